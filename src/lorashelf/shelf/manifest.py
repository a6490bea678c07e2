"""What a shelf holds at one moment: slots, tasks, the recipe in force, the cause; an immutable, linked document."""

from __future__ import annotations

import json
import math
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from ..digest import canonical_json, digest, is_digest
from ..errors import CorruptShelf, NewerFormat
from ..formats.codec import Codec
from ..formats.codecs import CODECS
from ..formats.objects import Stored
from ..lora.adapter import WIDTHS, Adapter, BaseId
from ..lora.kernels import squared_norms
from ..merging.average import Average, History, Source
from ..names import on_one_line
from .settings import FORMAT

PENDING = "b2-" + "0" * 64  # an object that is planned but not written yet; of a digest's length, so sizes are exact
_PACKED = {"energies": "d", "noise": "d", "sums": "I"}  # keys of a slot that are stored in base64: float64, uint32
_KEYS = _PACKED.keys() | {"slot", "object", "rank", "dtype", "bytes", "merged", "members", "error", "average"}
_KEYS |= {"restored", "encoding", "worn", "fixed"}
PENDING_TIME = "0000-00-00T00:00:00Z"
Clock = Callable[[], datetime]
_STATES = ("undo", "redo", "ended")
MOST_DECODED = 16


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An adapter as bytes: where it lies (`id`), how it is written, and what is known of it without reading it."""

    id: str
    rank: int
    dtype: str
    bytes: int
    encoding: str = "peft"
    squared_norms: tuple[float, ...] = ()
    """‖ΔW‖² of every module, in the order of their paths; empty where its writer kept none."""
    sums: tuple[int, ...] = ()
    """CRC-32 of its config and header together, then of every tensor in the order of the file; empty where its writer
    kept none.
    """

    @staticmethod
    def pending(adapter: Adapter, encoding: str) -> StoredObject:
        """What an adapter will be once it is written."""
        encoded = CODECS[encoding].encode(adapter)
        return StoredObject(
            id=PENDING,
            rank=adapter.rank,
            dtype=adapter.dtype,
            bytes=encoded.size,
            encoding=encoding,
            squared_norms=tuple(squared_norms(adapter).values()),
            sums=(0,) * encoded.parts,
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A numbered place: the object that it holds, what that averages, and the tasks that are routed to it."""

    id: int
    object: StoredObject
    history: History
    members: tuple[str, ...]

    @staticmethod
    def planned(slot_id: int, average: Average, members: Sequence[str], encoding: str = "peft") -> Slot:
        """A slot whose object is not written yet."""
        return Slot(slot_id, StoredObject.pending(average.adapter, encoding), average.history, tuple(members))

    @property
    def readable(self) -> bool:
        """Whether this lorashelf knows the encoding of its object."""
        return self.object.encoding in CODECS

    @property
    def codec(self) -> Codec:
        """What reads and writes its object. Raises NewerFormat for an encoding that this lorashelf does not know."""
        if not self.readable:
            what = f"slot {self.id} has the encoding {self.object.encoding!r}, which this lorashelf does not know"
            raise NewerFormat(f"{what}; tasks: {', '.join(self.members)}", cure="upgrade lorashelf")
        return CODECS[self.object.encoding]

    def document(self) -> dict[str, Any]:
        """As in every JSON answer: without squared norms, noise and sums; `worn`, `fixed` only where there is any."""
        stored, history = self.object, self.history
        document = {
            "slot": self.id,
            "object": stored.id,
            "rank": stored.rank,
            "dtype": stored.dtype,
            "bytes": stored.bytes,
            "merged": [asdict(source) for source in history.merged],
            "members": list(self.members),
            "error": history.error,
            "average": history.method,
            "restored": history.restored,
            "encoding": stored.encoding,
        }
        rare = {"worn": history.extra_roundings, "fixed": history.fixed}
        return document | {key: value for key, value in rare.items() if value}

    def stored(self) -> dict[str, Any]:
        """As in a manifest."""
        arrays = {"energies": self.object.squared_norms, "noise": self.history.noise, "sums": self.object.sums}
        return self.document() | {key: _packed(values, _PACKED[key]) for key, values in arrays.items() if values}

    @staticmethod
    def read(document: Mapping[str, Any]) -> Slot:
        """The slot of an entry in a manifest. Raises KeyError, TypeError, ValueError."""
        if unknown := document.keys() - _KEYS:
            raise ValueError(f"not what lorashelf writes: {', '.join(sorted(unknown))}")
        arrays: dict[str, Any] = {key: _unpacked(document.get(key, ""), code) for key, code in _PACKED.items()}
        stored = {key: document[key] for key in ("rank", "dtype", "bytes", "encoding")}
        history = History(
            merged=tuple(Source(**source) for source in document["merged"]),
            error=document["error"],
            method=document["average"],
            restored=document["restored"],
            noise=arrays["noise"],
            extra_roundings=document.get("worn", 0),
            fixed=document.get("fixed"),
        )
        kept = StoredObject(document["object"], **stored, squared_norms=arrays["energies"], sums=arrays["sums"])
        return Slot(document["slot"], kept, history, tuple(document["members"]))


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole content of a shelf. Its id is the digest of its canonical JSON; `parent` links it to the one before."""

    parent: str | None
    sequence: int
    recipe: Mapping[str, Any]
    budget: Mapping[str, Any]
    cause: Mapping[str, Any]
    base: BaseId | None = None
    slots: tuple[Slot, ...] = ()
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Task name → {type, digest of its adapter, and what --task-file gave}."""
    arrived: int = 0
    """How many adapters ever arrived."""
    scores: tuple[float, ...] = ()
    """Scores of arrivals while a slot was free, for threshold = auto."""
    state: str | None = None
    """Of an undo or a redo: the manifest whose content this one has again. None: the content is this one's own."""
    undo: tuple[str, ...] = ()
    """With `state`: the states before it that can be reached, nearest first."""
    redo: tuple[str, ...] = ()
    """With `state`: the states after it that can be reached, nearest first."""
    ended: tuple[str, ...] = ()
    """The states that could be redone until this change."""

    def document(self) -> dict[str, Any]:
        """The JSON document that is stored."""
        return {
            "format": FORMAT,
            "parent": self.parent,
            "sequence": self.sequence,
            "base": None if self.base is None else {"name": self.base.name, "revision": self.base.revision},
            "recipe": dict(self.recipe),
            "budget": dict(self.budget),
            "slots": [slot.stored() for slot in self.slots],
            "tasks": {name: dict(value) for name, value in self.tasks.items()},
            "arrived": self.arrived,
            "scores": list(self.scores),
            "cause": dict(self.cause),
            **self._line(),
        }

    def _line(self) -> dict[str, Any]:
        """The optional keys about undo and redo, where there is something to say."""
        ended = {"ended": list(self.ended)} if self.ended else {}
        if self.state is None:
            return ended
        return {"state": self.state, "undo": list(self.undo), "redo": list(self.redo), **ended}

    def encode(self) -> bytes:
        """Canonical JSON, UTF-8, no newline."""
        return canonical_json(self.document())

    @staticmethod
    def decode(data: bytes, where: str) -> Manifest:
        """The manifest of these bytes; the latest ones are remembered. Raises CorruptShelf or NewerFormat."""
        identity = manifest_id(data)
        if identity not in _decoded:
            if len(_decoded) >= MOST_DECODED:
                del _decoded[next(iter(_decoded))]
            _decoded[identity] = Manifest._decode(data, where)
        return _decoded[identity]

    @staticmethod
    def _decode(data: bytes, where: str) -> Manifest:
        try:
            document = json.loads(data)
            if document["format"] > FORMAT:
                raise NewerFormat(f"manifest of format {document['format']}", where=where, cure="upgrade lorashelf")
            base = document["base"]
            _check(document)
            return Manifest(
                parent=document["parent"],
                sequence=document["sequence"],
                recipe=document["recipe"],
                budget=document["budget"],
                cause=document["cause"],
                base=None if base is None else BaseId(base["name"], base["revision"]),
                slots=tuple(Slot.read(item) for item in document["slots"]),
                tasks=document["tasks"],
                arrived=document["arrived"],
                scores=tuple(document["scores"]),
                state=document.get("state"),
                **{name: tuple(document.get(name, ())) for name in _STATES},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what, cure = f"manifest cannot be read: {error!r}", "lorashelf repair SHELF"
            raise CorruptShelf(what, where=where, cure=cure) from error

    def slot(self, slot_id: int) -> Slot:
        """The slot of this id. Raises KeyError."""
        for slot in self.slots:
            if slot.id == slot_id:
                return slot
        raise KeyError(slot_id)

    def slot_of(self, task: str) -> Slot | None:
        """Θ(t): the slot whose members hold the task."""
        return next((slot for slot in self.slots if task in slot.members), None)

    def with_slot(self, slot: Slot) -> tuple[Slot, ...]:
        """The slots with this one put in or replaced, by id."""
        rest = [other for other in self.slots if other.id != slot.id]
        return tuple(sorted([*rest, slot], key=lambda each: each.id))

    def without_slot(self, slot_id: int) -> tuple[Slot, ...]:
        """The slots but this one."""
        return tuple(slot for slot in self.slots if slot.id != slot_id)


def _check(document: dict[str, Any]) -> None:
    if faults := list(_faults(document)):
        raise ValueError(f"not what lorashelf writes: {', '.join(faults)}")


def _faults(document: dict[str, Any]) -> Iterator[str]:
    """The fields that a manifest, whatever its digest, could not have had from `Manifest.document`."""
    kinds = {"sequence": int, "arrived": int, "slots": list, "scores": list}
    kinds |= dict.fromkeys(("recipe", "budget", "cause", "tasks"), dict)
    wrong = [name for name, kind in kinds.items() if type(document[name]) is not kind]
    yield from wrong
    base, parent = document["base"], document["parent"]
    if document["format"] != FORMAT:
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
    if not all(_number(score) for score in document["scores"]):
        yield "scores"
    yield from (
        f"tasks: {n}" for n, v in document["tasks"].items() if type(v) is not dict or not is_digest(v["digest"])
    )
    for place, slot in enumerate(document["slots"]):
        yield from (f"slots[{place}]: {field}" for field in _slot_faults(slot))
    ids, routed = (
        [slot["slot"] for slot in document["slots"]],
        [t for slot in document["slots"] for t in slot["members"]],
    )
    if len(set(ids)) < len(ids):
        yield "slots: a number twice"
    if sorted(routed) != sorted(document["tasks"]):
        yield "members: not the tasks, each once"


def _slot_faults(slot: dict[str, Any]) -> Iterator[str]:
    sound = {
        "slot": type(slot["slot"]) is int and slot["slot"] >= 0,
        "object": is_digest(slot["object"]),
        "encoding": type(slot["encoding"]) is str and on_one_line(slot["encoding"]),
        "dtype": slot["dtype"] in WIDTHS,
        "rank": type(slot["rank"]) is int and slot["rank"] > 0,
        "bytes": type(slot["bytes"]) is int and slot["bytes"] > 0,
        "members": type(slot["members"]) is list and all(type(task) is str for task in slot["members"]),
        "merged": type(slot["merged"]) is list and all(map(_is_record, slot["merged"])),
        "error": _number(slot["error"]),
        "restored": _number(slot["restored"]) and slot["restored"] > 0,
        "average": slot["average"] is None or type(slot["average"]) is str,
        "worn": type(slot.get("worn", 0)) is int and slot.get("worn", 0) >= 0,
        "fixed": slot.get("fixed") is None or (type(slot["fixed"]) is str and on_one_line(slot["fixed"])),
    }
    yield from (field for field, holds in sound.items() if not holds)


def _is_record(entry: dict[str, Any]) -> bool:
    numbers = all(_number(entry[name]) for name in ("weight", "norm", "rank", "parameters"))
    return numbers and is_digest(entry["digest"]) and type(entry["task"]) is str


def _are_digests(value: Any) -> bool:
    return type(value) is list and all(map(is_digest, value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _packed(values: Sequence[float], code: str) -> str:
    """Numbers of a kind that `struct` names, little-endian, in base64."""
    return b2a_base64(struct.pack(f"<{len(values)}{code}", *values), newline=False).decode()


def _unpacked(text: str, code: str) -> tuple[Any, ...]:
    data = a2b_base64(text)
    count = len(data) // struct.calcsize(f"<{code}")
    values = struct.unpack_from(f"<{count}{code}", data)
    if _packed(values, code) != text or not all(0 <= value < math.inf for value in values):
        raise ValueError("energies, noise or sums are not what lorashelf writes")
    return values


_decoded: dict[str, Manifest] = {}


def now() -> datetime:
    """The present time, UTC."""
    return datetime.now(timezone.utc)


def stamp(clock: Clock) -> str:
    """The time of a clock as a manifest has it: UTC, in seconds, always of one length."""
    time = clock().astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return time if len(time) == len(PENDING_TIME) else PENDING_TIME


def manifest_id(data: bytes) -> str:
    """The id of a manifest's bytes."""
    return digest([data])


@dataclass(frozen=True, slots=True)
class Plan:
    """A commit that has not happened: the manifest to be (its new objects PENDING), and the adapters to write per slot.

    `report` is the document of the command that made it. A refused plan has the parent's content and commits
    nothing.
    """

    parent: str
    manifest: Manifest
    writes: Mapping[int, Adapter]
    report: Mapping[str, Any]
    refused: str | None = None
    shrinks: bool = False
    """Whether it may pass a budget that is exceeded already (remove)."""

    def sealed(self, written: Mapping[int, Stored], time: str) -> Manifest:
        """The manifest with the ids and sums of what was written, by slot, and the time filled in."""
        slots = tuple(
            replace(s, object=replace(s.object, id=written[s.id].identity, sums=written[s.id].sums))
            if s.id in written
            else s
            for s in self.manifest.slots
        )
        return replace(self.manifest, slots=slots, cause={**self.manifest.cause, "time": time})
