"""A level as bytes: what stands around its body, how it is checked, how several lie in one file; docs/coded.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from zlib import crc32

from ...errors import AdapterFormatError, Fault
from .stream import Scanner, varint

MAGIC = b"LSC"
VERSION = 1
_REFERENCE = 8  # bytes of a level's digest in the next one
_SUM = 4
_AGAIN = "copy the file again, or code the adapter again"


def reference(level: bytes) -> bytes:
    """How the next level names this one: the first 8 bytes of its BLAKE2b-256."""
    return blake2b(level, digest_size=32).digest()[:_REFERENCE]


def framed(before: Sequence[bytes], body: bytes) -> bytes:
    """The level that follows on those before it."""
    parent = reference(before[-1]) if before else b""
    head = MAGIC + bytes([VERSION, len(before)]) + varint(len(body)) + parent
    return head + body + crc32(head + body).to_bytes(_SUM, "little")


def bodies(levels: Sequence[bytes], where: str | None = None) -> list[bytes]:
    """The bodies of levels, the base first, once each is known to be whole and to follow on the one before. Raises
    AdapterFormatError with the faults of all.
    """
    found, faults = [], []
    for place, level in enumerate(levels):
        body, fault = _body(level, place, reference(levels[place - 1]) if place else b"")
        found.append(body)
        faults += [fault.at(f"level {place}")] if fault else []
    if not levels:
        faults.append(Fault("there is no level", "give the base level first"))
    if faults:
        raise AdapterFormatError(faults, where=where)
    return found


def _body(level: bytes, place: int, parent: bytes) -> tuple[bytes, Fault | None]:
    if level[:3] != MAGIC:
        return b"", Fault("it does not begin as a level does", "give what lorashelf compress wrote")
    if len(level) > 3 and level[3] > VERSION:
        what = f"it is of version {level[3]} of the encoding; this lorashelf reads up to version {VERSION}"
        return b"", Fault(what, "update lorashelf")
    size, start = _extent(level)
    if size is None or len(level) < size:
        of = "its header is not whole" if size is None else f"{len(level)} of {size} bytes are there"
        return b"", Fault(f"it is cut off: {of}", f"{_AGAIN}; the levels before it can be used without it")
    if len(level) > size:
        return b"", Fault(f"{len(level) - size} bytes follow its end", _AGAIN)
    if crc32(level[:-_SUM]) != int.from_bytes(level[-_SUM:], "little"):
        return b"", Fault("its bytes have changed: the checksum is another", _AGAIN)
    if level[4] != place:
        what = f"it is level {level[4]} of its adapter, and level {place} is needed here"
        return b"", Fault(what, "give all levels before it, in their order")
    if place and level[start - _REFERENCE : start] != parent:
        what = "it does not follow on the level before it: that one is of another adapter or another coding"
        return b"", Fault(what, "give levels of one coding")
    return level[start : size - _SUM], None


def _extent(level: bytes) -> tuple[int | None, int]:
    """The size a level should have by its header, None if that is not whole, and where its body begins."""
    scanner = Scanner(level)
    try:
        scanner.take(5)
        count = scanner.varint()
    except AdapterFormatError:
        return None, 0
    start = len(MAGIC) + 2 + len(varint(count)) + (_REFERENCE if level[4] else 0)
    return start + count + _SUM, start


def divided(data: bytes) -> Iterator[bytes]:
    """The levels of a file, one after the other; what cannot be divided any more is the last."""
    while data:
        size, _ = _extent(data) if data[:3] == MAGIC else (None, 0)
        cut = len(data) if size is None else size
        yield data[:cut]
        data = data[cut:]
