"""What one slot holds: an adapter and the history it stands for; opened, folded into, taken out of. No disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..errors import AdapterFormatError, CorruptShelf, NotReversible
from ..formats.peft import encode, rounded
from ..lora.adapter import Adapter, BaseId, Factors, wider
from ..lora.algebra import compress, energies, norm
from ..lora.alignment import Renamed, aligned
from ..shelf.manifest import PENDING, Merged, Slot
from ..shelf.settings import Recipe
from ..shelf.snapshot import Snapshot
from . import METHODS, Noise, merge_measured, noise_of, unmerge

LARGEST_NORM = 1e9
GROWS = 0.9  # of the energy of what a sum had before this much is left, unless adapters cancel each other
UNRECORDED = "merged or cut before the shelf recorded how"
LEAST_PRECISION = 0.1  # an adapter is taken out of an average only if this much of the rest is left


@dataclass(frozen=True, slots=True)
class Content:
    """An adapter that stands for `merged`; the other fields are those of `manifest.Slot`."""

    adapter: Adapter
    merged: tuple[Merged, ...]
    error: float = 0.0
    average: str | None = None
    restored: float = 1.0
    noise: Noise | None = None
    """Of the content without norm restoration; None is that of folding `merged` one by one in its dtype."""
    fixed: str | None = None

    def slot(self, slot_id: int, members: Sequence[str]) -> Slot:
        """The manifest's entry for it, its object pending."""
        return Slot(
            slot=slot_id,
            object=PENDING,
            rank=self.adapter.rank,
            dtype=self.adapter.dtype,
            bytes=encode(self.adapter).size,
            merged=self.merged,
            members=tuple(members),
            error=self.error,
            average=self.average,
            restored=self.restored,
            energies=tuple(energies(self.adapter).values()),
            sums=(0,) * (1 + 2 * len(self.adapter.modules)),  # known once it is written
            noise=_flat(self.noise),
            fixed=self.fixed,
        )

    @property
    def plain(self) -> Content:
        """The same without norm restoration: what the next fold starts from."""
        if self.restored == 1.0:
            return self
        return replace(self, adapter=scaled(self.adapter, 1 / self.restored), restored=1.0)

    @property
    def faithful(self) -> str | None:
        """The averaging method that can go on from here exactly: its own; any ("*") for one adapter stored uncut."""
        return "*" if len(self.merged) == 1 and not self.error else self.average


def irreversible(held: Content | Slot) -> str | None:
    """Why no adapter can be taken out of what is held, None where one can: an equal average, or one adapter alone."""
    if held.average is not None or len(held.merged) < 2:
        return None
    return f"the slot's adapters cannot be taken apart: {held.fixed or UNRECORDED}"


def of_slot(snapshot: Snapshot, slot: Slot) -> Content:
    """A stored slot as what the next fold starts from: norm restoration divided out. Raises CorruptShelf."""
    adapter = snapshot.adapter(slot)
    content = Content(adapter, slot.merged, slot.error, slot.average, slot.restored, fixed=slot.fixed).plain
    if slot.noise:
        pairs = np.reshape(slot.noise, (-1, 2))
        if len(pairs) != len(adapter.modules) + 1:
            what = f"slot {slot.slot}: the manifest's noise is of {len(pairs) - 1} modules"
            raise CorruptShelf(what, where=str(snapshot.path), cure=f"lorashelf repair {snapshot.path}")
        return replace(content, noise=Noise(dict(zip(adapter.modules, pairs, strict=False)), pairs[-1]))
    if slot.worn:  # earlier writers counted roundings
        return replace(content, noise=noise_of(content.adapter, (len(slot.merged) + slot.worn) / 2))
    return content


def entry(task: str, kind: str, adapter: Adapter) -> Merged:
    """The record of an adapter that is to be stored. Raises AdapterFormatError if ΔW is absurdly large."""
    size = math.sqrt(sum(energies(adapter).values()))
    if not size <= LARGEST_NORM:  # NaN is not
        raise AdapterFormatError(
            [f"{task}: ‖ΔW‖ is {size:.1e}"], cure="no trained adapter is that large: train it again"
        )
    return Merged(task, kind, adapter.digest, 1.0, adapter.rank, adapter.parameters, adapter.dtype, size)


def single(adapter: Adapter, record: Merged, recipe: Recipe) -> Content:
    """The adapter alone, as the recipe stores it: `dtype`, and the rank cut to `rank`."""
    stored = replace(adapter, dtype=recipe.dtype or adapter.dtype)
    error = 0.0
    if recipe.rank is not None:
        stored, error = compress(stored, recipe.rank)
    return Content(rounded(stored), (record,), error, fixed=f"cut to rank {recipe.rank}" if error else None)


def fold(
    sources: Sequence[Content],
    adapter: Adapter,
    record: Merged,
    recipe: Recipe,
    average: Literal["mean", "half"] = "mean",
) -> Content:
    """The merge of what the sources have averaged with one more adapter.

    'mean': weights nᵢ/(n+1) and 1/(n+1), so everything averaged counts the same (K-Merge); 'half': ½ and ½; a method
    whose default weight is 1 takes 1 and 1. Averages are computed in float32 and rounded once, to the widest dtype or
    the recipe's.
    """
    sources = [source for source in sources if any(m.norm for m in source.merged)]  # untrained ones take no part
    if not sources:
        return single(adapter, record, recipe)
    *held, adapter = aligned([*(source.adapter for source in sources), adapter])
    sources = [_under(source, x) for source, x in zip(sources, held, strict=True)]
    records = [m for source in sources for m in source.merged]
    total = len(records) + 1
    if METHODS[recipe.merge].weights == "unary":
        shares, newcomer = [1.0] * len(sources), 1.0
    elif average == "half":
        shares, newcomer = [0.5] * len(sources), 0.5
    else:
        shares, newcomer = [len(source.merged) / total for source in sources], 1.0 / total
    weights = [share * m.weight for share, source in zip(shares, sources, strict=True) for m in source.merged] + [
        newcomer
    ]
    averages = [len(source.merged) > 1 for source in sources]
    xs = [*(source.adapter for source in sources), adapter]
    merged, error = _merge(xs, [*shares, newcomer], recipe, [*averages, False])
    entries = tuple(replace(m, weight=round(w, 15)) for m, w in zip([*records, record], weights, strict=True))
    fixed = _fixed(sources, recipe, average, error)
    method, noise = (recipe.merge, _noise(sources, shares, merged, recipe)) if fixed is None else (None, None)
    return _restored(Content(merged, entries, error, method, noise=noise, fixed=fixed), recipe)


def _under(content: Content, adapter: Adapter) -> Content:
    """The content with its modules named as the same adapter's, which `aligned` may have renamed."""
    if content.noise is None or not isinstance(adapter.modules, Renamed):
        return replace(content, adapter=adapter)
    noise = {path: content.noise[before] for path, before in adapter.modules.before.items()}
    return replace(content, adapter=adapter, noise=replace(content.noise, modules=noise))


def block(adapters: Sequence[Adapter], records: Sequence[Merged], recipe: Recipe) -> Content:
    """Several adapters merged at once with the method's default weights, copies once and untrained ones left out; one
    alone is stored as it is.
    """
    first: dict[str, tuple[Adapter, Merged]] = {}
    effective = any(m.norm for m in records)
    for x, m in zip(adapters, records, strict=True):
        if m.norm or not effective:
            first.setdefault(m.digest, (x, m))
    adapters, records = [x for x, _ in first.values()], [m for _, m in first.values()]
    if len(adapters) == 1:
        return single(adapters[0], records[0], recipe)
    method = METHODS[recipe.merge]
    weight = 1.0 / len(adapters) if method.weights == "mean" else 1.0
    merged, error = _merge(adapters, [weight] * len(adapters), recipe)
    fixed = _fixed([], recipe, "mean", error)
    average = recipe.merge if fixed is None else None
    entries = tuple(replace(m, weight=weight) for m in records)
    return _restored(Content(merged, entries, error, average, fixed=fixed), recipe)


def without(content: Content, digest: str, adapter: Adapter, recipe: Recipe) -> tuple[Content, float]:
    """The content with one adapter taken out of its average, and the relative precision of the rest.

    Raises NotReversible where the content is no equal average of several, or rounding would leave nothing of the rest.
    """
    if len(content.merged) < 2:
        raise NotReversible("the slot holds one adapter only")
    if content.average is None:
        raise NotReversible(str(irreversible(content)))
    index = next(i for i, m in enumerate(content.merged) if m.digest == digest)
    remaining = [*content.merged[:index], *content.merged[index + 1 :]]
    rest = unmerge(content.adapter, adapter, [m.norm for m in remaining], method=content.average, noise=content.noise)
    if rest.precision > LEAST_PRECISION:
        left = "nothing of it" if rest.precision > 1 else f"a relative precision of {rest.precision:.0e}"
        raise NotReversible(f"the rest is so small beside it that rounding would leave {left}")
    entries = tuple(replace(m, weight=1.0 / len(remaining)) for m in remaining)
    taken = Content(rounded(rest.adapter), entries, 0.0, content.average, noise=rest.noise)
    return _restored(taken, recipe), rest.precision


def _fixed(sources: Sequence[Content], recipe: Recipe, average: str, error: float) -> str | None:
    """Why a merge is not an equal average, so that nothing can be taken out of it; None where it is one."""
    if any(source.faithful is None for source in sources):
        return next((source.fixed for source in sources if source.fixed), UNRECORDED)
    if METHODS[recipe.merge].average is None:
        return f"merged by {recipe.merge}"
    if error:
        return f"cut to rank {recipe.rank}"
    if average == "half":
        return "folded with half weights"
    other = next((source.faithful for source in sources if source.faithful not in ("*", recipe.merge)), None)
    return f"merged by {recipe.merge} after {other}" if other else None


def _noise(sources: Sequence[Content], shares: Sequence[float], merged: Adapter, recipe: Recipe) -> Noise | None:
    """The noise after a fold of averages; None where it is that of a sum which grew, in one dtype, fold by fold."""
    power = METHODS[recipe.merge].average or 0.0
    usual = (source.noise is None and source.adapter.dtype == merged.dtype for source in sources)
    if all(usual) and not _cancels(sources, shares, merged, power):
        return None
    total, elsewhere = dict(noise_of(merged, 1).modules), np.zeros(2)
    for source, share in zip(sources, shares, strict=True):
        exact = len(source.merged) == 1 and source.merged[0].dtype == source.adapter.dtype
        before = source.noise or noise_of(source.adapter, 0 if exact else len(source.merged) / 2)
        total = {path: found + before[path] * share ** (2 * power) for path, found in total.items()}
        elsewhere = elsewhere + before.elsewhere * share ** (2 * power)
    return Noise(total, elsewhere)


def _cancels(sources: Sequence[Content], shares: Sequence[float], merged: Adapter, power: float) -> bool:
    """Whether a module's ΔW is smaller than what a source brought to it: it was larger when it was rounded."""
    now = energies(merged)
    return any(
        now[path] < GROWS * energy * share ** (4 * power)
        for source, share in zip(sources, shares, strict=True)
        for path, energy in energies(source.adapter).items()
    )


def _flat(noise: Noise | None) -> tuple[float, ...]:
    """As in a manifest: A and B of every module in the order of their paths, then of all others together."""
    if noise is None:
        return ()
    return tuple(float(energy) for _, pair in sorted(noise.modules.items()) for energy in pair) + tuple(
        map(float, noise.elsewhere)
    )


def one_base(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under one base name, after that was checked or declared."""
    base = next((x.base for x in adapters if x.base.name), BaseId())
    return [replace(x, base=base) for x in adapters]


def _merge(
    adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe, averages: Sequence[bool] | None = None
) -> tuple[Adapter, float]:
    merged, error = merge_measured(
        one_base(adapters),
        weights,
        method=recipe.merge,
        rank=recipe.rank,
        seed=recipe.seed,
        averages=averages,
        **recipe.parameters,
    )
    return rounded(replace(merged, dtype=recipe.dtype or wider([x.dtype for x in adapters]))), error


def _restored(content: Content, recipe: Recipe) -> Content:
    """With `restore_norm`, several adapters' merge scaled to their mean norm; the factor is divided out before the next
    fold.
    """
    if not recipe.restore_norm or len(content.merged) < 2:
        return content
    size, wanted = norm(content.adapter), float(np.mean([m.norm for m in content.merged]))
    factor = wanted / size if size else 0.0
    if not 0.0 < factor < math.inf:  # nothing to restore, or nothing to restore it with
        return content
    return replace(content, adapter=scaled(content.adapter, factor), restored=factor)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with every ΔW times `factor`, kept in the scales."""
    modules: Mapping[str, Factors] = adapter.modules
    return adapter.with_factors({path: Factors(f.a, f.b, f.scale * factor) for path, f in modules.items()})
