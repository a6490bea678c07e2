"""The state that an undo or a redo leads to, and the manifest that restores its content."""

from __future__ import annotations

from dataclasses import replace

from ..errors import NotReversible, UnknownName, UsageError
from ..version import VERSION
from .manifest import Manifest
from .snapshot import Snapshot


def restored(snapshot: Snapshot, operation: str, to: str | None, time: str) -> Manifest:
    """Return the manifest after an undo or a redo to the next state, or to a kept manifest by a prefix of its id.

    Raises NotReversible if no such state is kept, UnknownName, UsageError.
    """
    line = snapshot.timeline
    target = _next(snapshot, operation) if to is None else _find(snapshot, to)
    moved = line.moved(target, snapshot.keep)
    return replace(
        snapshot.kept[target],
        parent=snapshot.head,
        sequence=snapshot.manifest.sequence + 1,
        recipe=snapshot.settings.recipe,
        budget=snapshot.settings.budget.document(),
        cause={"operation": operation, "to": target, "time": time, "version": VERSION},
        state=target,
        undo=moved.undo,
        redo=moved.redo,
        ended=() if target in (*line.undo, *line.redo) else line.redo,
    )


def check_objects(snapshot: Snapshot, manifest: Manifest) -> None:
    """Raise NotReversible unless the objects of the manifest exist."""
    for slot in manifest.slots:
        if not all((snapshot.path / "objects" / name).exists() for name in slot.object.names):
            raise NotReversible(f"the object of slot {slot.id} is gone", where=str(snapshot.slot_path(slot)))


def _next(snapshot: Snapshot, operation: str) -> str:
    """Return the state that an undo or a redo without --to leads to. Raises NotReversible."""
    line = snapshot.timeline
    states = line.undo if operation == "undo" else line.redo
    if states:
        return states[0]
    where = str(snapshot.path)
    if operation == "redo":
        raise NotReversible("there is nothing to redo", where=where, cure="redo reverses an undo, until a change")
    if snapshot.manifest.sequence == 0:
        raise NotReversible("there is nothing to undo", where=where, cure="this shelf has not been changed yet")
    cure = f"undo reaches {snapshot.keep} state(s) back; lorashelf set SHELF --keep N keeps more from now on"
    raise NotReversible("no earlier state is kept", where=where, cure=cure)


def _find(snapshot: Snapshot, prefix: str) -> str:
    """Return the state of a kept manifest, by a prefix of the manifest's id. Raises UnknownName, UsageError."""
    if not prefix:
        raise UsageError("the id of a kept manifest is empty", cure="give its beginning: lorashelf log SHELF")
    every = {**snapshot.kept, snapshot.head: snapshot.manifest}
    found = [identity for identity in every if identity.startswith(prefix)]
    if len(found) > 1:
        raise UsageError(f"{prefix!r} begins several kept manifests", cure=f"give a longer prefix: {', '.join(found)}")
    if not found:
        raise UnknownName("kept manifest", prefix, list(every), where=str(snapshot.path))
    (identity,) = found
    own = every[identity].state
    state = own if own and own in snapshot.kept else identity
    if snapshot.timeline.state in (state, identity):
        raise UsageError(f"{identity} is the current state of the shelf", cure="choose another: lorashelf log SHELF")
    return state
