"""What a format of an export is: the options that it reads, and how it writes one object and what belongs to all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from ..errors import Fault, UnknownName
from ..lora.adapter import WIDTHS, Adapter, Factors

ROUTES = "routes.json"
TOLERANCES: Mapping[str, float] = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2}
"""Dtype → the relative error that rounding to it may cause; what is stored in it already is written unchanged."""


@dataclass(frozen=True, slots=True)
class Item:
    """An object to export: the name of its files, its slot, the tasks routed to it, and its adapter."""

    name: str
    slot: int
    tasks: tuple[str, ...]
    adapter: Adapter


class Written(NamedTuple):
    """An object on the disk, and as it is read back from there."""

    path: Path
    """The file or folder to load for the object's tasks."""
    factors: Mapping[str, Factors]
    tolerance: float
    """The relative error ‖ΔW − ΔŴ‖ / ‖ΔW‖ that the rounding of the format may cause."""


class Target(ABC):
    """The runtime that one export is for."""

    def faults(self, adapter: Adapter) -> Sequence[Fault]:
        """Return all that the target cannot hold of an adapter; it is asked before anything is written."""
        return ()

    @abstractmethod
    def write(self, item: Item, folder: Path) -> Written:
        """Write an object into a folder, synced, and read it back. Raises AdapterFormatError, DiskError."""

    def finish(self, paths: Mapping[str, str], folder: Path) -> None:
        """Write what belongs to all objects; `paths` maps each task to its file or folder."""
        return


class Format(ABC):
    """A way to write the objects of a shelf for a runtime."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """What is written, in half a line."""
    options: ClassVar[Sequence[str]] = ()
    """The names of the options that are read."""

    @abstractmethod
    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target for these options; `base` is the name of the shelf's base model, if known.

        Raises UsageError, UnknownName, ModelError, MissingExtra.
        """


def dtype_in(options: Mapping[str, str], dtypes: Sequence[str] = tuple(WIDTHS)) -> str | None:
    """Return the option `dtype`, None if absent. Raises UnknownName for a dtype that is not one of these."""
    dtype = options.get("dtype")
    if dtype is not None and dtype not in dtypes:
        raise UnknownName("dtype", dtype, [*dtypes])
    return dtype
