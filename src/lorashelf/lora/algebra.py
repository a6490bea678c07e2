"""Inner products, norms, exact sums and best low-rank approximations of updates ΔW = s B A, without forming ΔW.

    ⟨s B A, s' B' A'⟩ = s s' Σ (Bᵀ B') ∘ (A A'ᵀ)          an r × r' sum instead of dout × din
    Σ w s B A         = [.. √|w s| B ..] [.. √|w s| A ..]   the ranks add, nothing is lost
    best rank ρ       = SVD of R_B R_Aᵀ with B = Q_B R_B, Aᵀ = Q_A R_A

Where ranks are so large that the dense form costs less, the dense form is taken, a block of rows at a time. Data are
float32; `inner`, `norm`, `gram` and `compress` compute in float64 throughout. Cosines and energies multiply factors in
float32 (their sums are float64 all the same): half the time, and on cosines within 1e-6 (measured: 1e-9 to 2e-7). Where
that would not hold, because ranks cancel each other or values are out of float32's range, float64 is taken there too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, numbered
from ..execution import each
from .adapter import Adapter, Factors, Modules, Shape, Stack, wider
from .alignment import aligned
from .given import as_adapters, as_numbers
from .targets import joined

Vector = NDArray[np.float64]
Square = NDArray[np.float64]
_PANEL = 256  # rows of stacked factors multiplied at once: a panel and its product stay in the cache
_SMALL = 10**6  # multiplications up to which OpenBLAS multiplies without packing
_THIN = 100  # a side of a piece too short to be worth a call
_RUN = 2**19  # values of either factor of a run of modules, 2 MB of float32
_BLOCK = 2**21  # values of dense rows held at once, 16 MB of float64
_CANCELS = 4.0  # terms of a sum may be this much larger than the sum itself: beyond, float32 loses digits
_TINY = 1e-15  # sums of float32 products below this may have underflown


def inner(x: Adapter, y: Adapter) -> float:
    """The inner product Σ_m ⟨ΔW_m, ΔW'_m⟩ over the modules both have; float64. Cost r r' (dout + din) a module."""
    x, y = aligned([x, y])
    return sum(float(products([x.modules[path]], [y.modules[path]])[0, 0]) for path in x.modules if path in y.modules)


def norm(x: Adapter) -> float:
    """The Frobenius norm √Σ_m ‖ΔW_m‖²; float64."""
    return math.sqrt(
        sum(each(lambda paths: float(stack_squared_norms(x.modules.stack(paths), np.float64).sum()), runs([x])))
    )


def squared_norms(x: Adapter) -> Mapping[str, float]:
    """‖ΔW_m‖² of every module by its path, by float32 products (see `products`): found once, kept with the modules."""
    if x.modules.squared_norms is None:
        parts = runs([x])
        found = each(lambda paths: stack_squared_norms(x.modules.stack(paths), np.float32).tolist(), parts)
        x.modules.squared_norms = dict(sorted(zip(chain(*parts), chain(*found), strict=True)))
    return x.modules.squared_norms


def trained(x: Adapter | Factors) -> bool:
    """Whether an adapter, or a module, changes anything: not where A or B is zero throughout, as before training."""
    if isinstance(x, Adapter):
        return any(trained(factors) for factors in x.modules.values())
    return all(side[0].any() or side.any() for side in (x.a, x.b))  # a row tells, as a rule


def squared_norms_hold(x: Adapter) -> bool:
    """Whether the energies kept with the modules are theirs: to 1e-4, where ranks cancel to 1e-12 of the ranks' own."""
    if x.modules.squared_norms is None:
        return False
    for path, f in x.modules.items():
        sides = np.sum(f.a.astype(np.float64) ** 2, axis=1), np.sum(f.b.astype(np.float64) ** 2, axis=0)
        rounding = 1e-12 * float(sides[0] @ sides[1]) * f.scale**2
        if not math.isclose(x.modules.squared_norms[path], _energy(f), rel_tol=1e-4, abs_tol=rounding):
            return False
    return True


def _energy(f: Factors) -> float:
    """‖ΔW‖² of one module, float64."""
    return max(float(products([f])[0, 0]), 0.0)


def gram(xs: Sequence[Adapter]) -> Square:
    """The (n, n) float64 matrix of all inner products, one module of every adapter in memory at a time."""
    xs = aligned(as_adapters(xs))
    total = np.zeros((len(xs), len(xs)))
    for path in union(xs):
        total += products([x.modules.get(path) for x in xs])
    return total


def union(xs: Sequence[Adapter]) -> list[str]:
    """All module paths of the adapters, sorted."""
    return sorted(set().union(*(x.shapes for x in xs)))


def products(
    fs: Sequence[Factors | None], gs: Sequence[Factors | None] | None = None, dtype: type[np.floating[Any]] = np.float64
) -> Square:
    """⟨ΔW_i, ΔW'_j⟩ of one module, (n, m) float64; `None` stands for ΔW = 0. Without `gs`, of `fs` with itself, and
    then with `dtype` float32 as the head of this file says.
    """
    hs = fs if gs is None else gs
    rows = [i for i, f in enumerate(fs) if f is not None]
    columns = rows if gs is None else [j for j, g in enumerate(hs) if g is not None]
    result = np.zeros((len(fs), len(hs)))
    if not rows or not columns:
        return result
    left = [f for f in fs if f is not None]
    right = left if gs is None else [g for g in gs if g is not None]
    dout, _, din = left[0].shape
    ranks, others = sum(f.shape.rank for f in left), sum(g.shape.rank for g in right)
    if not _factored(ranks, others, len(left) * len(right), dout, din):
        block = _dense_products(left, right)
    elif gs is None and dtype is np.float32:
        block, sound = _factored_products(left, right, np.float32)
        if not sound.all():
            block, _ = _factored_products(left, right, np.float64)
    else:
        block, _ = _factored_products(left, right, np.float64)
    block *= np.outer([f.scale for f in left], [g.scale for g in right])
    result[np.ix_(rows, columns)] = block
    return result


def _factored(ranks: int, others: int, pairs: int, dout: int, din: int) -> bool:
    """Whether the factored way costs no more: R R' (dout + din) against (R + R' + 2 pairs) dout din, the dense one
    counted double for the memory it moves.
    """
    return ranks * others * (dout + din) <= 2 * (ranks + others + 2 * pairs) * dout * din


def row(
    x: Adapter, ys: Sequence[Adapter], paths: Sequence[str], dtype: type[np.floating[Any]]
) -> tuple[Square, Vector, Square]:
    """⟨ΔW, ΔW'_j⟩ (n, m), ‖ΔW‖² (n,) and ‖ΔW'_j‖² (n, m) of n modules that `runs` put together; float64.

    What `products` gives for one adapter against many, each of them read once; energies that are known are taken.
    """
    inner, squared = np.zeros((len(paths), len(ys))), np.zeros((len(paths), len(ys)))
    f = x.modules.stack(paths) if paths[0] in x.modules else None
    own = np.zeros(len(paths)) if f is None else _known_energies(x, paths, f, dtype)
    a_t = None if f is None else np.ascontiguousarray(f.a.swapaxes(1, 2), dtype)
    for j, y in enumerate(ys):
        if paths[0] in y.modules:
            g = y.modules.stack(paths)
            squared[:, j] = _known_energies(y, paths, g, dtype)
            if f is not None and a_t is not None:
                inner[:, j] = _inners(f, a_t, g, dtype, np.sqrt(own * squared[:, j]))
    return inner, own, squared


def _known_energies(x: Adapter, paths: Sequence[str], f: Stack, dtype: type[np.floating[Any]]) -> Vector:
    """`stack_energies`, or what is known of them."""
    known = x.modules.squared_norms
    if known is None or dtype is not np.float32:
        return stack_squared_norms(f, dtype)
    return np.array([known[path] for path in paths])


def runs(xs: Sequence[Adapter]) -> list[list[str]]:
    """The union of the adapters' module paths in runs of one name in successive layers that have one shape (or are
    absent) in each of the adapters, a run's factors small enough to stay in the cache.
    """
    shapes = [x.shapes for x in xs]
    alike: dict[tuple[str, tuple[Shape | None, ...]], list[str]] = {}
    for path in union(xs):
        alike.setdefault((path.rpartition(".")[2], tuple(of.get(path) for of in shapes)), []).append(path)
    found = []
    for (_, key), paths in alike.items():
        count = max(1, _RUN // max(f.rank * max(f.dout, f.din) for f in key if f))
        found += [paths[i : i + count] for i in range(0, len(paths), count)]
    return found


def stack_squared_norms(f: Stack, dtype: type[np.floating[Any]]) -> Vector:
    """‖ΔW‖² of stacked modules, (n,) float64: as `products` of each with itself."""
    dout, rank, din = f.shape
    if not _factored(rank, rank, 1, dout, din):
        return np.array([_energy(f[i]) for i in range(len(f))])
    a, b = f.a.astype(dtype, copy=False), f.b.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        found, sound = _gram_energies(a @ a.swapaxes(1, 2), b.swapaxes(1, 2) @ b)
        found = np.maximum(found * f.scales**2, 0.0)
    for i in np.flatnonzero(~sound).tolist() if dtype is np.float32 else ():
        found[i] = _energy(f[i])
    return found


def _gram_energies(a: NDArray[Any], b: NDArray[Any]) -> tuple[Vector, NDArray[np.bool_]]:
    """Σ (A Aᵀ) ∘ (Bᵀ B) of stacked Gram matrices, and whether float32 is enough for it."""
    product = a * b
    found, terms = product.sum(axis=(1, 2), dtype=np.float64), np.abs(product).sum(axis=(1, 2), dtype=np.float64)
    sides = np.minimum(np.trace(a, axis1=1, axis2=2), np.trace(b, axis1=1, axis2=2))
    return found, np.isfinite(terms) & (terms <= _CANCELS * found) & (np.minimum(terms, sides) > _TINY)


def _inners(f: Stack, a_t: NDArray[Any], g: Stack, dtype: type[np.floating[Any]], bounds: Vector) -> Vector:
    """⟨ΔW, ΔW'⟩ of stacked modules, (n,) float64; `a_t` is f.a with its sides exchanged, contiguous, in `dtype`;
    `bounds` (n,) are ‖ΔW‖ ‖ΔW'‖, beside which the result has to be exact.
    """
    (dout, rank, din), other = f.shape, g.shape.rank
    if not _factored(rank, other, 1, dout, din):
        return np.array([products([f[i]], [g[i]])[0, 0] for i in range(len(f))])
    with np.errstate(over="ignore", invalid="ignore"):
        product = _in_pieces(g.a.astype(dtype, copy=False), a_t)
        product *= _in_pieces(g.b.astype(dtype, copy=False).swapaxes(1, 2), f.b.astype(dtype, copy=False))
        scales = f.scales * g.scales
        found: Vector = product.sum(axis=(1, 2), dtype=np.float64) * scales
        terms = np.abs(product).sum(axis=(1, 2), dtype=np.float64) * np.abs(scales)
        sound = (terms <= _CANCELS * bounds) & (bounds > _TINY * np.abs(scales)) | (bounds == 0)
    for i in np.flatnonzero(~sound).tolist() if dtype is np.float32 else ():
        found[i] = products([f[i]], [g[i]])[0, 0]
    return found


def _in_pieces(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """The products of wide (n, r', d) and tall (n, d, r) matrices, the long side cut into pieces that OpenBLAS
    multiplies without packing: 3/5 of the time at rank 32.
    """
    (n, wide, length), tall = x.shape, y.shape[2]
    width = _piece(length, wide * tall)
    if width == length:
        return np.asarray(x @ y)
    pieces = x.reshape(n, wide, -1, width).swapaxes(1, 2) @ y.reshape(n, -1, width, tall)
    return np.asarray(pieces.sum(axis=1))


@cache
def _piece(length: int, area: int) -> int:
    """The largest divisor of the length with which a product is small; the length itself where pieces get thin."""
    widths = range(min(length, _SMALL // area), _THIN, -1)
    return next((width for width in widths if length % width == 0), length)


def _factored_products(
    left: list[Factors], right: list[Factors], dtype: type[np.floating[Any]]
) -> tuple[Square, NDArray[np.bool_]]:
    """The products without scales; of adapters with themselves also for which of them float32 is enough, (n,)."""
    symmetric = left is right
    a = np.concatenate([f.a for f in left]).astype(dtype, copy=False)
    b = np.concatenate([f.b for f in left], axis=1).astype(dtype, copy=False)
    c = a if symmetric else np.concatenate([g.a for g in right]).astype(dtype, copy=False)
    d = b if symmetric else np.concatenate([g.b for g in right], axis=1).astype(dtype, copy=False)
    row, column = _offsets(left), _offsets(right)
    result, sound = np.empty((len(left), len(right))), np.ones(len(left), np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, k in _panels(row):
            rows = slice(row[i], row[k])
            for j, stop in ((i, k), (k, len(right))) if symmetric else ((0, len(right)),):  # the rest by symmetry
                if j == stop:
                    continue
                columns = slice(column[j], column[stop])
                of_a, of_b = a[rows] @ c[columns].T, b[:, rows].T @ d[:, columns]  # with itself: half the work
                if symmetric and j == i:
                    for q in range(i, k):
                        own = np.s_[None, row[q] - row[i] : row[q + 1] - row[i], row[q] - row[i] : row[q + 1] - row[i]]
                        sound[q] = _gram_energies(of_a[own], of_b[own])[1][0]
                of_a *= of_b
                sums = np.add.reduceat(of_a, column[j:stop] - column[j], axis=1, dtype=np.float64)
                result[i:k, j:stop] = np.add.reduceat(sums, row[i:k] - row[i], axis=0)
            if symmetric:
                result[k:, i:k] = result[i:k, k:].T
    return (result + result.T) / 2 if symmetric else result, sound


def _offsets(fs: list[Factors]) -> NDArray[np.intp]:
    return np.concatenate([[0], np.cumsum([f.shape.rank for f in fs])]).astype(np.intp)


def _panels(offsets: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Runs of consecutive adapters whose ranks add up to at most a panel (one adapter at least)."""
    runs, start = [], 0
    for stop in range(1, len(offsets)):
        if stop == len(offsets) - 1 or offsets[stop + 1] - offsets[start] > _PANEL:
            runs.append((start, stop))
            start = stop
    return runs


def _dense_products(left: list[Factors], right: list[Factors]) -> Square:
    dout, _, din = left[0].shape
    step = max(1, _BLOCK // (din * (len(left) + len(right))))
    result = np.zeros((len(left), len(right)))
    for start in range(0, dout, step):
        x = _dense_rows(left, slice(start, start + step))
        y = x if left is right else _dense_rows(right, slice(start, start + step))
        result += x @ y.T
    return result


def _dense_rows(fs: list[Factors], rows: slice) -> NDArray[Any]:
    return np.stack([(f.b[rows].astype(np.float64) @ f.a.astype(np.float64)).ravel() for f in fs])


def combine(xs: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The exact sum Σ w_i ΔW_i by concatenation: per module a (Σr, din), b (dout, Σr), scale 1. A linear combination,
    rank Σr.
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
    """An adapter made from `xs`: the first known base, the widest dtype, the PEFT fields of the first with
    the targets of all, these modules.
    """
    base = next((x.base for x in xs if x.base.name), xs[0].base)
    config = {**xs[0].config, **joined((x.config, x.shapes) for x in xs)}
    return Adapter(Modules(modules), base, wider([x.dtype for x in xs]), config)


def concatenated(fs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ w s B A of one module as a single pair: √|w s| on both sides, the sign on B, so neither side overflows half
    precision.
    """
    roots = [math.sqrt(abs(w * f.scale)) for f, w in zip(fs, weights, strict=True)]
    signs = [math.copysign(1.0, w * f.scale) for f, w in zip(fs, weights, strict=True)]
    a = np.concatenate([np.float32(root) * f.a for root, f in zip(roots, fs, strict=True)])
    b = np.concatenate([np.float32(sign * root) * f.b for sign, root, f in zip(signs, roots, fs, strict=True)], axis=1)
    return Factors(a, b)


def compress(x: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best approximation of every ΔW_m by rank ≤ `rank`, and its relative error √Σ‖ΔW − ΔW'‖² / √Σ‖ΔW‖².

    Eckart-Young by QR and a small SVD in float64; singular values are split evenly over both factors, signs are
    canonical (the largest entry of each row of A is positive). A module within the rank is returned as it is.
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
    """One module of `compress`: the factors of rank ≤ `rank`, the energy ‖·‖² dropped, the energy kept."""
    if f.shape.rank <= rank:
        return f, 0.0, _energy(f)
    if f.shape.rank >= min(f.shape.dout, f.shape.din):
        return truncate_dense((f.b.astype(np.float64) @ f.a.astype(np.float64)) * f.scale, rank)
    q_b, q_a, u, s, vt = _svd(f)
    root = np.sqrt(s[:rank])
    a = root[:, None] * (vt[:rank] @ q_a.T)
    b = (q_b @ u[:, :rank]) * root
    return _canonical(a, b), float(np.sum(s[rank:] ** 2)), float(np.sum(s[:rank] ** 2))


def truncate_dense(delta: NDArray[Any], rank: int) -> tuple[Factors, float, float]:
    """The best rank-`rank` factors of a dense (dout, din) update, the energy dropped, the energy kept.

    By the eigenvectors of the smaller Gram matrix in float64: with V the leading ones, ΔW V Vᵀ is the best
    approximation. Energies are exact to about 1e-16 ‖ΔW‖².
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
    """The singular values of ΔW = s B A, descending, at most r of them; float64."""
    return _svd(f)[3]


def decomposed(f: Factors) -> tuple[NDArray[Any], Vector, NDArray[Any]]:
    """ΔW = U diag(σ) Vᵀ from its factors: U (dout, k), σ (k,) descending, V (din, k), k at most r; float64."""
    q_b, q_a, u, s, vt = _svd(f)
    return q_b @ u, s, q_a @ vt.T


def _svd(f: Factors) -> tuple[Any, Any, Any, Vector, Any]:
    q_b, r_b = np.linalg.qr(f.b.astype(np.float64))
    q_a, r_a = np.linalg.qr(f.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T * f.scale, full_matrices=False)
    return q_b, q_a, u, s, vt


def _canonical(a: NDArray[Any], b: NDArray[Any]) -> Factors:
    peaks = a[np.arange(len(a)), np.abs(a).argmax(axis=1)] if len(a) else np.empty(0)
    signs = np.where(peaks < 0, -1.0, 1.0)
    return Factors((a * signs[:, None]).astype(np.float32), np.ascontiguousarray(b * signs, dtype=np.float32))
