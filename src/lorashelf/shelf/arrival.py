"""An adapter that arrives at a shelf: the candidate actions, and the plan of the one that the policy picks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any

from ..errors import OverBudget, TaskNameError, UsageError
from ..execution import beside
from ..lora.adapter import Adapter
from ..lora.alignment import shared
from ..lora.given import as_adapter
from ..lora.kernels import squared_norms
from ..lora.similarity import init_similarity, similarity
from ..merging import METHODS
from ..merging.average import Average, Source, alone, fold, source
from ..names import task_name
from ..placement import policies
from ..placement.actions import Action, Candidate, Effect, Fold, Open, Refuse, folds, nearest
from .allocation import fitted
from .budget import Shortage, check_budget, shortage_of_room
from .manifest import Manifest
from .plan import Plan
from .plan_parts import agreed_base, all_damage, kind_of, planned, storable
from .slot import Slot
from .snapshot import Snapshot

MAX_SCORES = 256  # arrival scores that a manifest holds for the automatic threshold


def plan_add(
    snapshot: Snapshot,
    adapter: Adapter,
    task: str,
    *,
    type: str | None = None,
    details: Mapping[str, Any] | None = None,
    assume_base: bool = False,
) -> Plan:
    """Plan where an arriving adapter goes and what its slot becomes (K-Merge, K-Merge++ …, by the shelf's settings).

    `type` is the problem type (default: the name before the first "-"); `details` are stored with the task. Raises
    TaskNameError, BaseMismatch, ShapeMismatch. If the policy or the budget refuses, the plan has `refused` set.
    """
    return _arrival(snapshot, adapter, task, type, details, assume_base).decided()


def candidates(
    snapshot: Snapshot,
    adapter: Adapter,
    task: str,
    *,
    type: str | None = None,
    assume_base: bool = False,
) -> list[Candidate]:
    """Return what can be done with an arriving adapter: a new slot, if one is free and fits into the bytes, and a fold
    into each slot that holds a trained adapter. What an action would write, and the bytes of the shelf after it, are
    computed on demand. Raises as `plan_add`.
    """
    return _arrival(snapshot, adapter, task, type, None, assume_base).candidates


def _arrival(
    snapshot: Snapshot,
    adapter: Adapter,
    task: str,
    type: str | None,
    details: Mapping[str, Any] | None,
    assume_base: bool,
) -> Arrival:
    """Compare the adapter with the content of the shelf. Raises as `plan_add`."""
    task = task_name(task)
    manifest, settings = snapshot.manifest, snapshot.settings
    if task in manifest.tasks:
        cure = "choose another name, or lorashelf update / remove the task first"
        raise TaskNameError(f"task {task!r} is already on the shelf", where=str(snapshot.path), cure=cure)
    adapter = as_adapter(adapter)
    details = storable(task, details or {})
    kind = kind_of(task, type, details.pop("type", None))
    with all_damage(snapshot), beside(lambda: adapter.digest):  # needed below
        by_bytes = settings.placement.by_bytes  # then nothing depends on similarity
        held = {s.id: snapshot.glanced(s) if by_bytes else snapshot.stored(s) for s in manifest.slots if s.readable}
        base = agreed_base(snapshot, {task: adapter}, list(held.values()), assume_base)
        squared_norms(adapter)  # likewise
        metric = settings.placement.similarity
        values = similarity([adapter], list(held.values()), metric)[0] if held and not by_bytes else []
    scores = {slot: float(score) for slot, score in zip(held, values, strict=not by_bytes)}
    same = next((s.id for s in manifest.slots if s.readable and adapter.digest in s.history.digests), None)
    record = source(task, kind, adapter)
    if same is None and not record.norm and scores:  # untrained: a new slot would be wasted on it
        same = nearest([Candidate.folding(slot, score) for slot, score in scores.items()]).action.slot
    seen = manifest.scores if same is not None else (*manifest.scores, *scores.values())
    known = replace(
        manifest,
        base=base,
        tasks=dict(sorted({**manifest.tasks, task: {**details, "type": kind, "digest": adapter.digest}}.items())),
        arrived=manifest.arrived + 1,
        # once all slots are filled, nothing depends on a threshold
        scores=(seen if len(manifest.slots) < (settings.budget.slots or 0) else manifest.scores)[-MAX_SCORES:],
    )
    return Arrival(snapshot, adapter, record, known, held, scores, settings.placement.threshold_for(seen), same)


@dataclass(frozen=True)
class Arrival:
    """An adapter compared with the content of a shelf."""

    snapshot: Snapshot
    adapter: Adapter
    record: Source
    known: Manifest
    """The manifest with the task, not yet routed."""
    held: Mapping[int, Adapter]
    scores: Mapping[int, float]
    threshold: float | None
    same: int | None
    """The slot that averages this adapter already, or the nearest for an untrained one: only a route is new."""
    plans: dict[Action, Plan] = field(default_factory=dict, repr=False)

    @property
    def report(self) -> dict[str, Any]:
        """The part of the command's report that does not depend on the decision."""
        scores = {str(slot): score for slot, score in self.scores.items()}
        untrained = {} if self.record.norm else {"untrained": True}
        return {"task": self.record.task, "scores": scores, "threshold": self.threshold, **untrained}

    @cached_property
    def trained(self) -> list[Slot]:
        """The slots that hold a trained adapter and can be read."""
        return [slot for slot in self.snapshot.manifest.slots if slot.id in self.held and slot.history.trained]

    @cached_property
    def free(self) -> int | None:
        """The lowest slot that is empty, or holds untrained adapters only and may be shared; None without any."""
        alone = self.snapshot.settings.placement.by_bytes
        filled = {s.id for s in self.snapshot.manifest.slots if alone or s.history.trained or not s.readable}
        slots = self.snapshot.settings.budget.slots
        return next((i for i in (count() if slots is None else range(slots)) if i not in filled), None)

    @cached_property
    def shortage(self) -> Shortage | OverBudget | None:
        """The bytes missing for a new slot, as a Shortage; None if a new slot fits, or if no slot is free."""
        if self.free is None or self.snapshot.settings.budget.bytes is None:
            return None
        if self.snapshot.settings.placement.by_bytes:
            try:
                self.plan(Open(self.free))
            except OverBudget as error:
                return error
            return None
        return shortage_of_room(self.snapshot, self.plan(Open(self.free)))

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The result of `candidates`."""
        opening = [] if self.free is None or self.shortage else [Candidate.opening(self.free, self.effect)]
        return [*opening, *self._folds]

    @cached_property
    def _folds(self) -> list[Candidate]:
        compared = [slot.id for slot in self.trained if slot.id in self.scores]
        return [Candidate.folding(slot, self.scores[slot], self.effect) for slot in compared]

    def effect(self, action: Action) -> Effect:
        """Return what an action would write, and the bytes of the shelf after it."""
        plan = self.plan(action)
        return Effect(plan.writes, self.snapshot.at_rest(plan))

    def decided(self) -> Plan:
        """Plan the candidate that the policy picks, or a refusal. Raises UsageError for an action not offered."""
        if self.same is not None:
            return self._within_budget(self._arrived(Fold(self.same), None))
        manifest, settings = self.snapshot.manifest, self.snapshot.settings
        view = policies.View(
            threshold=self.threshold,
            type=self.record.type,
            types={slot.id: frozenset(m.type for m in slot.history.merged) for slot in self.trained},
            averaged={slot.id: slot.history.digests for slot in self.trained},
            seed=(settings.merge.seed, manifest.arrived),
        )
        decide = policies.POLICIES[settings.placement.policy]
        chosen = decide(self.candidates, view)
        if isinstance(chosen, Refuse):
            opens = self.free is not None and not self.shortage
            return self._refused(chosen.reason + ("" if opens else f"; {self._no_room()}"))
        self._check_offered(chosen.action)
        if isinstance(chosen.action, Open):
            return self.plan(chosen.action)
        plan = self.plan(chosen.action)
        if self.shortage and self.free is not None:
            wanted = decide([Candidate.opening(self.free, self.effect), *self._folds], view)
            if isinstance(wanted, Candidate) and isinstance(wanted.action, Open):
                plan = replace(plan, report={**plan.report, "reason": self.shortage.what})
        return self._within_budget(plan)

    def plan(self, action: Action) -> Plan:
        """Plan an action, once."""
        if action not in self.plans:
            self.plans[action] = self._opened(action) if isinstance(action, Open) else self._folded(action)
        return self.plans[action]

    def _opened(self, action: Open) -> Plan:
        new = alone(self.adapter, self.record, self.snapshot.settings.merge)
        return fitted(self.snapshot, self._arrived(action, new))

    def _folded(self, action: Fold) -> Plan:
        into = action.sources or (action.slot,)
        sources = [self.snapshot.average(self.snapshot.manifest.slot(i)) for i in into]
        new = fold(sources, self.adapter, self.record, self.snapshot.settings.merge, action.weighting)
        squared_norms(new.adapter)  # needed below
        plan = self._arrived(action, new)
        both = [*(self.held[i] for i in into), self.adapter]
        about: dict[str, Any] = {"shared": shared(both), "norm_ratio": new.norm_ratio / new.history.restored}
        if METHODS[self.snapshot.settings.merge.method].sums_shared_init:
            about["init_similarity"] = init_similarity(both)
        return replace(plan, report={**plan.report, **about})

    def _check_offered(self, action: Action) -> None:
        """Raise UsageError for an action that is not among the candidates."""
        offered = {candidate.action for candidate in self.candidates}
        slots = {candidate.action.slot for candidate in folds(self.candidates)}
        if action in offered or (isinstance(action, Fold) and {action.slot, *action.sources} <= slots):
            return
        name = self.snapshot.settings.placement.policy
        raise UsageError(f"policy {name!r} returned {action}", cure="return one of the candidates")

    def _arrived(self, action: Action, new: Average | None) -> Plan:
        """Return the plan of an add with this action; without `new` content the task is only routed."""
        settings, known, report = self.snapshot.settings, self.known, self.report
        kind = "open" if isinstance(action, Open) else "fold"
        before = next((slot for slot in known.slots if slot.id == action.slot), None)
        members = tuple(sorted([*(before.members if before else ()), self.record.task]))
        cause = {"operation": "add", "decision": kind, "slot": action.slot, "seed": settings.merge.seed, **report}
        if new:
            slot = Slot.planned(action.slot, new, members, settings.merge.encoding)
        else:
            slot = replace(known.slot(action.slot), members=members)
        writes = {action.slot: new.adapter} if new else {}
        report |= {"decision": kind, "slot": action.slot, "members": list(members), "merged": new is not None}
        report |= {"reversible": slot.history.irreversible is None}
        return planned(self.snapshot, replace(known, slots=known.with_slot(slot)), writes, cause, report)

    def _within_budget(self, plan: Plan) -> Plan:
        """Return the plan fitted into the budget, or a refusal."""
        try:
            plan = fitted(self.snapshot, plan)
            check_budget(self.snapshot, plan)
        except OverBudget as error:
            return self._refused(f"{error.what}; {error.cure}")
        return plan

    def _refused(self, reason: str) -> Plan:
        report = {**self.report, "decision": "refuse", "slot": None, "members": [], "merged": False}
        report |= {"reversible": None, "reason": reason}
        return Plan(self.snapshot.head, self.snapshot.manifest, {}, report, refused=reason)

    def _no_room(self) -> str:
        """Return why no slot can be opened, and the cure."""
        if self.shortage:
            error = self.shortage if isinstance(self.shortage, OverBudget) else self.shortage.error
            return f"{error.what}; {error.cure}"
        held = len(self.snapshot.manifest.slots)
        filled = f"all {held} slots are filled" if held > 1 else "the one slot is filled"
        return f"{filled}; raise budget.slots in shelf.toml"
