"""The flows: from adapters and a snapshot to a Plan, without any effect. `Shelf.commit` carries a plan out."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..digest import canonical_json
from ..errors import CorruptShelf, NotReversible, NotStorable, OverBudget, TaskNameError, UsageError
from ..execution import beside
from ..lora.adapter import Adapter, BaseId
from ..lora.algebra import squared_norms
from ..lora.alignment import aligned, shared
from ..lora.given import as_adapter
from ..lora.similarity import similarity
from ..merging.average import Average, Source, fold, one_base, single, source, without
from ..merging.blocks import merge_block, named
from ..merging.spec import MergeSpec
from ..names import problem_type, task_name
from ..placement import policies
from ..placement.partitioners import partition
from ..placement.policies import Fold, Open, Refuse
from ..version import VERSION
from .budget import Shortage, check_budget, shortage_of_room
from .manifest import PENDING_TIME, Manifest, Plan, Slot
from .settings import Settings
from .snapshot import Snapshot

if TYPE_CHECKING:
    from ..placement.d2c import Found

_ANEW = "for a slot without it, remove the slot's other tasks as well and add their originals anew"
MAX_SCORES = 256  # how many arrival scores a manifest carries for the automatic threshold


def plan_add(
    snapshot: Snapshot,
    adapter: Adapter,
    task: str,
    *,
    type: str | None = None,
    details: Mapping[str, Any] | None = None,
    assume_base: bool = False,
) -> Plan:
    """Where an arriving adapter goes, and what its slot becomes (K-Merge, K-Merge++ …, by the shelf's settings).

    `type` is the problem type (default: the name before the first "-"); `details` are stored with the task. Raises
    TaskNameError, BaseMismatch, ShapeMismatch. A refusal of the policy or the budget is a plan with `refused` set.
    """
    task = task_name(task)
    manifest, settings = snapshot.manifest, snapshot.settings
    if task in manifest.tasks:
        cure = "choose another name, or lorashelf update / remove the task first"
        raise TaskNameError(f"task {task!r} is on the shelf already", where=str(snapshot.path), cure=cure)
    adapter = as_adapter(adapter)
    details = _storable(task, details or {})
    kind = _kind(task, type, details.pop("type", None))
    with _all_damage(snapshot), beside(lambda: adapter.digest):  # asked for below
        held = {slot.id: snapshot.stored(slot) for slot in manifest.slots}
        base = _agreed_base(snapshot, {task: adapter}, list(held.values()), assume_base)
        squared_norms(adapter)  # likewise
        values = similarity([adapter], list(held.values()))[0] if held else []
    scores = {slot: float(score) for slot, score in zip(held, values, strict=True)}
    same = next((slot.id for slot in manifest.slots if adapter.digest in slot.history.digests), None)
    record = source(task, kind, adapter)
    if same is None and not record.norm and scores:  # untrained: a slot of its own would be taken from others
        same = policies.nearest(scores)
    seen = manifest.scores if same is not None else (*manifest.scores, *scores.values())
    threshold = settings.placement.threshold_for(seen)
    known = replace(
        manifest,
        base=base,
        tasks=dict(sorted({**manifest.tasks, task: {**details, "type": kind, "digest": adapter.digest}}.items())),
        arrived=manifest.arrived + 1,
        # once all slots are filled nothing depends on a threshold any more
        scores=(seen if len(manifest.slots) < settings.budget.slots else manifest.scores)[-MAX_SCORES:],
    )
    report = {"task": task, "scores": {str(slot): score for slot, score in scores.items()}, "threshold": threshold}
    report |= {} if record.norm else {"untrained": True}
    if same is not None:  # its average holds this very adapter, or the adapter changes nothing: only the route is new
        plan = _arrived(snapshot, known, Fold(same), None, report)
        return _within_budget(snapshot, plan, report)
    return _placed(snapshot, known, adapter, record, held, scores, report)


def _placed(
    snapshot: Snapshot,
    known: Manifest,
    adapter: Adapter,
    record: Source,
    held: Mapping[int, Adapter],
    scores: Mapping[int, float],
    report: Mapping[str, Any],
) -> Plan:
    """The plan of an add to the slot that the policy names."""
    manifest, settings = snapshot.manifest, snapshot.settings
    filled = [slot for slot in manifest.slots if any(m.norm for m in slot.history.merged)]
    scores = {slot.id: scores[slot.id] for slot in filled}
    free = next((i for i in range(snapshot.settings.budget.slots) if i not in scores), None)
    opening = None if free is None else _opening(snapshot, known, adapter, record, free, report)
    view = policies.View(
        free=free if isinstance(opening, Plan) else None,
        threshold=report["threshold"],
        type=record.type,
        types={slot.id: frozenset(m.type for m in slot.history.merged) for slot in filled},
        averaged={slot.id: slot.history.digests for slot in filled},
        seed=(settings.merge.seed, manifest.arrived),
    )
    decide = policies.POLICIES[settings.placement.policy]
    decision = decide(scores, view)
    if isinstance(decision, Refuse):
        why = "" if isinstance(opening, Plan) else f"; {_no_room(snapshot, opening)}"
        return _refused(snapshot, report, decision.reason + why)
    if isinstance(decision, Open) and isinstance(opening, Plan) and decision.slot == free:
        return opening
    if isinstance(decision, Fold) and {decision.slot, *decision.sources} <= scores.keys():
        new = _folded(snapshot, decision, adapter, record)
        plan = _arrived(snapshot, known, decision, new, report)
        common = shared([*(held[i] for i in decision.sources or (decision.slot,)), adapter])
        plan = replace(plan, report={**plan.report, "shared": common})
        if isinstance(opening, Shortage) and isinstance(decide(scores, replace(view, free=free)), Open):
            plan = replace(plan, report={**plan.report, "reason": opening.what})
        return _within_budget(snapshot, plan, report)
    raise UsageError(
        f"policy {settings.placement.policy!r} answered {decision}",
        cure="open view.free, or fold into slots with a score",
    )


def _folded(snapshot: Snapshot, decision: Fold, adapter: Adapter, record: Source) -> Average:
    """What the slot holds after the fold."""
    slots = [snapshot.manifest.slot(i) for i in decision.sources or (decision.slot,)]
    sources = [snapshot.average(slot) for slot in slots]
    new = fold(sources, adapter, record, snapshot.settings.merge, decision.weighting)
    squared_norms(new.adapter)  # asked for below
    return new


@contextlib.contextmanager
def _all_damage(snapshot: Snapshot) -> Iterator[None]:
    """Where the block meets a damaged slot, name all that are."""
    try:
        yield
    except CorruptShelf:
        snapshot.check_bytes(*snapshot.manifest.slots)
        raise


def _arrived(
    snapshot: Snapshot, known: Manifest, decision: Open | Fold, new: Average | None, report: Mapping[str, Any]
) -> Plan:
    """The plan of an add whose decision is made; without `new` content the task is only routed."""
    slot_id, kind = decision.slot, "open" if isinstance(decision, Open) else "fold"
    before = next((slot for slot in known.slots if slot.id == slot_id), None)
    members = tuple(sorted([*(before.members if before else ()), report["task"]]))
    cause = {"operation": "add", "decision": kind, "slot": slot_id, "seed": snapshot.settings.merge.seed, **report}
    slot = (
        Slot.planned(slot_id, new, members, snapshot.settings.merge.encoding)
        if new
        else replace(known.slot(slot_id), members=members)
    )
    writes = {slot_id: new.adapter} if new else {}
    report = {**report, "decision": kind, "slot": slot_id, "members": list(members), "merged": new is not None}
    report |= {"reversible": slot.history.irreversible is None}
    return _plan(snapshot, replace(known, slots=known.with_slot(slot)), writes, cause, report)


def _within_budget(snapshot: Snapshot, plan: Plan, report: Mapping[str, Any]) -> Plan:
    """The plan, or a refusal where the budget does not meet it."""
    try:
        check_budget(snapshot, plan)
    except OverBudget as error:
        return _refused(snapshot, report, f"{error.what}; {error.cure}")
    return plan


def _refused(snapshot: Snapshot, report: Mapping[str, Any], reason: str) -> Plan:
    report = {**report, "decision": "refuse", "slot": None, "members": [], "merged": False, "reversible": None}
    report["reason"] = reason
    return Plan(snapshot.head, snapshot.manifest, {}, report, refused=reason)


def _opening(
    snapshot: Snapshot, known: Manifest, adapter: Adapter, record: Source, free: int, report: Mapping[str, Any]
) -> Plan | Shortage:
    """The plan of an add to a free slot, or what lacks in bytes for it."""
    new = single(adapter, record, snapshot.settings.merge)
    plan = _arrived(snapshot, known, Open(free), new, report)
    return shortage_of_room(snapshot, plan) or plan


def _no_room(snapshot: Snapshot, opening: Shortage | None) -> str:
    """Why no slot can be opened, and what would help."""
    if isinstance(opening, Shortage):
        return f"{opening.error.what}; {opening.error.cure}"
    count = len(snapshot.manifest.slots)
    filled = f"all {count} slots are filled" if count > 1 else "the one slot is filled"
    return f"{filled}; raise budget.slots in shelf.toml"


def plan_update(
    snapshot: Snapshot, task: str, adapter: Adapter, was: Adapter | None = None, *, assume_base: bool = False
) -> Plan:
    """Replace a task's adapter in its slot. In a shared slot the old one, `was`, is taken out of the average first.

    Raises UnknownName, NotReversible where that needs an adapter or a history that is not there, BaseMismatch,
    ShapeMismatch.
    """
    slot, details = snapshot.located(task)
    task, adapter = unicodedata.normalize("NFC", task), as_adapter(adapter)
    spec = snapshot.settings.merge
    if was is not None and was.digest != details["digest"]:
        raise another(task, was, details["digest"])
    if adapter.digest == details["digest"]:
        raise UsageError(f"{task!r} has this very adapter already", cure="nothing is to be done")
    with _all_damage(snapshot):
        others = [snapshot.stored(other) for other in snapshot.manifest.slots if other.id != slot.id]
        base = _agreed_base(snapshot, {task: adapter}, others, assume_base)
    record = source(task, details["type"], adapter)
    precision = None
    if slot.members == (task,) or (slot.history.digests == {details["digest"]} and not _copies(snapshot, slot, task)):
        new = single(adapter, record, spec)
    else:
        new, precision = _remaining(snapshot, slot, task, was)
        if record.norm and adapter.digest not in {m.digest for m in new.history.merged}:
            new = fold([new.plain], adapter, record, spec)
    tasks = {**snapshot.manifest.tasks, task: {**details, "digest": adapter.digest}}
    slots = snapshot.manifest.with_slot(Slot.planned(slot.id, new, slot.members, spec.encoding))
    cause = {"operation": "update", "task": task, "slot": slot.id}
    report = {"task": task, "slot": slot.id, "members": list(slot.members), "precision": precision}
    known = replace(snapshot.manifest, base=base, tasks=tasks, slots=slots)
    return _plan(snapshot, known, {slot.id: new.adapter}, cause, report)


def _remaining(snapshot: Snapshot, slot: Slot, task: str, was: Adapter | None) -> tuple[Average, float | None]:
    """What a shared slot holds without the adapter that a task has so far, and to what precision."""
    if snapshot.manifest.tasks[task]["digest"] not in slot.history.digests:
        return snapshot.average(slot), None
    try:
        return _without(snapshot, slot, task, was, "--was OLD_ADAPTER")
    except NotReversible as error:
        error.cure = error.cure or f"lorashelf remove {task}, then add the new adapter; {_ANEW}"
        raise


def plan_remove(snapshot: Snapshot, task: str, adapter: Adapter | None = None) -> Plan:
    """Take a task off the shelf: its slot if it is alone there, with `adapter` its share of the average, else its route
    only.

    The report's `removed` says which of "slot", "average", "route" it was, `reason` why not more, `precision` the
    relative rounding left. Raises UnknownName, and NotReversible if `adapter` is not the one recorded.
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
        if not slots:  # what is known of adapters that are gone holds for none that come
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
    return _plan(snapshot, replace(known, slots=slots), writes, cause, report, shrinks=True)


def plan_set(snapshot: Snapshot, task: str, fields: Mapping[str, Any]) -> Plan:
    """Change what is stored with a task: prompt, type, language, metric, max_new_tokens (`tasks.checked_fields`).

    Raises UnknownName, UsageError where nothing would change, TaskNameError for a type that cannot be.
    """
    task = unicodedata.normalize("NFC", task)
    slot, details = snapshot.located(task)
    given = _storable(task, fields)
    changed = {name: value for name, value in given.items() if details.get(name) != value}
    if not changed:
        raise UsageError(f"{task!r} has this stored with it already", cure="nothing is to be done")
    kind = problem_type(changed.get("type", details["type"]))
    own = (task, details["digest"])
    merged = tuple(
        replace(entry, type=kind) if (entry.task, entry.digest) == own else entry for entry in slot.history.merged
    )
    known = replace(
        snapshot.manifest,
        tasks={**snapshot.manifest.tasks, task: {**details, **changed, "digest": details["digest"]}},
        slots=snapshot.manifest.with_slot(replace(slot, history=replace(slot.history, merged=merged))),
    )
    report = {"task": task, "slot": slot.id, "changed": changed}
    return _plan(snapshot, known, {}, {"operation": "set", "task": task, "slot": slot.id}, report)


def _without(snapshot: Snapshot, slot: Slot, task: str, adapter: Adapter | None, option: str) -> tuple[Average, float]:
    """The slot's content with a task's adapter taken out. Raises NotReversible, saying what is missing."""
    digest = snapshot.manifest.tasks[task]["digest"]
    if _copies(snapshot, slot, task):
        raise NotReversible("another task here is served by the same adapter", cure="it stays in the average")
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
    """The other tasks of a slot that have the same adapter."""
    tasks = snapshot.manifest.tasks
    return [other for other in slot.members if other != task and tasks[other]["digest"] == tasks[task]["digest"]]


def another(task: str, adapter: Adapter, digest: str) -> NotReversible:
    """The error for an adapter that is not the one recorded for a task."""
    what = f"this is not the adapter of {task!r}: its digest is {adapter.digest[:15]}…, recorded is {digest[:15]}…"
    return NotReversible(what, cure="give the very folder that was added")


def plan_cluster(
    snapshot: Snapshot,
    adapters: Mapping[str, Adapter],
    *,
    method: str,
    found: Found | None = None,
    merge: MergeSpec | None = None,
    types: Mapping[str, str] | None = None,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    assume_base: bool = False,
) -> Plan:
    """Partition the adapters (task → adapter) into the shelf's K slots and merge each block; the shelf must be empty.

    `found` is the partition of a search (d2c), in place of one by a registered `method`; `merge` says how
    blocks are merged, by default as later adds are; `details` are stored with the tasks. Blocks are numbered by their
    smallest task name. Raises TaskNameError, BaseMismatch, ShapeMismatch, OverBudget, UsageError.
    """
    if snapshot.manifest.slots:
        raise UsageError("the shelf is not empty", where=str(snapshot.path), cure="cluster writes a new shelf")
    settings = snapshot.settings
    spec = merge or settings.merge
    named, base = together(adapters, settings, assume_base=assume_base)
    tasks, xs = list(named), one_base(list(named.values()))
    kinds = {task: _kind(task, (types or {}).get(task)) for task in tasks}
    if found is None:
        indices = partition(xs, settings.budget.slots, method=method, seed=spec.seed)
        blocks = [[tasks[i] for i in block] for block in indices]
    else:
        blocks = [list(block) for block in found.blocks]
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
            task: {**_storable(task, (details or {}).get(task, {})), "type": kinds[task], "digest": x.digest}
            for task, x in zip(tasks, xs, strict=True)
        },
        arrived=len(xs),
    )
    cause = {"operation": "cluster", "method": method, "seed": spec.seed}
    cause |= {"merge": spec.method, "parameters": dict(spec.parameters)}
    report = {
        "partition": dict(sorted((task, slot_id) for slot_id, block in enumerate(blocks) for task in block)),
        "method": method,
        "seed": spec.seed,
        "shared": {str(i): shared([named[task] for task in block]) for i, block in enumerate(blocks)},
        "evaluations": None,
        "merge": spec.method,
        "later_merge": settings.merge.method,
    }
    plan = _plan(snapshot, known, writes, cause, report)
    check_budget(snapshot, plan)
    if lacking := shortage_of_room(snapshot, plan):
        raise lacking.error
    return plan


def _kind(task: str, *stated: str | None) -> str:
    """The problem type: the first that is stated, else the name before the first "-". Raises TaskNameError."""
    return next((problem_type(kind) for kind in stated if kind is not None), task.partition("-")[0])


def _storable(task: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored with a task, as a copy. Raises UsageError where JSON cannot hold it."""
    try:
        canonical_json(dict(details))
    except NotStorable as error:
        what = f"details of task {task!r} cannot be stored: {error.__cause__}"
        raise NotStorable(what, cure="give plain JSON values") from error
    return dict(details)


def together(
    adapters: Mapping[str, Adapter], settings: Settings, *, assume_base: bool = False
) -> tuple[dict[str, Adapter], BaseId | None]:
    """The adapters by their names as stored, and the base that all agree on: what can be refused before a search.

    Raises TaskNameError, BaseMismatch, ShapeMismatch.
    """
    found = named(adapters)
    return found, _one_base(settings, None, found, [], assume_base)


def check_arrivals(snapshot: Snapshot, adapters: Mapping[str, Adapter], *, assume_base: bool = False) -> None:
    """Raise what `plan_add` would raise of any of several adapters' bases and shapes, before the first is added.

    Raises TaskNameError, BaseMismatch, ShapeMismatch, CorruptShelf.
    """
    held = [snapshot.stored(slot) for slot in snapshot.manifest.slots]
    _agreed_base(snapshot, named(adapters), held, assume_base)


def _plan(
    snapshot: Snapshot,
    manifest: Manifest,
    writes: Mapping[int, Adapter],
    cause: Mapping[str, Any],
    report: Mapping[str, Any],
    shrinks: bool = False,
) -> Plan:
    settings = snapshot.settings
    planned = replace(
        manifest,
        parent=snapshot.head,
        sequence=snapshot.manifest.sequence + 1,
        recipe=settings.recipe,
        budget=settings.budget.document(),
        cause={**cause, "time": PENDING_TIME, "version": VERSION},
        state=None,
        undo=(),
        redo=(),
        ended=snapshot.timeline.redo,
    )
    return Plan(snapshot.head, planned, writes, report, shrinks=shrinks)


def _agreed_base(
    snapshot: Snapshot, adapters: Mapping[str, Adapter], held: Sequence[Adapter], assume: bool
) -> BaseId | None:
    stored = snapshot.manifest.base if snapshot.manifest.slots else None
    return _one_base(snapshot.settings, stored, adapters, held, assume, str(snapshot.path))


def _one_base(
    settings: Settings,
    stored: BaseId | None,
    adapters: Mapping[str, Adapter],
    held: Sequence[Adapter],
    assume: bool,
    where: str | None = None,
) -> BaseId | None:
    """The shelf's base once these adapters are on it: the first known name. Raises BaseMismatch naming all others, and
    every shape that disagrees with the rest or with those `held`; ShapeMismatch if it is shapes only.
    """
    base, faults = settings.agreed(stored, {task: x.base for task, x in adapters.items()}, assume)
    cure = "if these are one model under two names: --assume-base, or --base-alias NAME (base_aliases in shelf.toml)"
    aligned([*held, *adapters.values()], faults, where, cure)
    return base
