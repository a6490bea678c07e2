"""Plans of update, remove, set and cluster, without side effects. `Shelf.commit` carries out a plan."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from ..errors import NotReversible, UsageError
from ..lora.adapter import Adapter, BaseId
from ..lora.alignment import shared
from ..lora.given import as_adapter
from ..lora.similarity import init_similarity
from ..merging import METHODS
from ..merging.average import Average, Source, alone, fold, one_base, source, without
from ..merging.blocks import merge_block, named
from ..merging.spec import MergeSpec
from ..names import problem_type
from .allocation import fitted
from .budget import check_budget, shortage_of_room
from .plan import Plan
from .plan_parts import agreed_base, all_damage, common_base, kind_of, planned, storable
from .settings import Settings
from .slot import Slot
from .snapshot import Snapshot

if TYPE_CHECKING:
    from ..placement.clustering import Clustering

_ANEW = "for a slot without it, remove the slot's other tasks as well and add their originals anew"


def plan_update(
    snapshot: Snapshot, task: str, adapter: Adapter, was: Adapter | None = None, *, assume_base: bool = False
) -> Plan:
    """Plan to replace a task's adapter. In a shared slot the old one, `was`, is first taken out of the average.

    On a shelf of bytes the tasks that share the old adapter keep it, and a slot that holds the new one is shared.
    Raises UnknownName, NotReversible if taking out needs an adapter or a history that is missing, BaseMismatch,
    ShapeMismatch, OverBudget.
    """
    slot, details = snapshot.located(task)
    task, adapter = unicodedata.normalize("NFC", task), as_adapter(adapter)
    spec, by_bytes = snapshot.settings.merge, snapshot.settings.placement.by_bytes
    if was is not None and was.digest != details["digest"]:
        raise another(task, was, details["digest"])
    if adapter.digest == details["digest"]:
        raise UsageError(f"{task!r} already has this adapter", cure="nothing to do")
    stays = by_bytes and slot.members != (task,)
    with all_damage(snapshot):
        others = [snapshot.glanced(s) for s in snapshot.manifest.slots if s.readable and (stays or s.id != slot.id)]
        base = agreed_base(snapshot, {task: adapter}, others, assume_base)
    record = source(task, details["type"], adapter)
    precision = None
    if by_bytes:
        slots, slot, writes = _apart(snapshot, slot, task, adapter, record)
    else:
        new, precision = _replaced(snapshot, slot, task, adapter, was, record)
        slot, writes = Slot.planned(slot.id, new, slot.members, spec.encoding), {slot.id: new.adapter}
        slots = snapshot.manifest.with_slot(slot)
    tasks = {**snapshot.manifest.tasks, task: {**details, "digest": adapter.digest}}
    cause = {"operation": "update", "task": task, "slot": slot.id}
    report = {"task": task, "slot": slot.id, "members": list(slot.members), "precision": precision}
    known = replace(snapshot.manifest, base=base, tasks=tasks, slots=slots)
    return fitted(snapshot, planned(snapshot, known, writes, cause, report))


def _apart(
    snapshot: Snapshot, slot: Slot, task: str, adapter: Adapter, record: Source
) -> tuple[tuple[Slot, ...], Slot, dict[int, Adapter]]:
    """Return the slots of a shelf of bytes with another adapter for a task, the one that serves the task, and what is
    to be written.
    """
    others, spec = tuple(member for member in slot.members if member != task), snapshot.settings.merge
    rest = replace(snapshot.manifest, slots=snapshot.manifest.without_slot(slot.id))
    if others:
        rest = replace(rest, slots=rest.with_slot(replace(slot, members=others)))
    same = next((each for each in rest.slots if each.history.digests == {adapter.digest}), None)
    if same is not None:
        joined = replace(same, members=tuple(sorted([*same.members, task])))
        return rest.with_slot(joined), joined, {}
    taken = {each.id for each in rest.slots}
    number = slot.id if not others else next(i for i in count() if i not in taken)
    new = alone(adapter, record, spec)
    own = Slot.planned(number, new, (task,), spec.encoding)
    return rest.with_slot(own), own, {number: new.adapter}


def _replaced(
    snapshot: Snapshot, slot: Slot, task: str, adapter: Adapter, was: Adapter | None, record: Source
) -> tuple[Average, float | None]:
    """Return a slot's average with another adapter for a task, and the precision. Raises NotReversible."""
    spec, digest = snapshot.settings.merge, snapshot.manifest.tasks[task]["digest"]
    copies = _copies(snapshot, slot, task)
    if slot.members == (task,) or (slot.history.digests == {digest} and not copies):
        return alone(adapter, record, spec), None
    if copies and digest in slot.history.digests:
        what = f"served by the same adapter, which stays in the slot: {', '.join(copies)}"
        cure = f"lorashelf remove {task}, then add the new adapter"
        raise NotReversible(what, where=str(snapshot.path), cure=cure)
    new, precision = _remaining(snapshot, slot, task, was)
    if record.norm and adapter.digest not in {m.digest for m in new.history.merged}:
        new = fold([new.plain], adapter, record, spec)
    return new, precision


def _remaining(snapshot: Snapshot, slot: Slot, task: str, was: Adapter | None) -> tuple[Average, float | None]:
    """Return a shared slot's average without the current adapter of a task, and the precision."""
    if snapshot.manifest.tasks[task]["digest"] not in slot.history.digests:
        return snapshot.average(slot), None
    try:
        return _without(snapshot, slot, task, was, "--was OLD_ADAPTER")
    except NotReversible as error:
        if error.cure:
            raise
        cure = f"lorashelf remove {task}, then add the new adapter; {_ANEW}"
        raise error.amended(cure=cure) from error.__cause__


def plan_remove(snapshot: Snapshot, task: str, adapter: Adapter | None = None) -> Plan:
    """Plan to remove a task: its slot if the task is alone there, its share of the average if `adapter` is given, else
    only its route.

    The report's `removed` is "slot", "average" or "route", `reason` is why not more, `precision` the relative
    rounding error left. Raises UnknownName, and NotReversible if `adapter` is not the one recorded.
    """
    task = unicodedata.normalize("NFC", task)
    slot, details = snapshot.located(task)
    if adapter is not None and adapter.digest != details["digest"]:
        raise another(task, adapter, details["digest"])
    tasks = {name: value for name, value in snapshot.manifest.tasks.items() if name != task}
    known = replace(snapshot.manifest, tasks=tasks)
    members = tuple(member for member in slot.members if member != task)
    cause = {"operation": "remove", "task": task, "slot": slot.id}
    report: dict[str, Any] = {
        "task": task,
        "slot": slot.id,
        "members": list(members),
        "precision": None,
        "reason": None,
    }
    writes: dict[int, Adapter] = {}
    if not members:
        report["removed"] = "slot"
        slots = known.without_slot(slot.id)
        if not slots:  # base and scores of removed adapters do not hold for later ones
            known = replace(known, base=None, scores=())
    else:
        try:
            rest, report["precision"] = _without(snapshot, slot, task, adapter, "--adapter ADAPTER, after an undo,")
            report["removed"] = "average"
            slots, writes = (
                known.with_slot(Slot.planned(slot.id, rest, members, snapshot.settings.merge.encoding)),
                {slot.id: rest.adapter},
            )
        except NotReversible as error:
            report |= {"removed": "route", "reason": f"{error.what}; {error.cure or _ANEW}"}
            slots = known.with_slot(replace(slot, members=members))
    return planned(snapshot, replace(known, slots=slots), writes, cause, report, shrinks=True)


def plan_set(snapshot: Snapshot, task: str, fields: Mapping[str, Any]) -> Plan:
    """Plan to change the details of a task: prompt, type, language, metric, max_new_tokens (`tasks.checked_fields`).

    Raises UnknownName, UsageError if nothing would change, TaskNameError for an invalid type.
    """
    task = unicodedata.normalize("NFC", task)
    slot, details = snapshot.located(task)
    given = storable(task, fields)
    changed = {name: value for name, value in given.items() if details.get(name) != value}
    if not changed:
        raise UsageError(f"{task!r} already has these values", cure="nothing to do")
    kind = problem_type(changed.get("type", details["type"]))
    own = (task, details["digest"])
    merged = tuple(
        replace(source, type=kind) if (source.task, source.digest) == own else source for source in slot.history.merged
    )
    known = replace(
        snapshot.manifest,
        tasks={**snapshot.manifest.tasks, task: {**details, **changed, "digest": details["digest"]}},
        slots=snapshot.manifest.with_slot(replace(slot, history=replace(slot.history, merged=merged))),
    )
    report = {"task": task, "slot": slot.id, "changed": changed}
    return planned(snapshot, known, {}, {"operation": "set", "task": task, "slot": slot.id}, report)


def _without(snapshot: Snapshot, slot: Slot, task: str, adapter: Adapter | None, option: str) -> tuple[Average, float]:
    """Return the slot's average without a task's adapter, and the precision. Raises NotReversible with the reason."""
    digest = snapshot.manifest.tasks[task]["digest"]
    if _copies(snapshot, slot, task):
        raise NotReversible("another task here is served by the same adapter", cure="it stays in the slot")
    if digest not in slot.history.digests:
        raise NotReversible("the adapter is untrained and was left out of the average", cure="nothing of it is left")
    if why := slot.history.irreversible:
        raise NotReversible(why)
    if adapter is None:
        raise NotReversible(
            "the adapter is averaged with others", cure=f"give the original with {option} to take it out"
        )
    return without(snapshot.average(slot), digest, adapter, snapshot.settings.merge)


def _copies(snapshot: Snapshot, slot: Slot, task: str) -> list[str]:
    """Return the other tasks of a slot that have the same adapter."""
    tasks = snapshot.manifest.tasks
    return [other for other in slot.members if other != task and tasks[other]["digest"] == tasks[task]["digest"]]


def another(task: str, adapter: Adapter, digest: str) -> NotReversible:
    """Return the error for an adapter that is not the one recorded for a task."""
    what = f"this is not the adapter of {task!r}: its digest is {adapter.digest[:15]}…, recorded is {digest[:15]}…"
    return NotReversible(what, cure="give the adapter that was added")


def plan_cluster(
    snapshot: Snapshot,
    adapters: Mapping[str, Adapter],
    clustering: Clustering,
    *,
    merge: MergeSpec | None = None,
    types: Mapping[str, str] | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    assume_base: bool = False,
) -> Plan:
    """Plan to merge each block of a clustering of the adapters (task → adapter) into a slot; the shelf must be empty.

    `merge` states how blocks are merged, by default as later adds are; `details` are stored with the tasks. Blocks are
    numbered by their smallest task name. Raises TaskNameError, BaseMismatch, ShapeMismatch, OverBudget, and UsageError
    for a clustering of other tasks or into more blocks than the shelf has slots.
    """
    if snapshot.manifest.slots:
        raise UsageError("the shelf is not empty", where=str(snapshot.path), cure="cluster writes a new shelf")
    settings = snapshot.settings
    spec = merge or settings.merge
    named, base = together(adapters, settings, assume_base=assume_base)
    tasks, xs = list(named), one_base(list(named.values()))
    kinds = {task: kind_of(task, (types or {}).get(task)) for task in tasks}
    if settings.budget.slots is None:
        what = "cluster merges adapters into slots, and policy 'bytes' stores each alone"
        raise UsageError(what, where=str(snapshot.path), cure="lorashelf pack, or give --slots K")
    clustering.check(tasks, settings.budget.slots)
    blocks = sorted(sorted(block) for block in clustering.blocks)
    slots, writes = [], {}
    for slot_id, block in enumerate(blocks):
        new = merge_block(dict(zip(tasks, xs, strict=True)), kinds, block, spec)
        slots.append(Slot.planned(slot_id, new, block, spec.encoding))
        writes[slot_id] = new.adapter
    known = replace(
        snapshot.manifest,
        base=base,
        slots=tuple(slots),
        tasks={
            task: {**storable(task, (details or {}).get(task, {})), "type": kinds[task], "digest": x.digest}
            for task, x in zip(tasks, xs, strict=True)
        },
        arrived=len(xs),
    )
    cause: dict[str, Any] = {"operation": "cluster", "method": clustering.method, "seed": clustering.seed}
    cause |= {"merge": spec.method, "parameters": dict(spec.parameters)}
    cause |= {"search": dict(clustering.report)} if clustering.report else {}
    report = {
        "evaluations": None,
        **clustering.report,
        "partition": dict(sorted((task, slot_id) for slot_id, block in enumerate(blocks) for task in block)),
        "method": clustering.method,
        "seed": clustering.seed,
        "shared": {str(i): shared([named[task] for task in block]) for i, block in enumerate(blocks)},
        "merge": spec.method,
        "later_merge": settings.merge.method,
    }
    if METHODS[spec.method].sums_shared_init:
        similar = (init_similarity([named[task] for task in block]) for block in blocks)
        report["init_similarity"] = {str(i): cosine for i, cosine in enumerate(similar)}
    plan = planned(snapshot, known, writes, cause, report)
    check_budget(snapshot, plan)
    if lacking := shortage_of_room(snapshot, plan):
        raise lacking.error
    return plan


def together(
    adapters: Mapping[str, Adapter], settings: Settings, *, assume_base: bool = False
) -> tuple[dict[str, Adapter], BaseId | None]:
    """Return the adapters by their stored names, and the base that all agree on; refuses what it can before a search.

    Raises TaskNameError, BaseMismatch, ShapeMismatch, UsageError without adapters.
    """
    if not adapters:
        raise UsageError("no adapters are given", cure="give at least one")
    found = named(adapters)
    return found, common_base(settings, None, found, [], assume_base)


def check_arrivals(snapshot: Snapshot, adapters: Mapping[str, Adapter], *, assume_base: bool = False) -> None:
    """Raise what `plan_add` would raise for the bases and shapes of several adapters, before the first is added.

    Raises TaskNameError, BaseMismatch, ShapeMismatch, CorruptShelf.
    """
    held = [snapshot.glanced(slot) for slot in snapshot.manifest.slots if slot.readable]
    agreed_base(snapshot, named(adapters), held, assume_base)
