"""Which directions are coded, and how finely: one slope λ, the share of ‖ΔW‖² lost per bit, for all of them.

Every direction of every module takes the pair of quantisers for its sides, or none, that minimises

    e (1 − c_u² c_v²) + λ (bits of u + bits of v + 12)

with e its share of ‖ΔW‖² and c_u, c_v the cosines between its sides and their coded values. A level refines what the
levels before it have coded, and codes further directions. Several adapters share a budget of bits by one slope in
predicted quality: one more bit is worth the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Bool, Flags, Int, Positions, Table, Vector
from .directions import Directions, Sides
from .quantiser import MOST_BINS, RATIOS, STARTS, Chain, quantiser

Worth = Callable[[Vector], Vector]
_DIRECTION_BITS = 12.0  # of a direction's gain and the ids of its quantisers
_STEPS = 50  # the most trials of λ; usually 10 to 15
_TURNS = 3
SLOPES = 1e-12, 1.0
"""The least and the largest λ tried."""
_COARSE, _ROUNDS = 24, 5  # initial points of a curve, and how often one is added


@dataclass(frozen=True, eq=False)
class Coding:
    """The chains of u and v for every direction of an adapter; () if it is not coded."""

    u: Sequence[Chain]
    v: Sequence[Chain]

    @classmethod
    def nothing(cls, directions: Directions) -> Coding:
        """Return the coding without any direction."""
        empty: list[Chain] = [()] * len(directions.energy)
        return cls(empty, empty)


class Options:
    """What one more level may do with each direction of an adapter, given what is already coded."""

    def __init__(self, directions: Directions, before: Coding | None = None) -> None:
        self._before = before or Coding.nothing(directions)
        self._energy = directions.energy
        self._coded = np.array([bool(chain) for chain in self._before.u], np.bool_)
        self._fresh, self._old = np.flatnonzero(~self._coded), np.flatnonzero(self._coded)
        self._starts = [_started(side, self._fresh) for side in (directions.u, directions.v)]
        chains = (self._before.u, self._before.v)
        sides = (directions.u, directions.v)
        self._refined = [_refined(s, c, self._old) for s, c in zip(sides, chains, strict=True)]
        counts = [len(m) for m in directions.modules.values()]
        self._first = np.repeat(np.cumsum([0, *counts[:-1]]), counts)

    def choose(self, slope: float) -> tuple[Coding, float, float]:
        """Return the coding for this slope, the bits that it adds, and the share of ‖ΔW‖² that it keeps."""
        u, v = list(self._before.u), list(self._before.v)
        bits = kept = 0.0
        if len(self._fresh):
            i, j, added, share = _best(self._energy[self._fresh], self._starts, slope, _DIRECTION_BITS)
            gain = self._energy[self._fresh] * share - slope * added
            used = self._prefixes(gain > 0)
            bits += float(added[used].sum())
            kept += float((self._energy[self._fresh] * share)[used].sum())
            for at in np.flatnonzero(used).tolist():
                u[self._fresh[at]], v[self._fresh[at]] = (int(i[at]),), (int(j[at]),)
        if len(self._old):
            i, j, added, share = _best(self._energy[self._old], self._refined, slope, 0.0)
            bits += float(added.sum())
            kept += float((self._energy[self._old] * share).sum())
            for at, d in enumerate(self._old.tolist()):
                u[d] = u[d] + ((RATIOS[i[at]],) if i[at] else ())
                v[d] = v[d] + ((RATIOS[j[at]],) if j[at] else ())
        return Coding(u, v), bits, kept

    def _prefixes(self, wanted: Bool[Flags, " n"]) -> Bool[Flags, " n"]:
        """Return which fresh directions are wanted and have all their predecessors in the module coded, too."""
        all_wanted = self._coded.copy()
        all_wanted[self._fresh] = wanted
        places = np.arange(len(all_wanted))
        left_out = np.maximum.accumulate(np.where(all_wanted, -1, places))
        return (left_out < self._first)[self._fresh]


def _started(side: Sides, rows: Int[Positions, " n"]) -> tuple[Table, Table]:
    found = [side.estimate((start,), rows) for start in range(len(STARTS))]
    return np.stack([bits for bits, _ in found], 1), np.stack([kept for _, kept in found], 1)


def _refined(side: Sides, chains: Sequence[Chain], rows: Int[Positions, " n"]) -> tuple[Table, Table]:
    bits, kept = np.zeros((len(rows), len(RATIOS))), np.zeros((len(rows), len(RATIOS)))
    groups: dict[Chain, list[int]] = {}
    for at, row in enumerate(rows.tolist()):
        groups.setdefault(chains[row], []).append(at)
    for chain, members in groups.items():
        these = rows[members]
        kept[members, 0] = side.estimate(chain, these)[1]
        for i, ratio in enumerate(RATIOS[1:], 1):
            if quantiser(chain).bins * ratio >= MOST_BINS:
                kept[members, i] = -1.0  # never the best
                continue
            bits[members, i], kept[members, i] = side.estimate((*chain, ratio), these)
    return bits, kept


def _best(
    energy: Vector, sides: Sequence[tuple[Table, Table]], slope: float, extra: float
) -> tuple[Int[Positions, " n"], Int[Positions, " n"], Vector, Vector]:
    """Return for every direction the choice for u, that for v, the bits, and the share c_u² c_v² kept."""
    (bits_u, kept_u), (bits_v, kept_v) = sides
    rows, j = np.arange(len(energy)), kept_v.argmax(axis=1)
    for _ in range(_TURNS):  # the best for each side given the other, from the finest: converges
        i = ((energy * kept_v[rows, j])[:, None] * kept_u - slope * bits_u).argmax(axis=1)
        j = ((energy * kept_u[rows, i])[:, None] * kept_v - slope * bits_v).argmax(axis=1)
    return i, j, bits_u[rows, i] + bits_v[rows, j] + extra, kept_u[rows, i] * kept_v[rows, j]


def slope_within(options: Sequence[Options], bits: float) -> float:
    """Return the least λ at which one more level of these adapters adds at most `bits` bits in all, to 1 in 1000."""
    return _turn(options, lambda added, _: added, bits)[1]


def slope_keeping(options: Sequence[Options], kept: float) -> float:
    """Return the largest λ at which the adapters, with one more level, keep this share of ‖ΔW‖² on average (the share
    lost is met to 1 in 1000), or the least λ tried if none does.
    """

    def fineness(share: float) -> float:
        return 1 / max(1 - share, 1e-9)

    return _turn(options, lambda _, share: fineness(share / len(options)), fineness(kept))[0]


def _turn(options: Sequence[Options], measure: Callable[[float, float], float], goal: float) -> tuple[float, float]:
    """Return two close λ: the measure of the summed bits and shares of ‖ΔW‖² exceeds the goal at the first only."""
    (low, high), (above, below) = map(math.log, SLOPES), (math.inf, 0.0)
    for step in range(_STEPS):
        share = 0.5 if step % 2 or below <= 0 or math.isinf(above) else math.log(above / goal) / math.log(above / below)
        middle = low + (high - low) * min(max(share, 0.02), 0.98)
        found = [each.choose(math.exp(middle))[1:] for each in options]
        value = measure(sum(bits for bits, _ in found), sum(kept for _, kept in found))
        if value > goal:
            low, above = middle, value
        else:
            high, below = middle, value
        if above <= 1.001 * below or high - low < 1e-7:
            break
    return math.exp(low), math.exp(high)


class _Curve:
    """The bits that one more level adds and the share of ‖ΔW‖² that it keeps, by λ: exact at points, else linear."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._points: dict[float, tuple[float, float]] = {}
        low, high = map(math.log, SLOPES)
        for logarithm in np.linspace(low, high, _COARSE).tolist():
            self.measure(logarithm)

    def measure(self, logarithm: float) -> None:
        """Add the point at this ln λ."""
        self._points[logarithm] = self._options.choose(math.exp(logarithm))[1:]
        self.logarithms = np.array(sorted(self._points))
        table = np.array([self._points[each] for each in self.logarithms])
        self.bits, self.kept = np.maximum.accumulate(table[::-1], axis=0)[::-1].T

    def at(self, logarithm: float, worth: Worth) -> tuple[float, float]:
        """Return the ln λ at which ln(λ worth) has this value, and the bits there."""
        added = self.logarithms + np.log(worth(self.kept))
        found = float(np.interp(logarithm, added, self.logarithms))
        return found, float(np.interp(found, self.logarithms, self.bits))


def slopes_within(options: Sequence[Options], bits: float, worth: Worth) -> list[float]:
    """Return one λ per adapter at which one more level adds about `bits` in all, and each one's last bit adds the same
    predicted quality: λ worth(kept) is equal for all. `worth`, dq / d(share kept), must not increase.
    """
    curves = [_Curve(each) for each in options]
    logarithms: list[float] = []
    for _ in range(_ROUNDS):
        low, high = (math.log(slope) for slope in (SLOPES[0], 1e3 * SLOPES[1]))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            added = sum(curve.at(middle, worth)[1] for curve in curves)
            low, high = (middle, high) if added > bits else (low, middle)
        logarithms = [curve.at(high, worth)[0] for curve in curves]
        for curve, logarithm in zip(curves, logarithms, strict=True):
            curve.measure(logarithm)
    return [math.exp(each) for each in logarithms]
