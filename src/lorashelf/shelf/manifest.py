"""What a shelf holds at one moment: slots, tasks, the recipe in force, the cause; an immutable, linked document."""

from __future__ import annotations

import json
import math
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..digest import canonical_json, digest, is_digest
from ..errors import CorruptShelf, NewerFormat
from ..formats.objects import Stored
from ..lora.adapter import WIDTHS, Adapter, BaseId
from ..names import on_one_line
from .settings import FORMAT

PENDING = "b2-" + "0" * 64  # an object that is planned but not written yet; of a digest's length, so sizes are exact
_PACKED = {"energies": "d", "noise": "d", "sums": "I"}  # fields of a slot that are stored in base64: float64, uint32
PENDING_TIME = "0000-00-00T00:00:00Z"
_STATES = ("undo", "redo", "ended")


@dataclass(frozen=True, slots=True)
class Merged:
    """One adapter that a slot has averaged in, by the digest of its source."""

    task: str
    type: str
    digest: str
    weight: float
    rank: int
    parameters: int
    dtype: str
    norm: float


@dataclass(frozen=True, slots=True)
class Slot:
    """One stored adapter: the object it lies in, what was averaged into it, and the tasks routed to it."""

    slot: int
    object: str
    rank: int
    dtype: str
    bytes: int
    merged: tuple[Merged, ...]
    members: tuple[str, ...]
    error: float = 0.0
    """Relative error of what compression (`rank`) cut off, at the latest merge."""
    average: str | None = None
    """The merge method of which the content is the equal average of `merged`, as far as rounding; None if it is not."""
    restored: float = 1.0
    """The factor of norm restoration inside the object's scales; divided out before the next fold."""
    encoding: str = "peft"
    worn: int = 0
    """How many roundings the content has seen beyond those of folding `merged`; earlier writers kept it for `noise`."""
    energies: tuple[float, ...] = ()
    """‖ΔW‖² of every module of the object, in the order of their paths; empty where its writer kept none."""
    noise: tuple[float, ...] = ()
    """Energies of the errors that rounding has left on A and on B of every module, both multiplied by √|s|; empty where
    they are those of folding `merged` one by one in `dtype`.
    """
    sums: tuple[int, ...] = ()
    """CRC-32 of the config and header of the object, then of every tensor in the order of the file; empty where its
    writer kept none.
    """
    fixed: str | None = None
    """Why no adapter can be taken out of the content, in words; None where one can, or where nobody recorded it."""

    def document(self) -> dict[str, Any]:
        """As in every JSON answer: without energies, noise and sums, and `worn` and `fixed` only where there is any."""
        document = asdict(self) | {"merged": [asdict(entry) for entry in self.merged], "members": list(self.members)}
        hidden = _PACKED.keys() | {key for key in ("worn", "fixed") if not document[key]}
        return {key: value for key, value in document.items() if key not in hidden}

    def stored(self) -> dict[str, Any]:
        """As in a manifest."""
        packed = {key: _packed(values, code) for key, code in _PACKED.items() if (values := getattr(self, key))}
        return self.document() | packed

    @property
    def digests(self) -> frozenset[str]:
        """The digests averaged in."""
        return frozenset(entry.digest for entry in self.merged)


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
        """The manifest of these bytes. Raises CorruptShelf or NewerFormat."""
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
                slots=tuple(_slot(item) for item in document["slots"]),
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
            if slot.slot == slot_id:
                return slot
        raise KeyError(slot_id)

    def slot_of(self, task: str) -> Slot | None:
        """Θ(t): the slot whose members hold the task."""
        return next((slot for slot in self.slots if task in slot.members), None)

    def with_slot(self, slot: Slot) -> tuple[Slot, ...]:
        """The slots with this one put in or replaced, by id."""
        rest = [other for other in self.slots if other.slot != slot.slot]
        return tuple(sorted([*rest, slot], key=lambda each: each.slot))

    def without_slot(self, slot_id: int) -> tuple[Slot, ...]:
        """The slots but this one."""
        return tuple(slot for slot in self.slots if slot.slot != slot_id)


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
        "encoding": slot["encoding"] == "peft",
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


def _slot(document: dict[str, Any]) -> Slot:
    merged = tuple(Merged(**entry) for entry in document["merged"])
    unpacked: dict[str, Any] = {key: _unpacked(document.get(key, ""), code) for key, code in _PACKED.items()}
    return Slot(**{**document, "merged": merged, "members": tuple(document["members"]), **unpacked})


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


def manifest_id(data: bytes) -> str:
    """The id of a manifest's bytes."""
    return digest([data])


@dataclass(frozen=True, slots=True)
class Plan:
    """A commit that has not happened: the manifest to be (its new objects PENDING), and the adapters to write per slot.

    `report` is what the command that made it tells its caller. A refused plan has the parent's content and commits
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
            replace(s, object=written[s.slot].identity, sums=written[s.slot].sums) if s.slot in written else s
            for s in self.manifest.slots
        )
        return replace(self.manifest, slots=slots, cause={**self.manifest.cause, "time": time})
