"""Other factors of the same ΔW, for formats that have one scale or one rank for all modules."""

from __future__ import annotations

import math

import numpy as np

from .adapter import Adapter, Factors


def folded(f: Factors, scale: float = 1.0) -> Factors:
    """Return factors of the same ΔW with this scale: B is multiplied by the quotient of the scales, and a power of two
    moves from one side to the other, so that both have the same range and 16 bits hold as much of it as possible.
    """
    a, b = f.a, f.b * np.float32(f.scale / scale)
    tops = [float(np.abs(side).max()) for side in (a, b)]
    if not all(0 < top < math.inf for top in tops):
        return Factors(a, b, scale)
    shift = round((math.log2(tops[0]) - math.log2(tops[1])) / 2)
    return Factors(np.ldexp(a, -shift), np.ldexp(b, shift), scale)


def uniform(adapter: Adapter) -> Adapter:
    """Return the same ΔW with one rank and one scale: factors of smaller rank are padded with zeros; if the scales of
    the modules differ, they are folded into B, and the scale is 1.
    """
    scales = set(adapter.modules.scales.values())
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank, modules = adapter.rank, adapter.modules
    same = {path: f if f.scale == scale else folded(f, scale) for path, f in modules.items()}
    return adapter.with_factors({path: padded(f, rank) for path, f in same.items()})


def padded(f: Factors, rank: int) -> Factors:
    """Return factors of the same ΔW with this rank, at least their own: zeros are added."""
    lacking = rank - f.shape.rank
    return Factors(np.pad(f.a, ((0, lacking), (0, 0))), np.pad(f.b, ((0, 0), (0, lacking))), f.scale)
