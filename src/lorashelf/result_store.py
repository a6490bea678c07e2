"""Results measured so far, keyed by all that a result depends on; in a file or in memory.

    journal.jsonl   one line per result: {"digest", "result", "unit"}, canonical JSON, appended and fsynced
    lock            beside it, held by the evaluation that writes into this folder

`unit` is a JSON document of everything that the result depends on, `digest` that of [unit, result]. Other settings are
another unit and find nothing. A complete line that is altered or from another program is ignored with a warning, a
torn last line silently.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import atomic
from .digest import Json, canonical_json, digest
from .errors import UsageError
from .locks import sole

FILE = "journal.jsonl"
LOCK = "lock"
_logger = logging.getLogger("lorashelf")
_STAGED = re.compile(r"\.[0-9a-f]{16}")  # left by a killed atomic.replace_file


class ResultStore:
    """Results by unit. `kept` is their file, None for memory only; open a folder with `opened`.

    Files `beside` it are only read: the results of other processes.
    """

    def __init__(self, kept: Path | None = None, beside: Iterable[Path] = ()) -> None:
        self.kept = kept
        self.written = 0
        """The number of results put so far, without those read from files."""
        self._results: dict[bytes, Any] = {}
        self._size = 0
        for path in beside:
            self._read(path)
        if kept is not None:
            self._read(kept)

    @property
    def begun(self) -> bool:
        """Whether the file is not empty."""
        return self.kept is not None and self.kept.exists() and self.kept.stat().st_size > 0

    def get(self, unit: Mapping[str, Json], fits: Callable[[object], bool] = lambda _: True) -> Any:
        """Return the result of a unit, or None; a result that does not fit is dropped with a warning."""
        found = self._results.get(canonical_json(unit))
        if found is None or fits(found):
            return found
        where, named = self.kept or "the journal", canonical_json(unit).decode()
        _logger.warning("%s: a result has another form and will be measured again: %s", where, named)
        del self._results[canonical_json(unit)]
        return None

    def put(self, unit: Mapping[str, Json], result: Json) -> None:
        """Store the result of a unit, on disk before this returns. Raises DiskError."""
        line = _line(unit, result)
        if self.kept is not None:
            atomic.append(self.kept, line, self._size)
        self._size += len(line)
        self._results[canonical_json(unit)] = json.loads(line)["result"]
        self.written += 1

    def _read(self, path: Path) -> None:
        with atomic.refusals(path, "read"):
            data = atomic.read_file(path) if path.exists() else b""
        self._size = data.rfind(b"\n") + 1
        faulty = []
        for number, line in enumerate(data[: self._size].split(b"\n")[:-1], 1):
            record = _record(line)
            if record is None:
                faulty.append(number)
            else:
                self._results[canonical_json(record["unit"])] = record["result"]
        if faulty:
            shown = ", ".join(map(str, faulty[:5])) + (", …" if len(faulty) > 5 else "")
            _logger.warning("%s: ignored lines, damaged or from another program: %s", path, shown)


@contextlib.contextmanager
def opened(folder: Path | None) -> Iterator[ResultStore]:
    """Open and lock the journal of a folder, created if missing; None: a journal in memory.

    Raises UsageError if the folder holds something else or another evaluation writes there; DiskError.
    """
    if folder is None:
        yield ResultStore()
        return
    _make(folder)
    cure = "wait until it is done, or choose another folder"
    with sole(folder / LOCK, "another evaluation writes into this folder", folder, cure):
        for path in list(folder.rglob(".*")):
            if _STAGED.fullmatch(path.name):
                atomic.remove(path)
        if not (folder / FILE).exists():
            atomic.append(folder / FILE, b"", 0)
        yield ResultStore(folder / FILE)


def _make(folder: Path) -> None:
    """Create the folder of an evaluation, or check that of an earlier one."""
    if not folder.exists():
        atomic.make_parents(folder)
        atomic.make_folder(folder)
    with atomic.refusals(folder, "read"):
        held = {path.name for path in folder.iterdir()}
    if FILE not in held and held - {LOCK}:
        cure = "choose a new folder, or that of an earlier evaluation"
        raise UsageError("the output folder contains something else", where=str(folder), cure=cure)


def _line(unit: Mapping[str, Json], result: Json) -> bytes:
    record = {"digest": digest([canonical_json([unit, result])]), "unit": unit, "result": result}
    return canonical_json(record) + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None unless it is complete and from this program."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        record: dict[str, Any] = json.loads(line)
        if line + b"\n" == _line(record["unit"], record["result"]):
            return record
    return None
