"""A shelf as people look at it: its tasks, its bytes, how similar its objects are, its history. Plain values only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import MissingExtra, numbered
from ..lora.quality import quality
from ..lora.similarity import similarity
from ..shelf.allocation import rate
from ..shelf.routing import listing
from ..shelf.slot import Slot
from ..shelf.snapshot import Snapshot
from .heatmap import label

LEVELS = 12  # shades of one sign in the similarity map
NUMBERED = 12  # up to this many objects, cells show their values
NAMED = 60  # up to this many, rows and columns have labels


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """An object of the shelf and the tasks that it serves."""

    slot: int
    tasks: tuple[str, ...]
    merged: int
    """The number of adapters averaged in it."""
    bytes: int
    percent: float
    """Of its adapters in 16 bits."""
    quality: float | None
    """The predicted share of an adapter's gain in loss that is kept; None if several adapters are averaged."""
    encoding: str
    rank: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the bytes under a shelf."""

    kind: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """What the files of a shelf take, and what they are compared with."""

    total: int
    budget: int | None
    apart: int
    """The bytes of the averaged adapters if each were stored alone in the dtype of its slot."""
    parts: tuple[Part, ...]

    @property
    def scale(self) -> int:
        """The bytes that the full bar of the parts stands for: the budget, if there is one."""
        return max(self.total, self.budget or 0, 1)


@dataclass(frozen=True, slots=True)
class Event:
    """An operation on a shelf."""

    sequence: int
    time: str
    operation: str
    what: str
    """The operation in a few words."""
    state: str
    """now, undo or redo: the current state and those that undo and redo reach; else empty."""


@dataclass(frozen=True, slots=True)
class Overview:
    """All of a shelf that a report or a page shows, except its similarity map."""

    name: str
    head: str
    base: str
    policy: str
    slots: int | None
    """The most objects; None if bytes alone are limited."""
    objects: tuple[ObjectRow, ...]
    bytes: Bytes
    events: tuple[Event, ...]
    """The latest first."""
    undo: Event | None
    """What undo would take back."""
    redo: Event | None
    """What redo would bring back."""

    @property
    def filled(self) -> str:
        """How many of the slots are filled, or how many objects there are, in words."""
        count = len(self.objects)
        return numbered(count, "object") if self.slots is None else f"{count} of {numbered(self.slots, 'slot')}"

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return sum(len(row.tasks) for row in self.objects)

    @property
    def least(self) -> ObjectRow | None:
        """The object of the least predicted quality; None if none is predicted."""
        known = [row for row in self.objects if row.quality is not None]
        return min(known, key=lambda row: row.quality or 0.0, default=None)

    @property
    def mean_quality(self) -> float | None:
        """The mean predicted quality of the tasks for which there is one."""
        known = [row.quality for row in self.objects if row.quality is not None for _ in row.tasks]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class SimilarityMap:
    """Pairwise cosines of a shelf's objects, with similar ones side by side."""

    slots: tuple[int, ...]
    labels: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    borders: tuple[int, ...]
    """The positions where a new cluster begins."""

    @property
    def most(self) -> float:
        """The largest absolute cosine of two objects."""
        return max(map(abs, self._pairs()), default=0.0)

    @property
    def least(self) -> float:
        """The lowest cosine of two objects."""
        return min(self._pairs(), default=0.0)

    def _pairs(self) -> Iterable[float]:
        return (x for i, row in enumerate(self.matrix) for j, x in enumerate(row) if i != j)

    def shades(self) -> Iterable[tuple[str, str]]:
        """Yield (class, path): for every shade its cells as an SVG path in units of a cell; equal neighbours in a row
        are one rectangle.
        """
        scale = self.most or 1.0
        paths: dict[str, list[str]] = {}
        for y, row in enumerate(self.matrix):
            shades = ["self" if x == y else _shade(value / scale) for x, value in enumerate(row)]
            x = 0
            for shade, run in groupby(shades):
                width = len(list(run))
                if shade:
                    paths.setdefault(shade, []).append(f"M{x} {y}h{width}v1h-{width}z")
                x += width
        for shade in sorted(paths):
            yield shade, "".join(paths[shade])

    def nearest(self) -> Iterable[tuple[int, int, float]]:
        """Yield the place of every object, that of the one most similar to it, and their cosine."""
        for i, row in enumerate(self.matrix):
            others = [(value, -j) for j, value in enumerate(row) if j != i]
            if others:
                value, j = max(others)
                yield i, -j, value

    def strong(self, value: float) -> bool:
        """Return whether the shade of a value is so strong that text on it is in the colour of the ground."""
        return abs(value) > 0.6 * (self.most or 1.0)


def overview(snapshot: Snapshot, log: Sequence[Mapping[str, Any]]) -> Overview:
    """Return the overview of a shelf; `log` is `Shelf.log()`."""
    manifest, settings = snapshot.manifest, snapshot.settings
    line = snapshot.timeline
    states = dict.fromkeys(line.undo, "undo") | dict.fromkeys(line.redo, "redo") | {line.state: "now"}
    numbers = {record["id"]: record["sequence"] for record in log}
    events = [_event(record, states, numbers) for record in log]
    named = {record["id"]: event for record, event in zip(log, events, strict=True)}
    return Overview(
        name=snapshot.path.absolute().name,
        head=snapshot.head,
        base=(manifest.base.name if manifest.base else "") or settings.base or "",
        policy=settings.placement.policy,
        slots=settings.budget.slots,
        objects=tuple(_row(slot) for slot in manifest.slots),
        bytes=_bytes(snapshot),
        events=tuple(reversed(events)),
        undo=named.get(line.state) if line.undo else None,
        redo=named.get(line.redo[0]) if line.redo else None,
    )


def similarity_map(snapshot: Snapshot) -> SimilarityMap:
    """Return the cosines of a shelf's objects (of those that this version can read), in the order of the heat map.

    Raises MissingExtra (`report`), CorruptShelf.
    """
    slots = [slot for slot in snapshot.manifest.slots if slot.readable]
    if len(slots) < 2:
        return SimilarityMap(tuple(s.id for s in slots), tuple(map(_label, slots)), ((1.0,),) * len(slots), ())
    try:
        from .arrangement import arranged
    except ImportError as error:
        raise MissingExtra("a similarity map", "SciPy and scikit-learn", "report") from error
    matrix = similarity([snapshot.stored(slot) for slot in slots])
    order, borders = arranged(matrix)
    shown = matrix[np.ix_(order, order)]
    return SimilarityMap(
        tuple(slots[i].id for i in order),
        tuple(_label(slots[i]) for i in order),
        tuple(tuple(float(x) for x in row) for row in shown),
        tuple(borders),
    )


def _shade(value: float) -> str:
    """Return the class of a value between −1 and 1; empty for nearly 0."""
    level = round(abs(value) * LEVELS)
    return f"{'more' if value > 0 else 'less'}-{level}" if level else ""


def _label(slot: Slot) -> str:
    first, more = label(slot.members[0]) if slot.members else "no task", len(slot.members) - 1
    return f"{first} +{more}" if more > 0 else first


def _row(slot: Slot) -> ObjectRow:
    several = len(slot.history.merged) != 1
    return ObjectRow(
        slot=slot.id,
        tasks=slot.members,
        merged=len(slot.history.merged),
        bytes=slot.object.bytes,
        percent=rate(slot)["percent"],
        quality=None if several else quality(1.0 - slot.history.error**2),
        encoding=slot.object.encoding,
        rank=slot.object.rank,
    )


def _bytes(snapshot: Snapshot) -> Bytes:
    document = listing(snapshot)
    used = {name for slot in snapshot.manifest.slots for name in slot.object.names}
    objects = {path: size for path, size in snapshot.files.items() if path.parts[0] == "objects"}
    serving = sum(size for path, size in objects.items() if path.parts[1] in used)
    kept = sum(objects.values()) - serving
    parts = (
        Part("serving", "serves the tasks", serving),
        Part("kept", "kept for undo and redo", kept),
        Part("records", "manifests, log and settings", snapshot.bytes - serving - kept),
    )
    return Bytes(snapshot.bytes, document["budget"]["bytes"], document["adapter_bytes"], parts)


def _event(record: Mapping[str, Any], states: Mapping[str, str], numbers: Mapping[str, int]) -> Event:
    time, operation = str(record.get("time", "")), str(record["operation"])
    return Event(record["sequence"], time, operation, _words(record, numbers), states.get(record["id"], ""))


def _words(record: Mapping[str, Any], numbers: Mapping[str, int]) -> str:
    """Return what an operation did, in a few words."""
    task, slot, to = record.get("task"), record.get("slot"), record.get("to")
    if "method" in record:
        return f"by {record['method']}"
    if to is not None:
        return f"to #{numbers[to]}" if to in numbers else "to an earlier state"
    if task is None:
        return ""
    place = {"open": "in a new slot", "fold": "folded into slot"}.get(str(record.get("decision")), "in slot")
    return f"{task}, {place} {slot}" if place != "in a new slot" else f"{task}, {place}, {slot}"
