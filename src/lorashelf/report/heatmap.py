"""The heat map of a similarity matrix, as a file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..atomic import replace_file
from ..errors import MissingExtra, UsageError
from ..lora.arrays import Square
from .formats import UNDATED

FORMATS = tuple(UNDATED)
NEEDED = {"matplotlib": "matplotlib", "scipy": "SciPy", "sklearn": "scikit-learn"}
LONGEST = 32  # characters of a label
JOINERS = "\u200c\u200d"  # not printable on their own, but part of Persian and Hindi spelling


def format_of(path: Path, figure: str = "heat map", needed: Mapping[str, str] = NEEDED) -> str:
    """Return the format of a figure's file by its extension.

    Raises UsageError if no figure can be written there, MissingExtra (`report`) for `needed` modules.
    """
    ending = path.suffix.lstrip(".").lower()
    if ending not in FORMATS:
        written = f"a {path.suffix} file" if path.suffix else "a file without an extension"
        raise UsageError(f"cannot draw {written}", where=str(path), cure=f"end its name in .{', .'.join(FORMATS)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = f"the {figure}'s path is a folder" if path.is_dir() else f"the {figure}'s folder does not exist"
        raise UsageError(what, where=str(path), cure="choose another path, or create the folder first")
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise MissingExtra(f"a {figure}", " and ".join(missing), "report")
    return ending


def draw_heatmap(names: Sequence[str], matrix: Square, metric: str, path: Path) -> list[str]:
    """Draw an (n, n) similarity matrix with similar adapters side by side, as a png, svg or pdf file.

    Returns the characters of the names that no installed font has: the file shows boxes instead. Raises
    UsageError for another extension, MissingExtra (`report`), DiskError.
    """
    ending = format_of(path)
    with _quiet():
        from .figure import draw

        drawn, missing = draw([label(name) for name in names], matrix, metric, ending)
    replace_file(path, drawn, path.parent)
    return missing


def label(name: str) -> str:
    """Return a name as one short line: a long one without its middle, unprintable characters replaced.

    >>> label("adapter-of-" + 40 * "x" + "-v2")
    'adapter-of-xxxxx…xxxxxxxxxxxx-v2'
    """
    line = "".join(c if c.isprintable() or c in JOINERS else " " if c.isspace() else "\ufffd" for c in name)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]}…{line[1 - LONGEST // 2 :]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence matplotlib's notices about missing glyphs and its cache in the block."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing")
            yield
    finally:
        log.setLevel(level)
