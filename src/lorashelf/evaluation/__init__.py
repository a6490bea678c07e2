"""Losses and scores of adapters on tasks, compared and written to files."""
