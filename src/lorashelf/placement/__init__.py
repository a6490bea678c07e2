"""Where adapters go: online policies, offline partitions, the search by loss."""
