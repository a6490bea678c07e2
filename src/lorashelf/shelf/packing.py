"""Many adapters packed into a budget in bytes at once: the plan of `pack`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from ..lora.adapter import Adapter
from ..merging.average import Average, alone, one_base, source
from .allocation import fitted
from .plan import Plan
from .plan_parts import kind_of, planned, storable
from .plans import together
from .slot import Slot
from .snapshot import Snapshot


def plan_pack(
    snapshot: Snapshot,
    adapters: Mapping[str, Adapter],
    *,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    assume_base: bool = False,
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Plan:
    """Code adapters (task → adapter) into the bytes of an empty shelf, at one slope of predicted quality per byte.

    Tasks with the same adapter share an object. `details` are stored with the tasks; `watch` wraps the names of the
    tasks as their adapters are coded. Raises TaskNameError, BaseMismatch, ShapeMismatch, OverBudget where a task would
    fall below the floor, UsageError for a shelf that is not empty or whose policy is not `bytes`.
    """
    if snapshot.manifest.slots or not snapshot.settings.placement.by_bytes:
        what = "pack fills an empty shelf that counts bytes"
        raise UsageError(what, where=str(snapshot.path), cure="lorashelf pack ADAPTER… -o NEW_SHELF --bytes SIZE")
    named, base = together(adapters, snapshot.settings, assume_base=assume_base)
    xs = dict(zip(sorted(named), one_base([named[task] for task in sorted(named)]), strict=True))
    given = {task: storable(task, (details or {}).get(task, {})) for task in xs}
    kinds = {task: kind_of(task, given[task].pop("type", None)) for task in xs}
    coded: dict[str, Average] = {}
    members: dict[str, list[str]] = {}
    for task in watch(xs):
        members.setdefault(xs[task].digest, []).append(task)
        if xs[task].digest not in coded:
            record = source(task, kinds[task], xs[task])
            coded[xs[task].digest] = alone(xs[task], record, snapshot.settings.merge)
    encoding = snapshot.settings.merge.encoding
    slots = [Slot.planned(i, x, members[digest], encoding) for i, (digest, x) in enumerate(coded.items())]
    known = replace(
        snapshot.manifest,
        base=base,
        slots=tuple(slots),
        tasks={task: {**given[task], "type": kinds[task], "digest": x.digest} for task, x in xs.items()},
        arrived=len(xs),
    )
    writes = {i: x.adapter for i, x in enumerate(coded.values())}
    return fitted(snapshot, planned(snapshot, known, writes, {"operation": "pack"}, {}))
