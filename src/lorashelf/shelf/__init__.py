"""The shelf on disk: settings, manifest, log, plans, commits, repair, routes."""
