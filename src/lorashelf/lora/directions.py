"""An adapter as directions: ΔW_m = Σ σ u vᵀ of every module, its sides u and v scaled to entries of unit variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .adapter import Adapter, Factors
from .algebra import decomposed
from .arrays import Array32, Float32, Int, Positions, Vector
from .quantiser import LIMIT, TOTAL, UNIT, quantiser, refining_tables, start_table

CELLS = 384
"""Cells of a side's histogram, each 1/64 wide; one more holds what is larger."""
_OUTLIER_BITS = 32.0
_RELATIVE = 1e-7  # singular values below this share of the largest of their module are rounding


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One module: σ (n,) descending, √dout u as (n, dout) and √din v as (n, din), float32."""

    sigma: Vector
    u: Float32[Array32, "n dout"]
    v: Float32[Array32, "n din"]

    def __len__(self) -> int:
        return len(self.sigma)


def spectrum(f: Factors) -> Spectrum:
    """The singular value decomposition of one ΔW, from its factors; n is its rank, 0 where ΔW is 0."""
    u, sigma, v = decomposed(f)
    count = int(np.sum(sigma > _RELATIVE * sigma[0])) if sigma[0] > 0 else 0
    sides = ((side[:, :count].T * np.sqrt(len(side))).astype(np.float32) for side in (u, v))
    return Spectrum(sigma[:count], *map(np.ascontiguousarray, sides))


@dataclass(frozen=True, eq=False)
class Sides:
    """What rates and distortions of n sides are estimated from: how many magnitudes fall into each cell, their sums."""

    counts: Float32[Array32, "n cells"]
    sums: Float32[Array32, "n cells"]
    lengths: Vector

    def estimate(self, chain: tuple[int, ...], rows: Int[Positions, " n"] | None = None) -> tuple[Vector, Vector]:
        """Bits under the chain's start quantiser or last refinement, and cos² between sides and what they are coded
        as; (n,) each, of all sides or of some.
        """
        counts, sums = (x if rows is None else x[rows] for x in (self.counts, self.sums))
        lengths = self.lengths if rows is None else self.lengths[rows]
        bits, centres = _per_cell(chain)
        cross, square = sums @ centres, counts @ centres**2
        kept = np.divide(cross**2, square * lengths, out=np.zeros(len(cross)), where=square > 0)
        return (counts @ bits).astype(np.float64), np.minimum(kept, 1.0)


@cache
def _per_cell(chain: tuple[int, ...]) -> tuple[Float32[Array32, " cells"], Float32[Array32, " cells"]]:
    """Bits and centre of a magnitude in each cell."""
    q, middles = quantiser(chain), (np.arange(CELLS) * 2 + 1) * (LIMIT // CELLS // 2)
    bins = np.searchsorted(q.edges, middles, side="right")
    centres = np.append(q.centres[bins], LIMIT * 5 // 4) / UNIT
    if len(chain) == 1:
        bits = -np.log2(start_table(chain) / TOTAL)
        per_bin = np.append(bits[0], bits[1:-2:2])
        return np.append(per_bin[bins], _OUTLIER_BITS).astype(np.float32), centres.astype(np.float32)
    inner, outer = (-np.log2(table / TOTAL) for table in refining_tables(chain))
    per_bin = np.concatenate([inner[:2], outer.ravel()])
    return np.append(per_bin[bins], 0).astype(np.float32), centres.astype(np.float32)


def histogram(sides: Sequence[Float32[Array32, "_n _d"]]) -> Sides:
    """The histograms of sides, each (n, d) of one module, one after the other."""
    counts, sums = [], []
    for x in sides:
        magnitudes = np.abs(x)
        cells = np.minimum(magnitudes * np.float32(CELLS / 6), CELLS).astype(np.intp)
        cells += np.arange(len(x))[:, None] * (CELLS + 1)
        size = len(x) * (CELLS + 1)
        counts.append(np.bincount(cells.ravel(), minlength=size).reshape(len(x), CELLS + 1))
        sums.append(np.bincount(cells.ravel(), magnitudes.ravel(), minlength=size).reshape(len(x), CELLS + 1))
    lengths = np.concatenate([np.full(len(x), x.shape[1]) for x in sides])
    return Sides(
        np.concatenate(counts).astype(np.float32), np.concatenate(sums).astype(np.float32), lengths.astype(np.float64)
    )


@dataclass(frozen=True, eq=False)
class Directions:
    """All directions of an adapter, module by module: `energy` is σ² as a share of ‖ΔW‖², (n,)."""

    modules: Mapping[str, Spectrum]
    energy: Vector
    total: float
    u: Sides
    v: Sides


def directions(adapter: Adapter) -> Directions:
    """Decompose every module; what a coder allocates bits to."""
    modules = {path: spectrum(factors) for path, factors in adapter.modules.items()}
    sigma = np.concatenate([m.sigma for m in modules.values()])
    total = float(sigma @ sigma)
    u, v = (histogram([getattr(m, name) for m in modules.values()]) for name in "uv")
    return Directions(modules, sigma**2 / (total or 1.0), total, u, v)
