"""The files that pictures are written to."""

from __future__ import annotations

from typing import Any

UNDATED: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Extension → the metadata with which matplotlib writes the same bytes every time."""
