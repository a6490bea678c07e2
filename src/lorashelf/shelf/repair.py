"""Repair of damaged slots from the given originals and from kept states; docs/format.md, "Repair".

A slot's content is rebuilt as it was made: its adapters are folded in order, from the first one or from a kept state
that holds some of them, or merged at once. If this gives the same bytes, nothing has changed. Otherwise the slot gets
the content that serves most of its tasks, and its other tasks are no longer routed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from ..errors import LorashelfError, NotReversible
from ..lora.adapter import Adapter
from ..merging.average import Average, Source, alone, block, fold
from ..merging.spec import WEIGHTINGS, MergeSpec
from ..version import VERSION
from .allocation import coarser
from .manifest import PENDING_TIME, Manifest
from .plan import Plan
from .plans import another
from .settings import recorded
from .shelf import Shelf
from .slot import Slot
from .snapshot import Snapshot

How = Literal["rewritten", "merged", "earlier", "none"]
Given = Mapping[str, Adapter]  # by digest


@dataclass(frozen=True)
class Mended:
    """What a damaged slot may hold after a repair: its own bytes again ("rewritten"), a merge of originals ("merged"),
    the slot of a kept state ("earlier"), or nothing ("none").
    """

    how: How
    tasks: tuple[str, ...] = ()
    """The slot's tasks that this content serves."""
    new: Average | None = None
    kept: Slot | None = None
    state: str | None = None
    """The kept state that it comes from, or into which the originals were folded."""
    given: tuple[str, ...] = ()
    """The tasks of the originals merged into it."""

    def document(self, slot: Slot) -> dict[str, Any]:
        """Return the entry of the JSON answer of `repair`."""
        return {
            "slot": slot.id,
            "object": slot.object.id,
            "how": self.how,
            "tasks": list(self.tasks),
            "unrouted": [task for task in slot.members if task not in self.tasks],
            "state": self.state,
            "given": list(self.given),
        }


def repair(shelf: Shelf, originals: Mapping[str, Adapter] | None = None) -> dict[str, Any]:
    """Repair a damaged shelf, with originals given by task.

    Return `{head, files, slots, states, unused}`: the repairs of files in sentences, what each damaged slot holds now,
    the states that are no longer kept, and the tasks of originals that are in no slot. Raises NotReversible for an
    adapter other than the task's own, CorruptShelf if no manifest is left, NewerFormat, DiskError.
    """
    files = shelf.mend()
    with shelf.writing():
        snapshot = shelf.snapshot()
        states = {snapshot.head: snapshot.manifest, **snapshot.kept}
        try:
            given, unused = _by_digest(states.values(), originals or {})
        except NotReversible as error:
            raise error.amended(done={"files": files}) from error.__cause__
        damaged = _damaged(snapshot, states.values())
        mended = {identity: _mended(snapshot, slot, damaged, given) for identity, slot in damaged.items()}
        shelf.rewrite(
            (m.new.adapter, damaged[identity].codec) for identity, m in mended.items() if m.how == "rewritten" and m.new
        )
        lost = {identity for identity, m in mended.items() if m.how != "rewritten"}
        unsound = [i for i, manifest in states.items() if any(slot.object.id in lost for slot in manifest.slots)]
        if snapshot.head in unsound:
            shelf.commit(_plan(snapshot, mended, unsound))
        shelf.forget([i for i in unsound if i in shelf.snapshot().kept])
        return {
            "head": shelf.snapshot().head,
            "files": files,
            "slots": [mended[s.object.id].document(s) for s in snapshot.manifest.slots if s.object.id in damaged],
            "states": unsound,
            "unused": unused,
        }


def _by_digest(manifests: Collection[Manifest], originals: Mapping[str, Adapter]) -> tuple[Given, list[str]]:
    """Return the originals by digest, and the tasks of those that are in no slot. Raises NotReversible for an adapter
    other than the one recorded for its task.
    """
    merged = {m.digest for manifest in manifests for slot in manifest.slots for m in slot.history.merged}
    recorded_for = {(task, str(x["digest"])) for manifest in manifests for task, x in manifest.tasks.items()}
    unused = [task for task, adapter in originals.items() if adapter.digest not in merged]
    for task in unused:
        if known := [digest for name, digest in recorded_for if name == task]:
            raise another(task, originals[task], known[0])
    return {adapter.digest: adapter for task, adapter in originals.items() if task not in unused}, unused


def _damaged(snapshot: Snapshot, manifests: Collection[Manifest]) -> dict[str, Slot]:
    """Return the damaged objects, each with a slot that holds it, the head's first."""
    seen: set[str] = set()
    found: dict[str, Slot] = {}
    for manifest in manifests:
        for slot in manifest.slots:
            if slot.object.id not in seen:
                seen.add(slot.object.id)
                if slot.readable and snapshot.problems(slot):
                    found[slot.object.id] = slot
    return found


def _mended(snapshot: Snapshot, slot: Slot, damaged: Mapping[str, Slot], given: Given) -> Mended:
    """Return the best repair of a slot: its own bytes, else the content that serves most of its tasks."""
    options = [Mended("none")]
    for made in _options(snapshot, slot, damaged, given):
        own, option = _own(slot, made)
        if own:
            return replace(option, how="rewritten", tasks=slot.members)
        options.append(_serving(snapshot.manifest, slot, option))
    return max(options, key=lambda option: len(option.tasks))  # of equals, the first


def _own(slot: Slot, option: Mended) -> tuple[bool, Mended]:
    """Cut the option's merge to the most levels that take no more bytes than the slot did, at least to one. Return
    whether the cut has the slot's own bytes, and the option with the cut.
    """
    average, codec = option.new, slot.codec
    if average is None:
        return False, option
    parts = [coarser(average, codec, n) for n in range(1, len(codec.rates(average.adapter)) + 1)] or [average]
    fits = [part for part in parts if codec.encode(part.adapter).size <= slot.object.bytes] or parts[:1]
    own = codec.encode(fits[-1].adapter).stored().identity == slot.object.id
    return own, replace(option, new=fits[-1])


def _serving(manifest: Manifest, slot: Slot, option: Mended) -> Mended:
    """Return the option with the slot's tasks whose adapters are in its content."""
    held = option.new.history.merged if option.new else option.kept.history.merged if option.kept else ()
    digests = {m.digest for m in held}
    tasks = tuple(t for t in slot.members if t in manifest.tasks and manifest.tasks[t]["digest"] in digests)
    return replace(option, tasks=tasks)


def _options(snapshot: Snapshot, slot: Slot, damaged: Mapping[str, Slot], given: Given) -> Iterator[Mended]:
    """Yield the possible repairs from originals and kept states, the most faithful first."""
    kept = [
        (state, other)
        for state, manifest in snapshot.kept.items()
        for other in manifest.slots
        if other.object.id not in damaged and not other.history.digests.isdisjoint(slot.history.digests)
    ]
    starts: list[tuple[str | None, Average | None]] = [(None, None)]
    for state, other in kept:
        if other.history.merged and [m.digest for m in other.history.merged] == [
            m.digest for m in slot.history.merged[: len(other.history.merged)]
        ]:
            starts.append((state, snapshot.average(other)))
    specs, sets = _specs(snapshot, slot), list(_with_bases(snapshot, damaged, given))
    merged = [
        made
        for spec in specs
        for originals in sets
        for made in _from_originals(slot.history.merged, starts, originals, spec)
    ]
    complete = [
        option for option in merged if option.new and len(option.new.history.merged) == len(slot.history.merged)
    ]
    yield from complete
    yield from (Mended("earlier", kept=other, state=state) for state, other in kept)
    yield from (option for option in merged if option not in complete)


def _with_bases(snapshot: Snapshot, damaged: Mapping[str, Slot], given: Given) -> Iterator[Given]:
    """Yield the originals; then, if some name no base, with the base of the others, as a clustering stores them."""
    yield given
    if all(x.base.name for x in given.values()):
        return
    sound = (s for s in snapshot.manifest.slots if s.readable and s.object.id not in damaged)
    bases = chain((x.base for x in given.values()), (snapshot.glanced(slot).base for slot in sound))
    base = next((base for base in bases if base.name), None)
    if base is not None:
        yield {digest: x if x.base.name else replace(x, base=base) for digest, x in given.items()}


def _specs(snapshot: Snapshot, slot: Slot) -> list[MergeSpec]:
    """Return how a slot may have been merged: as in an add, by the slot's own method, or as in a clustering."""
    found: list[MergeSpec] = []
    for manifest in (snapshot.manifest, *snapshot.kept.values()):
        with contextlib.suppress(LorashelfError, TypeError):
            spec = replace(recorded(manifest.recipe, manifest.budget).merge, encoding=slot.object.encoding)
            own = (
                replace(spec, method=slot.history.method, parameters={})
                if slot.history.method not in (None, spec.method)
                else spec
            )
            found.append(own)
            if manifest.cause.get("operation") == "cluster" and "merge" in manifest.cause:
                cause = manifest.cause
                found.append(replace(spec, method=cause["merge"], parameters=cause.get("parameters", {})))
    return [spec for place, spec in enumerate(found) if spec not in found[:place]]


def _from_originals(
    merged: Sequence[Source], starts: Sequence[tuple[str | None, Average | None]], given: Given, spec: MergeSpec
) -> Iterator[Mended]:
    """Yield the available originals folded in order into each start, by each weighting; then merged at once."""
    for state, start in starts:
        rest = [m for m in merged[len(start.history.merged) if start else 0 :] if m.digest in given]
        for weighting in WEIGHTINGS if rest else ():
            with contextlib.suppress(LorashelfError):
                held = start
                for m in rest:
                    adapter, record = given[m.digest], replace(m, weight=1.0)
                    if held is None:
                        held = alone(adapter, record, spec)
                    else:
                        held = fold([held.plain], adapter, record, spec, weighting)
                yield Mended("merged", new=held, state=state, given=tuple(m.task for m in rest))
    there = [m for m in merged if m.digest in given]
    if len(there) > 1:
        with contextlib.suppress(LorashelfError):
            records = [replace(m, weight=1.0) for m in there]
            held = block([given[m.digest] for m in there], records, spec)
            yield Mended("merged", new=held, given=tuple(m.task for m in there))


def _plan(snapshot: Snapshot, mended: Mapping[str, Mended], unsound: Sequence[str]) -> Plan:
    """Return the plan with what is left of the damaged slots; undo leads to sound states only."""
    slots: list[Slot] = []
    writes: dict[int, Adapter] = {}
    for slot in snapshot.manifest.slots:
        found = mended.get(slot.object.id)
        if found is None or found.how == "rewritten":
            slots.append(slot)
        elif found.new is not None and found.tasks:
            slots.append(Slot.planned(slot.id, found.new, found.tasks, slot.object.encoding))
            writes[slot.id] = found.new.adapter
        elif found.kept is not None and found.tasks:
            slots.append(replace(found.kept, id=slot.id, members=found.tasks))
    served = {task for slot in slots for task in slot.members}
    line = snapshot.timeline
    manifest = replace(
        snapshot.manifest,
        parent=snapshot.head,
        sequence=snapshot.manifest.sequence + 1,
        slots=tuple(slots),
        tasks={task: details for task, details in snapshot.manifest.tasks.items() if task in served},
        cause={"operation": "repair", "time": PENDING_TIME, "version": VERSION},
        state=snapshot.head,  # deleted next, so a reader takes the new manifest as the state
        undo=tuple(state for state in (line.state, *line.undo) if state not in unsound),
        redo=(),
        ended=tuple(state for state in line.redo if state not in unsound),
    )
    return Plan(snapshot.head, manifest, writes, {}, shrinks=True)
