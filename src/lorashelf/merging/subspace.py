"""Rules that find a subspace of the result's rank first and merge in it; from the factors, ΔW is never formed. Each
returns its factors with ‖·‖² of Σ wᵢ ΔWᵢ outside the subspace and inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..lora.adapter import Factors
from ..lora.algebra import concatenated, decomposed, truncate
from ..lora.arrays import Array64, Float64
from .joint import SMALLEST, counted
from .merge_method import merge_method
from .parameters import Fraction
from .rules import agree, keep_largest

ISO = "Iso-C, arXiv 2502.04959"
CTM = "Compress then Merge, arXiv 2606.03723"
TOLERANCE = 1e-6  # CtM's: of the relative error, between two sweeps
SWEEPS = 1000
Found = tuple[Factors, float, float]
Core = Float64[Array64, "_p _q"]


@merge_method("iso_c", space="subspace", cites=ISO, weights="unary", gauge=True)
def iso_c(factors: Sequence[Factors], weights: Sequence[float], rank: int) -> Found:
    """Return σ̄ U Vᵀ with Σ wᵢ ΔWᵢ ≈ U diag(σ) Vᵀ its best approximation of this rank and σ̄ the mean of σ, so that all
    directions weigh the same. The paper's mean also counts the zeros of a full-rank spectrum, a constant factor. An
    adapter alone comes back times its weight.
    """
    factors, weights = counted(factors, weights)
    total = concatenated(factors, weights)
    if len(factors) == 1:
        return truncate(total, rank)
    u, s, v = decomposed(total)
    k = max(min(rank, int(np.sum(s > SMALLEST * s[0]))), 1)
    root = math.sqrt(s[:k].mean())
    merged = Factors((root * v[:, :k].T).astype(np.float32), (root * u[:, :k]).astype(np.float32))
    return merged, float(np.sum(s[k:] ** 2)), float(np.sum(s[:k] ** 2))


@merge_method("ctm_linear", space="subspace", cites=CTM, weights="unary", gauge=True)
def ctm_linear(factors: Sequence[Factors], weights: Sequence[float], rank: int, *, beta: Fraction = 0.25) -> Found:
    """Return U (Σ wᵢ Cᵢ) Vᵀ with Cᵢ = Uᵀ ΔWᵢ V (rank, rank), U and V the bases of the given rank that keep most of all
    ΔWᵢ (`_shared_bases`), once their norms were moved towards the mean norm by 1 − `beta`.
    """
    compressed = _Compressed(factors, weights, rank, beta)
    return compressed.expanded(sum(w * c for w, c in zip(compressed.weights, compressed.cores, strict=True)))


@merge_method("ctm_ties", space="subspace", cites=CTM, weights="unary", duplicate=True, gauge=True)
def ctm_ties(
    factors: Sequence[Factors], weights: Sequence[float], rank: int, *, beta: Fraction = 0.25, density: Fraction = 0.25
) -> Found:
    """Merge like `ctm_linear`, with the TIES merge of the Cᵢ instead of their sum. Those of copies are
    diagonal, so copies merge into the adapter if `density` is at least 1/rank.
    """
    compressed = _Compressed(factors, weights, rank, beta)
    trimmed = [keep_largest(c.astype(np.float32), density) for c in compressed.cores]
    merged = agree(trimmed, np.array(compressed.weights, np.float32), "total")
    return compressed.expanded(merged.astype(np.float64))


class _Compressed:
    """A module's adapters in shared bases, ΔWᵢ ≈ U Cᵢ Vᵀ, found on the small cores of a QR of the stacked factors."""

    def __init__(self, factors: Sequence[Factors], weights: Sequence[float], rank: int, beta: float) -> None:
        factors, self.weights = counted(factors, weights)
        q_b, r_b = np.linalg.qr(np.concatenate([f.b for f in factors], axis=1).astype(np.float64))
        q_a, r_a = np.linalg.qr(np.concatenate([f.a for f in factors]).T.astype(np.float64))
        ends = np.cumsum([f.shape.rank for f in factors])[:-1]
        sides = zip(factors, np.split(r_b, ends, axis=1), np.split(r_a, ends, axis=1), strict=True)
        exact = [f.scale * (b @ a.T) for f, b, a in sides]
        sizes = np.array([np.linalg.norm(m) for m in exact])
        wanted = beta * sizes + (1 - beta) * sizes.mean()
        factor = np.divide(wanted, sizes, out=np.zeros_like(sizes), where=sizes > 0)
        u, v = _shared_bases([x * m for x, m in zip(factor, exact, strict=True)], rank)
        self.cores = [u.T @ m @ v for m in exact]
        self.left, self.right = q_b @ u, q_a @ v
        total = sum(w * m for w, m in zip(self.weights, exact, strict=True))
        self.kept = float(np.sum((u.T @ total @ v) ** 2))
        self.dropped = max(float(np.sum(total**2)) - self.kept, 0.0)

    def expanded(self, core: Core) -> Found:
        """Return U C Vᵀ of a merged core as factors."""
        merged = Factors((core @ self.right.T).astype(np.float32), self.left.astype(np.float32))
        return merged, self.dropped, self.kept


def _shared_bases(cores: Sequence[Core], rank: int) -> tuple[Core, Core]:
    """Return U (p, k) and V (q, k), k ≤ rank, that maximise Σ ‖Uᵀ Mᵢ V‖²: a partial Tucker decomposition by HOOI, from
    the leading singular vectors of [M₁ … Mₙ] and of [M₁ᵀ … Mₙᵀ].
    """
    u, v = _leading(cores, rank)[0], _leading([m.T for m in cores], rank)[0]
    whole, error = sum(float(np.sum(m**2)) for m in cores), math.inf
    for _ in range(SWEEPS if whole else 0):
        u, _ = _leading([m @ v for m in cores], rank)
        v, kept = _leading([m.T @ u for m in cores], rank)
        before, error = error, math.sqrt(max(1 - kept / whole, 0.0))
        if abs(before - error) < TOLERANCE:
            break
    return u, v


def _leading(parts: Sequence[Core], rank: int) -> tuple[Core, float]:
    """Return the `rank` leading left singular vectors of [X₁ … Xₙ], and the sum of their squared singular values."""
    values, vectors = np.linalg.eigh(sum(x @ x.T for x in parts))
    return vectors[:, ::-1][:, :rank], float(values[::-1][:rank].sum())
