"""Task → slot, and what the slots hold: the answers that other programs read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ..errors import CorruptShelf, NewerFormat
from ..formats.peft import size_alone
from .manifest import Slot
from .snapshot import Snapshot


def route(snapshot: Snapshot, task: str, *, verify: bool = True) -> dict[str, Any]:
    """`{task, slot, path, members}`: the PEFT folder that serves the task, its bytes checked unless `verify` is False.

    Raises UnknownName with the nearest names, CorruptShelf.
    """
    slot, _ = snapshot.located(task)
    if verify:
        snapshot.check_bytes(slot)
    return _answer(snapshot, task, slot)


def routes(snapshot: Snapshot, *, verify: bool = True) -> dict[str, dict[str, Any]]:
    """The whole map, task → `{task, slot, path, members}`; likewise. Raises CorruptShelf."""
    if verify:
        snapshot.check_bytes(*(slot for slot in snapshot.manifest.slots if slot.readable))
    return {task: _answer(snapshot, task, slot) for slot in snapshot.manifest.slots for task in slot.members}


def slot_documents(snapshot: Snapshot) -> list[Mapping[str, Any]]:
    """Every slot as in the manifest, with its absolute `path`; None where PEFT cannot load what lies there."""
    return [{**slot.document(), "path": _path(snapshot, slot)} for slot in snapshot.manifest.slots]


def listing(snapshot: Snapshot) -> dict[str, Any]:
    """The document of `ls`: slots, tasks, bytes, budget, head; what the averaged adapters would take apart."""
    apart = _apart(snapshot)
    return {
        "slots": slot_documents(snapshot),
        "tasks": len(snapshot.manifest.tasks),
        "bytes": snapshot.bytes,
        "budget": snapshot.settings.budget.document(),
        "head": snapshot.head,
        "adapters": len(apart),
        "adapter_bytes": sum(apart.values()),
    }


def storage(snapshot: Snapshot) -> float | None:
    """Bytes of the head's slot objects over what the adapters averaged in would take apart; None if it is empty."""
    document = listing(snapshot)
    held = sum(slot["bytes"] for slot in document["slots"])
    return held / document["adapter_bytes"] if document["adapter_bytes"] else None


def _apart(snapshot: Snapshot) -> dict[str, int]:
    """Digest → bytes of every adapter averaged in, were it stored alone in the dtype of its slot: its values, and
    beside them as much as its slot's files hold.
    """
    apart: dict[str, int] = {}
    for slot in snapshot.manifest.slots:
        like = None
        with contextlib.suppress(CorruptShelf, NewerFormat):  # listed all the same
            like = snapshot.stored(slot)
        for source in slot.history.merged:
            apart.setdefault(source.digest, size_alone(source.parameters, slot.object.dtype, like))
    return apart


def _answer(snapshot: Snapshot, task: str, slot: Slot) -> dict[str, Any]:
    return {"task": task, "slot": slot.id, "path": _path(snapshot, slot), "members": list(slot.members)}


def _path(snapshot: Snapshot, slot: Slot) -> str | None:
    return str(snapshot.slot_path(slot)) if slot.readable and slot.codec.loadable else None
