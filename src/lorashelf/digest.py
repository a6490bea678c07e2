"""Canonical JSON and tagged hashes: the same content has the same digest on every machine.

A digest is `b2-` and 64 hex digits of BLAKE2b-256; the tag would distinguish a different hash of a later version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import rfc8785

from .errors import NotStorable

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What a JSON document holds."""
TAG = "b2-"
PATTERN = re.compile(r"b2-[0-9a-f]{64}")


class Hasher:
    """An incremental digest."""

    def __init__(self) -> None:
        self._state = blake2b(digest_size=32)

    def update(self, chunk: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._state.update(chunk)

    def digest(self) -> str:
        """Return the tagged BLAKE2b-256 of the bytes so far."""
        return TAG + self._state.hexdigest()


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the tagged BLAKE2b-256 of the concatenated chunks.

    >>> digest([b"lora", b"shelf"]) == digest([b"lorashelf"])
    True
    """
    hasher = Hasher()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.digest()


def is_digest(text: object) -> bool:
    """Return whether `text` is a complete digest."""
    return isinstance(text, str) and PATTERN.fullmatch(text) is not None


def canonical_json(document: Any) -> bytes:
    """Encode a JSON document canonically (RFC 8785: keys sorted, shortest numbers, UTF-8, no white space). Raises
    NotStorable.

    >>> canonical_json({"b": 1.0, "a": "é"}).decode()
    '{"a":"é","b":1}'
    """
    try:
        return rfc8785.dumps(document)
    except rfc8785.CanonicalizationError as error:
        what = f"a value cannot be stored: {error}"
        raise NotStorable(what, cure="find the source of NaN, infinity or so large a number") from error
