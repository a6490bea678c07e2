"""A slot of a shelf and its object, in memory and as a record of a manifest."""

from __future__ import annotations

import math
import re
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import shake_256
from typing import Any

from ..digest import digest, is_digest
from ..documents import StoredSlot
from ..errors import NewerFormat
from ..formats.codec import Codec
from ..formats.codecs import CODECS
from ..formats.objects import StoredFile
from ..lora.adapter import WIDTHS, Adapter
from ..lora.kernels import squared_norms
from ..merging.average import Average, History, Source
from ..names import on_one_line
from .pages import RECORDS, Pages, Reader, divided

PENDING = "b2-" + "0" * 64  # an object that is planned but not written yet; of a digest's length, so sizes are exact
FILE_NAME = re.compile(r"[0-9a-f]{16}\.[a-z]{3}")
_KEYS = {"slot", "object", "rank", "dtype", "bytes", "merged", "members", "error", "average"}
_KEYS |= {"restored", "encoding", "worn", "fixed", "noise", "facts", "files"}
_KEYS |= {"energies", "sums"}  # in format 1; in format 2 they are on the page `facts`


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about an object's values that are known without reading them."""

    squared_norms: tuple[float, ...] = ()
    """‖ΔW‖² of every module, in the order of their paths; empty if the writer recorded none."""
    sums: tuple[int, ...] = ()
    """CRC-32 of config and header together, then of every tensor in the order of the file; empty if the writer
    recorded none.
    """

    def document(self) -> dict[str, str]:
        """Return the document on a page."""
        arrays = {"squared_norms": _packed(self.squared_norms, "d"), "sums": _packed(self.sums, "I")}
        return {name: text for name, text in arrays.items() if text}

    @staticmethod
    def read(document: Mapping[str, Any]) -> Facts:
        """Read the facts from a page's document. Raises TypeError, ValueError."""
        if unknown := document.keys() - {"squared_norms", "sums"}:
            raise ValueError(f"not what lorashelf writes: {', '.join(sorted(unknown))}")
        return Facts(_unpacked(document.get("squared_norms", ""), "d"), _unpacked(document.get("sums", ""), "I"))


NOTHING = Facts()


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An adapter as bytes: its name (`id`), its encoding, and what is known without reading the object."""

    id: str
    rank: int
    dtype: str
    bytes: int
    encoding: str = "peft"
    facts: Facts | str = NOTHING
    """The facts, or the id of their page."""
    files: tuple[StoredFile, ...] = ()
    """The files that other objects may share; empty for a folder named by the id."""

    @property
    def names(self) -> Sequence[str]:
        """The names in the folder `objects`."""
        return [file.name for file in self.files] or [self.id]

    def anew(self, number: int, facts: Facts) -> StoredObject:
        """Return a made-up object of the same size that shares no files and no facts, one per number, to compute sizes;
        `facts` are the object's own.
        """
        names = [digest([f"{number} {file.name}".encode()]) for file in self.files]
        files = [StoredFile(name[3:19] + ".lsc", file.bytes) for name, file in zip(names, self.files, strict=True)]
        facts = replace(facts, sums=_made_up(number, len(facts.sums)))
        return replace(self, id=digest([bytes(number)]), files=tuple(files), facts=facts)

    @staticmethod
    def pending(adapter: Adapter, encoding: str) -> StoredObject:
        """Return the object that an adapter will be once written."""
        encoded = CODECS[encoding].encode(adapter)
        known = Facts(tuple(squared_norms(adapter).values()), _made_up(0, encoded.parts)) if encoded.parts else NOTHING
        return StoredObject(
            id=PENDING,
            rank=adapter.rank,
            dtype=adapter.dtype,
            bytes=encoded.size,
            encoding=encoding,
            facts=known,
            files=tuple(encoded.files),
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """A numbered slot: its object, the history of the average, and the tasks routed to the slot."""

    id: int
    object: StoredObject
    history: History
    members: tuple[str, ...]

    @staticmethod
    def planned(slot_id: int, average: Average, members: Sequence[str], encoding: str = "peft") -> Slot:
        """Return a slot whose object is not written yet."""
        return Slot(slot_id, StoredObject.pending(average.adapter, encoding), average.history, tuple(members))

    @property
    def reserved(self) -> Collection[str]:
        """The names in the folder `objects` that must stay: of an object in an unknown encoding also its id."""
        return self.object.names if self.readable else {*self.object.names, self.object.id}

    @property
    def readable(self) -> bool:
        """Whether this version knows the encoding of the object."""
        return self.object.encoding in CODECS

    @property
    def codec(self) -> Codec:
        """The codec of the object. Raises NewerFormat for an encoding that this version does not know."""
        if not self.readable:
            what = f"slot {self.id} has the encoding {self.object.encoding!r}, which this lorashelf does not know"
            raise NewerFormat(f"{what}; tasks: {', '.join(self.members)}", cure="upgrade lorashelf")
        return CODECS[self.object.encoding]

    def document(self) -> StoredSlot:
        """Return the document of JSON answers: without facts and noise; `worn` and `fixed` only if set."""
        stored, history = self.object, self.history
        document: StoredSlot = {
            "slot": self.id,
            "object": stored.id,
            "rank": stored.rank,
            "dtype": stored.dtype,
            "bytes": stored.bytes,
            "merged": [asdict(source) for source in history.merged],
            "members": list(self.members),
            "error": history.error,
            "average": history.method,
            "restored": history.restored,
            "encoding": stored.encoding,
        }
        if history.extra_roundings:
            document["worn"] = history.extra_roundings
        if history.fixed:
            document["fixed"] = history.fixed
        return document

    def record(self, pages: Pages) -> dict[str, Any]:
        """Return the record on a page of slots; long lists of sources, and facts, are added to `pages`."""
        record: dict[str, Any] = {**self.document()}
        equal = 1 / max(len(self.history.merged), 1)
        for source in record["merged"]:
            if source["weight"] == equal:
                del source["weight"]  # so that a fold changes few pages
        if len(record["merged"]) > RECORDS:
            record["merged"] = [pages.add(run) for run in divided(record["merged"], lambda source: source["digest"])]
        if self.history.noise:
            record["noise"] = _packed(self.history.noise, "d")
        if self.object.files:
            record["files"] = [list(file) for file in self.object.files]
        facts = self.object.facts
        if isinstance(facts, str):
            pages.setdefault(facts, None)
            record["facts"] = facts
        elif facts != NOTHING:
            record["facts"] = pages.add(facts.document())
        return record

    @staticmethod
    def whole(record: Mapping[str, Any], pages: Pages, reader: Reader) -> dict[str, Any]:
        """Return the record with all sources, read from pages if needed, and their weights. Raises as `pages.read`."""
        merged = record["merged"]
        if merged and isinstance(merged[0], str):
            merged = [source for identity in merged for source in pages.read(identity, reader)]
        if isinstance(record.get("facts"), str):
            pages.setdefault(record["facts"], None)
        equal = 1 / max(len(merged), 1)
        return {**record, "merged": [{"weight": equal, **source} for source in merged]}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Slot:
        """Read a slot from a whole record without faults. Raises KeyError, TypeError, ValueError."""
        if unknown := record.keys() - _KEYS:
            raise ValueError(f"not what lorashelf writes: {', '.join(sorted(unknown))}")
        history = History(
            merged=tuple(Source(**source) for source in record["merged"]),
            error=record["error"],
            method=record["average"],
            restored=record["restored"],
            noise=_unpacked(record.get("noise", ""), "d"),
            extra_roundings=record.get("worn", 0),
            fixed=record.get("fixed"),
        )
        inline = Facts(_unpacked(record.get("energies", ""), "d"), _unpacked(record.get("sums", ""), "I"))
        files = tuple(StoredFile(*file) for file in record.get("files", ()))
        stored = {key: record[key] for key in ("rank", "dtype", "bytes", "encoding")}
        kept = StoredObject(record["object"], **stored, facts=record.get("facts", inline), files=files)
        return Slot(record["slot"], kept, history, tuple(record["members"]))


def record_faults(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields with values that no writer makes, whatever the digest."""
    sound = {
        "slot": type(record["slot"]) is int and record["slot"] >= 0,
        "object": is_digest(record["object"]),
        "encoding": type(record["encoding"]) is str and on_one_line(record["encoding"]),
        "dtype": record["dtype"] in WIDTHS,
        "rank": type(record["rank"]) is int and record["rank"] > 0,
        "bytes": type(record["bytes"]) is int and record["bytes"] > 0,
        "members": type(record["members"]) is list and all(type(task) is str for task in record["members"]),
        "merged": type(record["merged"]) is list and all(map(_is_source, record["merged"])),
        "error": is_number(record["error"]),
        "restored": is_number(record["restored"]) and record["restored"] > 0,
        "average": record["average"] is None or type(record["average"]) is str,
        "worn": type(record.get("worn", 0)) is int and record.get("worn", 0) >= 0,
        "files": "files" not in record or _are_files(record["files"], record["bytes"]),
        "facts": "facts" not in record or is_digest(record["facts"]),
        "fixed": record.get("fixed") is None or (type(record["fixed"]) is str and on_one_line(record["fixed"])),
    }
    yield from (field for field, holds in sound.items() if not holds)


def _is_source(source: Mapping[str, Any]) -> bool:
    numbers = all(is_number(source[name]) for name in ("weight", "norm", "rank", "parameters"))
    return numbers and is_digest(source["digest"]) and type(source["task"]) is str


def _are_files(files: Any, size: int) -> bool:
    named = all(FILE_NAME.fullmatch(name) and type(count) is int and count > 0 for name, count in files)
    return bool(files) and named and sum(count for _, count in files) == size


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _made_up(seed: int, count: int) -> tuple[int, ...]:
    """Return sums of an object that is not written, which compress as real ones do."""
    return struct.unpack(f"<{count}I", shake_256(seed.to_bytes(8, "little")).digest(4 * count))


def _packed(values: Sequence[float], code: str) -> str:
    """Return numbers of a `struct` format code, little-endian, in base64."""
    return b2a_base64(struct.pack(f"<{len(values)}{code}", *values), newline=False).decode()


def _unpacked(text: str, code: str) -> tuple[Any, ...]:
    data = a2b_base64(text)
    count = len(data) // struct.calcsize(f"<{code}")
    values = struct.unpack_from(f"<{count}{code}", data)
    if _packed(values, code) != text or not all(0 <= value < math.inf for value in values):
        raise ValueError("squared norms, noise or sums are not what lorashelf writes")
    return values
