"""Objects of a shelf in the encoding `coded`: a folder of levels."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import atomic
from ...digest import digest
from ...errors import AdapterFormatError
from ...lora.adapter import Adapter
from ..codec import Codec, Level
from ..objects import Stored, length
from ..safetensors import Lost

if TYPE_CHECKING:
    from .decoder import CodedModules

_LEVEL = re.compile(r"level-(\d+)\.lsc")


@dataclass(frozen=True, slots=True)
class Levels:
    """An adapter as it would stand on disk: a file per level."""

    levels: tuple[bytes, ...]

    parts = 0
    """Levels check themselves."""

    @property
    def size(self) -> int:
        """Bytes of all levels."""
        return sum(map(len, self.levels))

    def stored(self) -> Stored:
        """What `write` returns: the digest of the length and the bytes of each level; no sums."""
        return Stored(digest(part for level in self.levels for part in (length(len(level)), level)), ())

    def write(self, folder: Path) -> Stored:
        """Write a file per level into an existing folder, synced. Raises DiskError."""
        for number, level in enumerate(self.levels):
            atomic.write_file(folder / f"level-{number}.lsc", [level])
        return self.stored()


class CodedFolder(Codec):
    """Few bytes, by rate and distortion; docs/coded.md."""

    name = "coded"
    loadable = False
    invertible = False

    def encode(self, adapter: Adapter) -> Levels:
        """The levels that the adapter was decoded from. Raises TypeError for one that was not."""
        return Levels(_decoded(adapter).levels)

    def levels(self, adapter: Adapter) -> Sequence[Level]:
        """What each of its levels is worth. Raises TypeError for an adapter that was not decoded from levels."""
        return _decoded(adapter).rates

    def coarser(self, adapter: Adapter, count: int) -> Adapter:
        """The adapter of the first `count` of its levels, which needs no original. Raises TypeError likewise."""
        from .decoder import decode

        return decode(_decoded(adapter).levels[:count])

    def round_trip(self, adapter: Adapter, quality: float) -> tuple[Adapter, float]:
        """The adapter coded for a predicted quality, and decoded. Raises UsageError where no code is so fine."""
        from .decoder import decode
        from .encoder import Encoder
        from .ladder import ladder

        encoder = Encoder(adapter)
        decoded = decode(list(ladder(encoder, quality)))
        return decoded, math.sqrt(max(1.0 - encoder.kept, 0.0))

    def open(self, folder: Path, sums: Sequence[int], lost: Lost, member: str | None = None) -> Adapter:
        """The adapter of a folder of levels. Raises AdapterFormatError."""
        try:
            levels = [atomic.read_file(path) for path in self.paths(folder)]
        except OSError as error:
            raise AdapterFormatError([f"a level cannot be read: {error.strerror}"], where=str(folder)) from error
        from .decoder import decode

        return decode(levels, str(folder))

    def names(self, folder: Path) -> Sequence[str]:
        """Its levels, the base first; whatever else is there comes last, so that the id is another. Raises OSError."""
        try:
            found = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return ()
        matches = {name: _LEVEL.fullmatch(name) for name in found}
        return sorted(found, key=lambda name: (int(m[1]) if (m := matches[name]) else len(found), name))


def _decoded(adapter: Adapter) -> CodedModules:
    """The modules of an adapter that was decoded from levels. Raises TypeError for another."""
    from .decoder import CodedModules

    if not isinstance(adapter.modules, CodedModules):
        raise TypeError("only what `round_trip` or `open` returned has levels")
    return adapter.modules
