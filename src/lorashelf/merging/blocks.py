"""Blocks of tasks, each merged into one adapter, however the blocks were found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import TaskNameError
from ..lora.adapter import Adapter
from ..lora.given import as_named
from ..names import task_name
from .average import Average, block, one_base, source
from .spec import MergeSpec


def named(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return the adapters sorted by task name, spelled as stored. Raises TaskNameError."""
    offered = as_named(adapters).items()
    found = {task_name(name): adapter for name, adapter in sorted(offered, key=lambda item: str(item[0]))}
    if len(found) < len(adapters):
        raise TaskNameError("two adapters have the same task name", cure="name them: NAME=ADAPTER")
    return found


def merge_block(
    adapters: Mapping[str, Adapter], types: Mapping[str, str], tasks: Sequence[str], spec: MergeSpec
) -> Average:
    """Merge a block's adapters in the order of their names."""
    ordered = sorted(tasks)
    sources = [source(task, types[task], adapters[task]) for task in ordered]
    return block([adapters[task] for task in ordered], sources, spec)


def merger(adapters: Mapping[str, Adapter], spec: MergeSpec) -> Callable[[Sequence[str]], Adapter]:
    """Return a function from a block of task names to the adapter that a shelf would store, which a search measures."""
    known = named(adapters)
    known = dict(zip(known, one_base(list(known.values())), strict=True))
    types = dict.fromkeys(known, "")
    return lambda tasks: merge_block(known, types, tasks, spec).adapter
