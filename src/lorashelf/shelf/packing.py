"""Plans of pack and convert: many adapters coded at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import NotReversible, UsageError
from ..formats.codec import Codec
from ..lora.adapter import Adapter, BaseId
from ..lora.quality import quality
from ..merging.average import Average, History, alone, one_base, source, total_error
from ..merging.spec import MergeSpec
from .allocation import coarser, error_with, fitted
from .plan import Plan
from .plan_parts import kind_of, planned, storable
from .plans import another, together
from .records import Details
from .slot import Slot
from .snapshot import Snapshot

Watch = Callable[[Iterable[str]], Iterable[str]]


class _Single(NamedTuple):
    """An adapter to be coded into an object of its own, and the tasks that it serves."""

    members: Sequence[str]
    held: Average
    """The adapter with its record, as given or as stored on another shelf."""
    codec: Codec | None = None
    """The codec of an adapter that is stored on another shelf."""

    def coded(self, spec: MergeSpec) -> Average:
        """Return the adapter as the spec codes it; of one that is coded already, the first levels that keep enough."""
        held = self.held
        if self.codec and (levels := self.codec.rates(held.adapter)):
            kept = (quality(1.0 - error_with(held, levels, count) ** 2) for count in range(1, len(levels)))
            enough = next((count for count, each in enumerate(kept, 1) if each >= spec.quality), len(levels))
            return coarser(held, self.codec, enough)
        new = alone(held.adapter, held.history.merged[0], spec)
        error = total_error(held.history.error, new.history.error)
        return replace(new, history=replace(new.history, error=error))


def plan_pack(
    snapshot: Snapshot,
    adapters: Mapping[str, Adapter],
    *,
    details: Mapping[str, Details] | None = None,
    assume_base: bool = False,
    watch: Watch = iter,
) -> Plan:
    """Plan to code adapters (task → adapter) into the bytes of an empty shelf, at one slope of predicted quality per
    byte.

    Tasks with the same adapter share an object. `details` are stored with the tasks; `watch` wraps the names of the
    tasks as their adapters are coded. Raises TaskNameError, BaseMismatch, ShapeMismatch, OverBudget if a task would
    fall below its floor, UsageError for a shelf that is not empty or has another policy.
    """
    if snapshot.manifest.slots or not snapshot.settings.placement.by_bytes:
        what = "pack fills an empty shelf that counts bytes"
        raise UsageError(what, where=str(snapshot.path), cure="lorashelf pack ADAPTER… -o NEW_SHELF --bytes SIZE")
    named, base = together(adapters, snapshot.settings, assume_base=assume_base)
    xs = dict(zip(sorted(named), one_base([named[task] for task in sorted(named)]), strict=True))
    given = {task: storable(task, (details or {}).get(task, {})) for task in xs}
    kinds = {task: kind_of(task, given[task].pop("type", None)) for task in xs}
    members: dict[str, list[str]] = {}
    for task, x in xs.items():
        members.setdefault(x.digest, []).append(task)
    singles = [
        _Single(tasks, Average(xs[tasks[0]], History((source(tasks[0], kinds[tasks[0]], xs[tasks[0]]),))))
        for tasks in members.values()
    ]
    tasks = {task: {**given[task], "type": kinds[task], "digest": x.digest} for task, x in xs.items()}
    return _coded(snapshot, singles, tasks, base, {"operation": "pack"}, watch)


def plan_convert(
    snapshot: Snapshot, held: Snapshot, originals: Mapping[str, Adapter] | None = None, *, watch: Watch = iter
) -> Plan:
    """Plan to code the adapter of every task of the shelf `held` into an object of its own on an empty shelf.

    A task's adapter is the given original, or the content of its slot if that is this adapter alone; of a coded one,
    the stored levels are kept. Raises NotReversible naming every merged task whose original is not given, and for an
    original that is not the one recorded; UsageError for fewer slots than adapters; OverBudget.
    """
    given, tasks = dict(originals or {}), held.manifest.tasks
    for task, adapter in given.items():
        if adapter.digest != held.located(task)[1]["digest"]:
            raise another(task, adapter, str(tasks[task]["digest"]))
    singles: list[_Single] = []
    lacking: list[str] = []
    for slot in held.manifest.slots:
        by_digest: dict[str, list[str]] = {}
        for task in slot.members:
            by_digest.setdefault(str(tasks[task]["digest"]), []).append(task)
        records = {record.digest: record for record in slot.history.merged}
        for digest, members in by_digest.items():
            original = next((given[task] for task in members if task in given), None)
            if original is not None:
                record = records.get(digest) or source(members[0], tasks[members[0]]["type"], original)
                singles.append(_Single(members, Average(original, History((replace(record, weight=1.0),)))))
            elif records.keys() == {digest}:
                singles.append(_Single(members, held.average(slot), slot.codec))
            else:
                lacking += members
    if lacking:
        what = f"merged with others in their slots: {', '.join(sorted(lacking))}"
        cure = f"give their originals: {' '.join(f'--adapter {task}=ADAPTER' for task in sorted(lacking))}"
        raise NotReversible(what, where=str(held.path), cure=cure)
    slots = snapshot.settings.budget.slots
    if slots is not None and len(singles) > slots:
        what = f"{len(singles)} adapters need a slot each, and there are {slots}"
        raise UsageError(what, where=str(held.path), cure=f"give --slots {len(singles)}, or --bytes SIZE")
    return _coded(snapshot, singles, tasks, held.manifest.base, {"operation": "convert"}, watch)


def _coded(
    snapshot: Snapshot,
    singles: Sequence[_Single],
    tasks: Mapping[str, Details],
    base: BaseId | None,
    cause: Mapping[str, Any],
    watch: Watch,
) -> Plan:
    """Return the plan that fills an empty shelf with these adapters, coded, each in a slot of its own."""
    spec = snapshot.settings.merge
    by_name = {single.members[0]: single for single in singles}
    coded = [(by_name[task], by_name[task].coded(spec)) for task in watch(by_name)]
    slots = [Slot.planned(i, x, sorted(one.members), spec.encoding) for i, (one, x) in enumerate(coded)]
    known = replace(
        snapshot.manifest, base=base, slots=tuple(slots), tasks=dict(sorted(tasks.items())), arrived=len(singles)
    )
    writes = {i: x.adapter for i, (_, x) in enumerate(coded)}
    return fitted(snapshot, planned(snapshot, known, writes, cause, {}))
