"""The order in which objects get coarser as space runs out: one slope, quality lost per byte, for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Rate(NamedTuple):
    """The bytes and the quality of an object with some of its levels."""

    bytes: int
    quality: float
    """Predicted share of the gain in loss that is kept, times the number of tasks that the object serves."""


class Step(NamedTuple):
    """One object gets coarser: to its first `levels` levels, which frees `bytes`."""

    object: int
    levels: int
    bytes: int
    slope: float
    """Quality lost per byte freed."""


def steps(curves: Sequence[Sequence[Rate]], floors: Sequence[float]) -> list[Step]:
    """Return steps that free bytes at the least loss of quality: for every k, the first k steps together are the best
    choice of levels at the slope of the k-th.

    `curves[i]` holds the rates of object i with 1, 2 … of its levels; when levels are dropped, it keeps at least
    `floors[i]`. Levels below the upper hull of a curve are skipped: a sum of qualities is largest for its bytes if all
    objects are on the hulls of their curves and lose the same quality per byte.
    """
    found = [step for i, curve in enumerate(curves) for step in _hull(i, curve, floors[i])]
    return sorted(found, key=lambda step: (step.slope, step.object, -step.levels))


def _hull(place: int, curve: Sequence[Rate], floor: float) -> Iterator[Step]:
    """Yield the steps of one object from its finest rate down, with non-decreasing slopes."""
    here, slope = len(curve) - 1, 0.0
    while lower := [i for i in range(here) if curve[i].quality >= floor and curve[i].bytes < curve[here].bytes]:

        def loss(i: int, here: int = here) -> float:
            return (curve[here].quality - curve[i].quality) / (curve[here].bytes - curve[i].bytes)

        nearest = min(lower, key=lambda i: (loss(i), i))
        slope = max(slope, loss(nearest))  # rounding
        yield Step(place, nearest + 1, curve[here].bytes - curve[nearest].bytes, slope)
        here = nearest
