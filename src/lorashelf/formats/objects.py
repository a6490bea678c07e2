"""An object of a shelf: a folder named by the digest of its files. docs/format.md is normative."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..atomic import TICK, open_file
from ..digest import digest

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_BLOCK = 2**22  # bytes hashed at a time: long enough that waiting for the interpreter in between does not count
_known: dict[tuple[int, ...], str] = {}
_locks: dict[tuple[int, ...], threading.Lock] = {}


class Stored(NamedTuple):
    """An object that was written: its id; CRC-32 of config and header together, then of each tensor in file order."""

    identity: str
    sums: tuple[int, ...]


def object_digest(files: Sequence[Path]) -> str:
    """The digest of the length and the bytes of each file, in this order. Raises OSError."""
    return digest(_chunks(files))


def known_digest(files: Sequence[Path]) -> str:
    """`object_digest`, remembered in this process as long as size and times of the files stay what they are."""
    before = _stamp(files)
    with _locks.setdefault(before, threading.Lock()):  # who comes while another thread is at it waits
        if before in _known:
            return _known[before]
        found = object_digest(files)
        # a file that changed just now may change again without a change of its times
        if max(before[4::5]) <= time.time_ns() - TICK and _stamp(files) == before:
            _known[before] = found
        return found


def length(size: int) -> bytes:
    """A file's length as a digest covers it."""
    return size.to_bytes(8, "little")


def _chunks(files: Sequence[Path]) -> Iterator[bytes | memoryview]:
    block = memoryview(bytearray(_BLOCK))
    for path in files:
        with open(open_file(path), "rb", buffering=0) as file:
            yield length(os.fstat(file.fileno()).st_size)
            while count := file.readinto(block):
                yield block[:count]


def _stamp(files: Sequence[Path]) -> tuple[int, ...]:
    """Of each file: device, inode, size, times of the last change of content and of inode."""
    found = [os.lstat(path) for path in files]
    return tuple(n for s in found for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
