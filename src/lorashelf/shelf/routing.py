"""Task → slot, and the content of slots: the answers that other programs read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .. import atomic
from ..cache_folder import cache_folder, keep_latest
from ..documents import ListedSlot, Listing, Route
from ..errors import CorruptShelf, NewerFormat, UsageError
from ..formats.peft import encode, is_whole, size_alone, write_adapter
from .allocation import rate
from .slot import Slot
from .snapshot import Snapshot

MOST_KEPT = 64
"""PEFT folders of coded slots in the cache."""


def route(snapshot: Snapshot, task: str, *, verify: bool = True) -> Route:
    """Return `{task, slot, path, members}`; `path` is the PEFT folder that serves the task, None if the slot is coded.
    Its bytes are checked unless `verify` is False.

    Raises UnknownName with the nearest names, CorruptShelf, NewerFormat.
    """
    slot, _ = snapshot.located(task)
    _ = slot.codec
    if verify:
        snapshot.check_bytes(slot)
    return _answer(snapshot, task, slot)


def materialised(snapshot: Snapshot, task: str, output: Path | None = None, *, verify: bool = True) -> Route:
    """Return `route` with a PEFT folder even if PEFT cannot load the slot's object: written to `output`, else to the
    user's cache folder under the object's id. The latest MOST_KEPT are kept, and checked before they are returned.

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
        with contextlib.suppress(FileNotFoundError):  # another process deletes old ones
            if is_whole(kept, kept.suffix.removeprefix(".")):
                os.utime(kept)
                return {**answer, "path": str(kept)}
        atomic.remove(kept)
    path = folder / f"{slot.object.id}.{encode(snapshot.adapter(task)).stored().identity}"
    with contextlib.suppress(UsageError):  # another process was faster
        write_adapter(snapshot.adapter(task), path)
    keep_latest(folder, MOST_KEPT)
    return {**answer, "path": str(path)}


def routes(snapshot: Snapshot, *, verify: bool = True) -> dict[str, Route]:
    """Return task → `{task, slot, path, members}` for every task, checked as in `route`. Raises CorruptShelf."""
    if verify:
        snapshot.check_bytes(*(slot for slot in snapshot.manifest.slots if slot.readable))
    return {task: _answer(snapshot, task, slot) for slot in snapshot.manifest.slots for task in slot.members}


def slot_documents(snapshot: Snapshot) -> list[ListedSlot]:
    """Return every slot as in the manifest, with its absolute `path`, None if PEFT cannot load the object; a coded slot
    also with `percent` and `predicted_quality` of `rate`.
    """
    found: list[ListedSlot] = []
    for slot in snapshot.manifest.slots:
        listed: ListedSlot = {**slot.document(), "path": _path(snapshot, slot)}
        if slot.object.encoding == "coded":
            coded = rate(slot)
            listed["percent"], listed["predicted_quality"] = coded["percent"], coded["predicted_quality"]
        found.append(listed)
    return found


def listing(snapshot: Snapshot) -> Listing:
    """Return the document of `ls`: slots, tasks, bytes, budget, head; bytes of the averaged adapters if separate."""
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
    """Return the bytes of the head's slot objects over those of the averaged adapters if separate; None if empty."""
    document = listing(snapshot)
    held = sum(slot["bytes"] for slot in document["slots"])
    return held / document["adapter_bytes"] if document["adapter_bytes"] else None


def _apart(snapshot: Snapshot) -> dict[str, int]:
    """Return digest → bytes of every averaged adapter, if stored alone in the dtype of its slot: its values, plus
    as much overhead as its slot's files have.
    """
    apart: dict[str, int] = {}
    for slot in snapshot.manifest.slots:
        like = None
        with contextlib.suppress(CorruptShelf, NewerFormat):  # listed nevertheless
            like = snapshot.glanced(slot)
        for source in slot.history.merged:
            apart.setdefault(source.digest, size_alone(source.parameters, slot.object.dtype, like))
    return apart


def _answer(snapshot: Snapshot, task: str, slot: Slot) -> Route:
    return {"task": task, "slot": slot.id, "path": _path(snapshot, slot), "members": list(slot.members)}


def _path(snapshot: Snapshot, slot: Slot) -> str | None:
    return str(snapshot.slot_path(slot)) if slot.readable and slot.codec.loadable else None
