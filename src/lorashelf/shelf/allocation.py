"""Which levels of coded objects fit into a budget in bytes: of a plan's new objects, and of the stored ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ..documents.coded import Coarser, Coded
from ..errors import OverBudget, Refused, UsageError
from ..formats.codec import Codec, LevelRate
from ..lora.adapter import in_16_bits
from ..lora.quality import quality
from ..merging.average import Average
from ..placement.rates import Rate, Step, steps
from .budget import EDIT, after_changes
from .plan import Plan
from .slot import PENDING, Slot
from .snapshot import Snapshot


def fitted(snapshot: Snapshot, plan: Plan) -> Plan:
    """Return the plan with every object as fine as the budget allows, if the shelf's policy is `bytes`.

    `plan` has its new objects at their finest. Levels are left out of them, and dropped from stored objects, in the
    order of `placement.rates.steps`, until the shelf fits and can be changed again after the plan. The cause and the
    report get `coarser`: task → {levels, bytes, predicted_quality}, each [before, after], of stored objects. Raises
    OverBudget, which names a sufficient budget, if a task would fall below its floor; Refused for a coded file that
    is below it already; UsageError for a shelf with slots in another encoding; CorruptShelf.
    """
    if not snapshot.settings.placement.by_bytes:
        return plan
    _check_encodings(snapshot, plan)
    return _Allocation(snapshot, plan).plan()


def rate(slot: Slot) -> Coded:
    """Return the `bytes` of a coded slot, their `percent` of its adapters in 16 bits, and, of an adapter alone, the
    `predicted_quality` by the share of ‖ΔW‖² that is kept; None for several.
    """
    whole = in_16_bits(sum(source.parameters for source in slot.history.merged))
    return {
        "bytes": slot.object.bytes,
        "percent": 100 * slot.object.bytes / whole,
        "predicted_quality": quality(1.0 - slot.history.error**2) if len(slot.history.merged) == 1 else None,
    }


def _check_encodings(snapshot: Snapshot, plan: Plan) -> None:
    """Raise UsageError naming every slot that cannot be made coarser; slots in unknown encodings stay as they are."""
    others = [slot for slot in plan.manifest.slots if slot.readable and slot.object.encoding != "coded"]
    if others:
        named = "; ".join(f"slot {slot.id} is {slot.object.encoding}: {', '.join(slot.members)}" for slot in others)
        what = f"policy 'bytes' needs all slots in encoding 'coded': {named}"
        cure = f"make another shelf of it: lorashelf convert {snapshot.path} -o NEW_SHELF --encoding coded --bytes SIZE"
        raise UsageError(what, where=str(snapshot.path), cure=cure)


@dataclass(frozen=True)
class _Allocation:
    """A plan with its objects at their finest, and the ways to make them coarser."""

    snapshot: Snapshot
    finest: Plan

    @cached_property
    def slots(self) -> Sequence[Slot]:
        return [slot for slot in self.finest.manifest.slots if slot.readable]

    @cached_property
    def averages(self) -> Sequence[Average]:
        """The content of each slot at its finest."""
        writes = self.finest.writes
        held = (writes[slot.id] if slot.id in writes else self.snapshot.glanced(slot) for slot in self.slots)
        return [Average(x, slot.history) for x, slot in zip(held, self.slots, strict=True)]

    @cached_property
    def curves(self) -> Sequence[Sequence[Rate]]:
        """The rates of each slot with 1, 2 … of its levels."""
        pairs = zip(self.slots, self.averages, strict=True)
        return [curve(held, slot.codec, len(slot.members)) for slot, held in pairs]

    @cached_property
    def order(self) -> Sequence[Step]:
        """The steps that free bytes, first the one that loses the least quality per byte."""
        floor = self.snapshot.settings.placement.floor
        return steps(self.curves, [floor * len(slot.members) for slot in self.slots])

    def plan(self) -> Plan:
        """Return the finest plan that fits. Raises OverBudget, Refused."""
        self._check_floor()
        limit = self.snapshot.settings.budget.bytes or 0
        for own in self._cuts:
            taken = self._fewest(own, limit)
            if taken is None:
                break
            if self._now(taken, own) <= limit:
                return self._settled(self._counts(taken, own))
        raise self._over(limit)

    def _check_floor(self) -> None:
        """Raise Refused naming every task whose new object is below the floor at its finest: it came coded."""
        floor = self.snapshot.settings.placement.floor
        low = {
            task: curve[-1].quality / len(slot.members)
            for slot, curve in zip(self.slots, self.curves, strict=True)
            for task in slot.members
            if slot.id in self.finest.writes and curve[-1].quality < floor * len(slot.members)
        }
        if low:
            named = ", ".join(f"{task} {quality:.3f}" for task, quality in sorted(low.items()))
            what = f"the predicted quality of what is given is below the floor of {floor:g}: {named}"
            cure = "give finer files or the original adapters, or a lower --floor"
            raise Refused(what, where=str(self.snapshot.path), cure=cure)

    @cached_property
    def _cuts(self) -> Sequence[int]:
        """The numbers of first steps that the new objects take in any case, the least first. They get coarser than the
        slope demands only if dropping levels of stored objects does not free enough, because old states are kept.
        """
        new = [place for place, step in enumerate(self.order, 1) if self.slots[step.object].id in self.finest.writes]
        return [0, *new]

    def _counts(self, taken: int, own: int) -> list[int]:
        """Return the number of levels of each slot after the first `taken` steps, of a new one also the first `own`."""
        counts = [len(curve) for curve in self.curves]
        for place, step in enumerate(self.order):
            if place < taken or (place < own and self.slots[step.object].id in self.finest.writes):
                counts[step.object] = step.levels
        return counts

    def _at(self, taken: int, own: int) -> Plan:
        """Return the plan after these steps, for its size: nothing is decoded."""
        return self._with(self._counts(taken, own), settled=False)

    def _with(self, counts: Sequence[int], settled: bool) -> Plan:
        slots = [slot for slot in self.finest.manifest.slots if not slot.readable]
        writes = dict(self.finest.writes)
        for slot, held, count, curve in zip(self.slots, self.averages, counts, self.curves, strict=True):
            if count == len(curve):
                slots.append(slot)
                continue
            if settled:
                coarse = coarser(held, slot.codec, count)
                writes[slot.id] = coarse.adapter
                slots.append(Slot.planned(slot.id, coarse, slot.members, slot.object.encoding))
            else:
                writes[slot.id] = held.adapter
                files = slot.object.files[:count]
                stored = replace(slot.object, id=PENDING, bytes=curve[count - 1].bytes, files=files)
                history = replace(slot.history, error=error_with(held, slot.codec.rates(held.adapter), count))
                slots.append(replace(slot, object=stored, history=history))
        changed = self._changes(counts)
        cause = {**self.finest.manifest.cause, **({"coarser": changed} if changed else {})}
        manifest = replace(self.finest.manifest, slots=tuple(sorted(slots, key=lambda slot: slot.id)), cause=cause)
        return replace(self.finest, manifest=manifest, writes=writes)

    def _changes(self, counts: Sequence[int]) -> dict[str, Coarser]:
        """Return `coarser` of the report: task → levels, bytes and quality before and after, of stored objects."""
        found: dict[str, Coarser] = {}
        for slot, count, curve in zip(self.slots, counts, self.curves, strict=True):
            if slot.id in self.finest.writes or count == len(curve):
                continue
            before, after, n = curve[-1], curve[count - 1], len(slot.members)
            document: Coarser = {
                "levels": [len(curve), count],
                "bytes": [before.bytes, after.bytes],
                "predicted_quality": [round(before.quality / n, 4), round(after.quality / n, 4)],
            }
            found |= dict.fromkeys(slot.members, document)
        return dict(sorted(found.items()))

    def _settled(self, counts: Sequence[int]) -> Plan:
        """Return the plan as it can be committed. Its report gets `coarser`, and `coded`: task → rate of its object,
        where that is new or new to the task.
        """
        plan = self._with(counts, settled=True)
        served = {task: slot.id for slot in self.snapshot.manifest.slots for task in slot.members}
        own = {
            task: rate(slot)
            for slot in plan.manifest.slots
            for task in slot.members
            if slot.id in self.finest.writes or served.get(task) != slot.id
        }
        return replace(plan, report={**plan.report, "coded": own, "coarser": self._changes(counts)})

    def _fewest(self, own: int, limit: int) -> int | None:
        """Return the least number of steps after which the shelf can be changed again within the limit; None if not
        even all suffice. Sizes fall nearly as payloads do, so few of them are computed.
        """
        low, high, guess = -1, len(self.order) + 1, 0
        while high - low > 1:
            guess = min(max(guess, low + 1), high - 1)
            excess = self._later(guess, own) - limit
            if excess <= 0:
                high = guess
            else:
                low = guess
            guess = self._after(guess, own, excess)
        return None if high > len(self.order) else high

    def _after(self, taken: int, own: int, excess: int) -> int:
        """Return about the number of steps that free `excess` bytes more than `taken` do, or fewer if negative."""
        freed = [0]
        for place, step in enumerate(self.order):
            counted = not (place < own and self.slots[step.object].id in self.finest.writes)
            freed.append(freed[-1] + (step.bytes if counted else 0))
        goal = freed[taken] + excess
        return next((place for place, total in enumerate(freed) if total >= goal), len(self.order))

    def _now(self, taken: int, own: int) -> int:
        """Return the bytes under the shelf after the plan with these steps. More steps free nothing while the states
        before are kept.
        """
        return self.snapshot.at_rest(self._at(taken, own), hashed=False)

    def _later(self, taken: int, own: int) -> int:
        """Return the bytes under the shelf after `keep` further changes, which fall with every step."""
        if not (self.slots and self.snapshot.settings.budget.keep):
            return self._now(taken, own)
        return after_changes(self.snapshot, self._at(taken, own))

    def _over(self, limit: int) -> OverBudget:
        """Return the error, with the least budget that the plan fits into."""
        own = len(self.order)
        low, high = 0, own  # where the plan and what comes after it take the same: more steps record more changes
        while low < high:
            middle = (low + high) // 2
            reached = self._now(middle, own) >= self._later(middle, own)
            low, high = (low, middle) if reached else (middle + 1, high)
        tried = {low, max(low - 1, 0)} if self.snapshot.settings.budget.keep else {own}
        needed = 2 * EDIT + min(max(self._now(taken, own), self._later(taken, own)) for taken in tried)
        floor = self.snapshot.settings.placement.floor
        what = f"with every task at a predicted quality of at least {floor:g} (floor), and room to change a task again"
        return OverBudget(
            f"{what}, the shelf would take {needed} bytes; the budget is {limit}",
            where=str(self.snapshot.path),
            cure=f"give --bytes {needed}, or a lower --floor, by lorashelf set SHELF or where the shelf is made",
        )


def curve(average: Average, codec: Codec, tasks: int = 1) -> Sequence[Rate]:
    """Return the rates of an object with 1, 2 … of its levels, which serves this number of tasks."""
    levels = codec.rates(average.adapter)
    sizes = accumulate(level.bytes for level in levels)
    errors = [error_with(average, levels, count) for count in range(1, len(levels) + 1)]
    return [Rate(n, quality(1.0 - error**2) * tasks) for n, error in zip(sizes, errors, strict=True)]


def coarser(average: Average, codec: Codec, count: int) -> Average:
    """Return the average with the first `count` levels of its content."""
    error = error_with(average, codec.rates(average.adapter), count)
    return Average(codec.coarser(average.adapter, count), replace(average.history, error=error))


def error_with(average: Average, levels: Sequence[LevelRate], count: int) -> float:
    """Return the relative error with the first `count` levels: what was left out before the coding stays left out."""
    if count == len(levels):
        return average.history.error
    before = 1.0 - average.history.error**2
    cut = min(before / levels[-1].kept, 1.0) if levels[-1].kept else 1.0
    return math.sqrt(max(1.0 - cut * levels[count - 1].kept, 0.0))
