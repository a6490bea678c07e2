"""The encoding `coded`: adapters in few bytes, as levels that refine one another; docs/coded.md is normative."""
