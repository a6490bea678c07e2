"""The shelf on disk: immutable objects and manifests, one HEAD whose replacement is the commit. docs/format.md is
normative.

Readers need no lock. A writer holds `lock`; killed at any point, the shelf opens at the old head or the new one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import atomic, history, recipe
from .adapter import Adapter
from .atomic import no_links
from .digest import is_digest
from .errors import (
    CorruptShelf,
    DiskError,
    LorashelfError,
    NotReversible,
    OverBudget,
    ShelfError,
    ShelfLocked,
    ShelfNotFound,
    StaleShelf,
    UnknownName,
    UsageError,
)
from .manifest import PENDING, PENDING_TIME, Manifest, Plan, manifest_id
from .peft_format import write_files
from .recipe import Settings
from .snapshot import HEAD_BYTES, Snapshot, check_budget
from .version import VERSION

LOCK_SECONDS = 10.0
_FOLDERS = ("manifests", "objects", "tmp")
Clock = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(timezone.utc)


class Shelf:
    """A folder of at most K slots with its history; every change is one `commit`."""

    def __init__(self, path: str | Path, clock: Clock = _now) -> None:
        """Open an existing shelf. Raises ShelfNotFound, and on `snapshot` whatever is wrong with its content."""
        self.path = atomic.expanded(path)
        self._clock = clock
        self._history = history.History(self.path)
        self._lock: Any = None
        with atomic.refusals(self.path, "read"):
            found = (self.path / "HEAD").exists()
        if not found:
            cure = "lorashelf init SHELF --slots K makes one"
            raise ShelfNotFound("there is no shelf here", where=str(self.path), cure=cure)

    @classmethod
    def create(cls, path: str | Path, settings: Settings, clock: Clock = _now) -> Shelf:
        """Make an empty shelf; the folder appears whole or not at all. Raises UsageError, ShelfError if it exists,
        OverBudget if even an empty shelf exceeds `bytes`, DiskError.
        """
        path = atomic.expanded(path)
        settings.checked()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ShelfError("this path exists already", where=str(path), cure="choose another, or delete it")
        folder = path.resolve()  # a link to an empty folder is followed
        if folder == Path.cwd():  # it would be replaced under the caller's feet
            cure = "give a new folder's name: lorashelf init NAME"
            raise ShelfError("this is the folder you are in", where=str(path), cure=cure)
        cause = {"operation": "init", "time": _stamp(clock), "version": VERSION}
        first = Manifest(None, 0, settings.recipe.document(), settings.budget.document(), cause).encode()
        written = recipe.write_toml(settings)
        empty, limit = HEAD_BYTES + len(first) + len(written), settings.budget.bytes
        if limit is not None and empty > limit:
            what = f"an empty shelf takes {empty} bytes already, the budget is {limit}"
            raise OverBudget(what, where=str(path), cure="raise the budget (--bytes, budget.bytes)")
        atomic.make_parents(folder)
        with atomic.staging(folder.parent) as staged:
            for name in _FOLDERS:
                atomic.make_folder(staged / name)
            atomic.write_file(staged / recipe.FILE, [written])
            atomic.write_file(staged / "manifests" / f"{manifest_id(first)}.json", [first])
            atomic.settle(staged / "manifests")
            atomic.write_file(staged / "HEAD", [f"{manifest_id(first)}\n".encode()])
            atomic.publish(staged, folder)
        return cls(path, clock)

    @classmethod
    def create_with(
        cls, path: str | Path, settings: Settings, planner: Callable[[Snapshot], Plan], clock: Clock = _now
    ) -> tuple[Snapshot, Plan]:
        """Make a shelf with the content that `planner` plans for it; it appears whole or not at all. Raises as `create`
        and `commit`.
        """
        path = atomic.expanded(path)
        if path.exists():
            raise ShelfError("this path exists already", where=str(path), cure="choose another, or delete it")
        atomic.make_parents(path)
        with atomic.staging(path.parent) as staged:
            try:
                shelf = cls.create(staged, settings, clock)
                plan = planner(shelf.snapshot())
                shelf.commit(plan)
                atomic.publish(staged, path)
            except LorashelfError as error:
                if str(staged) in (error.where or ""):
                    error.where = str(path)  # what the caller knows
                raise
        return cls(path, clock).snapshot(), plan

    # reading ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The head, its manifest, the settings in force and the kept predecessors.

        Raises ShelfConfigError where shelf.toml contradicts the content, CorruptShelf, NewerFormat.
        """
        with atomic.refusals(self.path, "read"):
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        head, manifest = self._head()
        no_links(self.path / recipe.FILE)
        settings = recipe.read_toml(self.path / recipe.FILE)
        self._check_settings(settings, manifest)
        ancestors: dict[str, Manifest] = {}
        parent = manifest.parent
        while parent is not None and (found := self._manifest(parent)) is not None:
            ancestors[parent] = found
            parent = found.parent
        return Snapshot(self.path, head, manifest, settings, ancestors)

    def log(self) -> list[dict[str, Any]]:
        """Every operation since the shelf was made, oldest first: {id, sequence, operation, time, version} and, where
        it has them, {task, decision, slot, to}. Lines of log.jsonl are under no hash.
        """
        snapshot = self.snapshot()
        with atomic.refusals(self.path, "read"):
            entries = {told["id"]: told for told in self._history.entries()}
        for identity, manifest in [*snapshot.ancestors.items(), (snapshot.head, snapshot.manifest)]:
            entries[identity] = history.entry(identity, manifest)
        return sorted(entries.values(), key=lambda entry: int(entry["sequence"]))

    def verify(self) -> list[str]:
        """Re-derive every hash from what is on disk; the problems found, in sentences. Changes nothing.

        Objects and manifests are hashed. log.jsonl and shelf.toml are not: the log is checked for states that are
        missing, the settings for what cannot be.
        """
        problems: list[str] = []
        try:
            snapshot = self.snapshot()
        except (ShelfError, DiskError) as error:
            return [str(error)]
        checked: set[str] = set()
        for manifest in (snapshot.manifest, *snapshot.ancestors.values()):
            for slot in manifest.slots:
                if slot.object not in checked:
                    checked.add(slot.object)
                    problems += snapshot.problems(slot)
        try:
            with atomic.refusals(self.path, "read"):
                problems += self._history.problems({snapshot.head: snapshot.manifest, **snapshot.ancestors})
        except (ShelfError, DiskError) as error:
            problems.append(f"{error.what}; {error.where}; {error.cure}")
        return problems

    # writing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writer's lock; may be nested. Raises ShelfLocked after 10 seconds."""
        import filelock  # here: readers never need it, and it costs a third of the start

        no_links(self.path / "lock")
        self._lock = self._lock or filelock.FileLock(self.path / "lock", timeout=LOCK_SECONDS)
        with atomic.refusals(self.path / "lock"):
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                cure = "wait until the other writer is done, then try again"
                where = str(self.path / "lock")
                raise ShelfLocked("another writer holds this shelf", where=where, cure=cure) from error
        try:
            self._ready()
            yield
        finally:
            self._lock.release()

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
            if any(slot.object == PENDING and slot.slot not in plan.writes for slot in plan.manifest.slots):
                raise StaleShelf("the plan goes on from one that was not committed", where=str(self.path))
            if not plan.shrinks:
                check_budget(snapshot, plan)
            self._sweep_staging()
            self._sweep(snapshot)  # what a killed writer half deleted must not pass for an object
            with self._nothing_left():
                objects = {slot: self._store(adapter) for slot, adapter in sorted(plan.writes.items())}
                return self._advance(plan.sealed(objects, _stamp(self._clock)))

    def undo(self, to: str | None = None) -> str:
        """Commit the content of the head's parent (or of any kept manifest, by a prefix of its id) anew; returns the
        new head.

        Undoing an undo is redo. Raises NotReversible where the objects are gone, UnknownName.
        """
        with self.writing():
            snapshot = self.snapshot()
            target = _find(snapshot, to) if to else snapshot.manifest.parent
            if target is None or target not in snapshot.ancestors:
                cure = "raise budget.keep in shelf.toml to reach further back in future"
                raise NotReversible("the state before is not kept any more", where=str(self.path), cure=cure)
            content = snapshot.ancestors[target]
            cause = {"operation": "undo", "to": target, "time": _stamp(self._clock), "version": VERSION}
            restored = replace(
                content,
                parent=snapshot.head,
                sequence=snapshot.manifest.sequence + 1,
                recipe=snapshot.settings.recipe.document(),
                budget=snapshot.settings.budget.document(),
                cause=cause,
            )
            self._check_settings(snapshot.settings, restored)
            for slot in restored.slots:
                if not snapshot.slot_path(slot).is_dir():
                    raise NotReversible(f"the object of slot {slot.slot} is gone", where=str(snapshot.slot_path(slot)))
            self._sweep_staging()
            with self._nothing_left():
                return self._advance(restored)

    def gc(self) -> list[str]:
        """Delete what neither the head nor its kept predecessors reach; the relative paths deleted."""
        with self.writing():
            return [*self._sweep_staging(), *self._sweep(self.snapshot())]

    def _ready(self) -> None:
        """With the lock held: the folders are there (archives drop empty ones), and the log can be appended to."""
        for folder in _FOLDERS:
            no_links(self.path / folder)
            if not (self.path / folder).exists():
                atomic.make_folder(self.path / folder)
        self._history.check()

    # inside -----------------------------------------------------------------------------------------------------

    def _head(self) -> tuple[str, Manifest]:
        """Read HEAD and its manifest; a writer may retire them in between, so look again."""
        for _ in range(5):
            no_links(self.path / "HEAD", *(self.path / folder for folder in _FOLDERS))
            try:
                head = (self.path / "HEAD").read_text().strip()
            except PermissionError:
                raise
            except (OSError, UnicodeDecodeError) as error:
                where, cure = str(self.path / "HEAD"), "write the id of a file under manifests/ into HEAD"
                raise CorruptShelf(f"HEAD cannot be read: {error}", where=where, cure=cure) from error
            if is_digest(head) and (manifest := self._manifest(head)) is not None:
                return head, manifest
        where, cure = str(self.path / "HEAD"), "write the id of a file under manifests/ into HEAD"
        raise CorruptShelf(f"HEAD says {head[:80]!r}, which is no manifest here", where=where, cure=cure)

    def _manifest_path(self, identity: str) -> Path:
        return self.path / "manifests" / f"{identity}.json"

    def _manifest(self, identity: str) -> Manifest | None:
        """The manifest of this id, None if it is not kept."""
        path = self._manifest_path(identity)
        no_links(path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CorruptShelf(f"manifest cannot be read: {error.strerror}", where=str(path)) from error
        if manifest_id(data) != identity:
            cure = "restore the file; if HEAD names another one, it is history only and may be deleted"
            raise CorruptShelf("the manifest was changed after it was written", where=str(path), cure=cure)
        return Manifest.decode(data, str(path))

    def _check_settings(self, settings: Settings, manifest: Manifest) -> None:
        """Raise ShelfConfigError where shelf.toml contradicts the content."""
        faults = []
        need = max((slot.slot + 1 for slot in manifest.slots), default=0)
        if settings.budget.slots < need:
            faults.append(
                ("slots", f"slots is {settings.budget.slots}, but slot {need - 1} is filled: at least {need}")
            )
        stored = manifest.base.name if manifest.base else ""
        if settings.base and stored and stored not in (settings.base, *settings.base_aliases):
            faults.append(("base", f"base is {settings.base!r}, but the adapters here are of {stored!r}"))
        if faults:
            path = self.path / recipe.FILE
            raise recipe.config_error(path, path.read_text(), faults)

    def _store(self, adapter: Adapter) -> str:
        with atomic.staging(self.path / "tmp") as staged:
            identity = write_files(adapter, staged)
            final = self.path / "objects" / identity
            if final.exists():
                atomic.remove(staged)
            else:
                atomic.publish(staged, final)
        return identity

    def _advance(self, manifest: Manifest) -> str:
        """Write the manifest, move HEAD (this is the commit), then delete what is out of reach."""
        data = manifest.encode()
        identity = manifest_id(data)
        Manifest.decode(data, str(self._manifest_path(identity)))  # nothing becomes the head that cannot be read again
        staged = self.path / "tmp" / f".{identity}.json"
        atomic.remove(staged)
        atomic.write_file(staged, [data])
        atomic.publish(staged, self._manifest_path(identity))
        atomic.replace_file(self.path / "HEAD", f"{identity}\n".encode(), self.path / "tmp")
        with contextlib.suppress(LorashelfError, OSError):  # committed all the same: the next writer sweeps again
            self._sweep(self.snapshot())
        return identity

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Take away what a commit that fails has written so far."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(LorashelfError, OSError):
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
        """Log and delete manifests beyond `keep`, then objects that the rest does not reach."""
        chain = list(snapshot.ancestors.items())
        window = [(snapshot.head, snapshot.manifest), *chain[: snapshot.settings.budget.keep]]
        kept = {identity for identity, _ in window}
        reached = {slot.object for _, manifest in window for slot in manifest.slots}
        gone = []
        leaving = chain[snapshot.settings.budget.keep :]
        if leaving:
            self._history.append(reversed(leaving))
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


def _find(snapshot: Snapshot, prefix: str) -> str:
    found = [identity for identity in snapshot.ancestors if identity.startswith(prefix)]
    if len(found) > 1:
        raise UsageError(f"{prefix!r} begins several kept manifests", cure=f"say more of it: {', '.join(found)}")
    if not found:
        raise UnknownName("kept manifest", prefix, list(snapshot.ancestors), where=str(snapshot.path))
    return found[0]


def _stamp(clock: Clock) -> str:
    stamp = clock().astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return stamp if len(stamp) == len(PENDING_TIME) else PENDING_TIME
