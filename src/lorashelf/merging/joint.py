"""Rules on a module of all adapters at once, in a basis that depends on the adapters; from the factors, ΔW is never
formed. The driver cuts the result, whose ranks add, to the largest rank of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..lora.adapter import Factors
from ..lora.algebra import concatenated, decomposed, module_squared_norm
from ..lora.arrays import Array64, Float64
from .merge_method import merge_method
from .parameters import Fraction
from .rules import agree, keep_largest

KNOTS = "KnOTS, arXiv 2410.19735"
OPCM = "OPCM, arXiv 2501.09522"
TSV = "TSV-M, arXiv 2412.00081"
PICO = "Pico, arXiv 2604.16826"
CORE = "Core Space, arXiv 2509.17786"
SMALLEST = 1e-6  # of the largest singular value: smaller ones are rounding


@merge_method("knots_ties", space="joint", cites=KNOTS, weights="unary", gauge=True)
def knots_ties(factors: Sequence[Factors], weights: Sequence[float], *, density: Fraction = 0.5) -> Factors:
    """Return U Σ V with [w₁ΔW₁ … wₙΔWₙ] = U Σ [V₁ … Vₙ] and V the TIES merge of the parts Vᵢ, (k, din)."""
    bases, triangle = np.linalg.qr(np.concatenate([f.b for f in factors], axis=1).astype(np.float64))
    rights, parts = [], []
    first = 0
    for f, weight in zip(factors, weights, strict=True):
        right, upper = np.linalg.qr(f.a.T.astype(np.float64))
        parts.append(triangle[:, first : first + f.shape.rank] @ upper.T * (weight * f.scale))
        rights.append(right)
        first += f.shape.rank
    u, s, vt = np.linalg.svd(np.concatenate(parts, axis=1), full_matrices=False)
    kept = max(int(np.sum(s > SMALLEST * s[0])), 1)
    split = np.split(vt[:kept], np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    aligned = [(v @ right.T).astype(np.float32) for v, right in zip(split, rights, strict=True)]
    merged = agree([keep_largest(v, density) for v in aligned], np.ones(len(aligned), np.float32), "total")
    return Factors(merged, np.ascontiguousarray(bases @ u[:, :kept] * s[:kept], dtype=np.float32))


@merge_method("opcm", space="joint", cites=OPCM, duplicate=True, gauge=True, ordered=True)
def opcm(factors: Sequence[Factors], weights: Sequence[float], *, alpha: Fraction = 0.5) -> Factors:
    """Return M scaled to the norm Σ |wᵢ| ‖ΔWᵢ‖, M ← M + √wᵢ P(ΔWᵢ) one by one: in the singular basis of M, P sets to
    zero the diagonal, and the block of the first directions whose singular values sum to more than the share `alpha`.

    Folding with n/(n+1) and 1/(n+1) multiplies the slot by √n relative to the newcomer: the paper's λ for orthogonal
    updates of equal norm.
    """
    roots = [math.copysign(math.sqrt(abs(w)), w) for w in weights]
    total = concatenated(factors[:1], roots[:1])
    for f, root in zip(factors[1:], roots[1:], strict=True):
        total = concatenated([total, _beyond(total, f, alpha)], [1.0, root])
    return _of_mean_norm(total, factors, weights)


def _beyond(total: Factors, f: Factors, alpha: float) -> Factors:
    """Return P(ΔW): without what lies on the diagonal and in the leading block of the singular basis of `total`."""
    u, s, v = decomposed(total)
    if not s[0]:
        return f
    kept = int(np.sum(s > SMALLEST * s[0]))
    u, s, v = u[:, :kept], s[:kept], v[:, :kept]
    leading = int(np.searchsorted(np.cumsum(s), alpha * s.sum(), side="right")) + 1
    removed = (u.T @ f.b.astype(np.float64)) @ (f.a.astype(np.float64) @ v)
    removed[leading:] *= np.eye(kept)[leading:]
    removed[:leading, leading:] = 0.0
    within = Factors((removed @ v.T).astype(np.float32), u.astype(np.float32), f.scale)
    return concatenated([f, within], [1.0, -1.0])


@merge_method("tsv_m", space="joint", cites=TSV, weights="unary", duplicate=True, gauge=True)
def tsv_m(
    factors: Sequence[Factors], weights: Sequence[float], *, directions: Literal["all", "equal"] = "all"
) -> Factors:
    """Return P(U) diag(w₁σ₁ … wₙσₙ) P(V)ᵀ with ΔWᵢ = Uᵢ diag(σᵢ) Vᵢᵀ, U = [U₁ … Uₙ], V = [V₁ … Vₙ] and P(X) =
    X (XᵀX)^(−½), the nearest matrix with orthonormal columns (the pseudo-inverse where columns coincide).

    The paper keeps the first min(dout, din) / n directions of each ΔWᵢ, more than a LoRA usually has: `all`. `equal`
    keeps a share of 1/n of its own r directions, so that the result is hardly cut.
    """
    factors, weights = counted(factors, weights)
    lefts, sizes, rights = [], [], []
    for f, weight in zip(factors, weights, strict=True):
        u, s, v = decomposed(f)
        share = f.shape.rank // len(factors) if directions == "equal" else f.shape.rank
        kept = max(min(share, int(np.sum(s > SMALLEST * s[0]))), 1)
        lefts.append(u[:, :kept])
        sizes.append(weight * s[:kept])
        rights.append(v[:, :kept])
    left, right = (_orthogonal(np.concatenate(side, axis=1)) for side in (lefts, rights))
    return Factors(right.T.astype(np.float32), (left * np.concatenate(sizes)).astype(np.float32))


@merge_method("pico", space="joint", cites=PICO)
def pico(factors: Sequence[Factors], weights: Sequence[float], *, then: Literal["sum", "tsv_m"] = "sum") -> Factors:
    """Return the merge of the ΔWᵢ' = ΔWᵢ + U diag(α − 1) Uᵀ ΔWᵢ, scaled to the norm Σ |wᵢ| ‖ΔWᵢ‖: their weighted sum,
    or `tsv_m`. U and σ are those of the SVD of [√|s₁| B₁ … √|sₙ| Bₙ], αⱼ = 1 / (1 + (n − 1) σⱼ² / Σ σ²): output
    directions that many adapters share are damped.
    """
    factors, weights = counted(factors, weights)
    roots = [math.sqrt(abs(f.scale)) for f in factors]
    stack = np.concatenate([root * f.b.astype(np.float64) for root, f in zip(roots, factors, strict=True)], axis=1)
    u, s, _ = np.linalg.svd(stack, full_matrices=False)
    total = float(np.sum(s**2))
    damping = 1 / (1 + (len(factors) - 1) * s**2 / total) - 1 if total else np.zeros_like(s)
    calibrated = [
        Factors(f.a, (f.b + (u * damping) @ (u.T @ f.b.astype(np.float64))).astype(np.float32), f.scale)
        for f in factors
    ]
    merged = tsv_m(calibrated, weights) if then == "tsv_m" else concatenated(calibrated, weights)
    return _of_mean_norm(merged, factors, weights)


@merge_method("core_ties", space="joint", cites=CORE, weights="unary")
def core_ties(factors: Sequence[Factors], weights: Sequence[float], *, density: Fraction = 0.5) -> Factors:
    """Return U M Vᵀ with M the TIES merge of the cores Mᵢ = Uᵀ ΔWᵢ V (Σr, Σr), U and V the left and right singular
    vectors of [√|s₁| B₁ … √|sₙ| Bₙ] and of the A's, stacked alike.
    """
    factors, weights = counted(factors, weights)
    roots = [math.sqrt(abs(f.scale)) for f in factors]
    signs = [math.copysign(1.0, f.scale) for f in factors]
    bs = [root * f.b.astype(np.float64) for root, f in zip(roots, factors, strict=True)]
    rows = [root * f.a.astype(np.float64) for root, f in zip(roots, factors, strict=True)]
    u, s, _ = np.linalg.svd(np.concatenate(bs, axis=1), full_matrices=False)
    v, t, _ = np.linalg.svd(np.concatenate(rows).T, full_matrices=False)
    u, v = u[:, s > SMALLEST * s[0]], v[:, t > SMALLEST * t[0]]
    cores = [sign * (u.T @ b) @ (a @ v) for sign, b, a in zip(signs, bs, rows, strict=True)]
    trimmed = [keep_largest(core.astype(np.float32), density) for core in cores]
    merged = agree(trimmed, np.array(weights, np.float32), "total")
    return Factors((merged @ v.T).astype(np.float32), u.astype(np.float32))


def counted(factors: Sequence[Factors], weights: Sequence[float]) -> tuple[Sequence[Factors], Sequence[float]]:
    """Return the adapters of weights other than 0 and these weights: one of weight 0 has no say in a shared basis."""
    chosen = [i for i, weight in enumerate(weights) if weight] or range(len(weights))
    return [factors[i] for i in chosen], [weights[i] for i in chosen]


def _of_mean_norm(total: Factors, factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return `total` scaled to the norm Σ |wᵢ| ‖ΔWᵢ‖, unless it is 0."""
    size = sum(abs(w) * math.sqrt(module_squared_norm(f)) for w, f in zip(weights, factors, strict=True))
    found = math.sqrt(module_squared_norm(total))
    return Factors(total.a, total.b * np.float32(size / found), total.scale) if found else total


def _orthogonal(x: Float64[Array64, "rows k"]) -> Float64[Array64, "rows k"]:
    """Return X (XᵀX)^(−½), the nearest matrix with orthonormal columns; directions that X lacks stay 0."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    kept = s > SMALLEST * s[0]
    return np.asarray(u[:, kept] @ vt[kept])
