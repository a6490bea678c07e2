"""log.jsonl: a line for every state that is not kept any more. History only, under no hash; docs/format.md."""

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
_TOLD = ("operation", "task", "decision", "slot", "to", "time", "version")
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
        """A line for each (id, manifest) that has none yet. A line that a crash tore off is cut off: its manifest is
        still there. Raises CorruptShelf, DiskError.
        """
        atomic.no_links(self.path)
        whole, added = self._with(states)
        if added:
            atomic.append(self.path, added, keep=len(whole))

    def size(self, states: Iterable[tuple[str, Manifest]]) -> int:
        """Bytes, once these states were appended."""
        whole, added = self._with(states)
        if not added:
            return self.path.lstat().st_size if self.path.exists() else 0
        return len(whole) + len(added)

    def entries(self) -> list[dict[str, Any]]:
        """The lines as documents, oldest first. Raises CorruptShelf for a line that is not an entry, OSError."""
        if not self.path.exists():
            return []
        atomic.no_links(self.path)
        data = atomic.read_file(self.path)
        found = []
        for number, text in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
            told = read_line(text)
            if told is None:
                cure = f"lorashelf repair {self.path.parent}"
                raise CorruptShelf(f"line {number} of {FILE} is not a log entry", where=str(self.path), cure=cure)
            found.append(told)
        return found

    def problems(self, kept: Mapping[str, Manifest]) -> Iterator[str]:
        """What shows that lines were taken out or altered: states 0 to the newest kept must be there, each once.

        Raises as `entries`.
        """
        found = {told["id"]: told["sequence"] for told in self.entries()}
        found |= {identity: manifest.sequence for identity, manifest in kept.items()}
        counts, head = Counter(found.values()), max(manifest.sequence for manifest in kept.values())
        lacking = next((number for number in range(head + 1) if number not in counts), None)
        if lacking is not None:
            yield f"{FILE}: the line of sequence {lacking} is missing"
        for number in sorted(number for number, count in counts.items() if count > 1 or not 0 <= number <= head):
            yield f"{FILE}: sequence {number} cannot be, or stands in lines of several states"

    def _with(self, states: Iterable[tuple[str, Manifest]]) -> tuple[bytes, bytes]:
        """The whole lines, and the lines of those states that have none; the file is read only if there are states."""
        states = list(states)
        data = atomic.read_file(self.path) if states and self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        return whole, b"".join(line(i, manifest) for i, manifest in states if b'"id":"%s"' % i.encode() not in whole)


def entry(identity: str, manifest: Manifest) -> dict[str, Any]:
    """What the log keeps of a manifest: its id and its cause, without scores; of a clustering also how it was found."""
    told = _TOLD + (_OF_A_CLUSTERING if manifest.cause.get("operation") == "cluster" else ())
    cause = {name: value for name, value in manifest.cause.items() if name in told}
    return {"id": identity, "sequence": manifest.sequence, **cause}


def read_line(text: bytes) -> dict[str, Any] | None:
    """The entry that a line holds, None if it holds none."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(told, dict) and is_digest(told.get("id")) and type(told.get("sequence")) is int
    return told if sound else None


def line(identity: str, manifest: Manifest) -> bytes:
    """One line of the log."""
    return canonical_json(entry(identity, manifest)) + b"\n"
