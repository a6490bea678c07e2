"""Which objects get coarser, and in what order, when bytes run short: one slope, quality lost per byte, for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Rate(NamedTuple):
    """What an object takes and keeps with some of its levels."""

    bytes: int
    quality: float
    """Predicted share of what the adapter does, times the number of tasks that the object serves."""


class Step(NamedTuple):
    """One object gets coarser: to its first `levels` levels, which frees `bytes`."""

    object: int
    levels: int
    bytes: int
    slope: float
    """Quality lost per byte freed."""


def steps(curves: Sequence[Sequence[Rate]], floors: Sequence[float]) -> list[Step]:
    """How to free bytes at the least loss of quality: the first k steps together are the best choice of levels at the
    slope of the k-th, for every k.

    `curves[i]` has what object i takes and keeps with 1, 2 … of its levels; with fewer than it has, it keeps at least
    `floors[i]`. Levels between which a line from a finer to a coarser one passes above are skipped: a sum of qualities
    is best, for its bytes, where all objects stand on the upper hulls of their curves and lose the same per byte.
    """
    found = [step for i, curve in enumerate(curves) for step in _hull(i, curve, floors[i])]
    return sorted(found, key=lambda step: (step.slope, step.object, -step.levels))


def _hull(place: int, curve: Sequence[Rate], floor: float) -> Iterator[Step]:
    """The steps of one object, from its finest rate down; their slopes never fall."""
    here, slope = len(curve) - 1, 0.0
    while lower := [i for i in range(here) if curve[i].quality >= floor and curve[i].bytes < curve[here].bytes]:

        def loss(i: int, here: int = here) -> float:
            return (curve[here].quality - curve[i].quality) / (curve[here].bytes - curve[i].bytes)

        nearest = min(lower, key=lambda i: (loss(i), i))
        slope = max(slope, loss(nearest))  # rounding
        yield Step(place, nearest + 1, curve[here].bytes - curve[nearest].bytes, slope)
        here = nearest
