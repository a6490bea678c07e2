"""Canonical JSON and tagged hashes: the same content has the same name, on every machine.

A digest is `b2-` and 64 hex digits of BLAKE2b-256; the tag lets a later version change the hash and still be told
apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import rfc8785

from .errors import NotStorable

TAG = "b2-"
PATTERN = re.compile(r"b2-[0-9a-f]{64}")


class Hasher:
    """A digest in the making: `update` with the next bytes, `digest` of those so far."""

    def __init__(self) -> None:
        self._state = blake2b(digest_size=32)

    def update(self, chunk: bytes | memoryview) -> None:
        """The next bytes."""
        self._state.update(chunk)

    def digest(self) -> str:
        """BLAKE2b-256 of what it was given, tagged."""
        return TAG + self._state.hexdigest()


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """BLAKE2b-256 of the chunks one after the other, tagged.

    >>> digest([b"lora", b"shelf"]) == digest([b"lorashelf"])
    True
    """
    hasher = Hasher()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.digest()


def is_digest(text: object) -> bool:
    """Whether `text` is a whole digest."""
    return isinstance(text, str) and PATTERN.fullmatch(text) is not None


def canonical_json(document: Any) -> bytes:
    """The one encoding of a JSON document (RFC 8785: keys sorted, shortest numbers, UTF-8, no white space). Raises
    NotStorable.

    >>> canonical_json({"b": 1.0, "a": "é"}).decode()
    '{"a":"é","b":1}'
    """
    try:
        return rfc8785.dumps(document)
    except rfc8785.CanonicalizationError as error:
        what = f"a value cannot be stored: {error}"
        raise NotStorable(what, cure="find where NaN, infinity or so large a number comes from") from error
