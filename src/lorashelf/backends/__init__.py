"""Language models behind the protocol of backend.py; nothing here is imported before a model is asked for."""
