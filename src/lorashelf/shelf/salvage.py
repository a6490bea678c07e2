"""What is left of a manifest that lacks pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..digest import is_digest
from ..errors import CorruptShelf
from .manifest import Manifest
from .pages import Pages, Reader
from .records import checked_slots, implied
from .settings import FORMAT
from .slot import NOTHING, Facts, Slot

T = TypeVar("T")
LOST = "a part of the record of what was merged is lost"


@dataclass(frozen=True)
class Salvage:
    """What is left of a manifest, and the pages that are lost."""

    manifest: Manifest
    lost: Sequence[str] = ()
    """The ids of lost pages of records."""
    facts: Mapping[str, Slot] = field(default_factory=dict)
    """The ids of lost pages of facts, each with a slot whose object they are of."""

    @property
    def left(self) -> Manifest:
        """The manifest without references to lost facts."""
        slots = [
            replace(slot, object=replace(slot.object, facts=NOTHING)) if slot.object.facts in self.facts else slot
            for slot in self.manifest.slots
        ]
        return replace(self.manifest, slots=tuple(slots))


def salvaged(data: bytes, where: str, reader: Reader) -> Salvage:
    """Read a manifest, or what is left of it if pages are lost.

    A slot is left if its record is; a task if its slot is, and its digest: on its own page, or among the sources of the
    slot. Raises as `Manifest.decode`, and ValueError, KeyError, TypeError, AttributeError, RecursionError for what no
    writer made.
    """
    document = json.loads(data)
    lost: list[str] = []
    rest = _rest(document, reader, lost) if document["format"] == FORMAT else data  # reads every page
    manifest = Manifest.decode(rest if lost else data, where, reader)
    named = {slot.object.facts: slot for slot in manifest.slots if isinstance(slot.object.facts, str)}
    facts = {identity: slot for identity, slot in named.items() if not _sound_facts(identity, slot, reader)}
    return Salvage(manifest, lost, facts)


def _rest(document: Mapping[str, Any], reader: Reader, lost: list[str]) -> bytes:
    """Return the manifest, in format 1, without what is on lost pages; append the ids of these pages to `lost`."""

    def page(identity: object, otherwise: T) -> T:
        if not is_digest(identity):
            raise ValueError(f"{identity!r} does not name a page")
        try:
            found = json.loads(reader(str(identity)))
        except CorruptShelf:
            lost.append(str(identity))
            return otherwise
        if type(found) is not type(otherwise):
            raise ValueError(f"page {identity} holds something else")
        return found

    given: dict[str, Any] = {}
    for identity in document["tasks"]:
        given |= page(identity, dict[str, Any]())
    records: list[dict[str, Any]] = []
    tasks: dict[str, Any] = {}
    for record in (each for identity in document["slots"] for each in page(identity, list[dict[str, Any]]())):
        before = len(lost)
        whole = Slot.whole(record, Pages(), lambda identity: json.dumps(page(identity, [])).encode())
        if len(lost) > before:
            whole |= {"average": None, "fixed": LOST}
        (slot,) = checked_slots([whole])
        known = implied([slot])
        served = {task: {**known.get(task, {}), **given.get(task, {})} for task in slot.members}
        served = {task: details for task, details in served.items() if "digest" in details}
        if served:
            records.append({**whole, "members": list(served)})
            tasks |= served
    return json.dumps({**document, "format": 1, "slots": records, "tasks": tasks}).encode()


def _sound_facts(identity: str, slot: Slot, reader: Reader) -> bool:
    """Return whether the page of a slot's facts is there; the facts of an unknown encoding are not judged."""
    try:
        found = json.loads(reader(identity))
        return not slot.readable or bool(Facts.read(found))
    except (CorruptShelf, ValueError, TypeError, AttributeError, RecursionError):
        return False
