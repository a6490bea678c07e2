"""A shelf's objects as files of other runtimes: one file a format, one driver."""
