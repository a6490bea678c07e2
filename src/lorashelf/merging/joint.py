"""Rules on a module of all adapters at once, in a basis that depends on the adapters; from the factors, ΔW is never
formed. The driver cuts the result, whose ranks add, to the largest rank of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..lora.adapter import Factors
from ..lora.algebra import concatenated, decomposed, module_squared_norm
from .merge_method import merge_method
from .parameters import Fraction
from .rules import agree, keep_largest

KNOTS = "KnOTS, arXiv 2410.19735"
OPCM = "OPCM, arXiv 2501.09522"
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
    size = sum(abs(w) * math.sqrt(module_squared_norm(f)) for w, f in zip(weights, factors, strict=True))
    found = math.sqrt(module_squared_norm(total))
    return Factors(total.a, total.b * np.float32(size / found), total.scale) if found else total


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
