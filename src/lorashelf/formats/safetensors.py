"""safetensors files: a bounded header, tensors read one by one (bfloat16 too), and a header to write.

The format: 8 bytes of header length, a JSON header, then the tensors without gaps. All faults of a header are reported
at once; no tensor of a faulty file is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ..atomic import TICK, open_file
from ..errors import AdapterFormatError, LorashelfError
from ..lora.adapter import numpy_dtype
from ..lora.arrays import Array32, Float32

MAX_HEADER = 100 * 2**20  # bytes; safetensors' own cap
STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
SPELLED = {dtype: spelled for spelled, dtype in STORED.items()}
Lost = Callable[[str], LorashelfError]  # what happened to an open file → the error
_CHANGED = "changed while it was being read"
DAMAGED = "its bytes have changed"
_HELD = threading.Semaphore(100)  # how many more files may be held open
_SIZES = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64 C64"}
_WIDTHS = {dtype: width for width, dtypes in _SIZES.items() for dtype in dtypes.split()}

# glibc returns freed blocks to the system, which zeroes them page by page on reuse, until a larger block was freed
# (mallopt(3), M_MMAP_THRESHOLD). Freeing one here halves the time of reading tensors into such blocks.
np.empty(2**23, np.uint8)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of a file: dtype as written by safetensors, shape, byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Guard:
    """Expected CRC-32 sums of an object (see `objects.Stored`), and the error for an object that differs.

    Without sums nothing is compared.
    """

    sums: Sequence[int]
    lost: Lost

    def check(self, place: int, data: bytes | memoryview, before: int = 0) -> None:
        """Raise the error of `lost` unless the data, continuing the sum `before`, have the sum at this place."""
        if self.sums and (place >= len(self.sums) or crc32(data, before) != self.sums[place]):
            raise self.lost(DAMAGED)


class TensorFile(Mapping[str, TensorRecord]):
    """A safetensors file; `array` and `stack` return copies of its tensors.

    The file is read, not mapped: truncating a mapped file kills the process (SIGBUS). If the file changes after it was
    opened, the next read raises, so all values read belong to one state of the file. The file is held open; beyond a
    hundred files, each is reopened for every read, since systems limit a process's open files.
    """

    def __init__(self, path: Path, guard: Guard | None = None) -> None:
        """Open the file. Raises AdapterFormatError with every fault of the header; later reads raise the error of
        `guard`, by default AdapterFormatError.
        """
        self.path = path
        self._guard = guard or Guard((), partial(_refused, path))
        self._handle: int | None = None
        try:
            if _HELD.acquire(blocking=False):
                self._handle = _held(self, path)
            with self._opened() as handle, open(handle, "rb", closefd=False) as file:
                # objects of a shelf are compared with their sums instead
                self._state = os.fstat(handle) if guard else _settled(handle)
                size = self._state.st_size
                text = _read_header(file.read(8), size, file.read)
                self._check_unchanged(handle)
            self._offset = 8 + len(text)
            self._records = _records(text, size - self._offset)
        except OSError as error:
            cure = "replace it with the saved file, readable by you"
            raise AdapterFormatError([f"cannot be read: {error.strerror}"], where=str(path), cure=cure) from error
        except AdapterFormatError as error:
            raise error.amended(where=error.where or str(path)) from error.__cause__
        in_order = sorted(self._records, key=lambda name: self._records[name].start)
        self._places = {name: place for place, name in enumerate(in_order, 1)}

    @property
    def header(self) -> bytes:
        """The bytes before the tensors."""
        with self._reading() as handle:
            return os.pread(handle, self._offset, 0)

    def array(self, name: str) -> NDArray[Any]:
        """Return the tensor as stored (f32, f16 or bf16). Raises AdapterFormatError if the file has changed."""
        return np.asarray(self.stack([name])[0])

    def stack(self, names: Sequence[str]) -> NDArray[Any]:
        """Return tensors of one shape as (n, *shape), as stored; float32 if their dtypes differ. Raises as `array`."""
        records = [self._records[name] for name in names]
        first = records[0]
        if any(record.dtype != first.dtype for record in records):
            return np.stack([self.array(name).astype("<f4", copy=False) for name in names])
        data = np.empty((len(records), first.stop - first.start), np.uint8)
        with self._reading() as handle:
            for row, record, name in zip(data, records, names, strict=True):
                self._fill(handle, row.data, self._offset + record.start)
                self._guard.check(self._places[name], row.data)  # now, while the data is in the CPU cache
        return data.view(numpy_dtype(STORED[first.dtype])).reshape(len(records), *first.shape)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield a handle of the file: the one held open, else one for the block. Raises OSError."""
        if self._handle is not None:
            yield self._handle
            return
        handle = open_file(self.path)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[int]:
        """Yield a handle to read tensors from. Raises the error of `guard` if the file is unreadable or has changed."""
        try:
            with self._opened() as handle:
                yield handle
                self._check_unchanged(handle)
        except OSError as error:
            raise self._guard.lost(f"cannot be read: {error.strerror}") from error

    def _fill(self, handle: int, room: memoryview, offset: int) -> None:
        while room and (count := os.preadv(handle, [room], offset)):
            room, offset = room[count:], offset + count
        if room:
            raise self._guard.lost(_CHANGED)

    def _check_unchanged(self, handle: int) -> None:
        then, now = self._state, os.fstat(handle)
        fields = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        same = all(getattr(then, field) == getattr(now, field) for field in fields)
        # adding or removing a hard link also sets ctime, without changing a byte
        if not same or (then.st_ctime_ns != now.st_ctime_ns and then.st_nlink == now.st_nlink):
            raise self._guard.lost(_CHANGED)

    def __getitem__(self, name: str) -> TensorRecord:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def _refused(path: Path, what: str) -> LorashelfError:
    cure = "wait until the program that writes the file is done, then run the command again"
    return AdapterFormatError([f"{path.name} {what}"], where=str(path.parent), cure=cure)


def _held(owner: TensorFile, path: Path) -> int:
    """Open a handle that is closed when its owner is deleted. Raises OSError."""
    try:
        handle = open_file(path)
    except OSError:
        _HELD.release()
        raise
    weakref.finalize(owner, _let_go, handle, _HELD)
    return handle


def _let_go(handle: int, places: threading.Semaphore) -> None:
    os.close(handle)
    places.release()


def _settled(handle: int) -> os.stat_result:
    """Return the file's status once its times are older than one clock tick, so that any later change shows."""
    found = os.fstat(handle)
    age = time.time_ns() - found.st_ctime_ns
    if not 0 <= age < TICK:
        return found
    time.sleep((TICK - age) / 1e9)
    return os.fstat(handle)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the length and JSON header, padded to 8 bytes, for (name, dtype, shape) in the order of their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * _WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_values(values: Float32[Array32, "rows columns"], dtype: str, name: str) -> NDArray[Any]:
    """Return the values rounded to a dtype; `name` is for the error. Raises AdapterFormatError beyond its range."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=numpy_dtype(dtype))
    if not np.isfinite(stored).all():
        largest = float(np.abs(values).max())
        raise AdapterFormatError(
            [f"{name}: {largest:.3g} is beyond what {dtype} can hold"], cure="store in bf16 or f32"
        )
    return stored


def _read_header(prefix: bytes, size: int, read: Callable[[int], bytes]) -> bytes:
    """Read the header's JSON text."""
    if len(prefix) < 8:
        raise _faulty([f"truncated: {size} bytes, a header needs at least 8"])
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise _faulty([f"header of {length} bytes; at most {MAX_HEADER} are allowed"])
    if length > size - 8:
        raise _faulty([f"truncated: header of {length} bytes in a file of {size}"])
    return read(length)


@lru_cache(maxsize=4)  # the slots of a shelf usually share one header
def _records(text: bytes, room: int) -> Mapping[str, TensorRecord]:
    """Return the tensors that a header describes, by name; `room` is the size of the file after the header."""
    repeated: list[str] = []
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, repeated))
    except (ValueError, RecursionError) as error:
        raise _faulty([f"header is not JSON: {error}"]) from error
    if not isinstance(header, dict):
        raise _faulty(["header is not a JSON object"])
    if repeated:
        raise _faulty([f"duplicate key {key!r} in the header" for key in repeated])
    return MappingProxyType(_checked_records(header, room))


def _faulty(faults: Sequence[str]) -> AdapterFormatError:
    return AdapterFormatError(faults, cure="download or copy the file again")


def _once(pairs: list[tuple[str, Any]], repeated: list[str]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            repeated.append(key)
        seen[key] = value
    return seen


def _checked_records(header: dict[str, Any], room: int) -> dict[str, TensorRecord]:
    faults: list[str] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append("__metadata__ is not a map of strings")
    records: dict[str, TensorRecord] = {}
    odd: list[tuple[str, str]] = []
    for name, described in header.items():
        record, fault = _record(described, room)
        if fault:
            odd.append((name, fault))
        if record:
            records[name] = record
    faults += _by_kind(odd)
    faults += _layout_faults(records, room) if not faults else []
    if faults:
        raise _faulty(faults)
    return dict(sorted(records.items()))


def _by_kind(faults: list[tuple[str, str]]) -> list[str]:
    """Return the faults, with those that differ only in numbers and names merged into one with a count."""
    kinds: dict[str, list[str]] = {}
    for name, what in faults:
        kinds.setdefault(re.sub(r"\d+| those of .*", "", what), []).append(f"{name}: {what}")
    return [first + (f", and {len(more)} more tensors" if more else "") for first, *more in kinds.values()]


def _record(described: object, room: int) -> tuple[TensorRecord | None, str | None]:
    if not isinstance(described, dict) or not {"dtype", "shape", "data_offsets"} <= described.keys():
        return None, "needs dtype, shape and data_offsets"
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        return None, f"shape {shape} or data_offsets {offsets} is not a list of whole numbers"
    start, stop = offsets
    if start > stop or stop > room:
        return None, f"bytes {start}:{stop} are outside the file's {room} (truncated?)"
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        return None, f"unknown dtype {dtype!r}"
    size = math.prod(shape) * _WIDTHS[dtype]
    if size != stop - start:
        return None, f"{dtype} of shape {shape} takes {size} bytes, data_offsets give {stop - start}"
    return TensorRecord(dtype, tuple(shape), start, stop), None


def _naturals(values: object) -> TypeGuard[list[int]]:
    """Return whether this is a short list of whole numbers that a file could hold: their product can be printed."""
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**53 for v in values)


def _layout_faults(records: Mapping[str, TensorRecord], room: int) -> list[str]:
    odd = []
    end, last = 0, "the header"
    for name, record in sorted(records.items(), key=lambda item: (item[1].start, item[1].stop)):
        if record.start != end:
            relation = "overlap" if record.start < end else "leave a gap after"
            odd.append((name, f"bytes {record.start}:{record.stop} {relation} those of {last}"))
        end, last = max(end, record.stop), name
    faults = _by_kind(odd)
    if end != room and not faults:
        faults.append(f"{room - end} bytes after the last tensor")
    return faults
