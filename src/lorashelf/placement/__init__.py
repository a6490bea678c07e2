"""Where adapters go: online policies, offline partitions, the search by loss."""

from . import d2c, partitioners

__all__ = ["d2c", "partitioners"]
