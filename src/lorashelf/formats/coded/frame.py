"""A level as bytes: the frame around its body, the checks, several levels in one file; docs/coded.md."""

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
_HEAD = 3 + 2 + 10  # the most bytes up to the size of the body
_AGAIN = "copy the file again, or code the adapter again"


def reference(level: bytes) -> bytes:
    """Return the next level's reference to this one: the first 8 bytes of its BLAKE2b-256."""
    return blake2b(level, digest_size=32).digest()[:_REFERENCE]


def framed(before: Sequence[bytes], body: bytes) -> bytes:
    """Frame the body of the level that follows those before it."""
    parent = reference(before[-1]) if before else b""
    head = MAGIC + bytes([VERSION, len(before)]) + varint(len(body)) + parent
    return head + body + crc32(head + body).to_bytes(_SUM, "little")


def bodies(levels: Sequence[bytes], where: str | None = None) -> list[bytes]:
    """Return the bodies of levels, the base first, after checking that each is complete and follows the one before.
    Raises AdapterFormatError with the faults of all.
    """
    found, faults = [], []
    parent: bytes | None = b""
    for place, level in enumerate(levels):
        body, fault = _body(level, place, parent)
        found.append(body)
        faults += [fault.at(f"level {place}")] if fault else []
        parent = None if fault else reference(level)
    if not levels:
        faults.append(Fault("there are no levels", "give the base level first"))
    if faults:
        raise AdapterFormatError(faults, where=where)
    return found


def _body(level: bytes, place: int, parent: bytes | None) -> tuple[bytes, Fault | None]:
    """Return the body of a level, or its fault; `parent` is None after a faulty level."""
    if level[:3] != MAGIC:
        return b"", Fault("this is not a level", "give the output of lorashelf compress")
    if len(level) > 3 and level[3] > VERSION:
        what = f"version {level[3]} of the encoding; this lorashelf reads up to version {VERSION}"
        return b"", Fault(what, "update lorashelf")
    size, start = _extent(level)
    if size is None or len(level) < size:
        of = "incomplete header" if size is None else f"{len(level)} of {size} bytes"
        return b"", Fault(f"truncated: {of}", f"{_AGAIN}; the levels before it can be used without it")
    if len(level) > size:
        return b"", Fault(f"{len(level) - size} bytes after the end", _AGAIN)
    if crc32(level[:-_SUM]) != int.from_bytes(level[-_SUM:], "little"):
        return b"", Fault("the bytes have changed: the checksum differs", _AGAIN)
    if level[4] != place:
        what = f"this is level {level[4]} of its adapter; level {place} is needed here"
        return b"", Fault(what, "give all levels before it, in order")
    if place and parent is not None and level[start - _REFERENCE : start] != parent:
        what = "it does not follow the level before it, which belongs to another adapter or another coding"
        return b"", Fault(what, "give levels of one coding")
    return level[start : size - _SUM], None


def _extent(level: bytes) -> tuple[int | None, int]:
    """Return the size of a level according to its header, None if that is incomplete, and the body's offset."""
    scanner = Scanner(level)
    try:
        scanner.take(5)
        count = scanner.varint()
    except AdapterFormatError:
        return None, 0
    start = len(MAGIC) + 2 + len(varint(count)) + (_REFERENCE if level[4] else 0)
    return start + count + _SUM, start


def divided(data: bytes) -> Iterator[bytes]:
    """Yield the levels of a file in order; a remainder that cannot be divided is the last."""
    start = 0
    while start < len(data):
        head = data[start : start + _HEAD]
        size, _ = _extent(head) if head[:3] == MAGIC else (None, 0)
        end = len(data) if size is None else start + size
        yield data[start:end]
        start = end
