"""Codecs: an adapter as immutable files, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from ..lora.adapter import Adapter
from .objects import Stored, StoredFile
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

    @property
    def files(self) -> Sequence[StoredFile]:
        """The files in `objects/` that objects may share; empty for a folder named by the object's id."""
        ...

    def stored(self) -> Stored:
        """Return what `publish` would return, without writing."""
        ...

    def publish(self, objects: Path, staging: Path) -> Stored:
        """Write what is missing in the folder `objects`, each file or folder atomically via `staging`.
        Raises DiskError.
        """
        ...


class LevelRate(NamedTuple):
    """The bytes of a level, and what it keeps with those before it."""

    bytes: int
    """Bytes of this level alone."""
    kept: float
    """Share of ‖ΔW‖² that the levels up to this one keep."""


class Codec(ABC):
    """One way to store an adapter."""

    name: ClassVar[str]
    """The manifest's `encoding`."""
    loadable: ClassVar[bool]
    """Whether PEFT loads the stored folder as it is."""
    invertible: ClassVar[bool]
    """Whether the stored adapter differs only by the rounding of its factors, so that averages can continue from it."""
    self_checking: ClassVar[bool] = False
    """Whether `open` and `glance` check every byte that they read, without sums."""

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
    def open(self, paths: Sequence[Path], sums: Sequence[int], lost: Lost, member: str | None = None) -> Adapter:
        """Open the adapter of an object's files, or one member of several, read lazily and checked against the `sums`
        of `Stored`, if any; `lost` makes the error. Raises AdapterFormatError.
        """

    @abstractmethod
    def paths(self, objects: Path, names: Sequence[str]) -> Sequence[Path]:
        """Return the files of the object that has these names in the folder `objects`, in the order of its id."""

    def damaged(self, paths: Sequence[Path]) -> list[str]:
        """Return a fault for each file that does not match its name; none if names do not state a digest."""
        return []

    def glance(self, paths: Sequence[Path], sums: Sequence[int], lost: Lost) -> Adapter:
        """Open like `open`, but only for shapes and `rates`, not values. Raises AdapterFormatError."""
        return self.open(paths, sums, lost)

    def rates(self, adapter: Adapter) -> Sequence[LevelRate]:
        """Return the rate of each level of an adapter of this codec; empty without levels."""
        return ()

    def coarser(self, adapter: Adapter, count: int) -> Adapter:
        """Return the adapter of the first `count` levels. Raises TypeError if there are no levels."""
        raise TypeError(f"the encoding {self.name} has no levels")
