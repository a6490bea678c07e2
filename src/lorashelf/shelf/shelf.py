"""The shelf on disk: immutable objects and manifests, one HEAD whose replacement is the commit. docs/format.md is
normative.

Readers need no lock. A writer holds `lock`; killed at any point, the shelf opens at the old head or the new one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .. import atomic
from ..atomic import no_links
from ..errors import (
    DiskError,
    LorashelfError,
    ShelfError,
    ShelfNotFound,
    StaleShelf,
    UsageError,
)
from ..formats.codec import Codec
from ..locks import WriterLock
from ..lora.adapter import Adapter
from . import log, repair_records
from .budget import check_budget
from .creation import appearing, fill, first_files
from .folder import MANIFESTS, ShelfFolder
from .manifest import Clock, Manifest, now, stamp
from .pages import Reader
from .plan import Plan
from .settings import FILE, FORMAT, Settings, config_error, edited_toml, read_toml
from .slot import PENDING, Slot
from .snapshot import Snapshot
from .undo import check_objects, restored

LOCK_SECONDS = 10.0
_logger = logging.getLogger("lorashelf")
T = TypeVar("T")


class Shelf:
    """A folder of at most K slots with its history; every change is one `commit`."""

    def __init__(self, path: str | Path, clock: Clock = now) -> None:
        """Open an existing shelf. Raises ShelfNotFound; faults of its content are raised by `snapshot`."""
        self.path = atomic.expanded(path)
        self._clock = clock
        self._folder = ShelfFolder(self.path)
        self._lock = WriterLock(self.path / "lock")
        with atomic.refusals(self.path, "read"):
            found = (self.path / "HEAD").exists() or (self.path / MANIFESTS).is_dir()
        if not found:
            cure = "create one: lorashelf init SHELF --slots K"
            raise ShelfNotFound("there is no shelf here", where=str(self.path), cure=cure)

    @classmethod
    def create(cls, path: str | Path, settings: Settings, clock: Clock = now) -> Shelf:
        """Create an empty shelf; the folder appears whole or not at all. Raises UsageError, ShelfError if it exists,
        OverBudget if even an empty shelf exceeds `bytes`, DiskError.
        """
        path = atomic.expanded(path)
        files = first_files(path, settings, clock)
        with appearing(path) as staged:
            fill(staged, files)
        return cls(path, clock)

    @classmethod
    def create_with(
        cls, path: str | Path, settings: Settings, planner: Callable[[Snapshot], Plan], clock: Clock = now
    ) -> tuple[Snapshot, Plan]:
        """Create a shelf with the content that `planner` plans; the folder appears whole or not at all. Raises as
        `create` and `commit`.
        """
        path = atomic.expanded(path)
        files = first_files(path, settings, clock)
        with appearing(path) as staged:
            fill(staged, files)
            shelf = cls(staged, clock)
            plan = planner(shelf.snapshot())
            shelf.commit(plan)
        return cls(path, clock).snapshot(), plan

    # reading ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Read the head, its manifest, the settings in force and the other kept manifests.

        Raises ShelfConfigError if shelf.toml contradicts the content, CorruptShelf, NewerFormat.
        """
        with atomic.refusals(self.path, "read"):
            while True:
                reader = self._folder.reader()
                head, manifest = self._folder.head(reader)
                try:
                    return self._snapshot(head, manifest, reader)
                except LorashelfError:
                    if self._folder.named_by_head() == head:
                        raise  # else a writer committed meanwhile

    def _snapshot(self, head: str, manifest: Manifest, reader: Reader) -> Snapshot:
        no_links(self.path / FILE)
        settings = read_toml(self.path / FILE)
        self._check_settings(settings, manifest)
        kept: dict[str, Manifest] = {}
        chain, parent = [manifest], manifest.parent
        while parent is not None and (found := self._folder.manifest(parent, reader)) is not None:
            kept[parent] = found
            chain.append(found)
            parent = found.parent
        for each in chain:
            for identity in (each.state, *each.undo, *each.redo, *each.ended):
                if identity and identity not in kept and (found := self._folder.manifest(identity, reader)) is not None:
                    kept[identity] = found
        return Snapshot(self.path, head, manifest, settings, kept, read_at=head)

    def read(self, answer: Callable[[Snapshot], T]) -> T:
        """Return what `answer`, which only reads, returns for the present snapshot, or for a new one if a commit
        deleted files of the first meanwhile. Raises as `snapshot` and `answer`.
        """
        while True:
            snapshot = self.snapshot()
            try:
                return answer(snapshot)
            except StaleShelf:
                if not snapshot.stale:
                    raise

    def log(self) -> list[dict[str, Any]]:
        """Return every operation since the shelf was created, oldest first: {id, sequence, operation, time, version}
        and, if any, {task, decision, slot, to}. The lines of log.jsonl are not hashed.
        """
        snapshot = self.snapshot()
        with atomic.refusals(self.path, "read"):
            records = {record["id"]: record for record in self._folder.log.records()}
        for identity, manifest in [*snapshot.kept.items(), (snapshot.head, snapshot.manifest)]:
            records[identity] = log.record(identity, manifest)
        return sorted(records.values(), key=lambda record: int(record["sequence"]))

    def verify(self) -> list[str]:
        """Recompute every hash from the files; return the problems found, in sentences. Changes nothing.

        Objects and manifests are hashed. log.jsonl and shelf.toml are not: the log is checked for missing states, the
        settings for invalid values. After a commit in the meantime, the new head is checked.
        """
        sound: set[Slot] = set()
        while True:
            try:
                snapshot = self.snapshot()
            except (ShelfError, DiskError) as error:
                return [str(error)]
            problems = self._problems(snapshot, sound)
            if not problems or not snapshot.stale:
                return problems

    def _problems(self, snapshot: Snapshot, sound: set[Slot]) -> list[str]:
        """Return the problems of a snapshot; slots in `sound` are not read again, and sound slots are added to it."""
        problems: list[str] = []
        seen: set[str] = set()
        for manifest in (snapshot.manifest, *snapshot.retained().values()):
            for slot in manifest.slots:
                if slot.object.id in seen or slot in sound:
                    continue
                seen.add(slot.object.id)
                if found := snapshot.problems(slot):
                    problems += found
                else:
                    sound.add(slot)
        try:
            with atomic.refusals(self.path, "read"):
                problems += self._folder.log.problems({snapshot.head: snapshot.manifest, **snapshot.kept})
        except (ShelfError, DiskError) as error:
            problems.append(f"{error.what}; {error.where}; {error.cure}")
        return problems

    # writing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer's lock; may be nested in one thread. Raises ShelfLocked after 10 seconds."""
        with self._lock.held(LOCK_SECONDS):
            self._ready()
            yield

    def commit(self, plan: Plan) -> str:
        """Carry out a plan and return the new head. A refused plan changes nothing and returns the old head.

        Raises StaleShelf if the head moved since the plan was made, OverBudget, DiskError.
        """
        with self.writing():
            snapshot = self.snapshot()
            if snapshot.head != plan.parent:
                cure = "make the plan again from a new snapshot"
                raise StaleShelf("the shelf changed since the plan was made", where=str(self.path), cure=cure)
            if plan.refused is not None:
                return snapshot.head
            if any(slot.object.id == PENDING and slot.id not in plan.writes for slot in plan.manifest.slots):
                raise StaleShelf("the plan builds on one that was not committed", where=str(self.path))
            if not plan.shrinks:
                check_budget(snapshot, plan)
            self._folder.sweep_staging()
            self._folder.sweep(snapshot)  # an object half deleted by a killed writer must not pass for whole
            with self._nothing_left():
                writes = [(plan.manifest.slot(number), adapter) for number, adapter in sorted(plan.writes.items())]
                objects = {slot.id: self._folder.store(adapter, slot.codec) for slot, adapter in writes}
                return self._advance(snapshot, plan.sealed(objects, stamp(self._clock)))

    def undo(self, to: str | None = None) -> str:
        """Commit the content of the previous state (or of any kept manifest, by a prefix of its id) again; return the
        new head.

        As in an editor: n undos go n states back, `redo` goes forward, and after a change nothing can be redone. Raises
        NotReversible if no earlier state is kept or its objects are gone, UnknownName, UsageError.
        """
        return self._restore("undo", to)

    def redo(self) -> str:
        """Commit again the content that the latest undo left; return the new head. Raises NotReversible."""
        return self._restore("redo")

    def _restore(self, operation: str, to: str | None = None) -> str:
        with self.writing():
            snapshot = self.snapshot()
            manifest = restored(snapshot, operation, to, stamp(self._clock))
            self._check_settings(snapshot.settings, manifest)
            check_objects(snapshot, manifest)
            self._folder.sweep_staging()
            with self._nothing_left():
                return self._advance(snapshot, manifest)

    def configure(self, changes: Mapping[str, Any]) -> Settings:
        """Change settings in shelf.toml, by the flat names of `new_settings`; None removes one. The rest of the file
        stays as it is. Raises UsageError naming every invalid value and every contradiction with the content.
        """
        path = self.path / FILE
        with self.writing():
            snapshot = self.snapshot()
            settings = snapshot.settings.changed(changes)
            faults = settings.faults()
            wrong = {name for name, _ in faults}
            if wrong.isdisjoint(("slots", "base")):
                faults += _contradictions(settings, snapshot.manifest)
            limit = settings.budget.bytes
            if wrong.isdisjoint(("bytes", "keep")) and limit is not None and "bytes" in changes:
                least = replace(snapshot, settings=settings).resting
                if least > limit:
                    faults.append(("bytes", f"bytes is {limit}, but the shelf takes {least}: give at least that"))
            if faults:
                raise UsageError("; ".join(fault for _, fault in faults), where=str(path), cure="give other values")
            with atomic.refusals(path, "read"):
                edited = edited_toml(atomic.read_file(path).decode(), changes)
            self._lock.check()
            self._folder.sweep_staging()
            atomic.replace_file(path, edited, self.path / "tmp")
            self._folder.sweep(self.snapshot())
            return settings

    def mend(self) -> list[str]:
        """Repair all files but objects (see `repair_records.mend`); return what was done, in sentences."""
        with self._lock.held(LOCK_SECONDS):
            self._folder.make_folders()
            return repair_records.mend(self.path)

    def rewrite(self, adapters: Iterable[tuple[Adapter, Codec]]) -> None:
        """Write the objects of these adapters, by their codecs, if damaged or missing. Raises DiskError."""
        with self.writing():
            for adapter, codec in adapters:
                self._folder.store(adapter, codec)

    def forget(self, states: Collection[str]) -> None:
        """Log and delete kept states, with the files that only they refer to. Raises DiskError."""
        with self.writing():
            snapshot = self.snapshot()
            rest = replace(snapshot, kept={i: m for i, m in snapshot.kept.items() if i not in states})
            leaving = [(i, m) for i, m in snapshot.kept.items() if i not in rest.retained()]
            self._folder.log.append(sorted(leaving, key=lambda state: state[1].sequence))
            self._folder.sweep(rest)

    def gc(self) -> list[str]:
        """Delete unreferenced files (docs/format.md); return their relative paths."""
        with self.writing():
            return [*self._folder.sweep_staging(), *self._folder.sweep(self.snapshot())]

    def _ready(self) -> None:
        """Make missing folders and check that the log can be appended to, with the lock held."""
        self._folder.make_folders()
        self._folder.log.check()

    # inside -----------------------------------------------------------------------------------------------------

    def _check_settings(self, settings: Settings, manifest: Manifest) -> None:
        """Raise ShelfConfigError if shelf.toml contradicts the content."""
        if faults := _contradictions(settings, manifest):
            path = self.path / FILE
            raise config_error(path, atomic.read_file(path).decode(), faults)

    def _advance(self, before: Snapshot, manifest: Manifest) -> str:
        """Write the manifest, move HEAD (this is the commit), then delete unreferenced files."""
        identity = self._folder.publish(manifest, before.manifest)
        self._lock.check()
        self._folder.move_head(identity)
        with contextlib.suppress(LorashelfError, OSError):  # committed nevertheless: the next writer sweeps again
            self._lock.check()
            self._folder.sweep(self.snapshot())
        if before.manifest.files.format < FORMAT:
            what = f"{self.path} now has format {FORMAT}, before it had {before.manifest.files.format}"
            _logger.warning("note: %s; an older lorashelf can no longer read it", what)
        return identity

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Delete what a failing commit has written."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(LorashelfError, OSError):
                self._lock.check()  # else the files may be another writer's
                self._folder.sweep_staging()
                self._folder.sweep(self.snapshot())
            raise


def _contradictions(settings: Settings, manifest: Manifest) -> list[tuple[str, str]]:
    """Return the settings that the content contradicts, as (key, sentence)."""
    faults = []
    need = max((slot.id + 1 for slot in manifest.slots), default=0)
    if settings.budget.slots is not None and settings.budget.slots < need:
        faults.append(("slots", f"slots is {settings.budget.slots}, but slot {need - 1} is filled: at least {need}"))
    stored = manifest.base.name if manifest.base and manifest.slots else ""
    if settings.base and stored and stored not in (settings.base, *settings.base_aliases):
        faults.append(("base", f"base is {settings.base!r}, but the adapters here are of {stored!r}"))
    return faults
