"""Whether a plan fits into the slots and bytes, whether room for changes is left, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import OverBudget
from ..lora.adapter import WIDTHS, Adapter, Factors, Modules
from .pages import compressed
from .plan import Plan
from .slot import Slot
from .snapshot import Snapshot

Size = Callable[[Snapshot, Plan], int]
EDIT = 64  # bytes that a changed line may add to shelf.toml or a config


@dataclass(frozen=True, slots=True)
class Shortage:
    """A plan that does not fit into the bytes; the cures are searched only when the error is requested."""

    snapshot: Snapshot
    plan: Plan
    size: Size
    """The bytes needed."""
    what: str

    @property
    def error(self) -> OverBudget:
        """The error, with every option of `lorashelf set` that would help."""
        options = " or ".join(_cures(self.snapshot, self.plan, self.size))
        cure = f"give {options}, by lorashelf set SHELF or where the shelf is made"
        return OverBudget(self.what, where=str(self.snapshot.path), cure=cure)


def check_budget(snapshot: Snapshot, plan: Plan) -> None:
    """Raise OverBudget unless the plan's result fits into the slots and bytes; the cure names what would help."""
    budget = snapshot.settings.budget
    if budget.slots is not None and len(plan.manifest.slots) > budget.slots:
        raise OverBudget(
            f"{len(plan.manifest.slots)} slots are needed, the budget is {budget.slots}",
            where=str(snapshot.path),
            cure="raise budget.slots in shelf.toml, or merge into fewer slots",
        )
    if lacking := shortage(snapshot, plan):
        raise lacking.error


def shortage(snapshot: Snapshot, plan: Plan) -> Shortage | None:
    """Return the shortage of bytes of a plan, None if it fits."""
    limit = snapshot.settings.budget.bytes
    if limit is None or snapshot.at_rest(plan, hashed=False) <= limit:
        return None
    total = snapshot.at_rest(plan)
    if total <= limit:
        return None
    what = f"the shelf would take {total} bytes, the budget is {limit}"
    return Shortage(snapshot, plan, Snapshot.at_rest, what)


def shortage_of_room(snapshot: Snapshot, plan: Plan) -> Shortage | None:
    """Return the shortage of bytes of a plan that opens slots, counting the room to change every slot afterwards.

    A change rewrites a slot, and `keep` old states of it are kept. If a new slot took that room, no slot could be
    folded into or updated again: better to fold now.
    """
    limit, keep = snapshot.settings.budget.bytes, snapshot.settings.budget.keep
    if limit is None or _with_room(snapshot, plan, hashed=False) <= limit or _with_room(snapshot, plan) <= limit:
        return None
    if lacking := shortage(snapshot, plan):
        return replace(lacking, size=_with_room)
    states = "an old state" if keep == 1 else f"{keep} old states"
    takes = (
        f"with {states} kept (keep) the shelf could take {after_changes(snapshot, plan)} bytes, the budget is {limit}"
    )
    return Shortage(snapshot, plan, _with_room, f"one more slot would leave no room to change any: {takes}")


def _with_room(snapshot: Snapshot, plan: Plan, *, hashed: bool = True) -> int:
    """Return the bytes for the plan and for changes after it."""
    return max(snapshot.at_rest(plan, hashed=hashed), after_changes(snapshot, plan))


def after_changes(snapshot: Snapshot, plan: Plan) -> int:
    """Return the bytes under the shelf after the plan and then `keep` changes of the largest slot, so that no earlier
    state is kept; plus one manifest, as manifests and the log grow with every operation.
    """
    limit, largest = snapshot.settings.budget.bytes, max(plan.manifest.slots, key=lambda slot: slot.object.bytes)
    times = snapshot.settings.budget.keep
    if not times:  # then a change replaces what it changes
        return 0
    if limit is not None:  # more would not fit in any case
        times = min(times, limit // largest.object.bytes + 1)
    facts = snapshot.facts(largest)
    for i in range(1, times + 1):
        snapshot = snapshot.after(plan, hashed=False)
        slot = replace(largest, object=largest.object.anew(i, facts))
        manifest = replace(
            plan.manifest,
            parent=snapshot.head,
            sequence=plan.manifest.sequence + 1,
            slots=plan.manifest.with_slot(slot),
        )
        plan = Plan(snapshot.head, manifest, {}, {})
    files = plan.manifest.files
    largest_page = max(len(compressed(data)) for data in files.pages.values() if data is not None)
    return snapshot.at_rest(plan, hashed=False) + len(files.root) + largest_page


def _cures(snapshot: Snapshot, plan: Plan, size: Size) -> Iterator[str]:
    """Yield the options each of which alone would make the plan fit."""
    budget = snapshot.settings.budget
    limit = budget.bytes or 0
    yield f"--bytes {size(snapshot, plan) + EDIT}"

    def kept(keep: int) -> bool:
        settings = replace(snapshot.settings, budget=replace(budget, keep=keep))
        return size(replace(snapshot, settings=settings), plan) <= limit

    def cut(rank: int) -> bool:
        return size(snapshot, _stored(plan, rank)) + EDIT // 2 <= limit

    if (keep := _most(range(budget.keep), kept)) is not None:
        yield f"--keep {keep}"
    if (rank := _most(range(1, max((x.rank for x in plan.writes.values()), default=1)), cut)) is not None:
        yield f"--rank {rank}"
    wide = any(WIDTHS[x.dtype] > WIDTHS["f16"] for x in plan.writes.values())
    if wide and size(snapshot, _stored(plan, dtype="f16")) + EDIT <= limit:
        yield "--dtype f16"


def _most(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the last of rising values that fits, None if the first does not; no value fits after one that does not."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None


def _stored(plan: Plan, rank: int | None = None, dtype: str | None = None) -> Plan:
    """Return the plan with the sizes of its new objects if cut to a rank or stored in a dtype."""

    def size(slot: int, x: Adapter) -> int:
        planned = plan.manifest.slot(slot)
        if not planned.codec.invertible:  # its size does not follow from rank and dtype
            return planned.object.bytes
        return planned.codec.encode(_hollow(x, rank or x.rank, dtype or x.dtype)).size

    sizes = {slot: size(slot, x) for slot, x in plan.writes.items()}

    def resized(slot: Slot) -> Slot:
        history = slot.history
        if rank:  # a cut is recorded, in as many letters as it can take
            history = replace(history, error=math.pi / 10, fixed=f"cut to rank {rank}")
        return replace(slot, object=replace(slot.object, bytes=sizes[slot.id]), history=history)

    slots = tuple(resized(slot) if slot.id in sizes else slot for slot in plan.manifest.slots)
    return replace(plan, manifest=replace(plan.manifest, slots=slots))


def _hollow(x: Adapter, rank: int, dtype: str) -> Adapter:
    """Return an adapter of the same shapes and scales, cut to a rank, with zeros as values."""
    modules = {}
    for path, (dout, r, din) in x.shapes.items():
        cut = min(r, rank)
        a, b = np.zeros((cut, din), np.float32), np.zeros((dout, cut), np.float32)
        modules[path] = Factors(a, b, x.modules.scales[path] if r == cut else 1.0)
    return replace(x, modules=Modules(modules), dtype=dtype)
