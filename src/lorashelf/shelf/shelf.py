"""The shelf on disk: immutable objects and manifests, one HEAD whose replacement is the commit. docs/format.md is
normative.

Readers need no lock. A writer holds `lock`; killed at any point, the shelf opens at the old head or the new one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from .. import atomic
from ..atomic import no_links
from ..digest import is_digest
from ..errors import (
    CorruptShelf,
    DiskError,
    LorashelfError,
    NotReversible,
    OverBudget,
    ShelfError,
    ShelfNotFound,
    StaleShelf,
    UnknownName,
    UsageError,
)
from ..formats.codec import Codec
from ..formats.objects import Stored
from ..locks import WriterLock
from ..lora.adapter import Adapter
from ..version import VERSION
from . import log, repair_records
from .budget import check_budget
from .manifest import PENDING, PENDING_TIME, Manifest, Plan, Slot, manifest_id
from .settings import FILE, Settings, config_error, edited_toml, read_toml, write_toml
from .snapshot import HEAD_BYTES, Snapshot

LOCK_SECONDS = 10.0
_FOLDERS = ("manifests", "objects", "tmp")
Clock = Callable[[], datetime]
T = TypeVar("T")


def _now() -> datetime:
    return datetime.now(timezone.utc)


class Shelf:
    """A folder of at most K slots with its history; every change is one `commit`."""

    def __init__(self, path: str | Path, clock: Clock = _now) -> None:
        """Open an existing shelf. Raises ShelfNotFound, and on `snapshot` whatever is wrong with its content."""
        self.path = atomic.expanded(path)
        self._clock = clock
        self._history = log.History(self.path)
        self._lock = WriterLock(self.path / "lock")
        with atomic.refusals(self.path, "read"):
            found = (self.path / "HEAD").exists() or (self.path / "manifests").is_dir()
        if not found:
            cure = "lorashelf init SHELF --slots K makes one"
            raise ShelfNotFound("there is no shelf here", where=str(self.path), cure=cure)

    @classmethod
    def create(cls, path: str | Path, settings: Settings, clock: Clock = _now) -> Shelf:
        """Make an empty shelf; the folder appears whole or not at all. Raises UsageError, ShelfError if it exists,
        OverBudget if even an empty shelf exceeds `bytes`, DiskError.
        """
        path = atomic.expanded(path)
        files = _first_files(path, settings, clock)
        with _appearing(path) as staged:
            _fill(staged, files)
        return cls(path, clock)

    @classmethod
    def create_with(
        cls, path: str | Path, settings: Settings, planner: Callable[[Snapshot], Plan], clock: Clock = _now
    ) -> tuple[Snapshot, Plan]:
        """Make a shelf with the content that `planner` plans for it; it appears whole or not at all. Raises as `create`
        and `commit`.
        """
        path = atomic.expanded(path)
        files = _first_files(path, settings, clock)
        with _appearing(path) as staged:
            _fill(staged, files)
            shelf = cls(staged, clock)
            plan = planner(shelf.snapshot())
            shelf.commit(plan)
        return cls(path, clock).snapshot(), plan

    # reading ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The head, its manifest, the settings in force and the other kept manifests.

        Raises ShelfConfigError where shelf.toml contradicts the content, CorruptShelf, NewerFormat.
        """
        with atomic.refusals(self.path, "read"):
            while True:
                head, manifest = self._head()
                try:
                    return self._snapshot(head, manifest)
                except LorashelfError:
                    if self._named_by_head() == head:
                        raise  # else a writer was at work meanwhile

    def _snapshot(self, head: str, manifest: Manifest) -> Snapshot:
        no_links(self.path / FILE)
        settings = read_toml(self.path / FILE)
        self._check_settings(settings, manifest)
        kept: dict[str, Manifest] = {}
        chain, parent = [manifest], manifest.parent
        while parent is not None and (found := self._manifest(parent)) is not None:
            kept[parent] = found
            chain.append(found)
            parent = found.parent
        for each in chain:
            for identity in (each.state, *each.undo, *each.redo, *each.ended):
                if identity and identity not in kept and (found := self._manifest(identity)) is not None:
                    kept[identity] = found
        return Snapshot(self.path, head, manifest, settings, kept, read_at=head)

    def read(self, answer: Callable[[Snapshot], T]) -> T:
        """What `answer`, which only reads, makes of the present snapshot; of a new one where a commit deleted files of
        the first meanwhile. Raises as `snapshot` and `answer`.
        """
        while True:
            snapshot = self.snapshot()
            try:
                return answer(snapshot)
            except StaleShelf:
                if not snapshot.stale:
                    raise

    def log(self) -> list[dict[str, Any]]:
        """Every operation since the shelf was made, oldest first: {id, sequence, operation, time, version} and, where
        it has them, {task, decision, slot, to}. Lines of log.jsonl are under no hash.
        """
        snapshot = self.snapshot()
        with atomic.refusals(self.path, "read"):
            entries = {told["id"]: told for told in self._history.entries()}
        for identity, manifest in [*snapshot.kept.items(), (snapshot.head, snapshot.manifest)]:
            entries[identity] = log.entry(identity, manifest)
        return sorted(entries.values(), key=lambda entry: int(entry["sequence"]))

    def verify(self) -> list[str]:
        """Re-derive every hash from what is on disk; the problems found, in sentences. Changes nothing.

        Objects and manifests are hashed. log.jsonl and shelf.toml are not: the log is checked for states that are
        missing, the settings for what cannot be. Where a commit was made meanwhile, the new head is checked.
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
        """The problems of what must be there for a head; slots that are sound, or turn out to be, are read once."""
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
                problems += self._history.problems({snapshot.head: snapshot.manifest, **snapshot.kept})
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
        """Carry a plan out; returns the new head. A refused plan changes nothing and returns the old one.

        Raises StaleShelf if the head moved since the plan was made, OverBudget, DiskError; then the head stands.
        """
        with self.writing():
            snapshot = self.snapshot()
            if snapshot.head != plan.parent:
                cure = "make the plan again from a new snapshot"
                raise StaleShelf("the shelf changed since the plan was made", where=str(self.path), cure=cure)
            if plan.refused is not None:
                return snapshot.head
            if any(slot.object.id == PENDING and slot.id not in plan.writes for slot in plan.manifest.slots):
                raise StaleShelf("the plan goes on from one that was not committed", where=str(self.path))
            if not plan.shrinks:
                check_budget(snapshot, plan)
            self._sweep_staging()
            self._sweep(snapshot)  # what a killed writer half deleted must not pass for an object
            with self._nothing_left():
                objects = {
                    slot: self._store(x, plan.manifest.slot(slot).codec) for slot, x in sorted(plan.writes.items())
                }
                return self._advance(plan.sealed(objects, _stamp(self._clock)))

    def undo(self, to: str | None = None) -> str:
        """Commit the content of the state before (or of any kept manifest, by a prefix of its id) anew; returns the new
        head.

        As in an editor: n undos go n states back, `redo` goes forward, and a change ends what can be redone. Raises
        NotReversible where no earlier state is kept or its objects are gone, UnknownName, UsageError.
        """
        return self._restore("undo", to)

    def redo(self) -> str:
        """Commit the content that the latest undo left anew; returns the new head. Raises NotReversible."""
        return self._restore("redo")

    def _restore(self, operation: str, to: str | None = None) -> str:
        with self.writing():
            snapshot = self.snapshot()
            line = snapshot.timeline
            target = _next(snapshot, operation) if to is None else _find(snapshot, to)
            moved = line.moved(target, snapshot.keep)
            restored = replace(
                snapshot.kept[target],
                parent=snapshot.head,
                sequence=snapshot.manifest.sequence + 1,
                recipe=snapshot.settings.recipe,
                budget=snapshot.settings.budget.document(),
                cause={"operation": operation, "to": target, "time": _stamp(self._clock), "version": VERSION},
                state=target,
                undo=moved.undo,
                redo=moved.redo,
                ended=() if target in (*line.undo, *line.redo) else line.redo,
            )
            self._check_settings(snapshot.settings, restored)
            for slot in restored.slots:
                if not snapshot.slot_path(slot).is_dir():
                    raise NotReversible(f"the object of slot {slot.id} is gone", where=str(snapshot.slot_path(slot)))
            self._sweep_staging()
            with self._nothing_left():
                return self._advance(restored)

    def configure(self, changes: Mapping[str, Any]) -> Settings:
        """Change settings in shelf.toml, by the flat names that `new_settings` takes; None takes one out. What a person
        wrote around them stays. Raises UsageError naming every value that cannot be, and what contradicts the content.
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
                    faults.append(("bytes", f"bytes is {limit}, but the shelf takes {least}: at least that"))
            if faults:
                raise UsageError("; ".join(fault for _, fault in faults), where=str(path), cure="give other values")
            with atomic.refusals(path, "read"):
                edited = edited_toml(atomic.read_file(path).decode(), changes)
            self._lock.check()
            self._sweep_staging()
            atomic.replace_file(path, edited, self.path / "tmp")
            self._sweep(self.snapshot())
            return settings

    def mend(self) -> list[str]:
        """Put right what a shelf has beside its objects (see `repair_records.mend`); what was done, in sentences."""
        with self._lock.held(LOCK_SECONDS):
            self._make_folders()
            return repair_records.mend(self.path)

    def rewrite(self, adapters: Iterable[tuple[Adapter, Codec]]) -> None:
        """Write the objects of these adapters by their codecs where they are damaged or gone. Raises DiskError."""
        with self.writing():
            for adapter, codec in adapters:
                self._store(adapter, codec)

    def forget(self, states: Collection[str]) -> None:
        """Delete kept states, and what only they reach; the log keeps their lines. Raises DiskError."""
        with self.writing():
            snapshot = self.snapshot()
            rest = replace(snapshot, kept={i: m for i, m in snapshot.kept.items() if i not in states})
            leaving = [(i, m) for i, m in snapshot.kept.items() if i not in rest.retained()]
            self._history.append(sorted(leaving, key=lambda state: state[1].sequence))
            for identity in states:
                atomic.remove(self._manifest_path(identity))
            self._sweep(self.snapshot())

    def gc(self) -> list[str]:
        """Delete what nothing reaches (docs/format.md); the relative paths deleted."""
        with self.writing():
            return [*self._sweep_staging(), *self._sweep(self.snapshot())]

    def _ready(self) -> None:
        """With the lock held: the folders are there, and the log can be appended to."""
        self._make_folders()
        self._history.check()

    def _make_folders(self) -> None:
        """Archives drop empty ones."""
        for folder in _FOLDERS:
            no_links(self.path / folder)
            if not (self.path / folder).exists():
                atomic.make_folder(self.path / folder)

    # inside -----------------------------------------------------------------------------------------------------

    def _head(self) -> tuple[str, Manifest]:
        """Read HEAD and its manifest; a writer may retire them in between, so look again."""
        before = None
        while True:
            head = self._named_by_head()
            if is_digest(head) and (manifest := self._manifest(head)) is not None:
                return head, manifest
            if head == before:
                where, cure = str(self.path / "HEAD"), f"lorashelf repair {self.path}"
                raise CorruptShelf(f"HEAD says {head[:80]!r}, which is not a manifest here", where=where, cure=cure)
            before = head

    def _named_by_head(self) -> str:
        no_links(self.path / "HEAD", *(self.path / folder for folder in _FOLDERS))
        try:
            return atomic.read_file(self.path / "HEAD").decode().strip()
        except PermissionError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            where, cure = str(self.path / "HEAD"), f"lorashelf repair {self.path}"
            raise CorruptShelf(f"HEAD cannot be read: {error}", where=where, cure=cure) from error

    def _manifest_path(self, identity: str) -> Path:
        return self.path / "manifests" / f"{identity}.json"

    def _manifest(self, identity: str) -> Manifest | None:
        """The manifest of this id, None if it is not kept."""
        path = self._manifest_path(identity)
        no_links(path)
        try:
            data = atomic.read_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            cure = f"lorashelf repair {self.path}"
            raise CorruptShelf(f"manifest cannot be read: {error.strerror}", where=str(path), cure=cure) from error
        if manifest_id(data) != identity:
            cure = f"lorashelf repair {self.path}"
            raise CorruptShelf("the manifest was changed after it was written", where=str(path), cure=cure)
        return Manifest.decode(data, str(path))

    def _check_settings(self, settings: Settings, manifest: Manifest) -> None:
        """Raise ShelfConfigError where shelf.toml contradicts the content."""
        if faults := _contradictions(settings, manifest):
            path = self.path / FILE
            raise config_error(path, atomic.read_file(path).decode(), faults)

    def _store(self, adapter: Adapter, codec: Codec) -> Stored:
        with atomic.staging(self.path / "tmp") as staged:
            stored = codec.encode(adapter).write(staged)
            final = self.path / "objects" / stored.identity
            if self._is_sound(stored.identity, codec):
                atomic.remove(staged)
            else:
                if final.exists():
                    atomic.remove(final)
                atomic.publish(staged, final)
        return stored

    def _is_sound(self, identity: str, codec: Codec) -> bool:
        path = self.path / "objects" / identity
        try:
            return not path.is_symlink() and codec.digest(path) == identity
        except OSError:
            return False

    def _advance(self, manifest: Manifest) -> str:
        """Write the manifest, move HEAD (this is the commit), then delete what is out of reach."""
        data = manifest.encode()
        identity = manifest_id(data)
        Manifest.decode(data, str(self._manifest_path(identity)))  # nothing becomes the head that cannot be read again
        staged = self.path / "tmp" / f".{identity}.json"
        atomic.remove(staged)
        atomic.write_file(staged, [data])
        atomic.publish(staged, self._manifest_path(identity))
        self._lock.check()
        try:
            atomic.replace_file(self.path / "HEAD", f"{identity}\n".encode(), self.path / "tmp")
        except DiskError as error:
            if self._named_by_head() != identity:
                raise
            raise error.amended(  # the rename was done, what failed is to make it durable
                what=f"{error.what}; the commit stands, but a power cut may take it back",
                cure=f"check the disk, then lorashelf verify {self.path}",
            ) from error.__cause__
        with contextlib.suppress(LorashelfError, OSError):  # committed all the same: the next writer sweeps again
            self._lock.check()
            self._sweep(self.snapshot())
        return identity

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Take away what a commit that fails has written so far."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(LorashelfError, OSError):
                self._lock.check()  # else what lies there may be another writer's
                self._sweep_staging()
                self._sweep(self.snapshot())
            raise

    def _sweep_staging(self) -> list[str]:
        """Delete what a killed writer left in tmp/; the lock is held, so nobody else is writing there."""
        left = sorted((self.path / "tmp").iterdir())
        for path in left:
            atomic.remove(path)
        return [f"tmp/{path.name}" for path in left]

    def _sweep(self, snapshot: Snapshot) -> list[str]:
        """Log the manifests beyond `keep`, then delete what nothing reaches: manifests, then objects."""
        retained = snapshot.retained()
        leaving = list(snapshot.ancestors.items())[snapshot.keep :]
        if leaving:
            self._history.append(reversed(leaving))
        kept = {snapshot.head, *retained}
        reached = {slot.object.id for manifest in (snapshot.manifest, *retained.values()) for slot in manifest.slots}
        gone = []
        for path in sorted((self.path / "manifests").iterdir()):
            if path.name.removesuffix(".json") not in kept:
                atomic.remove(path)
                gone.append(f"manifests/{path.name}")
        if gone:  # before its objects go: a manifest that came back after a power cut would miss them
            atomic.settle(self.path / "manifests")
        for path in sorted((self.path / "objects").iterdir()):
            if path.name not in reached:
                atomic.remove(path)
                gone.append(f"objects/{path.name}")
        return gone


def _contradictions(settings: Settings, manifest: Manifest) -> list[tuple[str, str]]:
    """The settings that the content contradicts, as (key, sentence)."""
    faults = []
    need = max((slot.id + 1 for slot in manifest.slots), default=0)
    if settings.budget.slots < need:
        faults.append(("slots", f"slots is {settings.budget.slots}, but slot {need - 1} is filled: at least {need}"))
    stored = manifest.base.name if manifest.base and manifest.slots else ""
    if settings.base and stored and stored not in (settings.base, *settings.base_aliases):
        faults.append(("base", f"base is {settings.base!r}, but the adapters here are of {stored!r}"))
    return faults


def check_vacant(path: Path) -> Path:
    """Where a new shelf of this path lies; a link to an empty folder is followed. Raises ShelfError if it cannot lie
    there.
    """
    folder = path.resolve()
    if not atomic.is_vacant(folder):
        raise _taken(path)
    if folder == Path.cwd():  # it would be replaced under the caller's feet
        cure = "give a new folder's name: lorashelf init NAME"
        raise ShelfError("this is the folder you are in", where=str(path), cure=cure)
    return folder


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A staged folder that gets its final name at the end. Raises ShelfError if that is taken, also meanwhile."""
    folder = check_vacant(path)
    atomic.make_parents(folder)
    atomic.sweep_staging(folder.parent)
    with atomic.staging(folder.parent) as staged:
        try:
            yield staged
            atomic.publish(staged, folder)
        except LorashelfError as error:
            if isinstance(error, DiskError) and not atomic.is_vacant(folder):
                raise _taken(path) from error
            if str(staged) in (error.where or ""):
                raise error.amended(where=str(path)) from error.__cause__  # the path that the caller knows
            raise


def _first_files(path: Path, settings: Settings, clock: Clock) -> Mapping[str, bytes]:
    """The files of an empty shelf, in the order of writing. Raises UsageError, OverBudget."""
    settings.checked()
    cause = {"operation": "init", "time": _stamp(clock), "version": VERSION}
    first = Manifest(None, 0, settings.recipe, settings.budget.document(), cause).encode()
    written = write_toml(settings)
    empty, limit = HEAD_BYTES + len(first) + len(written), settings.budget.bytes
    if limit is not None and empty > limit:
        what = f"an empty shelf takes {empty} bytes already, the budget is {limit}"
        raise OverBudget(what, where=str(path), cure="raise the budget (--bytes, budget.bytes)")
    identity = manifest_id(first)
    return {FILE: written, f"manifests/{identity}.json": first, "HEAD": f"{identity}\n".encode()}


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put the files of a shelf into an empty folder. Raises DiskError."""
    for name in _FOLDERS:
        atomic.make_folder(folder / name)
    for name, data in files.items():
        atomic.write_file(folder / name, [data])
    atomic.settle(folder / "manifests")


def _taken(path: Path) -> ShelfError:
    cure = "choose another path, or delete what is there; add works on a shelf"
    return ShelfError("this path exists already", where=str(path), cure=cure)


def _next(snapshot: Snapshot, operation: str) -> str:
    """The state that an undo or a redo without --to leads to."""
    line = snapshot.timeline
    states = line.undo if operation == "undo" else line.redo
    if states:
        return states[0]
    where = str(snapshot.path)
    if operation == "redo":
        raise NotReversible("there is nothing to redo", where=where, cure="redo takes back an undo, until a change")
    if snapshot.manifest.sequence == 0:
        raise NotReversible("there is nothing to undo", where=where, cure="nothing was done on this shelf yet")
    cure = f"undo reaches {snapshot.keep} state(s) back; lorashelf set SHELF --keep N reaches further in future"
    raise NotReversible("no earlier state is kept", where=where, cure=cure)


def _find(snapshot: Snapshot, prefix: str) -> str:
    """The state that a kept manifest has, by a prefix of the manifest's id."""
    if not prefix:
        raise UsageError("the id of a kept manifest is empty", cure="give its beginning: lorashelf log SHELF")
    every = {**snapshot.kept, snapshot.head: snapshot.manifest}
    found = [identity for identity in every if identity.startswith(prefix)]
    if len(found) > 1:
        raise UsageError(f"{prefix!r} begins several kept manifests", cure=f"say more of it: {', '.join(found)}")
    if not found:
        raise UnknownName("kept manifest", prefix, list(every), where=str(snapshot.path))
    (identity,) = found
    own = every[identity].state
    state = own if own and own in snapshot.kept else identity
    if snapshot.timeline.state in (state, identity):
        raise UsageError(f"{identity} is the state that the shelf has", cure="name another one: lorashelf log SHELF")
    return state


def _stamp(clock: Clock) -> str:
    stamp = clock().astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return stamp if len(stamp) == len(PENDING_TIME) else PENDING_TIME
