"""The report on a shelf as one file: HTML without anything to load, or Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import MissingExtra, UsageError
from ..shelf.snapshot import Snapshot
from ..version import VERSION
from .evaluations import evaluation_tables
from .overview import overview, similarity_map

ENDINGS = (".html", ".md")
_NEEDED: Mapping[str, str] = {"jinja2": "Jinja2", "scipy": "SciPy", "sklearn": "scikit-learn"}


def check_report(path: Path) -> None:
    """Check that a report can be written to a path, before anything is read.

    Raises UsageError for another ending, an existing path and a missing folder, MissingExtra (`report`).
    """
    if path.suffix.lower() not in ENDINGS:
        written = f"{path.suffix} files" if path.suffix else "files without an extension"
        raise UsageError(f"reports are not {written}", where=str(path), cure=f"end its name in {' or '.join(ENDINGS)}")
    atomic.check_output(path, "file")
    if not path.absolute().parent.is_dir():
        cure = "choose another path, or create the folder first"
        raise UsageError("the report's folder does not exist", where=str(path), cure=cure)
    if missing := [name for module, name in _NEEDED.items() if find_spec(module) is None]:
        raise MissingExtra("a report", " and ".join(missing), "report")


def write_report(
    snapshot: Snapshot, log: Sequence[Mapping[str, Any]], path: Path, evaluations: Sequence[Path] = ()
) -> None:
    """Write the report on a shelf; `log` is `Shelf.log()`, `evaluations` are files of `eval --json`.

    Raises as `check_report`, UsageError naming every file that is not an evaluation of this shelf, CorruptShelf,
    DiskError.
    """
    check_report(path)
    from .rendering import TEMPLATES, rendered

    tables = evaluation_tables(evaluations, snapshot)
    text = rendered(
        f"report{path.suffix.lower()}",
        shelf=overview(snapshot, log),
        similarity=similarity_map(snapshot),
        evaluations=tables,
        version=VERSION,
        style=atomic.read_file(TEMPLATES / "style.css").decode(),
    )
    atomic.replace_file(path, text.encode(), path.absolute().parent)
