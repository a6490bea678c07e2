"""The driver of all merge methods, module by module."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from ..digest import canonical_json
from ..errors import UsageError, numbered
from ..execution import WORKERS, each
from ..lora.adapter import Adapter, Factors
from ..lora.algebra import assemble, module_squared_norm, trained, truncate, truncate_dense, union
from ..lora.alignment import fitting
from ..lora.given import as_adapters, as_numbers
from . import rules
from .merge_method import METHODS, Draw, MergeMethod, Tensor
from .parameters import Value

_LARGE = 2**17  # values in a module's factors, over all adapters, from which a thread pays


def merge(
    xs: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str,
    rank: int | None = None,
    seed: int = 0,
    **params: Any,
) -> Adapter:
    """Merge adapters of one base into one, by a registered method.

    `weights` (n,) default to 1/n or 1 as the method declares; `rank` caps the rank stored (never pads). For a single
    adapter every method returns w ΔW. The result has the widest input dtype and, for several adapters, one alpha for
    all ranks. Untrained adapters (ΔW = 0) do not count in n, and an untrained module is left out: its random A would
    mix with the others' B. Raises UsageError, BaseMismatch, ShapeMismatch, UnknownName.
    """
    return merge_measured(xs, weights, method=method, rank=rank, seed=seed, **params)[0]


def merge_measured(
    xs: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str,
    rank: int | None = None,
    seed: int = 0,
    averages: Sequence[bool] | None = None,
    watch: Callable[[list[str]], Iterable[str]] = iter,
    **params: Any,
) -> tuple[Adapter, float]:
    """Return `merge`, and the relative Frobenius error of cutting its result to the rank (0 if nothing was cut).

    `averages` marks which of `xs` are averages: in these, a side that is 0 comes from adapters that cancel. `watch`
    wraps the iteration over module paths: a progress bar, for methods that take minutes.
    """
    chosen = METHODS[method]
    checked = chosen.checked(params)
    xs = as_adapters(xs)
    ws = _weights(xs, None if weights is None else as_numbers(weights), chosen)
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}", cure="give a rank of at least 1, or none for the method's default")
    sources, xs = xs, fitting(xs)  # masks are seeded by the source's digest
    paths = union(xs)

    def merged(path: str) -> tuple[Factors, float, float]:
        everyone = {i: x.modules[path] for i, x in enumerate(xs) if path in x.modules}
        present = [i for i, f in everyone.items() if len(xs) == 1 or (averages and averages[i]) or trained(f)]
        if not present:
            dout, _, din = next(iter(everyone.values())).shape
            return Factors(np.zeros((1, din), np.float32), np.zeros((dout, 1), np.float32)), 0.0, 0.0
        fs, share = [everyone[i] for i in present], [ws[i] for i in present]
        if len(xs) == 1:
            cap, found = rank, (replace(fs[0], scale=fs[0].scale * ws[0]), 0.0, 0.0)
        else:
            cap = rank if rank is not None else _default_rank(chosen, fs)
            found = _merge_module(chosen, fs, share, _masks(sources, present, path, seed), cap, checked)
        return truncate(found[0], cap) if cap is not None and found[0].shape.rank > cap else found

    # Averages are bound by memory, small modules by Python: threads help neither.
    values = Counter[str]()
    for x in xs:
        values.update({path: s.rank * (s.dout + s.din) for path, s in x.shapes.items()})
    workers = WORKERS if chosen.mean_power is None and max(values.values(), default=0) >= _LARGE else 1
    modules: dict[str, Factors] = {}
    whole: list[str] = []  # modules that were not cut
    dropped = kept = 0.0
    with contextlib.closing(each(merged, paths, workers)) as results:
        for path, found in zip(watch(paths), results, strict=True):
            modules[path], lost, left = found
            dropped += lost
            kept += left
            whole += [] if left else [path]
    if dropped:
        kept += sum(module_squared_norm(modules[path]) for path in whole)
    result = assemble(xs, modules if len(xs) == 1 else one_alpha(modules))
    return result, math.sqrt(dropped / (dropped + kept)) if dropped else 0.0


def _merge_module(
    method: MergeMethod,
    fs: list[Factors],
    weights: list[float],
    masks: dict[str, Draw],
    cap: int | None,
    params: Mapping[str, Value],
) -> tuple[Factors, float, float]:
    """Merge one module; returns its factors, and ‖ΔW‖² dropped and kept if the rank was cut on the way."""
    if method.space in ("exact", "joint"):
        return method.rule(fs, weights, **params), 0.0, 0.0
    if method.space == "subspace":
        found: tuple[Factors, float, float] = method.rule(fs, weights, cap or max(f.shape.rank for f in fs), **params)
        return found
    if method.space == "delta":
        deltas = [f.delta() for f in fs]
        dense = method.rule(deltas, np.array(weights, np.float32), masks["W"], **params)
        return truncate_dense(dense, cap or max(f.shape.rank for f in fs))
    if method.weighting == "root":
        signed = rules.roots([w * f.scale for w, f in zip(weights, fs, strict=True)])
        a: Tensor = method.rule([f.a for f in fs], signed, masks["A"], **params)
        b: Tensor = method.rule([f.b for f in fs], np.abs(signed), masks["B"], **params)
    else:
        root_a = rules.roots([f.scale for f in fs])
        shares = np.array(weights, np.float32)
        a = method.rule([r * f.a for r, f in zip(root_a, fs, strict=True)], shares, masks["A"], **params)
        b = method.rule([abs(r) * f.b for r, f in zip(root_a, fs, strict=True)], shares, masks["B"], **params)
    return Factors(a, b), 0.0, 0.0


def one_alpha(modules: dict[str, Factors]) -> dict[str, Factors]:
    """Return modules of scale 1 with the largest rank as alpha of all, so that ΔW = alpha / r · B A is read the same
    by programs that ignore per-module alphas (llama.cpp's converter).
    """
    alpha = max((f.shape.rank for f in modules.values()), default=1)
    scaled = {}
    for path, f in modules.items():
        root = np.float32(math.sqrt(alpha / f.shape.rank))
        scaled[path] = f if root == 1 else Factors(f.a / root, f.b / root, alpha / f.shape.rank)
    return scaled


def _weights(xs: Sequence[Adapter], weights: Sequence[float] | None, method: MergeMethod) -> list[float]:
    if not xs:
        raise UsageError("nothing to merge", cure="give at least one adapter")
    if weights is None:
        return [1.0 / (sum(map(trained, xs)) or 1) if method.weights == "mean" else 1.0] * len(xs)
    if len(weights) != len(xs):
        what = f"{numbered(len(weights), 'weight')} for {numbered(len(xs), 'adapter')}"
        raise UsageError(what, cure="give one weight per adapter")
    bad = [w for w in weights if not math.isfinite(w)]
    if bad:
        raise UsageError(f"weights {bad} are not finite numbers", cure="give finite numbers, one per adapter")
    return list(weights)


def _default_rank(method: MergeMethod, fs: list[Factors]) -> int | None:
    if method.space == "factors" or method.rank == "sum":
        return None
    return max(f.shape.rank for f in fs)


def _masks(xs: Sequence[Adapter], present: list[int], path: str, seed: int) -> dict[str, Draw]:
    """Return the generator of adapter i's mask for each side, from (seed, digest, module, side), independent of the
    adapters' order.
    """

    def side(name: str) -> Draw:
        def draw(i: int) -> np.random.Generator:
            key = canonical_json([seed, xs[present[i]].digest, path, name])
            return np.random.default_rng(list(blake2b(key, digest_size=16).digest()))

        return draw

    return {name: side(name) for name in "ABW"}
