"""Codecs: an adapter as immutable files in a folder, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from ..lora.adapter import Adapter
from .objects import Stored, known_digest, object_digest
from .safetensors import Lost


class Encoded(Protocol):
    """An adapter encoded but not written, so that the size is known in advance."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        ...

    @property
    def parts(self) -> int:
        """The number of sums that `Stored` will have."""
        ...

    def stored(self) -> Stored:
        """Return what `write` would return, without writing."""
        ...

    def write(self, folder: Path) -> Stored:
        """Write the files into an existing folder, synced. Raises DiskError."""
        ...


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


class Codec(ABC):
    """One way to store an adapter."""

    name: ClassVar[str]
    """The manifest's `encoding`."""
    loadable: ClassVar[bool]
    """Whether PEFT loads the stored folder as it is."""
    invertible: ClassVar[bool]
    """Whether the stored adapter differs only by the rounding of its factors, so that averages can continue from it."""

    @abstractmethod
    def encode(self, adapter: Adapter) -> Encoded:
        """Return what would be stored; deterministic. Raises AdapterFormatError if the adapter cannot be stored so."""

    @abstractmethod
    def round_trip(self, adapter: Adapter, quality: float) -> tuple[Adapter, float]:
        """Return the adapter as read back from disk, for `encode`, and the relative error ‖ΔW − ΔŴ‖ / ‖ΔW‖ of what was
        left out (0 for rounding alone). `quality` is the predicted share of the gain in loss that a lossy codec keeps.
        Raises AdapterFormatError, UsageError.
        """

    @abstractmethod
    def open(self, folder: Path, sums: Sequence[int], lost: Lost, member: str | None = None) -> Adapter:
        """Open the adapter of a stored folder, or one member of several, read lazily and checked against the `sums` of
        `Stored`, if any; `lost` makes the error. Raises AdapterFormatError.
        """

    @abstractmethod
    def names(self, folder: Path) -> Sequence[str]:
        """Return the names of a stored folder's files, in the order of its id. Raises OSError."""

    def levels(self, adapter: Adapter) -> Sequence[Level]:
        """What each level of an adapter that `round_trip` or `open` returned is worth; empty where there are none."""
        return ()

    def coarser(self, adapter: Adapter, count: int) -> Adapter:
        """The adapter of the first `count` of its levels. Raises TypeError where there are no levels."""
        raise TypeError(f"the encoding {self.name} has no levels")

    def paths(self, folder: Path) -> list[Path]:
        """Return the files of a stored folder. Raises OSError."""
        return [folder / name for name in self.names(folder)]

    def digest(self, folder: Path) -> str:
        """Return the id of the bytes in a stored folder. Raises OSError."""
        return object_digest(self.paths(folder))

    def known_digest(self, folder: Path) -> str:
        """Return `digest`, cached in this process while the files' sizes and times do not change. Raises OSError."""
        return known_digest(self.paths(folder))
