"""What can be done with an arriving adapter: actions, and candidates that a policy picks one of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ..lora.adapter import Adapter
from ..merging.spec import Weighting


@dataclass(frozen=True, slots=True)
class Open:
    """Put the adapter alone into a free slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge the adapter into `slot`: into what the slots `sources` (default: that slot) have averaged so far.

    `weighting` "mean" counts every averaged adapter the same, "half" gives the newcomer ½.
    """

    slot: int
    sources: tuple[int, ...] = ()
    weighting: Weighting = "mean"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Leave the shelf as it is."""

    reason: str


Action = Open | Fold


class Effect(NamedTuple):
    """What an action would do to the shelf."""

    writes: Mapping[int, Adapter]
    """Slot → the adapter that is written there."""
    bytes: int
    """Everything under the shelf, at rest."""


@dataclass(frozen=True)
class Candidate:
    """An action with the quality that it is predicted to keep; its effect is worked out when it is asked for."""

    action: Action
    quality: float
    """Predicted share of the adapter that is kept, higher is better: 1 in a slot of its own; in a fold (1 + s) / 2 for
    the similarity s, the energy that an equal average of two adapters of one norm keeps of each.
    """
    score: float | None = None
    """Similarity to what the slot of a fold holds."""
    work_out: Callable[[Action], Effect] | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def opening(slot: int, work_out: Callable[[Action], Effect] | None = None) -> Candidate:
        """A slot of its own."""
        return Candidate(Open(slot), 1.0, None, work_out)

    @staticmethod
    def folding(slot: int, score: float, work_out: Callable[[Action], Effect] | None = None) -> Candidate:
        """A fold into a slot that is similar by `score`."""
        return Candidate(Fold(slot), (1.0 + score) / 2, score, work_out)

    @cached_property
    def effect(self) -> Effect:
        """What it would write, and the bytes of the shelf after it. Costs the merge of a fold."""
        if self.work_out is None:
            raise TypeError("this candidate stands for no shelf")
        return self.work_out(self.action)

    @property
    def writes(self) -> Mapping[int, Adapter]:
        """Slot → the adapter that is written there."""
        return self.effect.writes

    @property
    def bytes(self) -> int:
        """Everything under the shelf after it, at rest."""
        return self.effect.bytes


def openings(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that take a slot of their own."""
    return [candidate for candidate in candidates if isinstance(candidate.action, Open)]


def folds(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that merge into a slot."""
    return [candidate for candidate in candidates if isinstance(candidate.action, Fold)]


def nearest(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of the largest score, ties to the lowest slot.

    >>> nearest([Candidate.folding(0, 0.1), Candidate.folding(2, 0.3), Candidate.folding(1, 0.3)]).action.slot
    1
    """
    return max(candidates, key=lambda candidate: (candidate.score or 0.0, -candidate.action.slot))


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of the highest quality; a free slot before any fold, then as `nearest`."""
    return (openings(candidates) or [nearest(candidates)])[0]
