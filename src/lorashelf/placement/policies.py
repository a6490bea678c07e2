"""Online rules: a policy picks one of the candidates for an arriving adapter, or refuses.

kmerge     open while a slot is free, else fold into the most similar (arXiv 2510.13537)
kmerge++   open while a slot is free and the best score is below the threshold, else fold into the most similar
bytes      one coded object per task; stored ones get coarser as space runs out (no slots)
half, random, oracle, all    the paper's baselines, for experiments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from ..registry import Registry
from .actions import Candidate, Fold, Refuse, best, folds, openings


@dataclass(frozen=True)
class View:
    """What a policy may use besides the candidates."""

    threshold: float | None = None
    type: str = ""
    types: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Slot id → the problem types averaged in it."""
    averaged: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Slot id → digests of the adapters averaged in it."""
    seed: tuple[int, ...] = (0,)

    @cached_property
    def rng(self) -> np.random.Generator:
        """The generator of the seed, created at the first draw; later draws continue it."""
        return np.random.default_rng(self.seed)


Policy = Callable[[Sequence[Candidate], View], Candidate | Refuse]
POLICIES: Registry[Policy] = Registry("policy")
BYTES = "bytes"
"""The policy of a shelf of bytes instead of slots."""
COSINE = "cosine"
NO_OBJECT = "one more object does not fit"
NO_ROOM = "no slot can be opened, and none can be folded into"


def policy(name: str) -> Callable[[Policy], Policy]:
    """Register a function of (candidates, view) as policy `name`. The candidates are a free slot, if there is one and
    the bytes suffice, and a fold into each slot; the function returns one of them, or Refuse.
    """

    def register(function: Policy) -> Policy:
        POLICIES.add(name, function)
        return function

    return register


@policy("kmerge")
def kmerge(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Open while a slot is free, else fold into the nearest (K-Merge, arXiv 2510.13537, algorithm 1)."""
    return best(candidates) if candidates else Refuse(NO_ROOM)


@policy("kmerge++")
def kmerge_plus(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Open while a slot is free and every score < threshold (equal folds), else fold into the nearest (K-Merge++)."""
    alike = [c for c in folds(candidates) if view.threshold is not None and (c.score or 0.0) >= view.threshold]
    return kmerge(alike or candidates, view)


@policy("half")
def half(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Choose like kmerge, but fold with weights ½, ½: early adapters fade."""
    chosen = kmerge(candidates, view)
    return _with(chosen, weighting="half") if _is_fold(chosen) else chosen


@policy("random")
def random(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Open while a slot is free, else fold into a slot drawn uniformly."""
    chosen = kmerge(candidates, view)
    if not _is_fold(chosen):
        return chosen
    by_slot = {candidate.action.slot: candidate for candidate in folds(candidates)}
    return by_slot[int(view.rng.choice(sorted(by_slot)))]


@policy("oracle")
def oracle(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Fold into the slot of the same problem type; open for a new type; fold into the nearest if no slot is free."""
    same = [c for c in folds(candidates) if view.type in view.types.get(c.action.slot, frozenset())]
    return kmerge(same or candidates, view)


@policy("all")
def everything(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Open while a slot is free; then make the nearest slot the uniform merge of all adapters so far ("use all models
    at step").
    """
    chosen = kmerge(candidates, view)
    if not _is_fold(chosen):
        return chosen
    everyone = frozenset().union(*view.averaged.values())
    covered: frozenset[str] = frozenset()
    sources = []
    slots = [candidate.action.slot for candidate in folds(candidates)]
    for slot in sorted(slots, key=lambda slot: (-len(view.averaged[slot]), slot)):
        if not covered & view.averaged[slot]:
            covered |= view.averaged[slot]
            sources.append(slot)
    if covered != everyone:
        return Refuse("the slots' histories overlap, so the sum of all adapters cannot be formed from them")
    return _with(chosen, sources=tuple(sorted(sources)))


@policy(BYTES)
def own_object(candidates: Sequence[Candidate], view: View) -> Candidate | Refuse:
    """Open an object per adapter, as fine as the bytes allow; never fold."""
    return next(iter(openings(candidates)), Refuse(NO_OBJECT))


def _is_fold(chosen: Candidate | Refuse) -> TypeGuard[Candidate]:
    return isinstance(chosen, Candidate) and isinstance(chosen.action, Fold)


def _with(chosen: Candidate, **changes: Any) -> Candidate:
    """Return the candidate with its fold changed."""
    return replace(chosen, action=replace(chosen.action, **changes))


def median_similarity(matrix: np.ndarray) -> float:
    """Return the median of all pairwise similarities, (n, n), n ≥ 2: the papers' threshold, from held-out adapters."""
    return float(np.median(matrix[np.triu_indices(len(matrix), 1)]))


AUTO_DEVIATIONS, AUTO_LEAST = 0.5, 2


def auto_threshold(scores: Sequence[float]) -> float | None:
    """Return the threshold without held-out adapters: mean + ½ standard deviation of all scores so far, the present
    arrival's included; None for fewer than two scores, and if the result is not positive.

    Our own rule, chosen by measurement (docs/methods.md); it has no unit, so it applies to other bases as well.
    """
    if len(scores) < AUTO_LEAST:
        return None
    threshold = float(np.mean(scores) + AUTO_DEVIATIONS * np.std(scores))
    return threshold if threshold > 0 else None


@dataclass(frozen=True, slots=True)
class PlacementSpec:
    """Where an arriving adapter goes: a policy, and the least similarity for a fold."""

    policy: str = "kmerge++"
    threshold: float | str = "auto"
    """A similarity, or "auto": the rule of `auto_threshold` on the scores seen."""
    floor: float = 0.8
    """With policy `bytes`, the least predicted quality of a task."""
    similarity: str = COSINE
    """The metric of lora/similarity.py that scores are of; the papers' is the cosine."""

    @property
    def by_bytes(self) -> bool:
        """Whether the shelf counts bytes instead of slots."""
        return self.policy == BYTES

    def threshold_for(self, seen: Sequence[float]) -> float | None:
        """Return the threshold after these scores; None for a policy without one."""
        if self.policy != "kmerge++":
            return None
        return auto_threshold(seen) if self.threshold == "auto" else float(self.threshold)

    def document(self) -> dict[str, Any]:
        """Return the document for a manifest and shelf.toml."""
        floor = {"floor": self.floor} if self.by_bytes else {}
        metric = {} if self.similarity == COSINE else {"similarity": self.similarity}
        return {"policy": self.policy, "threshold": self.threshold, **floor, **metric}
