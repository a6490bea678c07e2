"""The body of a level: head, lists of what is coded, elements; docs/coded.md is normative."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...lora.adapter import Shape
from ...lora.quantiser import RATIOS, STARTS, Chain
from .description import Description, unpacked
from .elements import OUTLIER, Indices, read_refined, read_started, write_refined, write_started
from .stream import Scanner, StreamReader, StreamWriter, malformed, varint

MOST_GAIN = 2**12 - 1
NONE = np.zeros(0, np.float32)
"""The values of no outliers."""
_LOW = 32  # gains are coded as quotient and remainder by this
_DENSEST = 9  # at most this many elements per bit, with any start quantiser


@dataclass(slots=True)
class Side:
    """The u or v of one direction as coded so far: chain, indices, values of outliers."""

    chain: Chain
    indices: Indices
    outliers: NDArray[np.float32]


@dataclass(slots=True)
class Direction:
    """One coded direction: `gain` counts 1/64 octaves down from the largest gain."""

    gain: int
    u: Side
    v: Side


Coded = dict[str, list[Direction]]
"""Module path, in order → its directions."""


class Head:
    """The part before a level's stream: share of ‖ΔW‖² kept, restoration; in the base level also the description."""

    def __init__(self, scanner: Scanner, base: bool) -> None:
        kept, self.restored = struct.unpack("<HH", scanner.take(4))
        self.kept = kept / 65535
        self.top = 0.0
        self.description: Description | None = None
        if base:
            (self.top,) = struct.unpack("<f", scanner.take(4))
            if not (0 <= self.top < float("inf")):
                raise malformed("the largest gain is not a number")
            self.description = unpacked(scanner.take(scanner.varint()))


def head(kept: float, restored: int, base: tuple[float, bytes] | None) -> bytes:
    """Encode what `Head` reads; `base` is the largest gain and the description."""
    found = struct.pack("<HH", min(max(int(kept * 65535), 0), 65535), restored)
    if base is not None:
        top, description = base
        found += struct.pack("<f", top) + varint(len(description)) + description
    return found


@dataclass(frozen=True)
class Additions:
    """What a level adds: new directions of every module, and ratios for the earlier ones, in order."""

    counts: Sequence[int]
    gains: Sequence[int]
    """Gains of new directions, as the difference from the previous direction in the module, or from the largest."""
    starts: tuple[Sequence[int], Sequence[int]]
    ratios: tuple[Sequence[int], Sequence[int]]
    """Places in RATIOS, of u and of v."""


def write_lists(writer: StreamWriter, add: Additions) -> None:
    """Write the lists at the start of a stream."""
    gains = np.array(add.gains, np.int64)
    lists = (add.counts, gains // _LOW, gains % _LOW, *add.starts, *add.ratios)
    for each in lists:
        writer.numbers(np.asarray(each, np.int64))


def read_lists(reader: StreamReader, shapes: Mapping[str, Shape], coded: Mapping[str, int]) -> Additions:
    """Read what `write_lists` wrote; `coded` is the number of directions per module. Raises AdapterFormatError."""
    counts = reader.numbers(len(shapes)).tolist()
    for (path, shape), count in zip(shapes.items(), counts, strict=True):
        if coded[path] + count > min(shape.rank, shape.dout, shape.din):
            raise malformed(f"{path} has {coded[path] + count} directions, but rank {shape.rank}")
    elements = sum(n * (shape.dout + shape.din) for shape, n in zip(shapes.values(), counts, strict=True))
    if elements > _DENSEST * 8 * (reader.size + 8):  # before memory of that size is allocated
        raise malformed(f"{elements} elements need more bits than there are")
    fresh, old = sum(counts), sum(coded.values())
    high, low = (reader.numbers(fresh).tolist() for _ in range(2))
    starts = tuple(reader.numbers(fresh).tolist() for _ in range(2))
    ratios = tuple(reader.numbers(old).tolist() for _ in range(2))
    if any(start >= len(STARTS) for side in starts for start in side):
        raise malformed("a start quantiser is unknown")
    if any(place >= len(RATIOS) for side in ratios for place in side):
        raise malformed("a ratio is unknown")
    gains = [h * _LOW + s for h, s in zip(high, low, strict=True)]
    return Additions(counts, gains, (starts[0], starts[1]), (ratios[0], ratios[1]))


def grouped(keys: Iterable[Chain | None]) -> Iterator[tuple[Chain, list[int]]]:
    """Yield the distinct chains in ascending order, each with its positions; None is skipped."""
    places: dict[Chain, list[int]] = {}
    for place, key in enumerate(keys):
        if key is not None:
            places.setdefault(key, []).append(place)
    yield from sorted(places.items())


def write_elements(
    writer: StreamWriter, fresh: Sequence[tuple[Side, NDArray[np.float32]]], refined: Sequence[tuple[Side, Indices]]
) -> None:
    """Write the elements of new sides, with their values, and of refined sides, with their previous indices."""
    for chain, places in grouped(side.chain for side, _ in fresh):
        q = np.concatenate([fresh[i][0].indices for i in places])
        write_started(writer, q, np.concatenate([fresh[i][1] for i in places]), chain)
    for chain, places in grouped(side.chain for side, _ in refined):
        before = np.concatenate([refined[i][1] for i in places])
        write_refined(writer, before, np.concatenate([refined[i][0].indices for i in places]), chain)


def read_elements(
    reader: StreamReader, fresh: Sequence[tuple[Side, int, Chain]], refined: Sequence[tuple[Side, Chain]]
) -> None:
    """Read the indices of new sides, given lengths and chains, and of refined sides, given chains."""
    for chain, places in grouped(chain for _, _, chain in fresh):
        q, outliers = read_started(reader, sum(fresh[i][1] for i in places), chain)
        end = 0
        for i in places:
            side, length, _ = fresh[i]
            begin, end = end, end + length
            side.indices = q[begin:end]
            if len(outliers):
                count = int((np.abs(side.indices) == OUTLIER).sum())
                side.outliers, outliers = outliers[:count], outliers[count:]
    for chain, places in grouped(chain for _, chain in refined):
        after, end = read_refined(reader, np.concatenate([refined[i][0].indices for i in places]), chain), 0
        for i in places:
            side = refined[i][0]
            begin, end = end, end + len(side.indices)
            side.indices = after[begin:end]
