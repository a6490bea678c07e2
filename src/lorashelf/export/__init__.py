"""A shelf's objects as files of other runtimes: one file per format, one driver."""
