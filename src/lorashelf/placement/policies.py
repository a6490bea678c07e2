"""Online rules: where does an arriving adapter go? Pure functions from its scores against the slots to Open, Fold or
Refuse.

kmerge     open while a slot is free, else fold into the most similar (arXiv 2510.13537)
kmerge++   open while a slot is free and the best score is below the threshold, else fold into the most similar
half, random, oracle, all    the paper's baselines, for experiments
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..merging.spec import Weighting
from ..registry import Registry

Scores = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Open:
    """Put the adapter alone into a free slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge the adapter into `slot`: into what the slots `sources` (default: that slot) have averaged so far.

    `weighting` 'mean' counts every averaged adapter the same, 'half' gives the newcomer ½.
    """

    slot: int
    sources: tuple[int, ...] = ()
    weighting: Weighting = "mean"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Leave the shelf as it is."""

    reason: str


Decision = Open | Fold | Refuse


@dataclass(frozen=True)
class View:
    """What a policy may know beside the scores."""

    free: int | None
    """The lowest free slot id, None where a slot or the bytes for one are lacking."""
    threshold: float | None = None
    type: str = ""
    types: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Slot id → the problem types averaged in it."""
    averaged: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """Slot id → digests of the adapters averaged in it."""
    seed: tuple[int, ...] = (0,)

    @cached_property
    def rng(self) -> np.random.Generator:
        """The generator of the seed, made when a policy first draws; later draws go on from it."""
        return np.random.default_rng(self.seed)


Policy = Callable[[Scores, View], Decision]
POLICIES: Registry[Policy] = Registry("policy")
NO_ROOM = "there is no room for a slot of its own, and none to fold into"


def policy(name: str) -> Callable[[Policy], Policy]:
    """Register a function of (scores, view) as policy `name`."""

    def register(function: Policy) -> Policy:
        POLICIES.add(name, function)
        return function

    return register


def nearest(scores: Scores) -> int:
    """The slot with the largest score, ties to the lowest id.

    >>> nearest({0: 0.1, 2: 0.3, 1: 0.3})
    1
    """
    return max(sorted(scores), key=lambda slot: scores[slot])


@policy("kmerge")
def kmerge(scores: Scores, view: View) -> Decision:
    """Open while a slot is free, else fold into the nearest (K-Merge, arXiv 2510.13537, algorithm 1)."""
    if view.free is not None:
        return Open(view.free)
    return Fold(nearest(scores)) if scores else Refuse(NO_ROOM)


@policy("kmerge++")
def kmerge_plus(scores: Scores, view: View) -> Decision:
    """Open while a slot is free and every score < threshold (equal folds), else fold into the nearest (K-Merge++)."""
    if scores and view.threshold is not None and scores[nearest(scores)] >= view.threshold:
        return Fold(nearest(scores))
    return kmerge(scores, view)


@policy("half")
def half(scores: Scores, view: View) -> Decision:
    """As kmerge, but every fold weighs ½, ½: early adapters fade."""
    decision = kmerge(scores, view)
    return Fold(decision.slot, weighting="half") if isinstance(decision, Fold) else decision


@policy("random")
def random(scores: Scores, view: View) -> Decision:
    """Open while a slot is free, else fold into a slot drawn uniformly."""
    decision = kmerge(scores, view)
    return Fold(int(view.rng.choice(sorted(scores)))) if isinstance(decision, Fold) else decision


@policy("oracle")
def oracle(scores: Scores, view: View) -> Decision:
    """Fold into the slot of the same problem type; open for a new type; the nearest when none is free."""
    same = {slot: score for slot, score in scores.items() if view.type in view.types.get(slot, frozenset())}
    return Fold(nearest(same)) if same else kmerge(scores, view)


@policy("all")
def everything(scores: Scores, view: View) -> Decision:
    """Open while a slot is free; then the nearest slot becomes the uniform merge of all that ever arrived ("use all
    models at step").
    """
    decision = kmerge(scores, view)
    if not isinstance(decision, Fold):
        return decision
    everyone = frozenset().union(*view.averaged.values())
    covered: frozenset[str] = frozenset()
    sources = []
    for slot in sorted(scores, key=lambda slot: (-len(view.averaged[slot]), slot)):
        if not covered & view.averaged[slot]:
            covered |= view.averaged[slot]
            sources.append(slot)
    if covered != everyone:
        return Refuse("the slots' histories overlap, so the sum of all adapters cannot be formed from them")
    return Fold(decision.slot, tuple(sorted(sources)))


def median_similarity(matrix: np.ndarray) -> float:
    """The median of all pairwise similarities: the papers' threshold, from held-out adapters ((n, n), n ≥ 2)."""
    return float(np.median(matrix[np.triu_indices(len(matrix), 1)]))


AUTO_DEVIATIONS, AUTO_LEAST = 0.5, 2


def auto_threshold(scores: Sequence[float]) -> float | None:
    """The threshold without held-out adapters: mean + ½ standard deviation of all scores seen, the present arrival's
    included; None below two scores, and where nothing seen was alike.

    A rule of our own, chosen by measurement (docs/methods.md); without a unit, so it carries over to other bases.
    """
    if len(scores) < AUTO_LEAST:
        return None
    threshold = float(np.mean(scores) + AUTO_DEVIATIONS * np.std(scores))
    return threshold if threshold > 0 else None


@dataclass(frozen=True, slots=True)
class PlacementSpec:
    """Where an arriving adapter goes: a policy, and the similarity from which on it folds."""

    policy: str = "kmerge++"
    threshold: float | str = "auto"
    """A similarity, or "auto": the rule of `auto_threshold` on the scores seen."""

    def threshold_for(self, seen: Sequence[float]) -> float | None:
        """The threshold in force once these scores were seen; None for a policy without one."""
        if self.policy != "kmerge++":
            return None
        return auto_threshold(seen) if self.threshold == "auto" else float(self.threshold)

    def document(self) -> dict[str, Any]:
        """As in a manifest and in shelf.toml."""
        return {"policy": self.policy, "threshold": self.threshold}
