"""log.jsonl: the history, one line per state that is not kept any more. No hash covers it. See docs/format.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import atomic
from ..digest import canonical_json, is_digest
from ..errors import CorruptShelf
from .manifest import Manifest

FILE = "log.jsonl"
_RECORDED = ("operation", "task", "decision", "slot", "to", "time", "version")
_OF_A_CLUSTERING = ("method", "seed", "merge", "parameters", "search")


class Log:
    """The log in a shelf's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def check(self) -> None:
        """Raise CorruptShelf unless lines can be appended."""
        atomic.no_links(self.path)
        if self.path.exists() and not self.path.is_file():
            raise CorruptShelf(
                f"{FILE} is not a file", where=str(self.path), cure=f"lorashelf repair {self.path.parent}"
            )

    def append(self, states: Iterable[tuple[str, Manifest]]) -> None:
        """Append a line for each (id, manifest) that has none yet. A line left incomplete by a crash is removed first:
        its manifest still exists. Raises CorruptShelf, DiskError.
        """
        atomic.no_links(self.path)
        whole, added = self._with(states)
        if added:
            atomic.append(self.path, added, keep=len(whole))

    def size(self, states: Iterable[tuple[str, Manifest]]) -> int:
        """Return the bytes of the log after these states are appended."""
        whole, added = self._with(states)
        if not added:
            return self.path.lstat().st_size if self.path.exists() else 0
        return len(whole) + len(added)

    def records(self) -> list[dict[str, Any]]:
        """Read the records, oldest first. Raises CorruptShelf for a line that is not a record, OSError."""
        if not self.path.exists():
            return []
        atomic.no_links(self.path)
        data = atomic.read_file(self.path)
        found = []
        for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            record = read_line(text)
            if record is None:
                cure = f"lorashelf repair {self.path.parent}"
                raise CorruptShelf(f"line {number} of {FILE} is not a log record", where=str(self.path), cure=cure)
            found.append(record)
        return found

    def problems(self, kept: Mapping[str, Manifest]) -> Iterator[str]:
        """Yield signs of deleted or altered lines: states 0 to the newest kept must be there, each once.

        Raises as `records`.
        """
        found = {record["id"]: record["sequence"] for record in self.records()}
        found |= {identity: manifest.sequence for identity, manifest in kept.items()}
        counts, head = Counter(found.values()), max(manifest.sequence for manifest in kept.values())
        lacking = next((number for number in range(head + 1) if number not in counts), None)
        if lacking is not None:
            yield f"{FILE}: the line of sequence {lacking} is missing"
        for number in sorted(number for number, count in counts.items() if count > 1 or not 0 <= number <= head):
            yield f"{FILE}: sequence {number} is out of range, or in the lines of several states"

    def _with(self, states: Iterable[tuple[str, Manifest]]) -> tuple[bytes, bytes]:
        """Return the complete lines, and lines for states without one; the file is read only if there are states."""
        states = list(states)
        data = atomic.read_file(self.path) if states and self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        return whole, b"".join(line(i, manifest) for i, manifest in states if b'"id":"%s"' % i.encode() not in whole)


def record(identity: str, manifest: Manifest) -> dict[str, Any]:
    """Return the log record of a manifest: id and cause without scores; for a clustering also how it was found."""
    names = _RECORDED + (_OF_A_CLUSTERING if manifest.cause.get("operation") == "cluster" else ())
    cause = {name: value for name, value in manifest.cause.items() if name in names}
    return {"id": identity, "sequence": manifest.sequence, **cause}


def read_line(text: bytes) -> dict[str, Any] | None:
    """Parse a line as a record; None if it is not one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(found, dict) and is_digest(found.get("id")) and type(found.get("sequence")) is int
    return found if sound else None


def line(identity: str, manifest: Manifest) -> bytes:
    """Return the log line of a manifest."""
    return canonical_json(record(identity, manifest)) + b"\n"
