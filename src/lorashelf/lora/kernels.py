"""Fast inner products of updates: the equations of `algebra.py` for many modules or many adapters at once.

Factors are multiplied in float32, in half the time; sums are float64. Where float32 is not enough, because ranks cancel
each other or values are out of range, the equation is used instead, so that a bound holds for any adapter:

    kernel                equation in algebra.py        differs from it by at most
    gram                  module_gram                   1e-6 ‖ΔW_i‖ ‖ΔW_j‖
    row                   module_row                    1e-6 ‖ΔW‖ ‖ΔW'_j‖, squared norms by 1e-5 (relative)
    stack_squared_norms   module_squared_norm           1e-5 ‖ΔW‖²
    squared_norms         module_squared_norm           1e-5 ‖ΔW‖²

tests/test_kernels.py checks every bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain

import numpy as np

from ..execution import each
from .adapter import Adapter, Factors, Shape, Stack
from .algebra import module_gram, module_inner, module_squared_norm, union
from .arrays import Array32, Array64, Bool, Flags, Float32, Float64, Int, Positions, Square, Table, Vector

_PANEL = 256  # rows of stacked factors multiplied at once: a panel and its product fit into the CPU cache
_SMALL = 10**6  # multiplications up to which OpenBLAS multiplies without packing
_THIN = 100  # pieces up to this width are not worth a call
_RUN = 2**19  # values in either factor of a run of modules, 2 MB of float32
_BLOCK = 2**21  # values of dense rows held at once, 16 MB of float64
_CANCELS = 4.0  # largest ratio of a sum's absolute terms to the sum: beyond, float32 loses digits
_TINY = 1e-15  # sums of float32 products below this may have underflown


def squared_norms(x: Adapter) -> Mapping[str, float]:
    """Return ‖ΔW‖² of every module by path, `module_squared_norm` to 1e-5; computed once and cached."""
    if x.modules.squared_norms is None:
        parts = runs([x])
        found = each(lambda paths: stack_squared_norms(x.modules.stack(paths)).tolist(), parts)
        x.modules.squared_norms = dict(sorted(zip(chain(*parts), chain(*found), strict=True)))
    return x.modules.squared_norms


def squared_norms_hold(x: Adapter) -> bool:
    """Return whether the squared norms cached with the modules are right: to 1e-4 or, where ranks cancel, to 1e-12 of
    the ranks' own.
    """
    if x.modules.squared_norms is None:
        return False
    for path, f in x.modules.items():
        sides = np.sum(f.a.astype(np.float64) ** 2, axis=1), np.sum(f.b.astype(np.float64) ** 2, axis=0)
        rounding = 1e-12 * float(sides[0] @ sides[1]) * f.scale**2
        if not math.isclose(x.modules.squared_norms[path], module_squared_norm(f), rel_tol=1e-4, abs_tol=rounding):
            return False
    return True


def runs(xs: Sequence[Adapter]) -> list[list[str]]:
    """Return the union of the adapters' module paths in runs of one name over successive layers, with one shape (or
    absent) in each adapter, whose factors fit into the CPU cache.
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


# many adapters with each other, one module at a time -----------------------------------------------------------------


def gram(fs: Sequence[Factors | None]) -> Square:
    """Return `module_gram` of one module, (n, n): G_ij to 1e-6 ‖ΔW_i‖ ‖ΔW_j‖; `None` means ΔW = 0."""
    present = [f for f in fs if f is not None]
    result = np.zeros((len(fs), len(fs)))
    if not present:
        return result
    dout, _, din = present[0].shape
    ranks = sum(f.shape.rank for f in present)
    if ranks**2 * (dout + din) > 4 * (ranks + len(present) ** 2) * dout * din:  # moving ΔW costs as much again
        found = _dense_gram(present)
    else:
        found, sound = _factored_gram(present)
        if not sound:
            return module_gram(fs)
    scales = np.array([f.scale for f in present])
    where = np.flatnonzero([f is not None for f in fs])
    result[np.ix_(where, where)] = found * np.outer(scales, scales)
    return result


def _factored_gram(fs: Sequence[Factors]) -> tuple[Square, bool]:
    """Return Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), a panel of ranks at a time, and whether float32 was enough."""
    a = np.concatenate([f.a for f in fs]).astype(np.float32, copy=False)
    b = np.concatenate([f.b for f in fs], axis=1).astype(np.float32, copy=False)
    start = np.concatenate([[0], np.cumsum([f.shape.rank for f in fs])]).astype(np.intp)
    result, sound = np.empty((len(fs), len(fs))), True
    with np.errstate(over="ignore", invalid="ignore"):
        for i, k in _panels(start):
            rows = slice(start[i], start[k])
            for j, stop in ((i, k), (k, len(fs))):  # columns left of the panel are known by symmetry
                if j == stop:
                    continue
                columns = slice(start[j], start[stop])
                of_a, of_b = a[rows] @ a[columns].T, b[:, rows].T @ b[:, columns]  # with itself: half the work
                if j == i:
                    owns = [slice(start[q] - start[i], start[q + 1] - start[i]) for q in range(i, k)]
                    sound &= all(_squared(of_a[None, own, own], of_b[None, own, own])[1][0] for own in owns)
                of_a *= of_b
                sums = np.add.reduceat(of_a, start[j:stop] - start[j], axis=1, dtype=np.float64)
                result[i:k, j:stop] = np.add.reduceat(sums, start[i:k] - start[i], axis=0)
            result[k:, i:k] = result[i:k, k:].T
    return (result + result.T) / 2, sound


def _panels(offsets: Int[Positions, " n"]) -> list[tuple[int, int]]:
    """Return runs of consecutive adapters whose ranks add up to at most a panel (at least one adapter)."""
    panels, start = [], 0
    for stop in range(1, len(offsets)):
        if stop == len(offsets) - 1 or offsets[stop + 1] - offsets[start] > _PANEL:
            panels.append((start, stop))
            start = stop
    return panels


def _dense_gram(fs: Sequence[Factors]) -> Square:
    """Return Σ (B_i A_i) ∘ (B_j A_j) in float64, a block of rows at a time."""
    dout, _, din = fs[0].shape
    step = max(1, _BLOCK // (2 * din * len(fs)))
    result = np.zeros((len(fs), len(fs)))
    for start in range(0, dout, step):
        x = _dense_rows(fs, slice(start, start + step))
        result += x @ x.T
    return result


def _dense_rows(fs: Sequence[Factors], rows: slice) -> Float64[Array64, "n values"]:
    return np.stack([(f.b[rows].astype(np.float64) @ f.a.astype(np.float64)).ravel() for f in fs])


# one adapter against many, stacked runs of modules -------------------------------------------------------------------


def row(x: Adapter, ys: Sequence[Adapter], paths: Sequence[str]) -> tuple[Table, Vector, Table]:
    """Return `module_row` of the n modules of a run: ⟨ΔW, ΔW'_j⟩ (n, m) to 1e-6 ‖ΔW‖ ‖ΔW'_j‖, ‖ΔW‖² (n,) and
    ‖ΔW'_j‖² (n, m) to a relative 1e-5. Each adapter is read once; known squared norms are used.
    """
    inner, squared = np.zeros((len(paths), len(ys))), np.zeros((len(paths), len(ys)))
    f = x.modules.stack(paths) if paths[0] in x.modules else None
    own = np.zeros(len(paths)) if f is None else _known_squared_norms(x, paths, f)
    a_t = None if f is None else np.ascontiguousarray(f.a.swapaxes(1, 2))
    for j, y in enumerate(ys):
        if paths[0] in y.modules:
            g = y.modules.stack(paths)
            squared[:, j] = _known_squared_norms(y, paths, g)
            if f is not None and a_t is not None:
                inner[:, j] = _stack_inner(f, a_t, g, np.sqrt(own * squared[:, j]))
    return inner, own, squared


def _known_squared_norms(x: Adapter, paths: Sequence[str], f: Stack) -> Vector:
    """Return the known squared norms, else `stack_squared_norms`."""
    known = x.modules.squared_norms
    return stack_squared_norms(f) if known is None else np.array([known[path] for path in paths])


def stack_squared_norms(f: Stack) -> Vector:
    """Return `module_squared_norm` of n stacked modules, (n,): ‖ΔW‖² to a relative 1e-5."""
    if not _worth(f, f):
        return np.array([module_squared_norm(f[i]) for i in range(len(f))])
    with np.errstate(over="ignore", invalid="ignore"):
        found, sound = _squared(f.a @ f.a.swapaxes(1, 2), f.b.swapaxes(1, 2) @ f.b)
        found = np.maximum(found * f.scales**2, 0.0)
    for i in np.flatnonzero(~sound).tolist():
        found[i] = module_squared_norm(f[i])
    return found


def _squared(
    a: Float32[Array32, "n rank rank"], b: Float32[Array32, "n rank rank"]
) -> tuple[Vector, Bool[Flags, " n"]]:
    """Return Σ (A Aᵀ) ∘ (Bᵀ B) of stacked Gram matrices, and whether float32 was enough."""
    product = a * b
    found, terms = product.sum(axis=(1, 2), dtype=np.float64), np.abs(product).sum(axis=(1, 2), dtype=np.float64)
    sides = np.minimum(np.trace(a, axis1=1, axis2=2), np.trace(b, axis1=1, axis2=2))
    return found, np.isfinite(terms) & (terms <= _CANCELS * found) & (np.minimum(terms, sides) > _TINY)


def _stack_inner(f: Stack, a_t: Float32[Array32, "n din rank"], g: Stack, bounds: Vector) -> Vector:
    """Return `module_inner` of n stacked modules, (n,), to 1e-6 `bounds`, which are ‖ΔW‖ ‖ΔW'‖; `a_t` is f.a with the
    last two axes exchanged, contiguous.
    """
    if not _worth(f, g):
        return np.array([module_inner(f[i], g[i]) for i in range(len(f))])
    with np.errstate(over="ignore", invalid="ignore"):
        product = _in_pieces(g.a, a_t)
        product *= _in_pieces(g.b.swapaxes(1, 2), f.b)
        scales = f.scales * g.scales
        found: Vector = product.sum(axis=(1, 2), dtype=np.float64) * scales
        terms = np.abs(product).sum(axis=(1, 2), dtype=np.float64) * np.abs(scales)
        sound = (terms <= _CANCELS * bounds) & (bounds > _TINY * np.abs(scales)) | (bounds == 0)
    for i in np.flatnonzero(~sound).tolist():
        found[i] = module_inner(f[i], g[i])
    return found


def _worth(f: Stack, g: Stack) -> bool:
    """Return whether multiplying factors costs no more than multiplying ΔW, counted double for moving it in memory."""
    (dout, rank, din), other = f.shape, g.shape.rank
    return rank * other * (dout + din) <= 2 * (rank + other + 2) * dout * din


def _in_pieces(x: Float32[Array32, "n wide d"], y: Float32[Array32, "n d tall"]) -> Float32[Array32, "n wide tall"]:
    """Return the products of wide and tall matrices, the long side cut into pieces that OpenBLAS multiplies without
    packing: 3/5 of the time at rank 32.
    """
    (n, wide, length), tall = x.shape, y.shape[2]
    width = _piece(length, wide * tall)
    if width == length:
        return np.asarray(x @ y)
    pieces = x.reshape(n, wide, -1, width).swapaxes(1, 2) @ y.reshape(n, -1, width, tall)
    return np.asarray(pieces.sum(axis=1))


@cache
def _piece(length: int, area: int) -> int:
    """Return the largest divisor of the length that makes products small; the length itself if pieces get too thin."""
    widths = range(min(length, _SMALL // area), _THIN, -1)
    return next((width for width in widths if length % width == 0), length)
