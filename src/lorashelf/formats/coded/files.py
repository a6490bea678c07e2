"""A coding as one file of consecutive levels, and the choice of levels for a file of a given size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import atomic
from ...errors import AdapterFormatError, UsageError
from ...lora.adapter import Adapter
from . import LEVELS, SUFFIX
from .decoder import decode
from .encoder import Encoder, add_together
from .frame import MAGIC, divided


def _ladder(encoders: Sequence[Encoder], size: int, levels: int) -> list[int]:
    """Return the sizes of the prefixes, each half the next: at least 1/400 of the adapters' 16-bit size."""
    least, sizes = sum(max(each.adapter.parameters // 200, 2 * each.least) for each in encoders), [size]
    while len(sizes) < levels and sizes[0] // 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def encode_within(encoder: Encoder, size: int, levels: int = LEVELS) -> list[bytes]:
    """Code up to `levels` levels in at most `size` bytes. Raises UsageError if one does not fit."""
    for each in _ladder([encoder], size, levels):
        encoder.add_within(each)
    return encoder.levels


def encode_together(encoders: Sequence[Encoder], size: int, levels: int = LEVELS) -> list[list[bytes]]:
    """Code up to `levels` levels of each adapter in at most `size` bytes in all, every level for the highest mean
    predicted quality. Raises UsageError if the first does not fit.
    """
    for each in _ladder(encoders, size, levels):
        add_together(encoders, each)
    return [each.levels for each in encoders]


def encode_for(encoder: Encoder, wanted: float, levels: int = LEVELS) -> list[bytes]:
    """Code up to `levels` levels with at least a predicted quality, in the fewest bytes. Raises UsageError."""
    for each in _ladder([encoder], encoder.size_for(wanted), levels)[:-1]:
        encoder.add_within(each)
    encoder.add_for(wanted)
    return encoder.levels


def write_coded(levels: Sequence[bytes], path: Path) -> None:
    """Write levels to a file atomically. Raises UsageError if the path exists, DiskError."""
    atomic.check_output(path, "file")
    atomic.make_parents(path)
    atomic.sweep_staging(path.parent)
    with atomic.staging(path.parent) as staged:
        atomic.write_file(staged / "levels", levels)
        atomic.publish(staged / "levels", path)
        atomic.remove(staged)


def is_coded(path: Path) -> bool:
    """Return whether a file is one of levels: by its name, NAME.lsc, or by its first bytes."""
    if path.suffix == SUFFIX:
        return True
    try:
        with open(atomic.open_file(path), "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_coded(path: str | Path) -> Adapter:
    """Read the adapter in a file of `lorashelf compress`; values are decoded when they are used. A shelf that stores it
    coded keeps its levels. Raises AdapterFormatError for a file that is unreadable, damaged or something else.
    """
    place = atomic.expanded(path)
    return decode(read_levels(place), str(place))


def read_levels(path: Path, count: int | None = None) -> list[bytes]:
    """Read the first `count` levels of a file, by default all; unchecked. Raises AdapterFormatError, UsageError."""
    try:
        data = atomic.read_file(path)
    except OSError as error:
        cure = "give a file written by lorashelf compress, readable by you"
        raise AdapterFormatError([f"cannot be read: {error.strerror}"], where=str(path), cure=cure) from error
    levels = list(divided(data))
    if count is not None and not 1 <= count <= max(len(levels), 1):
        raise UsageError(f"{count} of {len(levels)} levels requested", where=str(path), cure=f"give 1 to {len(levels)}")
    return levels[:count]
