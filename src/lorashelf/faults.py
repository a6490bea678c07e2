"""The faults of an adapter on the way to its error: modules that share one are named together, layers in order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from .errors import Fault


def natural(path: str) -> list[str | int]:
    """A sort key under which numbers inside a path count as numbers.

    >>> sorted(["h.10.q", "h.9.q"], key=natural)
    ['h.9.q', 'h.10.q']
    """
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", path))]


class Faults:
    """The list of faults in the making: sentences about the whole, and about modules or tensors by their paths."""

    def __init__(self) -> None:
        self._found: list[tuple[str | None, Fault]] = []

    def append(self, what: str, cure: str | None = None, *, at: str | None = None) -> None:
        """One fault more, `at` a path."""
        self._found.append((at, Fault(what, cure)))

    def extend(self, faults: Iterable[Fault]) -> None:
        """Faults that stand for themselves."""
        self._found += [(None, fault) for fault in faults]

    def __len__(self) -> int:
        return len(self._found)

    def listed(self) -> list[Fault]:
        """All of them, those about the whole first, layers in the order of their numbers; those of one kind at several
        paths are one: "self_attn.q_proj in model.layers 0-31".
        """
        listed: dict[object, tuple[Fault, list[str]]] = {}
        for path, fault in sorted(self._found, key=lambda found: natural(found[0] or "")):
            kind = (None if path is None else _shape(path), fault)
            listed.setdefault(kind, (fault, []))[1].extend([] if path is None else [path])
        return [fault.at(together(paths)) if paths else fault for fault, paths in listed.values()]


def together(paths: Sequence[str]) -> str:
    """Paths that differ in their numbers only, in a few words; the first number is the layer's.

    >>> together(["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.3.q_proj"])
    'q_proj in model.layers 0-1, 3'
    >>> together(["h.0.experts.0.up", "h.0.experts.1.up", "h.1.experts.0.up"])
    'experts.0-1.up in h 0-1 (3 modules)'
    """
    distinct = {_parts(path) for path in paths}
    columns = [sorted(set(column)) for column in zip(*distinct, strict=True)]
    words = [_ranges(column) for column in columns]
    layer = next((place for place, column in enumerate(columns) if isinstance(column[0], int)), 0)
    before, inside = ".".join(words[:layer]), ".".join(words[layer + 1 :])
    if len(distinct) == 1 or not before or not inside:
        return ".".join(words)
    all_of_them = math.prod(map(len, columns)) == len(distinct)
    return f"{inside} in {before} {words[layer]}" + ("" if all_of_them else f" ({len(distinct)} modules)")


def alike(paths: Iterable[str]) -> list[list[str]]:
    """The paths in groups that differ in their numbers only."""
    groups: dict[object, list[str]] = {}
    for path in paths:
        groups.setdefault(_shape(path), []).append(path)
    return list(groups.values())


def _parts(path: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in path.split("."))


def _shape(path: str) -> tuple[str | None, ...]:
    """The path without its numbers."""
    return tuple(None if part.isdecimal() else part for part in path.split("."))


def _ranges(values: Sequence[Any]) -> str:
    """Sorted numbers as ranges, or the one word."""
    if isinstance(values[0], str):
        return str(values[0])
    runs = [[value for _, value in run] for _, run in groupby(enumerate(values), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
