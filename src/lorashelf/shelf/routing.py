"""Task → slot, and what the slots hold: the answers that other programs read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import atomic
from ..cache_folder import cache_folder
from ..errors import CorruptShelf, NewerFormat, UsageError
from ..formats.objects import object_digest
from ..formats.peft import encode, peft_files, size_alone, write_adapter
from .allocation import rate
from .slot import Slot
from .snapshot import Snapshot

MOST_KEPT = 16  # PEFT folders of coded slots in the cache


def route(snapshot: Snapshot, task: str, *, verify: bool = True) -> dict[str, Any]:
    """`{task, slot, path, members}`: the PEFT folder that serves the task, None if the slot is coded; its bytes checked
    unless `verify` is False.

    Raises UnknownName with the nearest names, CorruptShelf, NewerFormat.
    """
    slot, _ = snapshot.located(task)
    _ = slot.codec
    if verify:
        snapshot.check_bytes(slot)
    return _answer(snapshot, task, slot)


def materialised(snapshot: Snapshot, task: str, output: Path | None = None, *, verify: bool = True) -> dict[str, Any]:
    """`route`, with a PEFT folder also where PEFT cannot load the slot's own: written to `output`, else kept in the
    user's cache folder under the object's id, the latest MOST_KEPT of them, each checked before it is given out.

    Raises as `route`, UsageError if `output` exists, DiskError.
    """
    answer = route(snapshot, task, verify=verify)
    if output is not None:
        write_adapter(snapshot.adapter(task), output)
        return {**answer, "path": str(atomic.expanded(output).absolute())}
    if answer["path"] is not None:
        return answer
    slot, _ = snapshot.located(task)
    folder = cache_folder() / "routes"
    for kept in folder.glob(f"{slot.object.id}.*"):
        if object_digest(peft_files(kept)) == kept.suffix.removeprefix("."):
            os.utime(kept)
            return {**answer, "path": str(kept)}
        atomic.remove(kept)
    path = folder / f"{slot.object.id}.{encode(snapshot.adapter(task)).stored().identity}"
    with contextlib.suppress(UsageError):  # another process was faster
        write_adapter(snapshot.adapter(task), path)
    for old in sorted(folder.iterdir(), key=lambda each: -each.stat().st_mtime)[MOST_KEPT:]:
        atomic.remove(old)
    return {**answer, "path": str(path)}


def routes(snapshot: Snapshot, *, verify: bool = True) -> dict[str, dict[str, Any]]:
    """The whole map, task → `{task, slot, path, members}`; likewise. Raises CorruptShelf."""
    if verify:
        snapshot.check_bytes(*(slot for slot in snapshot.manifest.slots if slot.readable))
    return {task: _answer(snapshot, task, slot) for slot in snapshot.manifest.slots for task in slot.members}


def slot_documents(snapshot: Snapshot) -> list[Mapping[str, Any]]:
    """Every slot as in the manifest, with its absolute `path`, None where PEFT cannot load what lies there; a coded one
    also with `percent` and `predicted_quality` of `rate`.
    """
    return [
        {**slot.document(), "path": _path(snapshot, slot), **(rate(slot) if slot.object.encoding == "coded" else {})}
        for slot in snapshot.manifest.slots
    ]


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
