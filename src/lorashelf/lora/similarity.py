"""The similarity of adapters: a registry of metrics over ΔW, as a matrix or for one adapter against many.

`cosine` is that of K-Merge (arXiv 2510.13537, eq. 2). Metrics stream: one module of every adapter is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..execution import each
from ..registry import Registry
from . import kernels
from .adapter import Adapter, Factors
from .algebra import module_gram, module_row, union
from .alignment import aligned
from .arrays import Array64, Float64, Int, Positions, Square, Table, Vector
from .given import as_adapters

Similarity = Callable[[Sequence[Adapter], "Sequence[Adapter] | None"], Table]
Left = Float64[Array64, "n 1"]
Right = Float64[Array64, "#n m"]
OfModule = Callable[[Table, Left, Right], Table]  # ⟨·,·⟩, and ‖·‖² of both sides
METRICS: Registry[Similarity] = Registry("metric")


def similarity(xs: Sequence[Adapter], ys: Sequence[Adapter] | None = None, metric: str = "cosine") -> Table:
    """Return the (n, m) float64 matrix of similarities between `xs` and `ys`, or (n, n) within `xs`. Raises
    UnknownName, ShapeMismatch.
    """
    xs = as_adapters(xs)
    others = [] if ys is None else as_adapters(ys, "ys")
    both = aligned([*xs, *others])
    return METRICS[metric](both[: len(xs)], None if ys is None else both[len(xs) :])


def _registered(function: Similarity) -> Similarity:
    METRICS.add(function.__name__, function)
    return function


@_registered
def cosine(xs: Sequence[Adapter], ys: Sequence[Adapter] | None = None) -> Table:
    """Return the mean over modules of cos(vec ΔW, vec ΔW'), in [-1, 1].

    Over the union of both adapters' modules; a module that one side lacks, or with ΔW = 0, counts 0. Invariant to
    positive scales and to the gauge (B G, G⁻¹ A). K-Merge, arXiv 2510.13537, eq. 2.
    """
    return _module_mean(xs, ys, _cosines)


def _cosines(inner: Table, left: Left, right: Right) -> Table:
    norms = np.sqrt(left * right)
    return np.clip(np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0), -1.0, 1.0)


@_registered
def l2(xs: Sequence[Adapter], ys: Sequence[Adapter] | None = None) -> Table:
    """Return the mean over modules of 1 / (1 + ‖ΔW − ΔW'‖_F), in (0, 1], on scaled ΔW; a module that one side lacks has
    ΔW = 0 there.
    """
    return _module_mean(xs, ys, _closeness, exact=True)  # a difference of numbers that may be equal


def _closeness(inner: Table, left: Left, right: Right) -> Table:
    squared = left + right - 2 * inner
    rounding = 1e-14 * (left + right)  # the residue of a difference of equal numbers
    distance = np.sqrt(np.where(squared <= rounding, 0.0, squared))
    return np.asarray(1.0 / (1.0 + distance))


@_registered
def l1(xs: Sequence[Adapter], ys: Sequence[Adapter] | None = None) -> Table:
    """Return the mean over modules of 1 / (1 + Σ |ΔW − ΔW'|), in (0, 1], as `l2`; forms ΔW, module by module."""
    return _of_differences(xs, ys, lambda difference: float(np.abs(difference).sum()))


@_registered
def linf(xs: Sequence[Adapter], ys: Sequence[Adapter] | None = None) -> Table:
    """Return the mean over modules of 1 / (1 + max |ΔW − ΔW'|), in (0, 1], as `l2`; forms ΔW, module by module."""
    return _of_differences(xs, ys, lambda difference: float(np.abs(difference).max()))


def _of_differences(
    xs: Sequence[Adapter], ys: Sequence[Adapter] | None, size: Callable[[Float64[Array64, "dout din"]], float]
) -> Table:
    """Return the mean of 1 / (1 + size(ΔW − ΔW')) over the modules that either side of a pair has."""
    others = xs if ys is None else ys
    total, count = np.zeros((len(xs), len(others))), np.zeros((len(xs), len(others)))
    for path in union([*xs, *others]):
        left = [_dense(x.modules.get(path)) for x in xs]
        right = left if ys is None else [_dense(y.modules.get(path)) for y in ys]
        for i, x in enumerate(left):
            for j, y in enumerate(right):
                if x is not None or y is not None:
                    difference = (0.0 if x is None else x) - (0.0 if y is None else y)
                    total[i, j] += 1.0 / (1.0 + size(np.asarray(difference)))
                    count[i, j] += 1
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _dense(f: Factors | None) -> Float64[Array64, "dout din"] | None:
    return None if f is None else f.b.astype(np.float64) @ f.a.astype(np.float64) * f.scale


@_registered
def svd_features(xs: Sequence[Adapter], ys: Sequence[Adapter] | None = None, *, quantile: float = 0.8) -> Table:
    """Return the cosine between SVD features of the raw factors (MBC, arXiv 2405.11157; mttl's `svd_similarity`).

    Per adapter all A, B are flattened, values up to the `quantile` of their magnitudes set to zero; features are the
    leading d = min(64, n - 1) left singular vectors times singular values of the (n, D) matrix. Depends on the gauge,
    and on the whole set.
    """
    everyone = [*xs, *(ys or [])]
    features = principal_coordinates(raw_gram(everyone, quantile))[:, : max(1, min(64, len(everyone) - 1))]
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, lengths, out=np.zeros_like(features), where=lengths > 0)
    table: Table = np.clip(unit @ unit.T, -1.0, 1.0)
    return table if ys is None else table[: len(xs), len(xs) :]


SHARED_INIT = 0.5
"""Merged by `linear`, the A of n adapters grows to √(1 + (n − 1) c) times one, c their `init_similarity`; if (n − 1) c
is above this, a merge deserves a warning. Measured: c within ±0.005 if initialised separately, 0.96 if together.
"""
_SAMPLED = 16  # modules at least, of adapters that have as many


def init_similarity(xs: Sequence[Adapter]) -> float:
    """Return the mean cosine of the factors A of two adapters, cos(vec A, vec A'), in [-1, 1]: near 1 if training
    started from the same random A, near 0 from separate ones.

    The mean over all pairs, (‖Σ Â‖² − n) / (n (n − 1)) with Â = A / ‖A‖, and over at most 31 modules, evenly spaced,
    that all adapters have with the same shape and A ≠ 0; without any, 0. Depends on the gauge: compressed or coded
    factors do not show their initialisation. Raises ShapeMismatch, NameMismatch.
    """
    xs = aligned(as_adapters(xs))
    n, cosines = len(xs), []
    common = [path for path in xs[0].modules if all(path in x.modules for x in xs)] if n > 1 else []
    for path in common[:: max(1, len(common) // _SAMPLED)]:
        sides = [x.modules[path].a for x in xs]  # (r, din) each
        norms = [float(np.linalg.norm(a)) for a in sides]
        if all(norms) and len({a.shape for a in sides}) == 1:
            whole = sum(a / norm for a, norm in zip(sides, norms, strict=True))
            cosines.append((float(np.linalg.norm(whole)) ** 2 - n) / (n * (n - 1)))
    return float(np.mean(cosines)) if cosines else 0.0


def _module_mean(
    xs: Sequence[Adapter], ys: Sequence[Adapter] | None, of_module: OfModule, *, exact: bool = False
) -> Table:
    """Return the mean of a per-module score over the modules that either side of a pair has; by kernels or, if `exact`,
    by the equations.
    """
    if ys is not None:
        return np.stack([_one_against(x, ys, of_module, exact) for x in xs]) if xs else np.zeros((0, len(ys)))
    total, count = np.zeros((len(xs), len(xs))), np.zeros((len(xs), len(xs)))
    gram = module_gram if exact else kernels.gram
    for path in union(xs):  # few large products: BLAS uses threads itself, and memory is limited
        fs = [x.modules.get(path) for x in xs]
        inner = gram(fs)
        own = np.maximum(np.diagonal(inner), 0.0)
        has = np.array([f is not None for f in fs])
        present = has[:, None] | has
        total += np.where(present, of_module(inner, own[:, None], own[None]), 0.0)
        count += present
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _one_against(x: Adapter, ys: Sequence[Adapter], of_module: OfModule, exact: bool) -> Vector:
    """Return the means of one adapter against many, (m,): many small products, runs of modules in parallel."""
    total, count = np.zeros(len(ys)), np.zeros(len(ys))
    for scores, present in each(partial(_sums, x, ys, of_module, exact), kernels.runs([x, *ys])):
        total += scores
        count += present
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def _sums(
    x: Adapter, ys: Sequence[Adapter], of_module: OfModule, exact: bool, paths: Sequence[str]
) -> tuple[Vector, Int[Positions, " n"]]:
    """Return the scores of one adapter against many, summed over a run of modules, and the number of modules."""
    inner, own, others = (_exact_row if exact else kernels.row)(x, ys, paths)
    present = np.array([paths[0] in x.modules or paths[0] in y.modules for y in ys])
    return np.where(present, of_module(inner, own[:, None], others).sum(axis=0), 0.0), len(paths) * present


def _exact_row(x: Adapter, ys: Sequence[Adapter], paths: Sequence[str]) -> tuple[Table, Vector, Table]:
    rows = [module_row(x.modules.get(path), [y.modules.get(path) for y in ys]) for path in paths]
    inner, own, others = zip(*rows, strict=True)
    return np.stack(inner), np.array(own), np.stack(others)


def raw_gram(xs: Sequence[Adapter], quantile: float = 0.0) -> Square:
    """Return the inner products of the flattened raw factors A, B (zero-padded to equal rank), (n, n), for K-Means on
    A, B.

    Values up to the `quantile` of an adapter's own magnitudes count as zero. Scales are not applied: these are A
    and B as stored.
    """
    xs = aligned(xs)
    cuts = [_magnitude(x, quantile) if quantile else -1.0 for x in xs]
    total = np.zeros((len(xs), len(xs)))
    for path in union(xs):
        present = [i for i, x in enumerate(xs) if path in x.modules]
        fs = [xs[i].modules[path] for i in present]
        rank = max(f.shape.rank for f in fs)
        for sides in ([f.a for f in fs], [f.b.T for f in fs]):
            rows = np.zeros((len(fs), rank, sides[0].shape[1]), dtype=np.float32)
            for values, side, i in zip(rows, sides, present, strict=True):
                values[: len(side)] = np.where(np.abs(side) > cuts[i], side, 0.0)
            flat = rows.reshape(len(fs), -1)
            total[np.ix_(present, present)] += flat @ flat.T
    return total


def _magnitude(x: Adapter, quantile: float) -> float:
    values = np.concatenate([np.abs(side).ravel() for f in x.modules.values() for side in (f.a, f.b)])
    position = int(quantile * (values.size - 1))
    return float(np.partition(values, position)[position])


def principal_coordinates(gram: Square) -> Square:
    """Return points with these inner products, (n, n): row i is point i, columns by falling variance (classical
    scaling, canonical signs).
    """
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    points = vectors[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0.0))
    peaks = points[np.abs(points).argmax(axis=0), np.arange(len(points))]
    return np.asarray(points * np.where(peaks < 0, -1.0, 1.0))
