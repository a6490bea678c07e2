"""The coded part of a level: symbols with integer frequency tables, by a 64-bit range coder; docs/coded.md.

The coder is constriction's, which takes a table as weights f − 1 that add up to 2^24 − n: integers that floating point
represents exactly, so that the coder recovers exactly this table on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import AdapterFormatError
from ...lora.arrays import Integers
from ...lora.quantiser import TOTAL, frequencies

Symbols = NDArray[np.int32]
_LEVELS = 15  # weights of a table of small numbers are 0 or 2^0 … 2^14
_FEW = 4096  # below this many symbols, building the faster model does not pay
MOST_NUMBERS = 2**16  # different values in one list of small numbers


def _coder() -> Any:
    import constriction

    return constriction.stream


def _model(table: Integers, count: int) -> Any:
    weights = (table - 1).astype(np.float64)
    return _coder().model.Categorical(weights, perfect=False, lazy=count < _FEW)


def varint(value: int) -> bytes:
    """Encode a number in bytes of 7 bits, the lowest first, with the eighth bit set in all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class Scanner:
    """A reader of consecutive bytes. Raises AdapterFormatError if they end too soon."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """Read the next bytes."""
        found = self._data[self._at : self._at + count]
        if len(found) < count:
            raise malformed("the bytes end too soon")
        self._at += count
        return found

    def varint(self) -> int:
        """Read the next number."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise malformed("a number is larger than 2^63")

    def rest(self) -> bytes:
        """Read the remaining bytes."""
        return self.take(len(self._data) - self._at)


def malformed(why: str) -> AdapterFormatError:
    """Return the error for bytes with a correct checksum that no writer produces."""
    return AdapterFormatError([f"this is not a level that lorashelf writes: {why}"], cure="code the adapter again")


def _weighted(weights: NDArray[np.int64]) -> Integers:
    masses = np.where(weights > 0, 1 << np.maximum(weights - 1, 0), 0)
    table: Integers = frequencies(masses[None] << 24)[0]
    return table


class StreamWriter:
    """An encoder from symbols to bytes."""

    def __init__(self) -> None:
        self._tables = bytearray()
        self._encoder = _coder().queue.RangeEncoder()

    def symbols(self, values: NDArray[np.signedinteger], table: Integers) -> None:
        """Write symbols with one table; with a table of one symbol they take no bits."""
        if len(values) and len(table) > 1:
            self._encoder.encode(np.ascontiguousarray(values, np.int32), _model(table, len(values)))

    def numbers(self, values: NDArray[np.signedinteger]) -> None:
        """Write a list of small numbers, whose length the reader knows, and its table."""
        if not len(values):
            return
        counts = np.bincount(values)
        scaled = np.log2(np.maximum(counts, 1) / counts.max()) + _LEVELS
        weights = np.where(counts > 0, np.maximum(np.rint(scaled), 1), 0).astype(np.int64)
        padded = np.pad(weights, (0, len(weights) % 2))
        self._tables += varint(len(weights)) + bytes((padded[::2] | padded[1::2] << 4).tolist())
        self.symbols(values, _weighted(weights))

    def finished(self) -> bytes:
        """Return the tables and their length, then the words of the range coder."""
        words: bytes = self._encoder.get_compressed().astype("<u4").tobytes()
        return varint(len(self._tables)) + bytes(self._tables) + words


class StreamReader:
    """A decoder of what a StreamWriter wrote, in the same order."""

    def __init__(self, scanner: Scanner) -> None:
        self._tables = Scanner(scanner.take(scanner.varint()))
        words = scanner.rest()
        if len(words) % 4:
            raise malformed("the last word is incomplete")
        self.size = len(words)
        self._decoder = _coder().queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))

    def symbols(self, count: int, table: Integers) -> Symbols:
        """Read the next symbols, all with one table."""
        if not count or len(table) == 1:
            return np.zeros(count, np.int32)
        try:
            found: Symbols = self._decoder.decode(_model(table, count), count)
        except (AssertionError, ValueError) as error:
            raise malformed("the words cannot come from the coder") from error
        return found

    def numbers(self, count: int) -> Symbols:
        """Read the next list of small numbers."""
        if not count:
            return np.zeros(0, np.int32)
        different = self._tables.varint()
        if not 1 <= different <= MOST_NUMBERS:
            raise malformed("a table has no symbols, or more than 2^16")
        packed = np.frombuffer(self._tables.take((different + 1) // 2), np.uint8)
        weights = np.stack([packed & 15, packed >> 4], 1).ravel()[:different].astype(np.int64)
        if not weights.any():
            raise malformed("a table gives every value the weight 0")
        return self.symbols(count, _weighted(weights))


UNIFORM = np.full(256, TOTAL // 256, np.int64)
"""The table of uniform bytes."""
