"""Averages: an adapter with the record of what was merged into it; created, folded into, taken apart. No disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import AdapterFormatError, NotReversible
from ..formats.codecs import CODECS
from ..lora.adapter import Adapter, BaseId, parameters, wider
from ..lora.algebra import compress, norm, scaled
from ..lora.alignment import Renamed, aligned
from ..lora.kernels import squared_norms
from .driver import merge_measured
from .inverse import Noise, noise_of, unmerge
from .merge_method import METHODS
from .spec import MergeSpec, Weighting

LARGEST_NORM = 1e9
GROWS = 0.9  # share of a term's ‖ΔW‖² that a sum keeps at least, unless adapters cancel each other
UNRECORDED = "merged or cut before the shelf recorded how"
LEAST_PRECISION = 0.1  # the largest relative error of the rest with which an adapter is taken out of an average


@dataclass(frozen=True, slots=True)
class Source:
    """The record of one adapter that was averaged in, with the digest of the original."""

    task: str
    type: str
    digest: str
    weight: float
    rank: int
    parameters: int
    dtype: str
    norm: float


@dataclass(frozen=True, slots=True)
class History:
    """What stored values were merged from, and how."""

    merged: tuple[Source, ...]
    error: float = 0.0
    """Relative error of compression (`rank`, lossy encoding) at the latest merge."""
    method: str | None = None
    """The merge method if the values are, up to rounding, the equal average of `merged` by it; else None."""
    restored: float = 1.0
    """The factor of norm restoration contained in the scales; divided out before the next fold."""
    noise: tuple[float, ...] = ()
    """Squared norms of rounding errors on A and on B of every module in the order of paths, both multiplied by √|s|,
    then of all other modules together; empty if they are those of folding `merged` one by one.
    """
    extra_roundings: int = 0
    """Number of roundings beyond those of folding `merged`; written by earlier versions instead of `noise`."""
    fixed: str | None = None
    """Why no adapter can be taken out, in words; None if one can, or if the reason was not recorded."""

    @property
    def digests(self) -> frozenset[str]:
        """The digests of the averaged adapters."""
        return frozenset(source.digest for source in self.merged)

    @property
    def trained(self) -> bool:
        """Whether any of the adapters is trained (ΔW ≠ 0)."""
        return any(source.norm for source in self.merged)

    @property
    def faithful(self) -> str | None:
        """The averaging method that can continue exactly: the same; any ("*") for one adapter stored without a cut."""
        return "*" if len(self.merged) == 1 and not self.error else self.method

    @property
    def irreversible(self) -> str | None:
        """Why no adapter can be taken out; None for an equal average or a single adapter."""
        if self.method is not None or len(self.merged) < 2:
            return None
        return f"the slot's adapters cannot be taken apart: {self.fixed or UNRECORDED}"


@dataclass(frozen=True, slots=True)
class Average:
    """An adapter with its history; in memory, without a shelf."""

    adapter: Adapter
    history: History

    @property
    def plain(self) -> Average:
        """The average without norm restoration, from which the next fold starts."""
        if self.history.restored == 1.0:
            return self
        return Average(scaled(self.adapter, 1 / self.history.restored), replace(self.history, restored=1.0))

    @property
    def norm_ratio(self) -> float:
        """‖ΔW‖ over the mean norm of the adapters averaged in; 0 if these have none."""
        mean = float(np.mean([source.norm for source in self.history.merged]))
        return math.sqrt(sum(squared_norms(self.adapter).values())) / mean if mean else 0.0

    @property
    def noise(self) -> Noise | None:
        """The rounding noise; None means that of folding `merged` one by one in the adapter's dtype."""
        history = self.history
        if history.noise:
            pairs = np.reshape(history.noise, (-1, 2))
            return Noise(dict(zip(self.adapter.modules, pairs, strict=False)), pairs[-1])
        if history.extra_roundings:
            return noise_of(self.adapter, (len(history.merged) + history.extra_roundings) / 2)
        return None

    @property
    def noise_fits(self) -> bool:
        """Whether the recorded noise matches the adapter's number of modules."""
        return len(self.history.noise) in (0, 2 * len(self.adapter.modules) + 2)


def source(task: str, kind: str, adapter: Adapter) -> Source:
    """Return the record of an adapter to store. Raises AdapterFormatError if ‖ΔW‖ is implausibly large."""
    size = math.sqrt(sum(squared_norms(adapter).values()))
    if not size <= LARGEST_NORM:  # also true for NaN
        raise AdapterFormatError(
            [f"{task}: ‖ΔW‖ is {size:.1e}"], cure="no trained adapter has such a norm: train it again"
        )
    shapes = adapter.modules.original_shapes
    rank = max(shape.rank for shape in shapes.values())
    return Source(task, kind, adapter.digest, 1.0, rank, parameters(shapes), adapter.dtype, size)


def alone(adapter: Adapter, record: Source, spec: MergeSpec) -> Average:
    """Return a single adapter as the spec stores it: in `dtype`, cut to `rank`."""
    stored = replace(adapter, dtype=spec.dtype or adapter.dtype)
    cut = 0.0
    if spec.rank is not None:
        stored, cut = compress(stored, spec.rank)
    stored, error, lossy = _stored(stored, spec, cut)
    return Average(stored, History((record,), error, fixed=lossy))


def fold(
    sources: Sequence[Average],
    adapter: Adapter,
    record: Source,
    spec: MergeSpec,
    weighting: Weighting = "mean",
) -> Average:
    """Merge one more adapter into the averages of the sources.

    'mean': weights nᵢ/(n+1) and 1/(n+1), so all averaged adapters count the same (K-Merge); 'half': ½ and ½; a method
    with default weight 1 uses 1 and 1. Averages are computed in float32 and rounded once, to the widest dtype or the
    spec's.
    """
    sources = [source for source in sources if source.history.trained]  # untrained sources are left out
    if not sources:
        return alone(adapter, record, spec)
    *held, adapter = aligned([*(source.adapter for source in sources), adapter])
    sources = [_under(source, x) for source, x in zip(sources, held, strict=True)]
    records = [m for source in sources for m in source.history.merged]
    total = len(records) + 1
    if METHODS[spec.method].weights == "unary":
        shares, newcomer = [1.0] * len(sources), 1.0
    elif weighting == "half":
        shares, newcomer = [0.5] * len(sources), 0.5
    else:
        shares, newcomer = [len(source.history.merged) / total for source in sources], 1.0 / total
    weights = [share * m.weight for share, x in zip(shares, sources, strict=True) for m in x.history.merged]
    averages = [len(source.history.merged) > 1 for source in sources]
    xs = [*(source.adapter for source in sources), adapter]
    merged, error, lossy = _merge(xs, [*shares, newcomer], spec, [*averages, False])
    everyone = zip([*records, record], [*weights, newcomer], strict=True)
    taken_in = tuple(replace(m, weight=round(w, 15)) for m, w in everyone)
    fixed = _fixed([source.history for source in sources], spec, weighting, lossy)
    method, noise = (spec.method, _noise(sources, shares, merged, spec)) if fixed is None else (None, None)
    history = History(taken_in, error, method, noise=_flat(noise), fixed=fixed)
    return _restored(Average(merged, history), spec)


def _under(average: Average, adapter: Adapter) -> Average:
    """Return the average with the module names of `adapter`, the same adapter possibly renamed by `aligned`."""
    noise = average.noise
    if noise is None or not isinstance(adapter.modules, Renamed):
        return replace(average, adapter=adapter)
    renamed = {path: noise[before] for path, before in adapter.modules.before.items()}
    history = replace(average.history, noise=_flat(replace(noise, modules=renamed)), extra_roundings=0)
    return Average(adapter, history)


def block(adapters: Sequence[Adapter], records: Sequence[Source], spec: MergeSpec) -> Average:
    """Merge adapters at once with the method's default weights, copies once and untrained ones left out; a single one
    is stored unmerged.
    """
    first: dict[str, tuple[Adapter, Source]] = {}
    effective = any(m.norm for m in records)
    for x, m in zip(adapters, records, strict=True):
        if m.norm or not effective:
            first.setdefault(m.digest, (x, m))
    adapters, records = [x for x, _ in first.values()], [m for _, m in first.values()]
    if len(adapters) == 1:
        return alone(adapters[0], records[0], spec)
    method = METHODS[spec.method]
    weight = 1.0 / len(adapters) if method.weights == "mean" else 1.0
    merged, error, lossy = _merge(adapters, [weight] * len(adapters), spec)
    fixed = _fixed([], spec, "mean", lossy)
    history = History(
        tuple(replace(m, weight=weight) for m in records), error, spec.method if fixed is None else None, fixed=fixed
    )
    return _restored(Average(merged, history), spec)


def without(average: Average, digest: str, adapter: Adapter, spec: MergeSpec) -> tuple[Average, float]:
    """Take one adapter out of an average; also return the relative precision of the rest.

    Raises NotReversible if it is not an equal average of several, or rounding would leave too little of the rest.
    """
    merged, method = average.history.merged, average.history.method
    if len(merged) < 2:
        raise NotReversible("the slot holds only one adapter")
    if method is None:
        raise NotReversible(str(average.history.irreversible))
    index = next(i for i, m in enumerate(merged) if m.digest == digest)
    remaining = [*merged[:index], *merged[index + 1 :]]
    rest = unmerge(average.adapter, adapter, [m.norm for m in remaining], method=method, noise=average.noise)
    if rest.precision > LEAST_PRECISION:
        left = "nothing of it" if rest.precision > 1 else f"a relative precision of {rest.precision:.0e}"
        raise NotReversible(f"the rest is so small compared with this adapter that rounding would leave {left}")
    equal = tuple(replace(m, weight=1.0 / len(remaining)) for m in remaining)
    stored, error, lossy = _stored(rest.adapter, spec)
    history = History(equal, error, None if lossy else method, noise=() if lossy else _flat(rest.noise), fixed=lossy)
    return _restored(Average(stored, history), spec), rest.precision


def _fixed(sources: Sequence[History], spec: MergeSpec, weighting: Weighting, lossy: str | None) -> str | None:
    """Return why a merge is not an equal average, so that nothing can be taken out; None if it is one. `lossy` states
    how storing left something out, if so.
    """
    if any(source.faithful is None for source in sources):
        return next((source.fixed for source in sources if source.fixed), UNRECORDED)
    if METHODS[spec.method].mean_power is None:
        return f"merged by {spec.method}"
    if lossy:
        return lossy
    if weighting == "half":
        return "folded with half weights"
    other = next((source.faithful for source in sources if source.faithful not in ("*", spec.method)), None)
    return f"merged by {spec.method} after {other}" if other else None


def _noise(sources: Sequence[Average], shares: Sequence[float], merged: Adapter, spec: MergeSpec) -> Noise | None:
    """Return the noise after a fold of averages; None if it is that of a sum that grew fold by fold in one dtype."""
    power = METHODS[spec.method].mean_power or 0.0
    usual = (source.noise is None and source.adapter.dtype == merged.dtype for source in sources)
    if all(usual) and not _cancels(sources, shares, merged, power):
        return None
    total, elsewhere = dict(noise_of(merged, 1).modules), np.zeros(2)
    for source, share in zip(sources, shares, strict=True):
        merges = source.history.merged
        exact = len(merges) == 1 and merges[0].dtype == source.adapter.dtype
        before = source.noise or noise_of(source.adapter, 0 if exact else len(merges) / 2)
        total = {path: found + before[path] * share ** (2 * power) for path, found in total.items()}
        elsewhere = elsewhere + before.elsewhere * share ** (2 * power)
    return Noise(total, elsewhere)


def _cancels(sources: Sequence[Average], shares: Sequence[float], merged: Adapter, power: float) -> bool:
    """Return whether a module's ΔW is smaller than a source's contribution: it was larger when it was rounded."""
    now = squared_norms(merged)
    return any(
        now[path] < GROWS * squared * share ** (4 * power)
        for source, share in zip(sources, shares, strict=True)
        for path, squared in squared_norms(source.adapter).items()
    )


def _flat(noise: Noise | None) -> tuple[float, ...]:
    """Return the noise as in a manifest: A and B of every module in the order of paths, then of all others together."""
    if noise is None:
        return ()
    return tuple(float(squared) for _, pair in sorted(noise.modules.items()) for squared in pair) + tuple(
        map(float, noise.elsewhere)
    )


def one_base(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with one base name, once that was checked or declared."""
    base = next((x.base for x in adapters if x.base.name), BaseId())
    return [replace(x, base=base) for x in adapters]


def _merge(
    adapters: Sequence[Adapter], weights: Sequence[float], spec: MergeSpec, averages: Sequence[bool] | None = None
) -> tuple[Adapter, float, str | None]:
    merged, cut = merge_measured(
        one_base(adapters),
        weights,
        method=spec.method,
        rank=spec.rank,
        seed=spec.seed,
        averages=averages,
        **spec.parameters,
    )
    merged = replace(merged, dtype=spec.dtype or wider([x.dtype for x in adapters]))
    return _stored(merged, spec, cut)


def _stored(adapter: Adapter, spec: MergeSpec, cut: float = 0.0) -> tuple[Adapter, float, str | None]:
    """Return the adapter as read back from disk, the total relative error including `cut`, and, in words, how something
    was left out.
    """
    codec = CODECS[spec.encoding]
    stored, error = codec.round_trip(adapter, spec.quality)
    lossy = f"cut to rank {spec.rank}" if cut else None if codec.invertible else f"stored in the encoding {codec.name}"
    return stored, total_error(cut, error), lossy


def total_error(first: float, second: float) -> float:
    """Return the relative error of two steps that each leave something out: √(1 − (1 − e₁²) (1 − e₂²))."""
    return math.sqrt(1 - (1 - first**2) * (1 - second**2)) if second else first


def _restored(average: Average, spec: MergeSpec) -> Average:
    """With `restore_norm`, scale the merge of several adapters to their mean norm; the next fold divides the factor out
    first.
    """
    if not spec.restore_norm or len(average.history.merged) < 2:
        return average
    size, wanted = norm(average.adapter), float(np.mean([m.norm for m in average.history.merged]))
    factor = wanted / size if size else 0.0
    if not 0.0 < factor < math.inf:  # nothing to restore, or not possible
        return average
    return Average(scaled(average.adapter, factor), replace(average.history, restored=factor))
