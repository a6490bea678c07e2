"""The user's cache folder: what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LORASHELF_CACHE, else lorashelf's folder in the user's cache folder; on Linux below $XDG_CACHE_HOME or ~/.cache.

    The folder may not be there yet.
    """
    if own := os.environ.get("LORASHELF_CACHE"):
        return Path(own)
    from platformdirs import user_cache_path

    return user_cache_path("lorashelf", appauthor=False)
