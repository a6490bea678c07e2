"""Pictures for people (extra `report`)."""
