"""The files that pictures are written to, and how matplotlib writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, UsageError

UNDATED: Mapping[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Extension → the metadata with which matplotlib writes the same bytes every time."""
FORMATS = tuple(UNDATED)
DARK = "#0d1117"
"""The background of GitHub's dark pages."""
MATPLOTLIB: Mapping[str, str] = {"matplotlib": "matplotlib"}


def format_of(path: Path, figure: str, needed: Mapping[str, str] = MATPLOTLIB) -> str:
    """Return the format of a figure's file by its extension.

    Raises UsageError if no figure can be written there, MissingExtra (`report`) for `needed` modules (module → name).
    """
    ending = path.suffix.lstrip(".").lower()
    if ending not in FORMATS:
        written = f"a {path.suffix} file" if path.suffix else "a file without an extension"
        raise UsageError(f"cannot draw {written}", where=str(path), cure=f"end its name in .{', .'.join(FORMATS)}")
    if os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        what = f"the {figure}'s path is a folder" if os.path.isdir(path) else f"the {figure}'s folder does not exist"
        raise UsageError(what, where=str(path), cure="choose another path, or create the folder first")
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise MissingExtra(f"a {figure}", " and ".join(missing), "report")
    return ending
