"""From an adapter to levels: each at one slope, or as fine as a number of bytes allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from ...lora.adapter import Adapter, Shape
from ...lora.allocation import SLOPES, Coding, Options, slope_keeping, slope_within, slopes_within
from ...lora.directions import directions
from ...lora.quality import energy_for, quality, restoration, worth
from ...lora.quantiser import RATIOS, Chain
from .body import MOST_GAIN, NONE, Additions, Direction, Side, grouped, head, write_elements, write_lists
from .decoder import factors
from .description import packed
from .elements import OUTLIER, indices, outlier_codes, outlier_values
from .frame import framed
from .stream import StreamWriter

_TRIES = 8
_FINER = 30  # slopes to try for a quality, the last ones far below any that a level needs
_SPARE = 0.9985  # share of the available bits to use: estimates are usually this exact
_AS_CODED = 2**14
_ANY = 1e-6  # a quality that any direction reaches


class _Trial(NamedTuple):
    """A candidate level, and what is coded after it: `found` maps a direction's index to the direction."""

    level: bytes
    coding: Coding
    found: Mapping[int, Direction]
    kept: float


class Encoder:
    """An adapter and its levels so far; every further level refines them.

    `factors` (module path → factor, default 1) multiply the ΔŴ of modules: the gains hold them.
    """

    def __init__(self, adapter: Adapter, factors: Mapping[str, float] | None = None) -> None:
        self.adapter = adapter
        self.directions = directions(adapter)
        self.levels: list[bytes] = []
        self.kept = 0.0
        """The share of the adapter's ‖ΔW‖² that the levels keep."""
        self.before = adapter.modules.kept
        """The share that the adapter itself keeps, if it was decoded from a code; levels state the product."""
        self._description = packed(adapter)
        self._spectra = list(self.directions.modules.values())
        self._owner = np.repeat(np.arange(len(self._spectra)), [len(m) for m in self._spectra]).tolist()
        self._x = [[row for m in self._spectra for row in getattr(m, name)] for name in "uv"]
        self._first = np.cumsum([0, *map(len, self._spectra)]).tolist()
        self._factors = [(factors or {}).get(path, 1.0) for path in self.directions.modules]
        roots = np.concatenate(
            [
                np.sqrt(factor * m.sigma) / (m.u.shape[1] * m.v.shape[1]) ** 0.25
                for m, factor in zip(self._spectra, self._factors, strict=True)
            ]
        )
        self._top = float(np.float32(roots.max(initial=0.0)))
        below = np.rint(64 * np.log2(self._top / roots))
        self._gains = np.clip(below, 0, MOST_GAIN).astype(np.int64).tolist()
        self._coding = Coding.nothing(self.directions)
        self._found: Mapping[int, Direction] = {}

    @property
    def size(self) -> int:
        """The bytes of all levels so far."""
        return sum(map(len, self.levels))

    @property
    def least(self) -> int:
        """The bytes of the smallest base level that codes a direction."""
        return len((self._for(_ANY) if self._owner else self._trial(self._coding)).level)

    def options(self) -> Options:
        """Return what one more level may add."""
        return Options(self.directions, self._coding)

    def add(self, slope: float, options: Options | None = None) -> bytes:
        """Add one level at a slope: the share of ‖ΔW‖² that a bit must be worth."""
        return self._accept(self._trial((options or self.options()).choose(slope)[0]))

    def add_within(self, size: int) -> bytes:
        """Add one level, as fine as possible with all levels in at most `size` bytes. Raises UsageError if no level is
        that small; the base level of a trained adapter must code a direction.
        """
        least, room = self._trial(self._coding), size - self.size
        options, bits = self.options(), _SPARE * 8.0 * (room - len(least.level))
        trial = least
        for _ in range(_TRIES if bits > 0 else 0):
            trial = self._trial(options.choose(slope_within([options], bits))[0])
            if len(trial.level) <= room:
                break
            bits, trial = max(_SPARE * bits - 8.0 * (len(trial.level) - room), 0.0), least
        trial = self._worth_writing(trial)
        if len(trial.level) > room:
            needed = self.size + len(trial.level)
            what = f"{size} bytes are too few: the adapter's description and first direction take {needed}"
            raise UsageError(what, cure=f"give at least {needed} bytes")
        return self._accept(trial)

    def add_for(self, wanted: float) -> bytes:
        """Add one level, as coarse as possible with a predicted quality of at least `wanted` for all levels. Raises
        UsageError if no level is that fine.
        """
        return self._accept(self._for(wanted))

    def size_for(self, wanted: float) -> int:
        """Return the bytes of all levels after `add_for`."""
        return self.size + len(self._for(wanted).level)

    def _for(self, wanted: float) -> _Trial:
        options, share = self.options(), energy_for(wanted)
        slope = slope_keeping([options], share)
        for attempt in range(_FINER):
            trial = self._trial(options.choose(slope)[0])
            if trial.kept >= share:
                return trial
            slope *= 1 - min(1e-3 * 2**attempt, 0.5)  # the estimate was slightly too high
        finest = self._trial(options.choose(SLOPES[0])[0])
        if finest.kept >= share:
            return finest
        what = f"no level is fine enough for a predicted quality of {wanted}"
        raise UsageError(what, cure=f"give at most {math.floor(1e3 * quality(finest.kept)) / 1e3:g}")

    def _worth_writing(self, trial: _Trial) -> _Trial:
        """Return the trial, or the least level with a direction if this one has none of a trained adapter."""
        return self._for(_ANY) if self._owner and not trial.found else trial

    def _accept(self, trial: _Trial) -> bytes:
        self.levels.append(trial.level)
        self._coding, self._found, self.kept = trial.coding, trial.found, trial.kept
        return trial.level

    def _trial(self, coding: Coding) -> _Trial:
        """Return the level that refines what is coded so far to this coding."""
        old = sorted(self._found.items())
        fresh = [d for d, chain in enumerate(coding.u) if chain and d not in self._found]
        u = _sides(self._x[0], {d: was.u for d, was in old}, coding.u)
        v = _sides(self._x[1], {d: was.v for d, was in old}, coding.v)
        found = {d: Direction(self._gains[d], u[d], v[d]) for d in (*(d for d, _ in old), *fresh)}
        firsts = set(self._first)
        below = [self._gains[d] - (0 if d in firsts else self._gains[d - 1]) for d in fresh]
        counts = np.bincount([self._owner[d] for d in fresh], minlength=len(self._spectra)).tolist()
        writer = StreamWriter()
        starts = [[side[d].chain[0] for d in fresh] for side in (u, v)]
        moved = [[(was.u, u[d]) for d, was in old], [(was.v, v[d]) for d, was in old]]
        ratios = [[0 if now is was else RATIOS.index(now.chain[-1]) for was, now in side] for side in moved]
        write_lists(writer, Additions(counts, below, (starts[0], starts[1]), (ratios[0], ratios[1])))
        new = [(side[d], x[d]) for side, x in zip((u, v), self._x, strict=True) for d in fresh]
        write_elements(writer, new, [(now, was.indices) for side in moved for was, now in side if now is not was])
        kept = self.kept if self.levels and coding is self._coding else self._kept(found)
        base = None if self.levels else (self._top, self._description)
        body = head(self.before * kept, round(math.sqrt(restoration(kept)) * _AS_CODED), base) + writer.finished()
        return _Trial(framed(self.levels, body), coding, found, kept)

    def _kept(self, found: Mapping[int, Direction]) -> float:
        """Return 1 − ‖ΔW − ΔŴ‖² / ‖ΔW‖² of the decoded directions, without restoration and factors."""
        gained = 0.0
        for module, factor, (start, end) in zip(self._spectra, self._factors, pairwise(self._first), strict=True):
            coded = [found[d] for d in range(start, end) if d in found]
            if coded:
                f = factors(coded, Shape(module.u.shape[1], len(coded), module.v.shape[1]), self._top, _AS_CODED)
                a, b = f.a.astype(np.float64), f.b.astype(np.float64)
                weight = module.sigma / math.sqrt(f.shape.dout * f.shape.din)
                cross = np.sum(weight[:, None] * (module.u @ b) * (module.v @ a.T))
                gained += float(2 * cross / factor - np.sum((b.T @ b) * (a @ a.T)) / factor**2)
        return gained / self.directions.total if self.directions.total else 1.0


def add_together(encoders: Sequence[Encoder], size: int) -> None:
    """Add a level to each adapter, as fine as all levels of all adapters fit into `size` bytes, where the last byte of
    each adds the same predicted quality. Raises UsageError if the least levels do not fit.
    """
    room = size - sum(each.size for each in encoders)
    empty = [each._trial(each._coding) for each in encoders]
    trials = [each._worth_writing(trial) for each, trial in zip(encoders, empty, strict=True)]
    if _size(trials) > room:
        what = f"{size} bytes are too few: the descriptions and first directions of {len(encoders)} adapters take"
        needed = size - room + _size(trials)
        raise UsageError(f"{what} {needed}", cure=f"give at least {needed} bytes")
    options, bits = [each.options() for each in encoders], _SPARE * 8.0 * (room - _size(empty))
    for _ in range(_TRIES):
        slopes = slopes_within(options, bits, worth)
        finer = [
            each._worth_writing(each._trial(choices.choose(slope)[0]))
            for each, choices, slope in zip(encoders, options, slopes, strict=True)
        ]
        if _size(finer) <= room:
            trials = finer
            break
        bits = max(_SPARE * bits - 8.0 * (_size(finer) - room), 0.0)
    for each, trial in zip(encoders, trials, strict=True):
        each._accept(trial)


def _size(trials: Sequence[_Trial]) -> int:
    return sum(len(trial.level) for trial in trials)


def _sides(x: Sequence[NDArray[np.float32]], before: Mapping[int, Side], chains: Sequence[Chain]) -> dict[int, Side]:
    """Return every coded direction's side with its chain: the previous side if the chain has not changed."""
    found = dict(before)
    unchanged = {d for d, was in before.items() if was.chain == chains[d]}
    for chain, places in grouped(None if d in unchanged else chain or None for d, chain in enumerate(chains)):
        q, end = indices(np.concatenate([x[d] for d in places]), chain), 0
        far = bool((np.abs(q) == OUTLIER).any())
        for d in places:
            begin, end = end, end + len(x[d])
            outliers = before[d].outliers if d in before else NONE
            if far and d not in before:
                beyond = x[d][np.abs(q[begin:end]) == OUTLIER]
                outliers = outlier_values(outlier_codes(beyond, chain), beyond < 0, chain)
            found[d] = Side(chain, q[begin:end], outliers)
    return found
