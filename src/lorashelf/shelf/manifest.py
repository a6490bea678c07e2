"""The content of a shelf at one moment: slots, tasks, recipe, cause; an immutable document, linked to its parent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

from ..digest import canonical_json, digest, is_digest
from ..errors import CorruptShelf, NewerFormat
from ..lora.adapter import BaseId
from .pages import Pages, Reader, divided
from .settings import FORMAT
from .slot import Facts, Slot, is_number, record_faults

PENDING_TIME = "0000-00-00T00:00:00Z"
Clock = Callable[[], datetime]
Details = Mapping[str, Any]
"""What is stored with a task: type, digest of its adapter, and the content of --task-file."""
K = TypeVar("K")
T = TypeVar("T")
_STATES = ("undo", "redo", "ended")
MOST_REMEMBERED = 4096  # manifests and pages, read or encoded in this process


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
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Task name → {type, digest of its adapter, and the content of --task-file}."""
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
        slots = [_slots_page(run, pages) for run in divided(self.slots, lambda slot: str(slot.id))]
        names = divided(sorted(self.tasks), lambda name: name)
        implied = _implied(
            (slot.members, [(source.task, source.type, source.digest) for source in slot.history.merged])
            for slot in self.slots
        )
        tasks = [_tasks_page({name: self.tasks[name] for name in run}, implied, pages) for run in names]
        return Files(FORMAT, canonical_json(self._document(slots, tasks)), pages)

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
        identity = digest([data])
        if identity not in _decoded:
            _remember(_decoded, identity, Manifest._decode(data, where, reader))
        return _decoded[identity]

    @staticmethod
    def _decode(data: bytes, where: str, reader: Reader) -> Manifest:
        try:
            document = json.loads(data)
            if document["format"] > FORMAT:
                raise NewerFormat(f"manifest of format {document['format']}", where=where, cure="upgrade lorashelf")
            slot_pages, task_pages = _resolve(document, reader) if document["format"] == FORMAT else ((), ())
            _check(document)
            base = document["base"]
            manifest = Manifest(
                parent=document["parent"],
                sequence=document["sequence"],
                recipe=document["recipe"],
                budget=document["budget"],
                cause=document["cause"],
                base=None if base is None else BaseId(base["name"], base["revision"]),
                slots=tuple(map(Slot.read, document["slots"])),
                tasks=document["tasks"],
                arrived=document["arrived"],
                scores=tuple(document["scores"]),
                state=document.get("state"),
                **{name: tuple(document.get(name, ())) for name in _STATES},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what, cure = f"manifest cannot be read: {error!r}", "lorashelf repair SHELF"
            raise CorruptShelf(what, where=where, cure=cure) from error
        pages = Pages()
        for found in (*slot_pages, *task_pages):
            pages.update(found.pages)
        manifest.__dict__["files"] = Files(document["format"], data, pages)
        _encoded_already(manifest, slot_pages, task_pages)
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


def salvaged(data: bytes, where: str, reader: Reader) -> tuple[Manifest, list[str]]:
    """Read what is left of a manifest with lost pages, and the ids of these pages.

    A task is left if its slot is, and either its own page or its adapter among the sources. Raises as `decode`.
    """
    lost: list[str] = []

    def page(identity: str, otherwise: T) -> T:
        try:
            return cast(T, json.loads(reader(identity)))
        except CorruptShelf:
            lost.append(identity)
            return otherwise

    document = json.loads(data)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return Manifest.decode(data, where), lost
    tasks: dict[str, Any] = {}
    for identity in document["tasks"]:
        tasks |= page(identity, dict[str, Any]())
    records: list[dict[str, Any]] = [each for i in document["slots"] for each in page(i, list[dict[str, Any]]())]
    document |= {"format": 1, "slots": [], "tasks": {}}
    for record in records:
        before, whole = len(lost), Slot.whole(record, Pages(), lambda i: canonical_json(page(i, [])))
        if len(lost) > before:
            whole |= {"average": None, "fixed": "a part of the record of what was merged is lost"}
        if "facts" in whole and not _sound_facts(page(whole["facts"], None)):
            lost.append(whole.pop("facts"))
        implied = _implied([_served(whole)])
        known = {task: {**implied.get(task, {}), **tasks.get(task, {})} for task in whole["members"]}
        whole["members"] = [task for task in whole["members"] if "digest" in known[task]]
        if whole["members"]:
            document["slots"].append(whole)
            document["tasks"] |= {task: known[task] for task in whole["members"]}
    return Manifest.decode(canonical_json(document), where), lost


def _sound_facts(document: Any) -> bool:
    try:
        return bool(Facts.read(document))
    except (ValueError, TypeError, AttributeError):
        return False


def _slots_page(run: Sequence[Slot], pages: Pages) -> str:
    """Add the page of these slots, and the pages that it refers to, to `pages`; return its id. Encodes once."""
    key = tuple(map(id, run))
    if key not in _encoded:
        own = Pages()
        _remember(_encoded, key, (run, own.add([slot.record(own) for slot in run]), own))
    _, identity, own = _encoded[key]  # the cache keeps `run`, so that `id` stays unique
    pages.update(own)
    return identity


Served = tuple[Sequence[str], Sequence[tuple[str, str, str]]]
"""The members of a slot, and its sources: task, type, digest."""


def _served(record: Mapping[str, Any]) -> Served:
    return record["members"], [(source["task"], source["type"], source["digest"]) for source in record["merged"]]


def _implied(slots: Iterable[Served]) -> dict[str, dict[str, str]]:
    """Return task → {type, digest} of the first source of this name in the slot that serves the task."""
    found: dict[str, dict[str, str]] = {}
    for members, sources in slots:
        served = set(members)
        for task, kind, identity in sources:
            if task in served:
                found.setdefault(task, {"type": kind, "digest": identity})
    return found


def _tasks_page(run: Mapping[str, Details], implied: Mapping[str, Details], pages: Pages) -> str:
    """Add the page of these tasks to `pages`; return its id. Encodes once."""
    without = [name for name, details in run.items() if name in implied and implied[name].items() <= details.items()]
    key = (*run, *map(id, run.values()), *without)
    if key not in _encoded:
        own = Pages()
        left = {name: implied[name] if name in without else {} for name in run}
        shown = {name: {k: v for k, v in run[name].items() if k not in left[name]} for name in run}
        _remember(_encoded, key, (run, own.add(shown), own))
    _, identity, own = _encoded[key]
    pages.update(own)
    return identity


class _Found(NamedTuple):
    """A page that was read: its id, its content, and the pages: itself and those it refers to."""

    id: str
    content: Any
    pages: Pages


def _resolve(document: dict[str, Any], reader: Reader) -> tuple[list[_Found], list[_Found]]:
    """Insert the records on pages into a manifest's document of format 2; return the pages of slots and of tasks."""

    def read(name: str) -> Iterator[_Found]:
        if not _are_digests(document[name]):
            raise ValueError(f"not what lorashelf writes: {name}")
        for identity in document[name]:
            pages = Pages()
            content = pages.read(identity, reader)
            if name == "slots":
                content = [Slot.whole(record, pages, reader) for record in content]
            yield _Found(identity, content, pages)

    slots, tasks = list(read("slots")), list(read("tasks"))
    document["slots"] = [record for page in slots for record in page.content]
    implied = _implied(map(_served, document["slots"]))
    given = {name: details for page in tasks for name, details in page.content.items()}
    document["tasks"] = {name: {**implied.get(name, {}), **details} for name, details in given.items()}
    return slots, tasks


def _encoded_already(manifest: Manifest, slots: Sequence[_Found], tasks: Sequence[_Found]) -> None:
    """Cache the pages of the slots and tasks of a manifest, so that they are not encoded again."""
    place = 0
    for page in slots:
        run = manifest.slots[place : place + len(page.content)]
        place += len(run)
        _remember(_encoded, tuple(map(id, run)), (run, page.id, page.pages))
    for page in tasks:
        named = {name: manifest.tasks[name] for name in sorted(page.content)}
        without = [name for name in named if "digest" not in page.content[name]]
        _remember(_encoded, (*named, *map(id, named.values()), *without), (named, page.id, page.pages))


def _remember(known: dict[K, T], key: K, value: T) -> None:
    """Cache a value; drop the oldest if there are too many."""
    if len(known) >= MOST_REMEMBERED:
        del known[next(iter(known))]
    known[key] = value


def _check(document: dict[str, Any]) -> None:
    if faults := list(_faults(document)):
        raise ValueError(f"not what lorashelf writes: {', '.join(faults)}")


def _faults(document: dict[str, Any]) -> Iterator[str]:
    """Yield the fields with values that no writer makes, whatever the digest."""
    kinds = {"sequence": int, "arrived": int, "slots": list, "scores": list}
    kinds |= dict.fromkeys(("recipe", "budget", "cause", "tasks"), dict)
    wrong = [name for name, kind in kinds.items() if type(document[name]) is not kind]
    yield from wrong
    base, parent = document["base"], document["parent"]
    if document["format"] not in (1, FORMAT):
        yield "format"
    if not (parent is None or is_digest(parent)):
        yield "parent"
    yield from (name for name in _STATES if not _are_digests(document.get(name, [])))
    if not (is_digest(document["state"]) if "state" in document else {"undo", "redo"}.isdisjoint(document)):
        yield "state"
    if not (base is None or (type(base["name"]) is str and isinstance(base["revision"], str | None))):
        yield "base"
    if not {"slots", "scores", "tasks"}.isdisjoint(wrong):
        return
    if not all(is_number(score) for score in document["scores"]):
        yield "scores"
    yield from (
        f"tasks: {n}" for n, v in document["tasks"].items() if type(v) is not dict or not is_digest(v["digest"])
    )
    for place, slot in enumerate(document["slots"]):
        yield from (f"slots[{place}]: {field}" for field in record_faults(slot))
    ids, routed = (
        [slot["slot"] for slot in document["slots"]],
        [t for slot in document["slots"] for t in slot["members"]],
    )
    if len(set(ids)) < len(ids):
        yield "slots: a number twice"
    if sorted(routed) != sorted(document["tasks"]):
        yield "members: not the tasks, each once"


def _are_digests(value: Any) -> bool:
    return type(value) is list and all(map(is_digest, value))


_decoded: dict[str, Manifest] = {}
_encoded: dict[tuple[object, ...], tuple[object, str, Pages]] = {}


def now() -> datetime:
    """Return the current time, UTC."""
    return datetime.now(timezone.utc)


def stamp(clock: Clock) -> str:
    """Return the time of a clock as in a manifest: UTC, in seconds, always of the same length."""
    time = clock().astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return time if len(time) == len(PENDING_TIME) else PENDING_TIME


def manifest_id(data: bytes) -> str:
    """Return the id of a manifest's bytes."""
    return digest([data])
