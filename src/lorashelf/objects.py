"""An object of a shelf: a PEFT folder named by the digest of its two files. docs/format.md is normative."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from .atomic import TICK, open_file
from .digest import digest

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_BLOCK = 2**20  # bytes hashed at a time
_known: dict[tuple[int, ...], str] = {}


def object_digest(folder: Path) -> str:
    """The digest of the length and bytes of the config, then of the tensors. Raises OSError."""
    return digest(_chunks(folder))


def known_digest(folder: Path) -> str:
    """`object_digest`, remembered in this process as long as size and times of both files stay what they are."""
    before = _stamp(folder)
    if before not in _known:
        found = object_digest(folder)
        # a file that changed just now may change again without a change of its times
        if max(before[4::5]) > time.time_ns() - TICK or _stamp(folder) != before:
            return found
        _known[before] = found
    return _known[before]


def length(size: int) -> bytes:
    """A file's length as a digest covers it."""
    return size.to_bytes(8, "little")


def _chunks(folder: Path) -> Iterator[bytes | memoryview]:
    block = memoryview(bytearray(_BLOCK))
    for name in (CONFIG_FILE, TENSOR_FILE):
        with open(open_file(folder / name), "rb", buffering=0) as file:
            yield length(os.fstat(file.fileno()).st_size)
            while count := file.readinto(block):
                yield block[:count]


def _stamp(folder: Path) -> tuple[int, ...]:
    """Of both files: device, inode, size, times of the last change of content and of inode."""
    found = [os.lstat(folder / name) for name in (CONFIG_FILE, TENSOR_FILE)]
    return tuple(n for s in found for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
