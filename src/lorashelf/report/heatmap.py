"""The heat map of a similarity matrix, as a file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..atomic import replace_file
from ..lora.arrays import Square
from .formats import MATPLOTLIB, format_of

NEEDED = {**MATPLOTLIB, "scipy": "SciPy", "sklearn": "scikit-learn"}
LONGEST = 32  # characters of a label
JOINERS = "\u200c\u200d"  # not printable on their own, but part of Persian and Hindi spelling


def heatmap_format(path: Path) -> str:
    """Return the format of a heat map's file. Raises as `format_of`."""
    return format_of(path, "heat map", NEEDED)


def draw_heatmap(
    names: Sequence[str], matrix: Square, metric: str, path: Path, *, arrange: bool = True, dark: bool = False
) -> list[str]:
    """Draw an (n, n) similarity matrix with similar adapters side by side, or in the given order unless `arrange`, as a
    png, svg or pdf file.

    Returns the characters of the names that no installed font has: the file shows boxes instead. Raises
    UsageError for another extension, MissingExtra (`report`), DiskError.
    """
    ending = heatmap_format(path)
    with _quiet():
        from .figure import draw

        drawn, missing = draw([label(name) for name in names], matrix, metric, ending, arrange=arrange, dark=dark)
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
