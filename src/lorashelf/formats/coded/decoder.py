"""From levels to an adapter: levels are checked at once, values decoded when a module is first used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain as chained
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import AdapterFormatError
from ...lora.adapter import Adapter, Factors, Modules, Shape, parameters
from ...lora.quality import quality
from ...lora.quantiser import RATIOS, Chain
from ..codec import LevelRate
from .body import MOST_GAIN, NONE, Additions, Coded, Direction, Head, Side, read_elements, read_lists
from .description import Description
from .elements import checked, values
from .frame import bodies, reference
from .stream import Scanner, StreamReader, malformed

_STEP = 18248035989933441396  # 2^64 2^(-1/64), rounded down


class Level(NamedTuple):
    """What a level, with those before it, achieves."""

    bytes: int
    """Bytes of this level alone."""
    kept: float
    """Share of ‖ΔW‖² that the levels up to this one keep."""
    quality: float
    """Predicted share of the adapter's gain in loss."""
    directions: int
    """The number of directions, over all modules, coded up to this level."""
    reference: str
    """The first 16 hex digits of the level's BLAKE2b-256."""


class _Pending(NamedTuple):
    """A level whose elements are not read yet: new sides with lengths and chains, refined sides with chains."""

    reader: StreamReader
    fresh: Sequence[tuple[Side, int, Chain]]
    refined: Sequence[tuple[Side, Chain]]


class Outline:
    """Levels of which only the lists are read: shapes, ranks, gains and chains, but not the elements."""

    def __init__(self, levels: Sequence[bytes], where: str | None = None) -> None:
        """Raise AdapterFormatError with `where` for levels that are damaged, incomplete in sequence or malformed."""
        self._where = where
        self.stored = tuple(levels)
        self._lock = threading.Lock()
        self._failed: AdapterFormatError | None = None
        self._begin()

    def _begin(self) -> None:
        """Read the lists of all levels."""
        self._begun = True  # what is read from here on cannot be read again
        self._pending: list[_Pending] = []
        self.levels: list[Level] = []
        for place, body in enumerate(bodies(self.stored, self._where)):
            with self._named(place):
                self._take(Scanner(body), self.stored[place], place == 0)
        self._begun = False

    @contextmanager
    def _named(self, place: int) -> Iterator[None]:
        """Add the level and the file to errors in the block."""
        try:
            yield
        except AdapterFormatError as error:
            faults = [reason.at(f"level {place}") for reason in error.reasons]
            raise AdapterFormatError(faults, where=self._where) from error

    def _take(self, scanner: Scanner, level: bytes, base: bool) -> None:
        head = Head(scanner, base)
        if head.description is not None:
            self.top, self.description = head.top, head.description
            self.coded: Coded = {path: [] for path in head.description.shapes}
        self.restored = head.restored
        reader = StreamReader(scanner)
        add = read_lists(reader, self.description.shapes, {path: len(found) for path, found in self.coded.items()})
        refined = list(self._refined(add))
        self._pending.append(_Pending(reader, self._extended(add), refined))
        count = sum(map(len, self.coded.values()))
        self.levels.append(Level(len(level), head.kept, quality(head.kept), count, reference(level).hex()))

    def _refined(self, add: Additions) -> Iterator[tuple[Side, Chain]]:
        """Yield the sides that a level refines, with their new chains: of u, then of v."""
        old = list(chained.from_iterable(self.coded.values()))
        for name, places in zip("uv", add.ratios, strict=True):
            for direction, place in zip(old, places, strict=True):
                if place:
                    side: Side = getattr(direction, name)
                    side.chain = checked((*side.chain, RATIOS[place]))
                    yield side, side.chain

    def _extended(self, add: Additions) -> list[tuple[Side, int, Chain]]:
        """Add a level's new directions to their modules and return their sides: of u, then of v."""
        u, v = [], []
        news = zip(add.gains, *add.starts, strict=True)
        for (path, found), count in zip(self.coded.items(), add.counts, strict=True):
            shape = self.description.shapes[path]
            for below, *starts in islice(news, count):
                gain = below + (found[-1].gain if found else 0)
                if gain > MOST_GAIN:
                    raise malformed("a gain is too small")
                sides = [Side((start,), np.zeros(0, np.int16), NONE) for start in starts]
                found.append(Direction(gain, *sides))
                u.append((sides[0], shape.dout, sides[0].chain))
                v.append((sides[1], shape.din, sides[1].chain))
        return u + v

    def read(self) -> Coded:
        """Return the directions with all elements, decoded on the first call. Raises AdapterFormatError."""
        with self._lock:
            if self._failed is not None:
                raise self._failed
            if self._begun:  # the first call was interrupted, or memory ran out
                self._begin()
            self._begun = bool(self._pending)
            try:
                for place, level in enumerate(self._pending):
                    with self._named(place):
                        read_elements(level.reader, level.fresh, level.refined)
            except AdapterFormatError as error:
                self._failed = error
                raise
            self._pending, self._begun = [], False
        return self.coded


class CodedModules(Modules):
    """Modules of levels: decoded on first access, each converted to float32 factors on access."""

    coded = True

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        counts = {path: max(len(found), 1) for path, found in outline.coded.items()}
        shapes = outline.description.shapes
        self._shapes = {path: Shape(shape.dout, counts[path], shape.din) for path, shape in shapes.items()}

    @property
    def levels(self) -> tuple[bytes, ...]:
        """The levels that the modules are decoded from."""
        return self._outline.stored

    @property
    def rates(self) -> Sequence[LevelRate]:
        """The rate of each level."""
        return [LevelRate(level.bytes, level.kept) for level in self._outline.levels]

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that the levels keep."""
        return self._outline.levels[-1].kept

    def of(self, adapter: Adapter) -> bool:
        """Return whether the levels describe the adapter as it is: its base, dtype and fields."""
        found = self._outline.description
        return (found.base, found.dtype, found.config) == (adapter.base, adapter.dtype, adapter.config)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Module path → (dout, directions coded, din)."""
        return self._shapes

    @property
    def original_shapes(self) -> Mapping[str, Shape]:
        """Module path → the shape that was coded."""
        return self._outline.description.shapes

    @property
    def scales(self) -> Mapping[str, float]:
        """1 for every module."""
        return dict.fromkeys(self._shapes, 1.0)

    def __getitem__(self, path: str) -> Factors:
        outline = self._outline
        return factors(outline.read()[path], self._shapes[path], outline.top, outline.restored)

    def __contains__(self, path: object) -> bool:
        return path in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class GlancedModules(Modules):
    """Modules of levels of which only the heads are read: the shapes that were coded, without values."""

    def __init__(self, levels: Sequence[bytes], where: str | None = None) -> None:
        """Raise AdapterFormatError with `where` for levels that are damaged or lack those before."""
        self.levels = tuple(levels)
        heads = [Head(Scanner(body), place == 0) for place, body in enumerate(bodies(levels, where))]
        self.rates = [LevelRate(len(level), head.kept) for level, head in zip(levels, heads, strict=True)]
        assert heads[0].description is not None
        self.description = heads[0].description

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Module path → the shape that was coded."""
        return self.description.shapes

    @property
    def scales(self) -> Mapping[str, float]:
        """1 for every module."""
        return dict.fromkeys(self.shapes, 1.0)

    def __getitem__(self, path: str) -> Factors:
        raise TypeError(f"the values of {path} are not read: decode the levels")

    def __contains__(self, path: object) -> bool:
        return path in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def factors(directions: Sequence[Direction], shape: Shape, top: float, restored: int) -> Factors:
    """Return ΔW = Σ factor² g r_u r_vᵀ of one module as factors; every value is one float32 product."""
    a, b = np.zeros((shape.rank, shape.din), np.float32), np.zeros((shape.rank, shape.dout), np.float32)
    for i, direction in enumerate(directions):
        root = root_of(direction.gain, top)
        scaled = np.float32(np.float64(root) * np.float64(restored * restored) * 2.0**-28)
        a[i] = root * side_values(direction.v)
        b[i] = scaled * side_values(direction.u)
    return Factors(a, np.ascontiguousarray(b.T))


def side_values(side: Side) -> NDArray[np.float32]:
    """Return the values of a side's indices, in units of 2^-16."""
    return values(side.indices, side.chain, side.outliers)


def root_of(gain: int, top: float) -> np.float32:
    """Return √g scaled for values in units of 2^-16: top 2^(−gain / 64) 2^-16."""
    return np.float32(np.float64(top) * np.float64(_sixtyfourths()[gain % 64]) * 2.0 ** (-40 - gain // 64))


@cache
def _sixtyfourths() -> list[int]:
    """Return 2^24 2^(−i / 64) for i < 64, rounded down at each step."""
    value, found = 2**64, []
    for _ in range(64):
        found.append(value >> 40)
        value = value * _STEP >> 64
    return found


def decode(levels: Sequence[bytes], where: str | None = None) -> Adapter:
    """Decode the first n levels of a coding; bytes, shapes and lists are checked at once, values decoded when used.

    Raises AdapterFormatError naming every level that is damaged, truncated or does not follow the one before.
    """
    outline = Outline(levels, where)
    of = outline.description
    return Adapter(CodedModules(outline), of.base, of.dtype, of.config)


def glance(levels: Sequence[bytes], where: str | None = None) -> Adapter:
    """Return the adapter of `decode` without lists and values: base, shapes and levels. Raises AdapterFormatError."""
    modules = GlancedModules(levels, where)
    of = modules.description
    return Adapter(modules, of.base, of.dtype, of.config)


def inspect(levels: Sequence[bytes], where: str | None = None) -> tuple[Description, int, list[Level]]:
    """Return the description, the number of values coded, and what every level achieves, without decoding elements."""
    outline = Outline(levels, where)
    return outline.description, parameters(outline.description.shapes), outline.levels
