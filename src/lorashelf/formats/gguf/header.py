"""The header of a GGUF file: its fields, and where its tensors are. Integers are little-endian.

    "GGUF", version (u32), number of tensors (u64), number of fields (u64)
    field    key, type (u32), value; an array: element type (u32), length (u64), elements; a string: length (u64), UTF-8
    tensor   name, dimensions (u32), sizes (u64 each, the row's length first), type (u32), offset (u64) in the data
    data     from the next multiple of general.alignment on

The package `gguf` reads headers, too, but makes several arrays per token of a vocabulary, which takes seconds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ...atomic import open_file
from ...errors import ModelError
from ...lora.arrays import Array32, Float32

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS, _ALIGNMENT = 4, 32
BLOCK = 32  # values of a block of q8_0, which share a scale
F32, F16, Q8_0 = 0, 1, 8


class Place(NamedTuple):
    """A tensor's type, its shape, rows first, and where its bytes begin in the file."""

    kind: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """The fields and the tensors of a GGUF file."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Place]

    def number(self, name: str) -> int:
        """Return a field that is a whole number, or the first of several; 0 without it. Raises ModelError."""
        value = self.fields.get(name, 0)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is not int or value < 0:
            raise _unreadable(self.path, f"{name} is not a number")
        return value

    def array(self, name: str) -> Float32[Array32, "rows columns"]:
        """Read a matrix in f32, f16 or q8_0 as float32. Raises ModelError."""
        kind, (rows, columns), start = self.tensors[name]
        size = rows * columns * {F32: 4, F16: 2}.get(kind, 0) or rows * columns // BLOCK * (BLOCK + 2)
        with open(open_file(self.path), "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size or kind not in (F32, F16, Q8_0):
            raise _unreadable(self.path, f"{name} is cut off or of another type than f32, f16 and q8_0")
        if kind == Q8_0:
            blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]))
            found = blocks["values"] * blocks["scale"].astype(np.float32)[:, None]
        else:
            found = np.frombuffer(data, "<f4" if kind == F32 else "<f2").astype(np.float32)
        return found.reshape(rows, columns)


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file. Raises ModelError if the file is missing, no GGUF file or cut off."""
    try:
        with open(open_file(path), "rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _unreadable(path, "it is not a GGUF file, or it is cut off") from error


class _Reader:
    """Reads the header's parts in order. Raises ValueError for what no writer makes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = os.fstat(file.fileno()).st_size

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF" or self._number("I") not in _VERSIONS:
            raise ValueError("not a GGUF file of a known version")
        tensors, fields = self._number("Q"), self._number("Q")
        found = {self._text(): self._value(self._number("I")) for _ in range(fields)}
        listed = [(self._text(), *self._tensor()) for _ in range(tensors)]
        step = Header(self._path, found, {}).number("general.alignment") or _ALIGNMENT
        start = -(-self._file.tell() // step) * step
        places = {name: Place(kind, shape, start + offset) for name, shape, kind, offset in listed}
        if any(place.start > self._size for place in places.values()):
            raise ValueError("cut off")
        return Header(self._path, found, places)

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        count = self._number("I")
        if count > _MOST_DIMENSIONS:
            raise ValueError("too many dimensions")
        shape = tuple(self._number("Q") for _ in range(count))[::-1]
        return shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_letter(kind))
        of, count = self._number("I"), self._number("Q")
        if of == _STRING:
            return [self._text() for _ in range(count)]
        return list(struct.unpack(f"<{count}{_letter(of)}", self._bytes(count * struct.calcsize(_letter(of)))))

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8", "replace")

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._bytes(struct.calcsize(f"<{letter}")))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._size:
            raise ValueError("cut off")
        data = self._file.read(count)
        if len(data) < count:
            raise ValueError("cut off")
        return data


def _letter(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"unknown type {kind}")
    return _NUMBERS[kind]


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(f"the GGUF file cannot be read: {why}", where=str(path), cure="download or convert it again")
