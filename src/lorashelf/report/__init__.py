"""Pictures and reports for people (extra `report`)."""
