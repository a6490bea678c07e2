"""Previews, before anything is written: one adapter described, and K slots forecast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..faults import natural
from ..formats.peft import encode
from ..lora.adapter import Adapter
from ..lora.algebra import singular_values
from ..lora.alignment import fitting
from ..lora.arrays import Array64, Square
from ..lora.similarity import similarity
from ..merging.average import block, one_base, source
from ..merging.spec import MergeSpec
from ..placement.partition_methods import blocks
from ..placement.partitioners import average_linkage


def describe(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter: modules with rank, scale, ‖ΔW‖ and shape; the share of ‖ΔW‖² kept by the best rank ρ."""
    modules, spectra = [], []
    for path in sorted(adapter.modules, key=natural):
        factors = adapter.modules[path]
        values = singular_values(factors)
        spectra.append(values)
        size = float(np.sqrt(np.sum(values**2)))
        modules.append(
            {"module": path, "shape": [factors.shape.dout, factors.shape.din], "rank": factors.shape.rank}
            | {"scale": factors.scale, "norm": size}
        )
    total = sum(float(np.sum(values**2)) for values in spectra)
    ranks = [2**i for i in range(adapter.rank.bit_length()) if 2**i < adapter.rank] + [adapter.rank]
    kept = {rank: sum(float(np.sum(values[:rank] ** 2)) for values in spectra) for rank in ranks}
    return {
        "base": adapter.base.name,
        "revision": adapter.base.revision,
        "dtype": adapter.dtype,
        "digest": adapter.digest,
        "parameters": adapter.parameters,
        "bytes": encode(adapter).size,
        "rank": adapter.rank,
        "norm": float(np.sqrt(total)),
        "energy": {str(rank): squared / total if total else 1.0 for rank, squared in kept.items()},
        "modules": modules,
    }


def forecast(
    adapters: Mapping[str, Adapter],
    slot_counts: Sequence[int],
    spec: MergeSpec,
    *,
    watch: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[dict[str, Any]]:
    """Forecast, for each K, an agglomerative partition merged by the spec; nothing is written.

    `bytes` of the K objects and `storage` relative to all adapters; `error` of compression (mean over slots, relative);
    `norm_ratio`, ‖merged‖ over the mean norm of the members (mean over slots of several); `similarity_inside` and
    `similarity_between` slots, mean cosine of pairs. `watch` wraps the iteration over the numbers of slots.
    """
    names = sorted(adapters)
    xs = one_base(fitting([adapters[name] for name in names], names))
    table = similarity(xs)
    records = [source(name, name.split("-")[0], x) for name, x in zip(names, xs, strict=True)]
    whole = sum(encode(x).size for x in xs)
    effective = [m.norm > 0 for m in records]
    rows = []
    for count in watch(slot_counts):
        linked = partial(_linked, 1.0 - table, count)
        partition = blocks(effective, count, linked)
        held = [block([xs[i] for i in b], [records[i] for i in b], spec) for b in partition]
        ratios = [c.norm_ratio for c in held if len(c.history.merged) > 1]
        labels = [next(label for label, b in enumerate(partition) if i in b) for i in range(len(xs))]
        same = np.equal.outer(labels, labels)[np.triu_indices(len(xs), 1)]
        pairs = table[np.triu_indices(len(xs), 1)]
        size = sum(encode(c.adapter).size for c in held)
        rows.append(
            {
                "slots": count,
                "filled": len(partition),
                "bytes": size,
                "storage": size / whole,
                "error": float(np.mean([c.history.error for c in held])),
                "norm_ratio": _mean(ratios),
                "similarity_inside": _mean(pairs[same]),
                "similarity_between": _mean(pairs[~same]),
                "blocks": [[names[i] for i in b] for b in partition],
            }
        )
    return rows


def _linked(distances: Square, count: int, chosen: list[int]) -> list[int]:
    return average_linkage(distances[np.ix_(chosen, chosen)], count)


def _mean(values: Sequence[float] | Array64) -> float | None:
    return float(np.mean(values)) if len(values) else None
