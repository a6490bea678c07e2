"""The user's cache folder, for files that can be recomputed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from . import atomic


def cache_folder() -> Path:
    """Return $LORASHELF_CACHE, else lorashelf's folder in the user's cache (Linux: $XDG_CACHE_HOME or ~/.cache).

    The folder may not exist yet.
    """
    if own := os.environ.get("LORASHELF_CACHE"):
        return Path(own)
    from platformdirs import user_cache_path

    return user_cache_path("lorashelf", appauthor=False)


def keep_latest(folder: Path, most: int) -> None:
    """Delete all but the most recently used entries of a folder of the cache; others' unfinished ones stay."""
    used = []
    for path in folder.iterdir():
        if not path.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):  # another process deletes as well
                used.append((-path.stat().st_mtime, path))
    for _, old in sorted(used)[most:]:
        atomic.remove(old)
