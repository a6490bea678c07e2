"""The shelves that other programs' plugins serve: paths in the environment variable LORASHELF_SHELVES."""

from __future__ import annotations

import os
from pathlib import Path

from ..atomic import expanded

SHELVES = "LORASHELF_SHELVES"


def shelves() -> list[Path]:
    """Return the paths in LORASHELF_SHELVES, separated as in PATH, in their order."""
    return [expanded(path) for path in os.environ.get(SHELVES, "").split(os.pathsep) if path]
