"""The records of slots and tasks on pages, and back.

Manifests share records as they share pages: in one process, a page is decoded once and encoded once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from .pages import RECORDS, Pages, Reader, divided
from .slot import Slot, record_faults

Details = Mapping[str, Any]
"""What is stored with a task: type, digest of its adapter, and the content of --task-file."""
MOST_PAGES = 1024  # decoded, and as many encoded, that stay in memory
T = TypeVar("T")


class NotWritten(ValueError):
    """A document that no writer makes, whatever its digest: the faulty fields."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__(f"not what lorashelf writes: {', '.join(self.faults)}")


class Cache(Generic[T]):
    """The values used latest, for any number of threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values[key] = self._values.pop(key)
                return self._values[key]
        made = make()
        return self.put(key, made)

    def put(self, key: Hashable, value: T) -> T:
        """Keep a value, unless another thread did before; return the one that is kept. The oldest goes."""
        with self._lock:
            value = self._values.setdefault(key, value)
            if len(self._values) > self._most:
                del self._values[next(iter(self._values))]
            return value


Page = tuple[T, str, Pages]
"""The content of a page, its id, and the pages: itself and those that it refers to."""
_decoded: Cache[Page[Any]] = Cache(MOST_PAGES)
_encoded: Cache[Page[Any]] = Cache(MOST_PAGES)


def slot_pages(slots: Sequence[Slot]) -> Iterator[tuple[str, Pages]]:
    """Yield the id of each page of these slots, with the pages that are needed."""
    for run in divided(slots, lambda slot: str(slot.id)):
        yield _page(tuple(map(id, run)), run, partial(_slot_records, run))


def task_pages(tasks: Mapping[str, Details], slots: Iterable[Slot]) -> Iterator[tuple[str, Pages]]:
    """Yield the id of each page of these tasks, with the page. Type and digest are left out where the record of the
    slot has them; not where they are on a page of sources, which may be lost without the slot.
    """
    known = implied(slot for slot in slots if len(slot.history.merged) <= RECORDS)
    for names in divided(sorted(tasks), lambda name: name):
        run = {name: tasks[name] for name in names}
        left_out = {name: known[name] for name in names if name in known and known[name].items() <= run[name].items()}
        yield _page((*names, *map(id, run.values()), *left_out), run, partial(_task_records, run, left_out))


def _slot_records(slots: Sequence[Slot], pages: Pages) -> list[dict[str, Any]]:
    return [slot.record(pages) for slot in slots]


def _task_records(tasks: Mapping[str, Details], left_out: Mapping[str, Details], _: Pages) -> dict[str, Details]:
    return {name: {k: v for k, v in tasks[name].items() if k not in left_out.get(name, ())} for name in tasks}


def _page(key: Hashable, content: T, document: Callable[[Pages], Any]) -> tuple[str, Pages]:
    """Return the id of the page of a content, and the pages; `key` is made of the ids of what is in the content."""

    def made() -> Page[T]:
        pages = Pages()
        return content, pages.add(document(pages)), pages

    _, identity, pages = _encoded.get(key, made)  # the cache keeps the content, so that Python's ids stay unique
    return identity, pages


def read_slots(identity: str, reader: Reader) -> tuple[Sequence[Slot], Pages]:
    """Return the slots on a page, and the pages. Raises NotWritten, ValueError, KeyError, TypeError, AttributeError,
    and what `reader` raises.
    """

    def made() -> Page[Sequence[Slot]]:
        pages = Pages()
        slots = checked_slots([Slot.whole(record, pages, reader) for record in pages.read(identity, reader)])
        return slots, identity, pages

    slots, _, pages = page = _decoded.get(identity, made)
    _encoded.put(tuple(map(id, slots)), page)
    return slots, pages


def read_tasks(identity: str, reader: Reader, known: Mapping[str, Details]) -> tuple[Mapping[str, Details], Pages]:
    """Return the tasks on a page, each with what is `known` from its slot, and the page. Raises as `read_slots`."""

    def read() -> Page[dict[str, Details]]:
        pages = Pages()
        return dict(pages.read(identity, reader)), identity, pages

    given, _, pages = _decoded.get((identity,), read)
    without = [name for name in sorted(given) if "digest" not in given[name]]

    def made() -> Page[dict[str, Details]]:
        return {name: {**known.get(name, {}), **given[name]} for name in sorted(given)}, identity, pages

    key = (identity, *(tuple(known.get(name, {}).items()) for name in without))
    tasks, _, _ = page = _decoded.get(key, made)
    _encoded.put((*tasks, *map(id, tasks.values()), *without), page)
    return tasks, pages


def checked_slots(records: Sequence[Mapping[str, Any]]) -> tuple[Slot, ...]:
    """Read slots from whole records. Raises NotWritten naming every fault, ValueError, KeyError, TypeError."""
    faults = [f"slots[{place}]: {field}" for place, record in enumerate(records) for field in record_faults(record)]
    if faults:
        raise NotWritten(faults)
    return tuple(map(Slot.read, records))


def implied(slots: Iterable[Slot]) -> dict[str, dict[str, str]]:
    """Return task → {type, digest} of the first source of this name in the slot that serves the task."""
    found: dict[str, dict[str, str]] = {}
    for slot in slots:
        served = set(slot.members)
        for source in slot.history.merged:
            if source.task in served:
                found.setdefault(source.task, {"type": source.type, "digest": source.digest})
    return found
