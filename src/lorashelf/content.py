"""What one slot holds: an adapter and the history it stands for; opened, folded into, taken out of. No disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .adapter import Adapter, BaseId, Factors, wider
from .algebra import compress, energies, norm
from .errors import AdapterFormatError, NotReversible
from .manifest import PENDING, Merged, Slot
from .merging import METHODS, merge_measured, unmerge
from .peft_format import encode, rounded
from .recipe import Recipe
from .snapshot import Snapshot

LARGEST_NORM = 1e9
LEAST_PRECISION = 0.1  # an adapter is taken out of an average only if this much of the rest is left


@dataclass(frozen=True, slots=True)
class Content:
    """An adapter that stands for `merged`; the other fields are those of `manifest.Slot`."""

    adapter: Adapter
    merged: tuple[Merged, ...]
    error: float = 0.0
    average: str | None = None
    restored: float = 1.0
    worn: int = 0

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
            worn=self.worn,
            energies=tuple(energies(self.adapter).values()),
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


def of_slot(snapshot: Snapshot, slot: Slot) -> Content:
    """A stored slot as what the next fold starts from: norm restoration divided out. Raises CorruptShelf."""
    return Content(snapshot.adapter(slot), slot.merged, slot.error, slot.average, slot.restored, slot.worn).plain


def entry(task: str, kind: str, adapter: Adapter) -> Merged:
    """The record of an adapter that is to be stored. Raises AdapterFormatError if ΔW is absurdly large."""
    size = math.sqrt(sum(energies(adapter).values()))
    if size > LARGEST_NORM:
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
    return Content(rounded(stored), (record,), error)


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
    merged, error = _merge([*(source.adapter for source in sources), adapter], [*shares, newcomer], recipe)
    continued = all(source.faithful in ("*", recipe.merge) for source in sources)
    even = average == "mean" and METHODS[recipe.merge].average is not None and not error
    entries = tuple(replace(m, weight=round(w, 15)) for m, w in zip([*records, record], weights, strict=True))
    method, worn = recipe.merge if even and continued else None, sum(source.worn for source in sources)
    return _restored(Content(merged, entries, error, method, worn=worn), recipe)


def block(adapters: Sequence[Adapter], records: Sequence[Merged], recipe: Recipe) -> Content:
    """Several adapters merged at once with the method's default weights, copies once; one alone is stored as it is."""
    first: dict[str, tuple[Adapter, Merged]] = {}
    for x, m in zip(adapters, records, strict=True):
        first.setdefault(m.digest, (x, m))
    adapters, records = [x for x, _ in first.values()], [m for _, m in first.values()]
    if len(adapters) == 1:
        return single(adapters[0], records[0], recipe)
    method = METHODS[recipe.merge]
    weight = 1.0 / len(adapters) if method.weights == "mean" else 1.0
    merged, error = _merge(adapters, [weight] * len(adapters), recipe)
    average = recipe.merge if method.average is not None and not error else None
    return _restored(Content(merged, tuple(replace(m, weight=weight) for m in records), error, average), recipe)


def without(content: Content, digest: str, adapter: Adapter, recipe: Recipe) -> tuple[Content, float]:
    """The content with one adapter taken out of its average, and the relative precision of the rest.

    Raises NotReversible where the content is no equal average of several, or rounding would leave nothing of the rest.
    """
    if content.average is None or len(content.merged) < 2:
        how = "a merge that cannot be taken apart" if len(content.merged) > 1 else "one adapter only"
        raise NotReversible(f"the slot holds {how}", cure="its content stays as it is")
    rest, precision = unmerge(content.adapter, adapter, len(content.merged), method=content.average, worn=content.worn)
    if precision > LEAST_PRECISION:
        what = f"the rest is so small beside it that rounding would leave a relative precision of {precision:.0e}"
        raise NotReversible(what, cure="its content stays as it is")
    index = next(i for i, m in enumerate(content.merged) if m.digest == digest)
    remaining = [*content.merged[:index], *content.merged[index + 1 :]]
    entries = tuple(replace(m, weight=1.0 / len(remaining)) for m in remaining)
    # the rounding of the fold that is undone stays, and there is one more
    return _restored(Content(rounded(rest), entries, 0.0, content.average, worn=content.worn + 2), recipe), precision


def one_base(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters under one base name, after that was checked or declared."""
    base = next((x.base for x in adapters if x.base.name), BaseId())
    return [replace(x, base=base) for x in adapters]


def _merge(adapters: Sequence[Adapter], weights: Sequence[float], recipe: Recipe) -> tuple[Adapter, float]:
    merged, error = merge_measured(
        one_base(adapters), weights, method=recipe.merge, rank=recipe.rank, seed=recipe.seed, **recipe.parameters
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
