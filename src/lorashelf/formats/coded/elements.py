"""The elements of sides as indices of bins, written and read in groups: all elements with one quantiser at once.

An index has the sign of its value; OUTLIER marks a value beyond all bins, whose size is coded in a separate byte.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...lora.arrays import Integers
from ...lora.quantiser import MOST_BINS, UNIT, Chain, quantiser, refining_tables, start_table
from .stream import UNIFORM, StreamReader, StreamWriter, malformed

Indices = NDArray[np.int16]
OUTLIER = 32767


def checked(chain: Chain) -> Chain:
    """Return a chain that was read. Raises AdapterFormatError if its quantiser is too fine for an index."""
    if 1 + quantiser(chain[:-1]).bins * chain[-1] > MOST_BINS:
        raise malformed("a quantiser has more than 2^14 bins")
    return chain


def indices(x: NDArray[np.float32], chain: Chain) -> Indices:
    """Return the indices of values of unit variance."""
    q = quantiser(chain)
    found = np.searchsorted(_edges(chain), np.abs(x), side="right")
    found[found > q.bins] = OUTLIER
    return np.where(x < 0, -found, found).astype(np.int16)


@cache
def _edges(chain: Chain) -> NDArray[np.float32]:
    """Return the edges, each rounded up to float32."""
    exact = quantiser(chain).edges / UNIT
    near = exact.astype(np.float32)
    return np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)


def values(q: Indices, chain: Chain, outliers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the values of indices in units of 2^-16, float32; `outliers` are in the order of their positions."""
    if len(outliers):
        places = np.abs(q) == OUTLIER
        found = _signed_centres(chain)[np.where(places, 0, q)]
        found[places] = outliers
        return found
    return _signed_centres(chain)[q]


@cache
def _signed_centres(chain: Chain) -> NDArray[np.float32]:
    """Return the centres of bins 0, 1, … K, −K, … −1, so that a negative index counts from the end."""
    centres = quantiser(chain).centres.astype(np.float32)
    return np.concatenate([centres, -centres[:0:-1]])


# outliers: octaves above the last edge, each in 16 equal parts -------------------------------------------------------


def outlier_codes(x: NDArray[np.float32], chain: Chain) -> Integers:
    """Return the bytes that code the sizes of outliers."""
    ratio = np.abs(x).astype(np.float64) * UNIT / float(quantiser(chain).edges[-1])
    mantissa, exponent = np.frexp(np.maximum(ratio, 1.0))  # ratio = mantissa 2^exponent, mantissa in [1/2, 1)
    codes = (exponent - 1) * 16 + (mantissa * 32).astype(np.int64) - 16
    return np.asarray(np.minimum(codes, 255), np.int64)


def outlier_values(codes: Integers, negative: NDArray[np.bool_], chain: Chain) -> NDArray[np.float32]:
    """Return the midpoint of the part of an octave that a byte codes, in units of 2^-16, with the sign."""
    sizes = quantiser(chain).edges[-1] * (33 + 2 * (codes & 15)) * (1 << (codes >> 4)) // 32
    return np.asarray(np.where(negative, -sizes, sizes), np.float32)


# the first quantiser of a side --------------------------------------------------------------------------------------


def write_started(writer: StreamWriter, q: Indices, x: NDArray[np.float32], chain: Chain) -> None:
    """Write indices of a start quantiser, then the sizes of the outliers."""
    bins, size = quantiser(chain).bins, np.abs(q).astype(np.int32)
    size[size == OUTLIER] = bins + 1
    writer.symbols(np.where(q > 0, 2 * size - 1, 2 * size), start_table(chain))
    writer.symbols(outlier_codes(x[size > bins], chain), UNIFORM)


def read_started(reader: StreamReader, count: int, chain: Chain) -> tuple[Indices, NDArray[np.float32]]:
    """Read what `write_started` wrote: indices, and the values of outliers."""
    bins = quantiser(chain).bins
    symbols = reader.symbols(count, start_table(chain))
    q = _signed(bins)[symbols]
    outliers = q[symbols > 2 * bins]
    codes = reader.symbols(len(outliers), UNIFORM).astype(np.int64)
    return q, outlier_values(codes, outliers < 0, chain)


@cache
def _signed(bins: int) -> Indices:
    """Return the table symbol → index: 0, 1, −1, 2, −2 … and outliers."""
    sizes = np.append(np.arange(1, bins + 1), OUTLIER)
    return np.append(0, np.stack([sizes, -sizes], 1).ravel()).astype(np.int16)


# refinements --------------------------------------------------------------------------------------------------------


def write_refined(writer: StreamWriter, before: Indices, after: Indices, chain: Chain) -> None:
    """Write the indices of a chain, for a reader that knows those before the last ratio."""
    (inner, outer), ratio = refining_tables(chain), chain[-1]
    size, finer = np.abs(before), np.abs(after).astype(np.int32)
    fresh = after[size == 0].astype(np.int32)
    writer.symbols(np.where(fresh < 0, 2, fresh), inner)
    for k in range(1, _largest(size) + 1):
        writer.symbols(finer[size == k] - 2 - (k - 1) * ratio, outer[k - 1])


def read_refined(reader: StreamReader, before: Indices, chain: Chain) -> Indices:
    """Read what `write_refined` wrote: the indices of the whole chain."""
    (inner, outer), ratio = refining_tables(chain), chain[-1]
    size = np.abs(before)
    order = np.argsort(size, kind="stable")
    ends = np.cumsum(np.bincount(size, minlength=1))
    after = before.copy()
    fresh = reader.symbols(int(ends[0]), inner)
    after[order[: ends[0]]] = np.where(fresh == 2, -1, fresh)
    for k in range(1, _largest(size) + 1):
        here = order[ends[k - 1] : ends[k]]
        finer = 2 + (k - 1) * ratio + reader.symbols(len(here), outer[k - 1])
        after[here] = np.where(before[here] < 0, -finer, finer)
    return after


def _largest(size: Indices) -> int:
    """Return the largest index that is not an outlier."""
    return int(size[size < OUTLIER].max(initial=0))
