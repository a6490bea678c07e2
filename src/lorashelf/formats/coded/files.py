"""A coding as one file, its levels one after the other; and the levels that a file of a given size is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ... import atomic
from ...errors import AdapterFormatError, UsageError
from .encoder import Encoder
from .record import divided

LEVELS = 6


def _ladder(encoder: Encoder, size: int, levels: int) -> list[int]:
    """The sizes of a file's prefixes, each half the next: 1/400 of the adapter's bytes at least, mostly values."""
    least, sizes = max(encoder.adapter.parameters // 200, 2 * encoder.least), [size]
    while len(sizes) < levels and sizes[0] // 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def encode_within(encoder: Encoder, size: int, levels: int = LEVELS) -> list[bytes]:
    """Up to so many levels in at most `size` bytes. Raises UsageError if one does not fit."""
    for each in _ladder(encoder, size, levels):
        encoder.add_within(each)
    return encoder.levels


def encode_for(encoder: Encoder, wanted: float, levels: int = LEVELS) -> list[bytes]:
    """Up to so many levels of at least a predicted quality in as few bytes as that takes. Raises UsageError."""
    for each in _ladder(encoder, encoder.size_for(wanted), levels)[:-1]:
        encoder.add_within(each)
    encoder.add_for(wanted)
    return encoder.levels


def write_coded(levels: Sequence[bytes], path: Path) -> None:
    """Write levels as a file that appears whole or not at all. Raises UsageError if the path exists, DiskError."""
    atomic.check_output(path, "file")
    atomic.make_parents(path)
    atomic.sweep_staging(path.parent)
    with atomic.staging(path.parent) as staged:
        atomic.write_file(staged / "levels", levels)
        atomic.publish(staged / "levels", path)
        atomic.remove(staged)


def read_levels(path: Path, count: int | None = None) -> list[bytes]:
    """The first `count` levels of a file, all without; not checked yet. Raises AdapterFormatError, UsageError."""
    try:
        data = atomic.read_file(path)
    except OSError as error:
        cure = "give a file that lorashelf compress wrote, which this user can read"
        raise AdapterFormatError([f"cannot be read: {error.strerror}"], where=str(path), cure=cure) from error
    levels = list(divided(data))
    if count is not None and not 1 <= count <= max(len(levels), 1):
        raise UsageError(f"level {count} of {len(levels)}", where=str(path), cure=f"give 1 to {len(levels)}")
    return levels[:count]
