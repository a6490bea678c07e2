"""Nested scalar quantisers of a Gaussian, in integers: edges, centres and frequencies of bins.

A value x of unit variance is binned by magnitude: bin 0 is |x| < edges[0], bin k is edges[k-1] <= |x| < edges[k], and
larger values are outliers. Edges and centres are integers in units of 2^-16, frequencies are integers that add up to
2^24, all computed by integer arithmetic alone: the same on every machine. docs/coded.md is normative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .arrays import Int64, Integers

Chain = tuple[int, ...]
"""A start quantiser's id, then the ratios of its refinements."""
UNIT = 2**16
"""One standard deviation, in the unit of edges and centres."""
TOTAL = 2**24
"""The sum of a table's frequencies."""
LIMIT = 6 * UNIT
"""The bins of a start quantiser reach up to this magnitude."""
MOST_BINS = 2**14
"""The most bins besides bin 0."""
RATIOS = (1, 2, 3)
"""Into how many bins a refinement cuts one; 1 leaves the quantiser unchanged."""
_NODE = UNIT // 64  # the density is linear between multiples of 1/64
_NODES = 640
_FALL, _BEND = 18444492411329227605, 18442241023793258495  # 2^64 e^(-1/8192), 2^64 e^(-2/8192), rounded down

_STEPS = (
    *(183501, 154305, 129754, 109110, 91750, 77152, 64877, 54555, 45875, 38576, 32438),
    *(27277, 22937, 19288, 16219, 13638, 11468, 9644, 8109, 6819, 5734, 4822),
)
STARTS: Sequence[tuple[int, int]] = (
    *((step, step // 2) for step in _STEPS),
    *((step, step * 3 // 4) for step in _STEPS[1:11]),
)
"""(step, half the width of bin 0) of the start quantisers: 2.8 · 2^(-i/4), and some with a wider bin 0."""


@cache
def _law() -> tuple[Int64[Integers, " nodes"], Int64[Integers, " nodes"]]:
    """Return the density 2^30 e^(-x²/2) at multiples of 1/64, and its integral from 0 to each in units of 2^-16."""
    value, fall, values = 2**62, _FALL, []
    for _ in range(_NODES + 1):
        values.append(value >> 32)
        value, fall = value * fall >> 64, fall * _BEND >> 64
    density = np.array(values, np.int64)
    return density, np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) * (_NODE // 2))])


def _density(x: Int64[Integers, " n"]) -> Int64[Integers, " n"]:
    values, _ = _law()
    node, rest = np.divmod(x, _NODE)
    found: Integers = values[node] + (values[node + 1] - values[node]) * rest // _NODE
    return found


def _mass(x: Int64[Integers, " n"]) -> Int64[Integers, " n"]:
    """Return the integral of the density from 0 to x."""
    values, sums = _law()
    node, rest = np.divmod(x, _NODE)
    bend = (values[node + 1] - values[node]) * rest * rest // (2 * _NODE)
    found: Integers = sums[node] + values[node] * rest + bend
    return found


def frequencies(masses: Int64[Integers, "n m"]) -> Int64[Integers, "n m"]:
    """Return (n, m) masses as n tables of m frequencies, each ≥ 1, adding up to 2^24; the first takes the remainder."""
    count = masses.shape[1]
    unit = masses.sum(axis=1, keepdims=True) // (TOTAL - count) + 1
    found: Integers = 1 + masses // unit
    found[:, 0] += TOTAL - found.sum(axis=1)
    return found


@dataclass(frozen=True, eq=False)
class Quantiser:
    """The bins of a magnitude: `edges` (K + 1,) ascending, `centres` (K + 1,) from 0, for K bins besides bin 0."""

    edges: Int64[Integers, " n"]

    @property
    def bins(self) -> int:
        """K, the number of bins besides bin 0."""
        return len(self.edges) - 1

    @property
    def centres(self) -> Int64[Integers, " {self.bins}+1"]:
        """The mean magnitude in every bin: 0 for bin 0, and (p(a) − p(b)) / ∫ₐᵇ p for [a, b)."""
        low, high = self.edges[:-1], self.edges[1:]
        mass, fall = _mass(high) - _mass(low), _density(low) - _density(high)
        mean = np.where(mass > 0, fall * 2**32 // np.maximum(mass, 1), (low + high) // 2)
        return np.concatenate([[0], np.clip(mean, low, high)])

    def masses(self) -> Int64[Integers, " {self.bins}+1"]:
        """Return the mass of every bin, (K + 1,), one sign only."""
        return np.diff(_mass(self.edges), prepend=0)

    def start_frequencies(self) -> Int64[Integers, " 2*{self.bins}+3"]:
        """Return the frequencies of the symbols 0, +1, −1, … +K, −K and an outlier of either sign: (2 K + 3,)."""
        masses = self.masses()
        both = np.concatenate([masses[:1] * 2, np.repeat(masses[1:], 2), [0, 0]])
        table: Integers = frequencies(both[None])[0]
        return table

    def refined(self, ratio: int) -> Quantiser:
        """Return the refinement: bin 0 is cut at a third, every other bin into `ratio` equal ones."""
        low, high = self.edges[:-1, None], self.edges[1:, None]
        cuts = low + (high - low) * np.arange(1, ratio + 1) // ratio
        return Quantiser(np.concatenate([[self.edges[0] // 3, self.edges[0]], cuts.ravel()]))

    def refining_frequencies(self, ratio: int) -> tuple[Int64[Integers, " 3"], Int64[Integers, "{self.bins} {ratio}"]]:
        """Return the frequencies of bin 0's parts 0, +1, −1, (3,), and of the parts of bins 1 … K, (K, ratio)."""
        parts = self.refined(ratio).masses()
        inner = np.array([[2 * parts[0], parts[1], parts[1]]])
        return frequencies(inner)[0], frequencies(parts[2:].reshape(self.bins, ratio))


@cache
def quantiser(chain: Chain) -> Quantiser:
    """Return the quantiser of a chain."""
    if len(chain) > 1:
        return quantiser(chain[:-1]).refined(chain[-1])
    step, zero = STARTS[chain[0]]
    return Quantiser(np.arange(zero, LIMIT + step, step, dtype=np.int64))


@cache
def start_table(chain: Chain) -> Int64[Integers, " symbols"]:
    """Return `start_frequencies` of a chain's quantiser."""
    return quantiser(chain).start_frequencies()


@cache
def refining_tables(chain: Chain) -> tuple[Int64[Integers, " 3"], Int64[Integers, "bins {chain[-1]}"]]:
    """Return `refining_frequencies` of a chain's last ratio."""
    return quantiser(chain[:-1]).refining_frequencies(chain[-1])
