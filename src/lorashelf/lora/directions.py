"""An adapter as directions: ΔW_m = Σ σ u vᵀ of every module, with sides u and v scaled to unit-variance entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .adapter import Adapter, Factors
from .algebra import decomposed
from .arrays import Array32, Float32, Int, Positions, Vector
from .quantiser import LIMIT, TOTAL, UNIT, Chain, quantiser, refining_tables, start_table

CELLS = 384
"""Cells of a side's histogram, each 1/64 wide; one more holds larger values."""
_OUTLIER_BITS = 32.0
_RELATIVE = 1e-7  # singular values below this share of their module's largest are rounding


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One module: σ (n,) descending, √dout u as (n, dout) and √din v as (n, din), float32."""

    sigma: Vector
    u: Float32[Array32, "n dout"]
    v: Float32[Array32, "n din"]

    def __len__(self) -> int:
        return len(self.sigma)


def spectrum(f: Factors) -> Spectrum:
    """Return the singular value decomposition of one ΔW, from its factors; n is the rank, 0 if ΔW = 0."""
    u, sigma, v = decomposed(f)
    count = int(np.sum(sigma > _RELATIVE * sigma[0])) if sigma[0] > 0 else 0
    sides = ((side[:, :count].T * np.sqrt(len(side))).astype(np.float32) for side in (u, v))
    return Spectrum(sigma[:count], *map(np.ascontiguousarray, sides))


@dataclass(frozen=True, eq=False)
class Sides:
    """Histograms of n sides, to estimate rates and distortions: the number and sum of magnitudes in each cell, and the
    sum of squares of those beyond all cells, whose own size is coded.
    """

    counts: Float32[Array32, "n cells"]
    sums: Float32[Array32, "n cells"]
    beyond: Vector
    lengths: Vector

    def estimate(self, chain: Chain, rows: Int[Positions, " n"] | None = None) -> tuple[Vector, Vector]:
        """Estimate the bits with the chain's start quantiser or last refinement, and cos² between sides and their coded
        values; (n,) each, for all sides or for `rows`.
        """
        stored = (self.counts, self.sums, self.beyond, self.lengths)
        counts, sums, beyond, lengths = (x if rows is None else x[rows] for x in stored)
        bits, centres = _per_cell(chain)
        cross, square = sums @ centres + beyond, counts @ centres**2 + beyond
        kept = np.divide(cross**2, square * lengths, out=np.zeros(len(cross)), where=square > 0)
        return (counts @ bits).astype(np.float64), np.minimum(kept, 1.0)


@cache
def _per_cell(chain: Chain) -> tuple[Float32[Array32, " cells"], Float32[Array32, " cells"]]:
    """Return the bits and the centre of a magnitude in each cell, 0 beyond all cells."""
    q, middles = quantiser(chain), (np.arange(CELLS) * 2 + 1) * (LIMIT // CELLS // 2)
    bins = np.searchsorted(q.edges, middles, side="right")
    centres = np.append(q.centres[bins], 0) / UNIT
    if len(chain) == 1:
        bits = -np.log2(start_table(chain) / TOTAL)
        per_bin = np.append(bits[0], bits[1:-2:2])
        return np.append(per_bin[bins], _OUTLIER_BITS).astype(np.float32), centres.astype(np.float32)
    inner, outer = (-np.log2(table / TOTAL) for table in refining_tables(chain))
    per_bin = np.concatenate([inner[:2], outer.ravel()])
    return np.append(per_bin[bins], 0).astype(np.float32), centres.astype(np.float32)


def histogram(sides: Sequence[Float32[Array32, "_n _d"]]) -> Sides:
    """Return the concatenated histograms of sides, (n, d) per module."""
    counts, sums, beyond = [], [], []
    for x in sides:
        magnitudes = np.abs(x)
        cells = np.minimum(magnitudes * np.float32(CELLS / 6), CELLS).astype(np.intp)
        far = cells == CELLS
        beyond.append(np.bincount(np.nonzero(far)[0], magnitudes[far].astype(np.float64) ** 2, minlength=len(x)))
        cells += np.arange(len(x))[:, None] * (CELLS + 1)
        size = len(x) * (CELLS + 1)
        counts.append(np.bincount(cells.ravel(), minlength=size).reshape(len(x), CELLS + 1))
        sums.append(np.bincount(cells.ravel(), magnitudes.ravel(), minlength=size).reshape(len(x), CELLS + 1))
    lengths = np.concatenate([np.full(len(x), x.shape[1]) for x in sides])
    return Sides(
        np.concatenate(counts).astype(np.float32),
        np.concatenate(sums).astype(np.float32),
        np.concatenate(beyond).astype(np.float64),
        lengths.astype(np.float64),
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
    """Decompose every module into the directions to which a coder allocates bits."""
    modules = {path: spectrum(factors) for path, factors in adapter.modules.items()}
    sigma = np.concatenate([m.sigma for m in modules.values()])
    total = float(sigma @ sigma)
    u, v = (histogram([getattr(m, name) for m in modules.values()]) for name in "uv")
    return Directions(modules, sigma**2 / (total or 1.0), total, u, v)
