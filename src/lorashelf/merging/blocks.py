"""Blocks of tasks: each merged into one adapter, whichever way they were found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..errors import TaskNameError
from ..lora.adapter import Adapter
from ..lora.given import as_named
from ..names import task_name
from .average import Average, block, one_base, source
from .spec import MergeSpec


def named(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters in the order of their task names, spelled as they are stored. Raises TaskNameError."""
    offered = as_named(adapters).items()
    found = {task_name(name): adapter for name, adapter in sorted(offered, key=lambda item: str(item[0]))}
    if len(found) < len(adapters):
        raise TaskNameError("two adapters have the same task name", cure="name them: NAME=ADAPTER")
    return found


def merge_block(
    adapters: Mapping[str, Adapter], types: Mapping[str, str], tasks: Sequence[str], spec: MergeSpec
) -> Average:
    """The merge of a block's adapters in the order of their names."""
    ordered = sorted(tasks)
    sources = [source(task, types[task], adapters[task]) for task in ordered]
    return block([adapters[task] for task in ordered], sources, spec)


def merger(adapters: Mapping[str, Adapter], spec: MergeSpec) -> Callable[[Sequence[str]], Adapter]:
    """What a shelf would store for a block of tasks, as a function of their names: what a search measures."""
    known = named(adapters)
    known = dict(zip(known, one_base(list(known.values())), strict=True))
    types = dict.fromkeys(known, "")
    return lambda tasks: merge_block(known, types, tasks, spec).adapter
