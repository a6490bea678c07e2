"""The algebra of updates ΔW = s B A, written as equations, in float64 and without forming ΔW.

    ⟨s B A, s' B' A'⟩ = s s' Σ (Bᵀ B') ∘ (A A'ᵀ)          an r × r' sum instead of dout × din
    Σ w s B A         = [.. √|w s| B ..] [.. √|w s| A ..]   the ranks add, nothing is lost
    best rank ρ       = SVD of R_B R_Aᵀ with B = Q_B R_B, Aᵀ = Q_A R_A

Factors are float32; results computed from them here are float64. Comparisons of many adapters use `kernels.py`, which
computes the same inner products faster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from ..errors import UsageError, numbered
from .adapter import Adapter, Factors, Modules, wider
from .alignment import aligned
from .arrays import Array32, Array64, Float32, Float64, Square, Vector
from .given import as_adapters, as_numbers
from .targets import joined

_AT_ONCE = 16  # adapters multiplied with all later ones in one step


def inner(x: Adapter, y: Adapter) -> float:
    """Return ⟨x, y⟩ = Σ_m ⟨ΔW_m, ΔW'_m⟩ over the modules both have. Cost r r' (dout + din) per module."""
    x, y = aligned([x, y])
    return sum(module_inner(x.modules[path], y.modules[path]) for path in x.modules if path in y.modules)


def norm(x: Adapter) -> float:
    """Return the Frobenius norm √Σ_m ‖ΔW_m‖²."""
    return math.sqrt(sum(map(module_squared_norm, x.modules.values())))


def scaled(x: Adapter, factor: float | Mapping[str, float]) -> Adapter:
    """Return the adapter with φ ΔW in place of ΔW, in the scales: one φ for all modules, or module path → φ."""

    def of(path: str) -> float:
        return factor[path] if isinstance(factor, Mapping) else factor

    return x.with_factors({path: replace(f, scale=f.scale * of(path)) for path, f in x.modules.items()})


def gram(xs: Sequence[Adapter]) -> Square:
    """Return G_ij = ⟨x_i, x_j⟩, (n, n), with one module of every adapter in memory at a time."""
    xs = aligned(as_adapters(xs))
    total = np.zeros((len(xs), len(xs)))
    for path in union(xs):
        total += module_gram([x.modules.get(path) for x in xs])
    return total


def relative_error(x: Adapter, found: Mapping[str, Factors]) -> float:
    """Return ‖ΔW − ΔŴ‖ / ‖ΔW‖ of an adapter and the factors that should be its own; ∞ if only ΔW is 0."""
    total = lost = 0.0
    for path, factors in x.modules.items():
        gram = module_gram([factors, found[path]])
        total, lost = total + gram[0, 0], lost + max(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1], 0.0)
    return math.sqrt(lost / total) if total else math.inf if lost else 0.0


def module_inner(f: Factors, g: Factors) -> float:
    """Return ⟨s B A, s' B' A'⟩ = s s' Σ (Bᵀ B') ∘ (A A'ᵀ), or Σ ΔW ∘ ΔW' if that costs less, at large ranks."""
    a, b = _float64(f)
    c, d = (a, b) if g is f else _float64(g)
    if 1 / len(a) + 1 / len(c) < 1 / len(b) + 1 / a.shape[1]:
        return f.scale * g.scale * float(np.vdot(b @ a, d @ c))
    return f.scale * g.scale * float(np.vdot(b.T @ d, a @ c.T))


def module_squared_norm(f: Factors) -> float:
    """Return ‖ΔW‖² = ⟨ΔW, ΔW⟩, never below 0."""
    return max(module_inner(f, f), 0.0)


def module_gram(fs: Sequence[Factors | None]) -> Square:
    """Return G_ij = s_i s_j Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ) of one module, (n, n); `None` means ΔW = 0.

    The ranks of all adapters are concatenated; those of a few are multiplied with those of all later ones at once.
    """
    present = [f for f in fs if f is not None]
    total = np.zeros((len(fs), len(fs)))
    if not present:
        return total
    a = np.concatenate([f.a for f in present]).astype(np.float64)
    b = np.concatenate([f.b for f in present], axis=1).astype(np.float64)
    starts = np.array([0, *accumulate(f.shape.rank for f in present)])
    found = np.empty((len(present), len(present)))
    for i in range(0, len(present), _AT_ONCE):
        few, rest = starts[i : i + _AT_ONCE + 1], starts[i:]
        terms = (b[:, few[0] : few[-1]].T @ b[:, few[0] :]) * (a[few[0] : few[-1]] @ a[few[0] :].T)
        sums = np.add.reduceat(terms, rest[:-1] - few[0], axis=1)
        found[i : i + _AT_ONCE, i:] = np.add.reduceat(sums, few[:-1] - few[0], axis=0)
        found[i:, i : i + _AT_ONCE] = found[i : i + _AT_ONCE, i:].T
    where = np.flatnonzero([f is not None for f in fs])
    scales = np.array([f.scale for f in present])
    total[np.ix_(where, where)] = (found + found.T) / 2 * np.outer(scales, scales)
    return total


def module_row(f: Factors | None, gs: Sequence[Factors | None]) -> tuple[Vector, float, Vector]:
    """Return ⟨ΔW, ΔW'_j⟩ (m,), ‖ΔW‖² and ‖ΔW'_j‖² (m,) of one module; `None` means ΔW = 0."""
    inner = [0.0 if f is None or g is None else module_inner(f, g) for g in gs]
    own, *others = (0.0 if g is None else module_squared_norm(g) for g in (f, *gs))
    return np.array(inner), own, np.array(others)


def trained(x: Adapter | Factors) -> bool:
    """Return whether an adapter or module has any effect: not if A or B is all zero, as before training."""
    if isinstance(x, Adapter):
        return any(trained(factors) for factors in x.modules.values())
    return all(side[0].any() or side.any() for side in (x.a, x.b))  # usually one row decides


def union(xs: Sequence[Adapter]) -> list[str]:
    """Return all module paths of the adapters, sorted."""
    return sorted(set().union(*(x.shapes for x in xs)))


def combine(xs: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the exact sum Σ w_i ΔW_i by concatenation: per module a (Σr, din), b (dout, Σr), scale 1; rank Σr. Raises
    UsageError, and as `aligned`.
    """
    xs, weights = as_adapters(xs), as_numbers(weights)
    if not xs or len(weights) != len(xs):
        what = f"{numbered(len(weights), 'weight')} for {numbered(len(xs), 'adapter')}"
        raise UsageError(what, cure="give one weight per adapter")
    xs = aligned(xs)
    modules = {}
    for path in union(xs):
        present = [(x.modules[path], w) for x, w in zip(xs, weights, strict=True) if path in x.modules]
        modules[path] = concatenated([f for f, _ in present], [w for _, w in present])
    return assemble(xs, modules)


def assemble(xs: Sequence[Adapter], modules: Mapping[str, Factors]) -> Adapter:
    """Return an adapter of these modules with the first known base of `xs`, their widest dtype, and the PEFT fields of
    the first with the targets of all.
    """
    base = next((x.base for x in xs if x.base.name), xs[0].base)
    config = {**xs[0].config, **joined((x.config, x.shapes) for x in xs)}
    return Adapter(Modules(modules), base, wider([x.dtype for x in xs]), config)


def concatenated(fs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return Σ w s B A of one module as a single pair: √|w s| on both sides, the sign on B, so that neither side
    overflows half precision.
    """
    roots = [math.sqrt(abs(w * f.scale)) for f, w in zip(fs, weights, strict=True)]
    signs = [math.copysign(1.0, w * f.scale) for f, w in zip(fs, weights, strict=True)]
    a = np.concatenate([np.float32(root) * f.a for root, f in zip(roots, fs, strict=True)])
    b = np.concatenate([np.float32(sign * root) * f.b for sign, root, f in zip(signs, roots, fs, strict=True)], axis=1)
    return Factors(a, b)


def compress(x: Adapter, rank: int) -> tuple[Adapter, float]:
    """Return the best approximation of every ΔW_m by rank ≤ `rank`, and its relative error √Σ‖ΔW − ΔW'‖² / √Σ‖ΔW‖².

    Eckart-Young by QR and a small SVD in float64; singular values are split evenly over both factors, signs are
    canonical (the largest entry of each row of A is positive). A module within the rank is returned unchanged. Raises
    UsageError.
    """
    if rank < 1:
        raise UsageError(f"rank is {rank}", cure="give a rank of at least 1")
    modules, lost, total = {}, 0.0, 0.0
    for path, factors in x.modules.items():
        modules[path], dropped, kept = truncate(factors, rank)
        lost += dropped
        total += dropped + kept
    return x.with_factors(modules), math.sqrt(lost / total) if total else 0.0


def truncate(f: Factors, rank: int) -> tuple[Factors, float, float]:
    """Return one module of `compress`: the factors of rank ≤ `rank`, and ‖·‖² dropped and kept."""
    if f.shape.rank <= rank:
        return f, 0.0, module_squared_norm(f)
    if f.shape.rank >= min(f.shape.dout, f.shape.din):
        a, b = _float64(f)
        return truncate_dense(b @ a * f.scale, rank)
    q_b, q_a, u, s, vt = _svd(f)
    root = np.sqrt(s[:rank])
    a = root[:, None] * (vt[:rank] @ q_a.T)
    b = (q_b @ u[:, :rank]) * root
    return _canonical(a, b), float(np.sum(s[rank:] ** 2)), float(np.sum(s[:rank] ** 2))


def truncate_dense(
    delta: Float32[Array32, "dout din"] | Float64[Array64, "dout din"], rank: int
) -> tuple[Factors, float, float]:
    """Return the best rank-`rank` factors of a dense (dout, din) update, and ‖·‖² dropped and kept.

    By the eigenvectors of the smaller Gram matrix in float64: with V the leading ones, ΔW V Vᵀ is the best
    approximation. Both squared norms are exact to about 1e-16 ‖ΔW‖².
    """
    d = delta.astype(np.float64, copy=False)
    wide = d.shape[0] < d.shape[1]
    d = d.T if wide else d
    _, vectors = np.linalg.eigh(d.T @ d)
    v = vectors[:, ::-1][:, :rank]
    scores = d @ v
    s = np.linalg.norm(scores, axis=0)
    root = np.sqrt(s)
    left = np.divide(scores, root, out=np.zeros_like(scores), where=root > 0)
    right = v * root
    kept = float(np.sum(s**2))
    dropped = max(float(np.sum(d**2)) - kept, 0.0)
    return (_canonical(left.T, right) if wide else _canonical(right.T, left)), dropped, kept


def singular_values(f: Factors) -> Vector:
    """Return the singular values of ΔW = s B A, descending, at most r of them; float64."""
    return _svd(f)[3]


def decomposed(
    f: Factors,
) -> tuple[Float64[Array64, "dout k"], Float64[Array64, " k"], Float64[Array64, "din k"]]:
    """Decompose ΔW = U diag(σ) Vᵀ from its factors: U (dout, k), σ (k,) descending, V (din, k), k ≤ r; float64."""
    q_b, q_a, u, s, vt = _svd(f)
    return q_b @ u, s, q_a @ vt.T


def _svd(
    f: Factors,
) -> tuple[
    Float64[Array64, "dout p"],
    Float64[Array64, "din q"],
    Float64[Array64, "p k"],
    Float64[Array64, " k"],
    Float64[Array64, "k q"],
]:
    a, b = _float64(f)
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T * f.scale, full_matrices=False)
    return q_b, q_a, u, s, vt


def _canonical(a: Float64[Array64, "rank din"], b: Float64[Array64, "dout rank"]) -> Factors:
    peaks = a[np.arange(len(a)), np.abs(a).argmax(axis=1)] if len(a) else np.empty(0)
    signs = np.where(peaks < 0, -1.0, 1.0)
    return Factors((a * signs[:, None]).astype(np.float32), np.ascontiguousarray(b * signs, dtype=np.float32))


def _float64(f: Factors) -> tuple[Float64[Array64, "rank din"], Float64[Array64, "dout rank"]]:
    return f.a.astype(np.float64), f.b.astype(np.float64)
