"""Taking an adapter out of an equal average, and how much of the rest survives rounding.

X is a side (A or B) of one module, multiplied by √|s|; p is the method's `mean_power`.

    stored    M = n^-p Σ X + errors            errors: one rounding per fold, each of at most u |M| + a subnormal's step
    rest      (n - 1)^-p (n^p M - X_removed)   the same errors, relative to a smaller remainder
    ΔW        ‖B' A' - B A‖² ≤ e_B max‖a_k‖² + e_A max‖b_k‖² + e_A e_B      e: ‖errors of a side‖²; k: a rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import NotReversible
from ..lora.adapter import Adapter, Factors
from ..lora.algebra import norm, trained
from ..lora.alignment import aligned
from ..lora.arrays import Array64, Bool, Flags, Float64
from . import rules
from .driver import one_alpha
from .merge_method import METHODS

Energies = Float64[Array64, "2"]
"""Of the errors on A and on B of a module, both multiplied by √|s|."""
Sides = tuple[Float64[Array64, "rank din"], Float64[Array64, "dout rank"]]
UNIT_ROUNDOFF = {"f32": 2.0**-22, "f16": 2.0**-11, "bf16": 2.0**-8}  # in f32 the weights and sums of a fold round too
SUBNORMAL = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}  # the step between the smallest values
STATED = 1e-5  # relative precision of the norms in a manifest


@dataclass(frozen=True, slots=True)
class Noise:
    """The squared norms of the rounding errors in an average."""

    modules: Mapping[str, Energies]
    elsewhere: Energies = field(default_factory=lambda: np.zeros(2))
    """Of all modules together that the average does not hold (any more): dropped values may not have been zero."""

    def __getitem__(self, path: str) -> Energies:
        return self.modules.get(path, self.elsewhere)


class Rest(NamedTuple):
    """The rest of an average after one adapter was taken out."""

    adapter: Adapter
    noise: Noise
    precision: float
    """Bound of ‖ΔW - the true average's‖ / ‖the true average's‖; inf if there is no bound."""


def noise_of(x: Adapter, roundings: float) -> Noise:
    """Return the noise of an average rounded `roundings` times to the dtype of `x`, its present values.

    The squared norms of independent errors add up. A sum grows with every fold, unless adapters cancel, so the n
    roundings of a running average count as n / 2 roundings of its present values.
    """
    return Noise({path: roundings * _rounding(f, x.dtype) for path, f in x.modules.items()})


def unmerge(
    merged: Adapter, removed: Adapter, staying: Sequence[float], *, method: str, noise: Noise | None = None
) -> Rest:
    """Take one adapter out of an equal average; `staying` are the norms ‖ΔW‖ of the others in it, at least one.

    `noise` defaults to that of an average folded one by one in its dtype. Ranks and modules with both sides no larger
    than the noise are cleared, because cosine would take them for an adapter; the precision includes what they may
    have held. Raises NotReversible for a method that does not average.
    """
    power = METHODS[method].mean_power
    if power is None:
        raise NotReversible(f"a merge by {method} cannot be taken apart", cure="use linear or factor_mean")
    merged, removed = aligned([merged, removed], spelling="first")  # as in the noise
    count = len(staying) + 1
    noise = noise or noise_of(merged, count / 2)
    share = (count - 1) ** -power
    grown = (count**power * share) ** 2
    modules: dict[str, Factors] = {}
    errors: dict[str, Energies] = {}
    elsewhere, missed = noise.elsewhere * grown, 0.0
    brought = {path: f for path, f in removed.modules.items() if trained(f)}
    for path in sorted({*merged.modules, *brought}):
        a, b = _difference(merged.modules.get(path), brought.get(path), count**power)
        a, b, error = a * share, b * share, noise[path] * grown
        ranks = np.stack([np.sum(a**2, axis=1), np.sum(b**2, axis=0)])
        kept = np.any(ranks > error[:, None], axis=0)
        error = error + ranks[:, ~kept].sum(axis=1)
        if kept.any():
            modules[path] = _cleared(a, b, kept)
            errors[path] = error + _rounding(modules[path], merged.dtype)
            missed += float(errors[path] @ ranks[::-1, kept].max(axis=1) + np.prod(errors[path]))
        else:
            elsewhere = elsewhere + error
    if not any(staying) or not modules:
        gone = {p: Factors(np.zeros_like(f.a[:1]), np.zeros_like(f.b[:, :1])) for p, f in merged.modules.items()}
        nothing = merged.with_factors(one_alpha(gone))
        return Rest(nothing, noise_of(nothing, 0), math.inf if any(staying) else 0.0)
    rest = merged.with_factors(one_alpha(modules))
    missed += float(np.prod(elsewhere))
    return Rest(rest, Noise(errors, elsewhere), _precision(rest, math.sqrt(missed), staying))


def _difference(held: Factors | None, removed: Factors | None, times: float) -> Sides:
    """Return `times` · held − removed on A and on B; lower ranks are zero-padded, an absent module is 0."""
    sides = [_rooted(f) for f in (held, removed) if f is not None]
    a, b = (np.zeros(np.max([pair[i].shape for pair in sides], axis=0)) for i in (0, 1))
    for pair, weight in zip(sides, [times, -1.0] if held is not None else [-1.0], strict=False):
        for total, side in zip((a, b), pair, strict=True):
            total[: side.shape[0], : side.shape[1]] += weight * side
    return a, b


def _cleared(a: Float64[Array64, "rank din"], b: Float64[Array64, "dout rank"], kept: Bool[Flags, " rank"]) -> Factors:
    """Return the factors with the ranks not kept set to zero, and trailing ones cut off: the others keep their place,
    where the next fold adds to them.
    """
    rank = np.flatnonzero(kept)[-1] + 1
    return Factors(
        np.where(kept[:rank, None], a[:rank], 0).astype(np.float32),
        np.where(kept[:rank], b[:, :rank], 0).astype(np.float32),
    )


def _precision(rest: Adapter, missed: float, staying: Sequence[float]) -> float:
    """Return the error relative to the true rest, whose norm is known for a single adapter and for several is at least
    the norm found minus the error.
    """
    size = norm(rest)
    if len(staying) > 1:
        return missed / (size - missed) if size > missed else math.inf
    return max(missed, abs(size - staying[0]) - STATED * staying[0]) / staying[0]


def _rounding(f: Factors, dtype: str) -> Energies:
    """Return the squared norms of the errors of rounding A and B once: per value u |x| and half a subnormal step."""
    unit, step = UNIT_ROUNDOFF[dtype], SUBNORMAL[dtype] / 2 * math.sqrt(abs(f.scale))
    return np.array([unit**2 * np.sum(side**2) + step**2 * side.size for side in _rooted(f)])


def _rooted(f: Factors) -> Sides:
    signed = rules.roots([f.scale])[0]
    return f.a.astype(np.float64) * signed, f.b.astype(np.float64) * abs(signed)
