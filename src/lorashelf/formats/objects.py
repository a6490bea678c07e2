"""An object of a shelf: a PEFT folder named by the digest of its two files. docs/format.md is normative."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
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


def object_digest(folder: Path) -> str:
    """The digest of the length and bytes of the config, then of the tensors. Raises OSError."""
    return digest(_chunks(folder))


def known_digest(folder: Path) -> str:
    """`object_digest`, remembered in this process as long as size and times of both files stay what they are."""
    before = _stamp(folder)
    with _locks.setdefault(before, threading.Lock()):  # who comes while another thread is at it waits
        if before in _known:
            return _known[before]
        found = object_digest(folder)
        # a file that changed just now may change again without a change of its times
        if max(before[4::5]) <= time.time_ns() - TICK and _stamp(folder) == before:
            _known[before] = found
        return found


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
