"""The content of a shelf at one moment: slots, tasks, recipe, cause; an immutable document, linked to its parent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

from ..digest import canonical_json, digest, is_digest
from ..errors import CorruptShelf, NewerFormat
from ..lora.adapter import BaseId
from .pages import Pages, Reader
from .records import Cache, Details, NotWritten, checked_slots, implied, read_slots, read_tasks, slot_pages, task_pages
from .settings import FORMAT
from .slot import Slot, is_number

PENDING_TIME = "0000-00-00T00:00:00Z"
Clock = Callable[[], datetime]
MOST_DECODED = 16  # manifests that stay in memory
_STATES = ("undo", "redo", "ended")


@dataclass(frozen=True, slots=True)
class Files:
    """A manifest as files: the root, and the pages that it refers to, each with its JSON or only its id."""

    format: int
    root: bytes
    pages: Pages = field(default_factory=Pages)

    @property
    def id(self) -> str:
        """The id of the manifest."""
        return digest([self.root])


def no_page(identity: str) -> bytes:
    """Raise ValueError: the reader of a manifest without pages."""
    raise ValueError(f"page {identity!r} is missing")


@dataclass(frozen=True)
class Manifest:
    """The whole content of a shelf. Its id is the digest of its canonical JSON; `parent` links to the previous one."""

    parent: str | None
    sequence: int
    recipe: Mapping[str, Any]
    budget: Mapping[str, Any]
    cause: Mapping[str, Any]
    base: BaseId | None = None
    slots: tuple[Slot, ...] = ()
    tasks: Mapping[str, Details] = field(default_factory=dict)
    arrived: int = 0
    """The number of adapters that ever arrived."""
    scores: tuple[float, ...] = ()
    """Scores of arrivals while a slot was free, for threshold = auto."""
    state: str | None = None
    """After an undo or a redo: the manifest whose content this one restores. None: the content is new."""
    undo: tuple[str, ...] = ()
    """With `state`: the reachable states before it, nearest first."""
    redo: tuple[str, ...] = ()
    """With `state`: the reachable states after it, nearest first."""
    ended: tuple[str, ...] = ()
    """The states that could be redone before this change."""

    @cached_property
    def files(self) -> Files:
        """The files that the manifest was read from, else its files in the current format."""
        pages = Pages()
        slots, tasks = list(slot_pages(self.slots)), list(task_pages(self.tasks, self.slots))
        for _, own in (*slots, *tasks):
            pages.update(own)
        root = canonical_json(self._document([identity for identity, _ in slots], [identity for identity, _ in tasks]))
        return Files(FORMAT, root, pages)

    def document(self) -> dict[str, Any]:
        """Return the whole content as a JSON document, as in answers."""
        slots = [slot.document() for slot in self.slots]
        return self._document(slots, {name: dict(value) for name, value in self.tasks.items()})

    def _document(self, slots: object, tasks: object) -> dict[str, Any]:
        ended = {"ended": list(self.ended)} if self.ended else {}
        line = {"state": self.state, "undo": list(self.undo), "redo": list(self.redo)} if self.state else {}
        return {
            "format": FORMAT,
            "parent": self.parent,
            "sequence": self.sequence,
            "base": None if self.base is None else {"name": self.base.name, "revision": self.base.revision},
            "recipe": dict(self.recipe),
            "budget": dict(self.budget),
            "slots": slots,
            "tasks": tasks,
            "arrived": self.arrived,
            "scores": list(self.scores),
            "cause": dict(self.cause),
            **line,
            **ended,
        }

    @staticmethod
    def decode(data: bytes, where: str, reader: Reader = no_page) -> Manifest:
        """Read a manifest from its bytes and the pages that they refer to; the latest manifests are cached.

        Raises CorruptShelf, NewerFormat, and what `reader` raises.
        """
        return _decoded.get(digest([data]), lambda: Manifest._decode(data, where, reader))

    @staticmethod
    def _decode(data: bytes, where: str, reader: Reader) -> Manifest:
        try:
            document = json.loads(data)
            if document["format"] > FORMAT:
                raise NewerFormat(f"manifest of format {document['format']}", where=where, cure="upgrade lorashelf")
            pages = Pages()
            slots, tasks = _content(document, reader, pages)
            base = document["base"]
            manifest = Manifest(
                parent=document["parent"],
                sequence=document["sequence"],
                recipe=document["recipe"],
                budget=document["budget"],
                cause=document["cause"],
                base=None if base is None else BaseId(base["name"], base["revision"]),
                slots=slots,
                tasks=tasks,
                arrived=document["arrived"],
                scores=tuple(document["scores"]),
                state=document.get("state"),
                **{name: tuple(document.get(name, ())) for name in _STATES},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what, cure = f"manifest cannot be read: {error!r}", "lorashelf repair SHELF"
            raise CorruptShelf(what, where=where, cure=cure) from error
        manifest.__dict__["files"] = Files(document["format"], data, pages)
        return manifest

    def slot(self, slot_id: int) -> Slot:
        """Return the slot of this id. Raises KeyError."""
        for slot in self.slots:
            if slot.id == slot_id:
                return slot
        raise KeyError(slot_id)

    def slot_of(self, task: str) -> Slot | None:
        """Return Θ(t), the slot whose members include the task; None for an unknown task."""
        return next((slot for slot in self.slots if task in slot.members), None)

    def with_slot(self, slot: Slot) -> tuple[Slot, ...]:
        """Return the slots with this one added or replaced, in order of id."""
        rest = [other for other in self.slots if other.id != slot.id]
        return tuple(sorted([*rest, slot], key=lambda each: each.id))

    def without_slot(self, slot_id: int) -> tuple[Slot, ...]:
        """Return the slots except the one of this id."""
        return tuple(slot for slot in self.slots if slot.id != slot_id)


def _content(document: dict[str, Any], reader: Reader, pages: Pages) -> tuple[tuple[Slot, ...], Mapping[str, Details]]:
    """Read the slots and tasks of a manifest, and put its pages into `pages`. Raises NotWritten naming every fault."""
    faults = list(_faults(document))
    if not {"slots", "tasks"}.isdisjoint(faults):
        raise NotWritten(faults)
    paged, slots = document["format"] == FORMAT, list[Slot]()
    for part in document["slots"] if paged else [document["slots"]]:
        try:
            found, own = read_slots(part, reader) if paged else (checked_slots(part), Pages())
        except NotWritten as error:
            faults += error.faults
            continue
        slots += found
        pages.update(own)
    if faults:
        raise NotWritten(faults)
    known, tasks = implied(slots), {} if paged else document["tasks"]
    for identity in document["tasks"] if paged else ():
        given, own = read_tasks(identity, reader, known)
        tasks.update(given)
        pages.update(own)
    if faults := list(_route_faults(slots, tasks)):
        raise NotWritten(faults)
    return tuple(slots), tasks


def _route_faults(slots: Sequence[Slot], tasks: Mapping[str, Details]) -> Iterator[str]:
    yield from (f"tasks: {n}" for n, v in tasks.items() if type(v) is not dict or not is_digest(v["digest"]))
    if len({slot.id for slot in slots}) < len(slots):
        yield "slots: a number twice"
    if sorted(task for slot in slots for task in slot.members) != sorted(tasks):
        yield "members: not the tasks, each once"


def _faults(document: dict[str, Any]) -> Iterator[str]:
    """Yield the fields of a root with values that no writer makes, whatever the digest."""
    kinds = {"sequence": int, "arrived": int, "slots": list, "scores": list}
    kinds |= dict.fromkeys(("recipe", "budget", "cause"), dict)
    kinds |= {"tasks": list if document["format"] == FORMAT else dict}
    wrong = [name for name, kind in kinds.items() if type(document[name]) is not kind]
    yield from wrong
    base, parent = document["base"], document["parent"]
    if document["format"] not in (1, FORMAT):
        yield "format"
    if document["format"] == FORMAT:
        yield from (name for name in ("slots", "tasks") if name not in wrong and not _are_digests(document[name]))
    if not (parent is None or is_digest(parent)):
        yield "parent"
    yield from (name for name in _STATES if not _are_digests(document.get(name, [])))
    if not (is_digest(document["state"]) if "state" in document else {"undo", "redo"}.isdisjoint(document)):
        yield "state"
    if not (base is None or (type(base["name"]) is str and isinstance(base["revision"], str | None))):
        yield "base"
    if "scores" not in wrong and not all(map(is_number, document["scores"])):
        yield "scores"


def _are_digests(value: Any) -> bool:
    return type(value) is list and all(map(is_digest, value))


_decoded: Cache[Manifest] = Cache(MOST_DECODED)


def now() -> datetime:
    """Return the current time, UTC."""
    return datetime.now(timezone.utc)


def stamp(clock: Clock) -> str:
    """Return the time of a clock as in a manifest: UTC, in seconds, always of the same length."""
    time = clock().astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return time if len(time) == len(PENDING_TIME) else PENDING_TIME
