"""What better codes would bring to coded adapters: quantisation on a trellis, and factors refitted to coded ones.

    python suites/codes.py --adapters DIR

DIR holds PEFT folders. First table: the share of ‖ΔW‖² that adapters keep at a share of their 16-bit size, if sides are
coded as a Gaussian is by entropy-coded scalar quantisers, and on trellises of 8 and 32 states (Ungerboeck's codes, a
scalar quantiser of even and one of odd multiples of a step, both with 0; Viterbi search of distortion + λ bits), with
the frequencies of the best steps and λ found on 38,400 values. Second table: what the encoder of lorashelf keeps, with
the best gains for what is coded, with the best K x K mixture of directions, and with U requantised after V.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorashelf import Adapter, read_adapter
from lorashelf.formats.coded.decoder import factors
from lorashelf.formats.coded.elements import indices
from lorashelf.formats.coded.encoder import Encoder
from lorashelf.formats.coded.files import encode_within
from lorashelf.lora.adapter import Shape
from lorashelf.lora.directions import Directions, directions
from lorashelf.lora.quantiser import UNIT, quantiser

Floats = NDArray[np.floating[Any]]
SHARES = (0.25, 0.5, 1, 2.5, 5)
PASSES = 5  # of fitting frequencies and centres to the choices made with them
DIRECTION_BITS = 12.0
AS_CODED = 2**14  # without restoration of the norm
CODES = {8: (0o13, 0o04), 32: (0o45, 0o10)}
"""Number of states → the parity checks of Ungerboeck's code for one dimension."""


def fitted(chosen: NDArray[np.intp], x: Floats, centres: Floats) -> tuple[Floats, Floats]:
    """The frequencies of symmetric indices, and the mean value of each."""
    count = np.bincount(chosen, minlength=len(centres)).astype(float)
    total = np.bincount(chosen, x, minlength=len(centres))
    count, total = count + count[::-1], total - total[::-1]
    means = np.where(count > 40, total / np.maximum(count, 1), centres)
    means[len(means) // 2] = 0.0
    return (count + 1e-3) / (count + 1e-3).sum(), means


def scalar(x: Floats, step: float, slope: float) -> tuple[float, float]:
    """Bits and squared error per value of an entropy-coded scalar quantiser that minimises error + slope · bits."""
    centres = step * np.arange(-int(5 / step) - 1, int(5 / step) + 2)
    flat, weights = x.ravel(), np.exp(-(centres**2) / 2)
    frequencies = weights / weights.sum()
    for _ in range(PASSES):
        chosen = ((flat[:, None] - centres) ** 2 - slope * np.log2(frequencies)).argmin(1)
        frequencies, centres = fitted(chosen, flat, centres)
    return float(-np.log2(frequencies[chosen]).mean()), float(np.mean((flat - centres[chosen]) ** 2))


def trellis(states: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The next state after an even or odd index, (states, 2), and the quantiser of each state, (states,)."""
    (first, second), state = (check >> 1 for check in CODES[states]), np.arange(states)[:, None]
    following = (state >> 1 ^ (state & 1) * first ^ np.array([[0, second]])) & states - 1
    return following, np.arange(states) & 1


def coded_on_trellis(x: Floats, states: int, step: float, slope: float) -> tuple[float, float]:
    """Bits and squared error per value of the rows of x, (n, length), each a path from state 0."""
    following, uses = trellis(states)
    (n, length), rows = x.shape, np.arange(len(x))
    k = np.arange(-int(2.5 / step) - 1, int(2.5 / step) + 2)
    centres = [2.0 * step * k, step * (2.0 * k - np.sign(k))]
    frequencies = [np.exp(-(c**2) / 2) / np.exp(-(c**2) / 2).sum() for c in centres]
    before = np.array([np.argwhere(following == state) for state in range(states)])  # (states, 2, (state, parity))
    for _ in range(PASSES):
        best, cost = np.zeros((length, n, 2, 2), np.intp), np.zeros((length, n, 2, 2))
        for which in (0, 1):
            for odd in (0, 1):
                allowed = np.flatnonzero(np.abs(k) % 2 == odd)
                price = -slope * np.log2(frequencies[which][allowed])
                found = (x.T[:, :, None] - centres[which][allowed]) ** 2 + price
                best[:, :, which, odd], cost[:, :, which, odd] = allowed[found.argmin(2)], found.min(2)
        total, came = np.full((n, states), np.inf), np.zeros((length, n, states), np.int8)
        total[:, 0] = 0.0
        for t in range(length):
            both = [total[:, old] + cost[t][:, uses[old], odd] for old, odd in before.transpose(1, 2, 0)]
            came[t] = both[1] < both[0]
            total = np.minimum(*both)
        state, chosen, used = total.argmin(1), np.zeros((n, length), np.intp), np.zeros((n, length), np.intp)
        for t in range(length - 1, -1, -1):
            state, odd = before[state, came[t, rows, state]].T
            used[:, t], chosen[:, t] = uses[state], best[t, rows, uses[state], odd]
        parts = [fitted(chosen[used == which], x[used == which], centres[which]) for which in (0, 1)]
        frequencies, centres = [part[0] for part in parts], [part[1] for part in parts]
    bits = -np.log2(np.choose(used, [f[chosen] for f in frequencies])).mean()
    return float(bits), float(np.mean((x - np.choose(used, [c[chosen] for c in centres])) ** 2))


def envelope(points: Sequence[tuple[float, float]]) -> Floats:
    """The points that no other one beats in both, in order of bits."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return np.array(kept)


def share_kept(found: Directions, code: Floats, bits: float) -> float:
    """The share of ‖ΔW‖² kept if each side may take any point of the code (bits, error per value)."""
    modules = [module for module in found.modules.values() for _ in range(len(module))]
    dout, din = (np.array([getattr(m, side).shape[1] for m in modules], float)[:, None] for side in "uv")
    rate, keeps = code[:, 0], 1 - code[:, 1]
    low, high, kept = 1e-9, 1.0, 0.0
    for _ in range(40):
        slope = float(np.sqrt(low * high))
        value = np.zeros(len(modules))
        spent, gained = np.zeros(len(modules)), np.zeros(len(modules))
        for r, c in zip(rate, keeps, strict=True):
            cost = dout * r + din * rate + DIRECTION_BITS
            share = found.energy[:, None] * c * keeps
            at = (share - slope * cost).argmax(1)
            rows = np.flatnonzero((share - slope * cost)[np.arange(len(modules)), at] > value)
            value[rows] = (share - slope * cost)[rows, at[rows]]
            spent[rows], gained[rows] = cost[rows, at[rows]], share[rows, at[rows]]
        if spent.sum() > bits:
            low = slope
        else:
            high, kept = slope, float(gained.sum())
    return kept


def refitted(adapter: Adapter, percent: float) -> Floats:
    """The shares of ‖ΔW‖² kept: as coded, with the best gains, with the best mixture, with U quantised after V."""
    encoder = Encoder(adapter)
    encode_within(encoder, int(adapter.parameters * percent / 50), 1)
    shares = np.zeros(4)
    for module, (start, end) in zip(encoder._spectra, pairwise(encoder._first), strict=True):
        coded = [encoder._found[d] for d in range(start, end) if d in encoder._found]
        if not coded:
            continue
        dout, din = module.u.shape[1], module.v.shape[1]
        dw = (module.u.T * (module.sigma / np.sqrt(dout * din))) @ module.v
        f = factors(coded, Shape(dout, len(coded), din), encoder._top, AS_CODED)
        u, v = f.b.T.astype(np.float64), f.a.astype(np.float64)
        best = (dw @ v.T @ np.linalg.inv(v @ v.T)).T
        root = np.sqrt(np.mean(best**2, 1, keepdims=True))
        again = [requantised(row, d.u.chain) for row, d in zip((best / root).astype(np.float32), coded, strict=True)]
        for place, left in ((0, u), (1, u), (3, np.array(again) * root)):
            across, gram = np.einsum("ko,oi,ki->k", left, dw, v), (left @ left.T) * (v @ v.T)
            gains = np.linalg.solve(gram, across) if place else np.ones(len(coded))
            shares[place] += 2 * gains @ across - gains @ gram @ gains
        cross = u @ dw @ v.T
        shares[2] += np.trace(np.linalg.solve(u @ u.T, cross) @ np.linalg.solve(v @ v.T, cross.T))
    return shares / encoder.directions.total


def requantised(x: NDArray[np.float32], chain: tuple[int, ...]) -> Floats:
    """The values of a side's elements in the quantiser of a chain; what lies beyond it takes its largest value."""
    centres = quantiser(chain).centres / UNIT
    q = np.clip(indices(x, chain).astype(int), -len(centres) + 1, len(centres) - 1)
    return np.asarray(np.sign(q) * centres[np.abs(q)])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="take every Nth adapter")
    options = parser.parse_args()
    folders = sorted(path.parent for path in options.adapters.glob("*/adapter_config.json"))[:: options.every]
    adapters = [read_adapter(folder) for folder in folders]
    x = np.random.default_rng(0).standard_normal((64, 600))
    slopes = (0.03, 0.06, 0.12, 0.2, 0.3, 0.45, 0.6)
    steps = np.geomspace(0.3, 2.8, 14)
    codes = {"scalar": envelope([scalar(x, step, slope) for step in steps for slope in slopes])}
    for states in CODES:
        points = [coded_on_trellis(x, states, step, slope) for step in steps[:-3] for slope in slopes]
        codes[f"{states} states"] = envelope(points)
    found = [directions(adapter) for adapter in adapters]
    print(f"| bytes | {' | '.join(codes)} | scalar, 10 % more bytes |\n|{'---|' * (len(codes) + 2)}")
    for percent in SHARES:
        trials = [(code, 1.0) for code in codes.values()] + [(codes["scalar"], 1.1)]
        row = [
            np.mean([share_kept(d, code, a.parameters * 0.16 * percent * more) for d, a in zip(found, adapters)])
            for code, more in trials
        ]
        print(f"| {percent} % | {' | '.join(f'{each:.3f}' for each in row)} |", flush=True)
    print("\n| bytes | as coded | best gains | best mixture | U after V |\n|---|---|---|---|---|")
    for percent in SHARES:
        row = np.mean([refitted(adapter, percent) for adapter in adapters], axis=0)
        print(f"| {percent} % | {' | '.join(f'{each:.4f}' for each in row)} |", flush=True)


if __name__ == "__main__":
    main()
