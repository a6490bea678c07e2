"""Collecting the faults of an adapter for its error: modules with the same fault are merged, layers in order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from .errors import Fault


def natural(path: str) -> list[str | int]:
    """Return a sort key that orders numbers inside a path by value.

    >>> sorted(["h.10.q", "h.9.q"], key=natural)
    ['h.9.q', 'h.10.q']
    """
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", path))]


class Faults:
    """A growing list of faults: of the adapter as a whole, and of modules or tensors by path."""

    def __init__(self) -> None:
        self._found: list[tuple[str | None, Fault]] = []

    def append(self, what: str, cure: str | None = None, *, at: str | None = None) -> None:
        """Add a fault, `at` a path or of the whole."""
        self._found.append((at, Fault(what, cure)))

    def extend(self, faults: Iterable[Fault]) -> None:
        """Add faults of the whole."""
        self._found += [(None, fault) for fault in faults]

    def __len__(self) -> int:
        return len(self._found)

    def listed(self) -> list[Fault]:
        """Return all faults, those of the whole first, layers in numeric order; equal faults at several paths are one:
        "self_attn.q_proj in model.layers 0-31".
        """
        listed: dict[object, tuple[Fault, list[str]]] = {}
        for path, fault in sorted(self._found, key=lambda found: natural(found[0] or "")):
            kind = (None if path is None else _shape(path), fault)
            listed.setdefault(kind, (fault, []))[1].extend([] if path is None else [path])
        return [fault.at(together(paths)) if paths else fault for fault, paths in listed.values()]


def together(paths: Sequence[str]) -> str:
    """Abbreviate paths that differ only in their numbers; the first number is the layer's.

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
    """Group the paths that differ only in their numbers."""
    groups: dict[object, list[str]] = {}
    for path in paths:
        groups.setdefault(_shape(path), []).append(path)
    return list(groups.values())


def _parts(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in path.split("."))


def _shape(path: str) -> tuple[str | None, ...]:
    """Return the path without its numbers."""
    return tuple(None if part.isdecimal() else part for part in path.split("."))


def _ranges(values: Sequence[Any]) -> str:
    """Format sorted numbers as ranges, or the single word."""
    if isinstance(values[0], str):
        return str(values[0])
    runs = [[value for _, value in run] for _, run in groupby(enumerate(values), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
