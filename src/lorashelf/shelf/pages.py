"""Pages: the immutable parts of a manifest, each a compressed JSON document named by its digest.

A commit writes the pages that changed; the kept manifests share all others. docs/format.md is normative.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ..atomic import no_links, read_file, refusals
from ..digest import canonical_json, digest, is_digest
from ..errors import CorruptShelf, NotStorable

FOLDER = "pages"
SUFFIX = ".json.gz"
RECORDS = 32  # on a page, on average
MOST_BYTES = 2**26  # of a page's JSON: bounds what a forged file can make a reader allocate
T = TypeVar("T")
Reader = Callable[[str], bytes]
"""Returns the JSON of the page of an id, checked against the id. Raises CorruptShelf."""


class Pages(dict[str, bytes | None]):
    """The pages that a manifest refers to: id → the JSON of a page, None for one that was not read."""

    def add(self, document: Any) -> str:
        """Put a document on a new page; return its id. Raises NotStorable for one that no reader would take."""
        data = canonical_json(document)
        if len(data) > MOST_BYTES:
            what = f"a page of {len(data)} bytes cannot be stored; the most is {MOST_BYTES}"
            raise NotStorable(what, cure="shorten what --task-file gives: its prompts, above all")
        identity = digest([data])
        self[identity] = data
        return identity

    def read(self, identity: str, reader: Reader) -> Any:
        """Read the document of a page and keep the JSON here. Raises CorruptShelf, ValueError, TypeError."""
        data = self[identity] = reader(identity)
        return json.loads(data)


def divided(items: Iterable[T], key: Callable[[T], str]) -> Iterator[tuple[T, ...]]:
    """Divide items into runs, one per page: an item ends a run where the digest of its key ends in 5 zero bits.

    The boundaries depend on the keys alone: changing, inserting or removing one item changes one run, splits one or
    joins two.
    """
    run: list[T] = []
    for item in items:
        run.append(item)
        if int(digest([key(item).encode()])[-2:], 16) % RECORDS == 0:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


def page_path(shelf: Path, identity: str) -> Path:
    """Return the path of the page of this id."""
    return shelf / FOLDER / f"{identity}{SUFFIX}"


def read_page(shelf: Path, identity: str) -> bytes:
    """Read the JSON of a page of a shelf. Raises CorruptShelf if the page is missing or does not match its id, and
    DiskError if permission is denied.
    """
    cure = f"lorashelf repair {shelf}"
    if not is_digest(identity):
        raise CorruptShelf(f"{identity!r} does not name a page", where=str(shelf / FOLDER), cure=cure)
    path = page_path(shelf, identity)
    no_links(path)
    try:
        return content(read_file(path), identity)
    except PermissionError:
        with refusals(path, "read"):
            raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        what = f"a page of the manifest cannot be read: {reason}"
        raise CorruptShelf(what, where=str(path), cure=cure) from error


@lru_cache(maxsize=1024)
def compressed(data: bytes) -> bytes:
    """Return the bytes of a page's file: gzip, without a time."""
    return gzip.compress(data, mtime=0)


def content(file: bytes, identity: str) -> bytes:
    """Return the JSON of a page's file. Raises ValueError unless the JSON matches the id."""
    inflate = zlib.decompressobj(wbits=31)
    try:
        data = inflate.decompress(file, MOST_BYTES)
    except zlib.error as error:
        raise ValueError(f"the page cannot be decompressed: {error}") from error
    if not inflate.eof or inflate.unused_data or digest([data]) != identity:
        raise ValueError("the page was changed after it was written")
    return data
