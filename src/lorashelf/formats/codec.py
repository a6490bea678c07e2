"""Codecs: an adapter as immutable bytes in a folder of its own, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from ..lora.adapter import Adapter
from .objects import Stored, known_digest, object_digest
from .safetensors import Lost


class Encoded(Protocol):
    """An adapter as it would be stored; what it takes is known before anything is written."""

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        ...

    @property
    def parts(self) -> int:
        """How many sums `Stored` will have."""
        ...

    def digest(self) -> str:
        """The id of the object that `write` makes."""
        ...

    def write(self, folder: Path) -> Stored:
        """Write the files into an existing folder, synced. Raises DiskError."""
        ...


class Codec(ABC):
    """One way to store an adapter."""

    name: ClassVar[str]
    """As the manifest has it (`encoding`)."""
    loadable: ClassVar[bool]
    """Whether PEFT loads the stored folder as it is."""
    invertible: ClassVar[bool]
    """Whether what comes back differs by the rounding of the factors only, so that averages can go on from it."""

    @abstractmethod
    def encode(self, adapter: Adapter) -> Encoded:
        """What would be stored; deterministic. Raises AdapterFormatError where the adapter cannot be stored so."""

    @abstractmethod
    def round_trip(self, adapter: Adapter, quality: float) -> tuple[Adapter, float]:
        """The adapter as it comes back from a disk, and the relative error ‖ΔW − ΔŴ‖ / ‖ΔW‖ of what was left out (0 for
        rounding alone); `encode` takes what this returns. `quality` is the predicted share
        of what the adapter does that a codec with loss keeps. Raises AdapterFormatError, UsageError.
        """

    @abstractmethod
    def open(self, folder: Path, sums: Sequence[int], lost: Lost, member: str | None = None) -> Adapter:
        """The adapter of a stored folder, or one member of several, read lazily and held against the `sums` that
        `Stored` has, if there are any; `lost` makes the error. Raises AdapterFormatError.
        """

    @abstractmethod
    def names(self, folder: Path) -> Sequence[str]:
        """The files of a stored folder, in the order in which its id covers them. Raises OSError."""

    def paths(self, folder: Path) -> list[Path]:
        """The files of a stored folder. Raises OSError."""
        return [folder / name for name in self.names(folder)]

    def digest(self, folder: Path) -> str:
        """The id that the bytes in a stored folder have. Raises OSError."""
        return object_digest(self.paths(folder))

    def known_digest(self, folder: Path) -> str:
        """`digest`, remembered in this process while sizes and times of the files do not change. Raises OSError."""
        return known_digest(self.paths(folder))
