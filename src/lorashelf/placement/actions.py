"""Actions for an arriving adapter, and the candidates from which a policy picks one."""

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
    """Merge the adapter with the averages of the slots `sources` (default: that slot), and store the result in `slot`.

    `weighting` "mean" weights all averaged adapters equally, "half" gives the arriving adapter ½.
    """

    slot: int
    sources: tuple[int, ...] = ()
    weighting: Weighting = "mean"


@dataclass(frozen=True, slots=True)
class Refuse:
    """Leave the shelf unchanged."""

    reason: str


Action = Open | Fold


class Effect(NamedTuple):
    """What an action would do to the shelf."""

    writes: Mapping[int, Adapter]
    """Slot → the adapter written there."""
    bytes: int
    """Bytes of all files of the shelf, at rest."""


@dataclass(frozen=True)
class Candidate:
    """An action with its predicted quality; the effect is computed on first use."""

    action: Action
    quality: float
    """Predicted share of the adapter that is kept, higher is better: 1 in its own slot; in a fold (1 + s) / 2 with the
    similarity s, the share of ‖ΔW‖² that an equal average of two adapters of equal norm keeps of each.
    """
    score: float | None = None
    """Similarity to the adapter in a fold's slot."""
    work_out: Callable[[Action], Effect] | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def opening(slot: int, work_out: Callable[[Action], Effect] | None = None) -> Candidate:
        """Return the candidate that opens a slot."""
        return Candidate(Open(slot), 1.0, None, work_out)

    @staticmethod
    def folding(slot: int, score: float, work_out: Callable[[Action], Effect] | None = None) -> Candidate:
        """Return the candidate that folds into a slot with similarity `score`."""
        return Candidate(Fold(slot), (1.0 + score) / 2, score, work_out)

    @cached_property
    def effect(self) -> Effect:
        """The writes and the bytes of the shelf afterwards. For a fold this costs a merge."""
        if self.work_out is None:
            raise TypeError("this candidate does not belong to a shelf")
        return self.work_out(self.action)

    @property
    def writes(self) -> Mapping[int, Adapter]:
        """Slot → the adapter written there."""
        return self.effect.writes

    @property
    def bytes(self) -> int:
        """Bytes of all files of the shelf afterwards, at rest."""
        return self.effect.bytes


def openings(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that open a slot."""
    return [candidate for candidate in candidates if isinstance(candidate.action, Open)]


def folds(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that fold into a slot."""
    return [candidate for candidate in candidates if isinstance(candidate.action, Fold)]


def nearest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the highest score, ties to the lowest slot.

    >>> nearest([Candidate.folding(0, 0.1), Candidate.folding(2, 0.3), Candidate.folding(1, 0.3)]).action.slot
    1
    """
    return max(candidates, key=lambda candidate: (candidate.score or 0.0, -candidate.action.slot))


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate with the highest quality: a free slot before any fold, then as `nearest`."""
    return (openings(candidates) or [nearest(candidates)])[0]
