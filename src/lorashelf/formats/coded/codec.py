"""Objects of a shelf in the encoding `coded`: one file per level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import atomic
from ...digest import digest
from ...errors import AdapterFormatError, NotStorable
from ...lora.adapter import Adapter
from ...lora.quality import energy_for
from ..codec import Codec, LevelRate
from ..objects import Stored, StoredFile, length
from ..safetensors import DAMAGED, Lost
from . import SUFFIX
from .frame import reference

if TYPE_CHECKING:
    from .decoder import CodedModules, GlancedModules


@dataclass(frozen=True, slots=True)
class Levels:
    """A coded adapter before it is written: one file per level."""

    levels: tuple[bytes, ...]

    parts = 0
    """Levels check themselves."""

    @property
    def size(self) -> int:
        """Bytes of all levels."""
        return sum(map(len, self.levels))

    @property
    def files(self) -> Sequence[StoredFile]:
        """One file per level, named by the next level's reference to it, so that coarser versions share files."""
        return [StoredFile(_name(level), len(level)) for level in self.levels]

    def stored(self) -> Stored:
        """Return the digest of the length and the bytes of each level; no sums."""
        return Stored(digest(part for level in self.levels for part in (length(len(level)), level)), ())

    def publish(self, objects: Path, staging: Path) -> Stored:
        """Write the missing levels. Raises DiskError, and NotStorable for another level of the same name."""
        for level in self.levels:
            path = objects / _name(level)
            there = _content(path)
            if there == level:
                continue
            if there is not None and _name(there) == path.name:
                raise NotStorable("a level of another adapter has this name", where=str(path), cure="code it otherwise")
            if path.is_dir() and not path.is_symlink():
                atomic.remove(path)
            atomic.place_file(path, level, staging)
        atomic.settle(objects)
        return self.stored()


def _name(level: bytes) -> str:
    return f"{reference(level).hex()}{SUFFIX}"


def _content(path: Path) -> bytes | None:
    """Return the bytes of a file; None if it cannot be read."""
    try:
        return None if path.is_symlink() else atomic.read_file(path)
    except OSError:
        return None


class Coded(Codec):
    """Few bytes, by rate-distortion optimisation; docs/coded.md."""

    name = "coded"
    loadable = False
    invertible = False
    self_checking = True

    def encode(self, adapter: Adapter) -> Levels:
        """Return the levels that the adapter was decoded from. Raises TypeError for other adapters."""
        return Levels(_of_levels(adapter).levels)

    def rates(self, adapter: Adapter) -> Sequence[LevelRate]:
        """Return the rate of each level. Raises TypeError for an adapter without levels."""
        return _of_levels(adapter).rates

    def coarser(self, adapter: Adapter, count: int) -> Adapter:
        """Decode the first `count` levels, without the original. Raises TypeError for an adapter without levels."""
        from .decoder import decode

        return decode(_of_levels(adapter).levels[:count])

    def round_trip(self, adapter: Adapter, quality: float) -> tuple[Adapter, float]:
        """Code the adapter for a predicted quality and decode it. Raises UsageError if no level is that fine.

        An adapter decoded from levels keeps them: the fewest that have the quality, or all. The error is that of the
        adapter they were coded from.
        """
        from .decoder import CodedModules, decode
        from .encoder import Encoder
        from .ladder import ladder

        if isinstance(adapter.modules, CodedModules) and adapter.modules.of(adapter):
            kept, wanted = [rate.kept for rate in adapter.modules.rates], energy_for(quality)
            count = 1 + sum(share < wanted for share in kept[:-1])
            return self.coarser(adapter, count), math.sqrt(max(1.0 - kept[count - 1], 0.0))

        encoder = Encoder(adapter)
        decoded = decode(list(ladder(encoder, quality)))
        return decoded, math.sqrt(max(1.0 - encoder.before * encoder.kept, 0.0))

    def open(self, paths: Sequence[Path], sums: Sequence[int], lost: Lost, member: str | None = None) -> Adapter:
        """Open the adapter from files of levels. Raises AdapterFormatError naming every damaged file."""
        from .decoder import decode

        return decode(self._read(paths), str(paths[-1]))

    def glance(self, paths: Sequence[Path], sums: Sequence[int], lost: Lost) -> Adapter:
        """Read shapes and rates from the heads of the levels. Raises AdapterFormatError naming every damaged file."""
        from .decoder import glance

        return glance(self._read(paths), str(paths[-1]))

    def _read(self, paths: Sequence[Path]) -> list[bytes]:
        found = {path.name: _content(path) for path in paths}
        if faults := _damaged(found):
            raise AdapterFormatError(faults, where=str(paths[-1]))
        return [level for level in found.values() if level is not None]

    def damaged(self, paths: Sequence[Path]) -> list[str]:
        """Return a fault for each level that does not match its name."""
        return _damaged({path.name: _content(path) for path in paths})

    def paths(self, objects: Path, names: Sequence[str]) -> Sequence[Path]:
        """Return the levels, the base first."""
        return [objects / name for name in names]


def _damaged(found: Mapping[str, bytes | None]) -> list[str]:
    """Return the faults of levels, by name."""
    gone = [f"objects/{name} is gone or cannot be read" for name, level in found.items() if level is None]
    changed = [name for name, level in found.items() if level is not None and _name(level) != name]
    return gone + [f"objects/{name}: {DAMAGED}" for name in changed]


def _of_levels(adapter: Adapter) -> CodedModules | GlancedModules:
    """Return the modules of an adapter that was made from levels. Raises TypeError for another."""
    from .decoder import CodedModules, GlancedModules

    if not isinstance(adapter.modules, CodedModules | GlancedModules):
        raise TypeError("only what `round_trip`, `open` or `glance` returned has levels")
    return adapter.modules
