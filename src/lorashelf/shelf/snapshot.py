"""A shelf at one moment, read: its slots' contents, its size, and whether a plan would fit."""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..atomic import no_links, read_file, refusals
from ..errors import AdapterFormatError, CorruptShelf, DiskError, StaleShelf, UnknownName
from ..execution import at_once
from ..formats.objects import Stored, known_digest, object_digest
from ..formats.safetensors import DAMAGED, Lost
from ..lora.adapter import Adapter
from ..lora.kernels import squared_norms_hold
from ..merging.average import Average
from .log import FILE as LOG
from .log import Log
from .manifest import PENDING_TIME, Manifest
from .pages import FOLDER as PAGES
from .pages import compressed, page_path, read_page
from .plan import Plan
from .settings import Settings
from .slot import NOTHING, PENDING, Facts, Slot
from .timeline import Timeline, timeline

HEAD_BYTES = 68  # a digest and a newline
_SWEPT = ("HEAD", LOG, "manifests", PAGES, "objects", "tmp")  # what a commit rewrites or sweeps


@dataclass(frozen=True)
class Snapshot:
    """A shelf as it was when read. It never changes, but its files may be deleted after `keep` further commits."""

    path: Path
    head: str
    manifest: Manifest
    settings: Settings
    kept: Mapping[str, Manifest]
    """The other manifests that are still kept: predecessors of the head, and where undo and redo lead."""
    pending: Mapping[int, Adapter] = field(default_factory=dict)
    """Contents of slots that are planned, not written: a dry run of several adds builds on them."""
    _served: dict[object, Adapter] = field(default_factory=dict, repr=False, compare=False)
    _glanced: dict[str, Adapter] = field(default_factory=dict, repr=False, compare=False)
    _known: dict[Adapter, Stored] = field(default_factory=dict, repr=False, compare=False)
    _walked: dict[Path, int] = field(default_factory=dict, repr=False, compare=False)
    read_at: str = ""
    """The id in HEAD when the shelf was read: the head, unless the head is planned."""

    @property
    def keep(self) -> int:
        """The most other states that undo and redo reach, and the number of commits for which a path stays readable."""
        return self.settings.budget.keep

    @property
    def base_names(self) -> frozenset[str]:
        """The names of the shelf's base model; none if it is unknown."""
        base, settings = self.manifest.base, self.settings
        return frozenset({base.name if base else "", settings.base or "", *settings.base_aliases} - {""})

    @property
    def ancestors(self) -> Mapping[str, Manifest]:
        """The kept predecessors of the head, nearest first."""
        found: dict[str, Manifest] = {}
        parent = self.manifest.parent
        while parent is not None and parent in self.kept:
            found[parent] = self.kept[parent]
            parent = found[parent].parent
        return found

    @property
    def timeline(self) -> Timeline:
        """Where undo and redo lead."""
        return timeline(self.head, self.manifest, self.kept, self.keep)

    @property
    def stale(self) -> bool:
        """Whether HEAD names another manifest now, so that files of this snapshot may be gone."""
        with contextlib.suppress(OSError, ValueError):
            return read_file(self.path / "HEAD").decode().strip() != self.read_at
        return False

    @contextlib.contextmanager
    def _standing(self) -> Iterator[None]:
        """Raise StaleShelf for a failure to read what a later commit may have deleted."""
        try:
            yield
        except (CorruptShelf, DiskError) as error:
            if not self.stale:
                raise
            cure = "run it again, or raise keep: lorashelf set SHELF --keep N"
            raise StaleShelf("the shelf changed while it was read", where=str(self.path), cure=cure) from error

    def slot_path(self, slot: Slot) -> Path:
        """Return the absolute path of a slot's object: the folder or last file. Raises CorruptShelf for a link."""
        *_, last = found = [self.path.absolute() / "objects" / name for name in slot.object.names]
        no_links(*found)
        return last

    def slot_files(self, slot: Slot) -> Sequence[Path]:
        """Return the absolute paths of the files of a slot's object. Raises CorruptShelf for a link."""
        paths = slot.codec.paths(self.slot_path(slot).parent, slot.object.names)
        no_links(*paths)
        return paths

    def adapter(self, task: str) -> Adapter:
        """Return the adapter that serves a task, the same one per object and snapshot. Raises UnknownName with the
        nearest names, and as `stored`.
        """
        slot, _ = self.located(task)
        key = _key(slot)
        if key not in self._served:
            self._served[key] = self.stored(slot)
        return self._served[key]

    def stored(self, slot: Slot) -> Adapter:
        """Return a slot's content as stored, read lazily. What is read is checked against the sums in the manifest; if
        there are none, all bytes are first checked against the id. Raises CorruptShelf, also on a later read.
        """
        if slot.id in self.pending:
            return self.pending[slot.id]
        adapter, known = self._opened(slot, slot.codec.open), self.facts(slot).squared_norms
        if len(known) == len(adapter.modules):
            adapter.modules.squared_norms = dict(zip(adapter.modules, known, strict=True))
        return adapter

    def glanced(self, slot: Slot) -> Adapter:
        """Return as `stored`, for shapes and rates of levels: values may be missing. Raises as `stored`."""
        if slot.id in self.pending:
            return self.pending[slot.id]
        if slot.object.id not in self._glanced:
            self._glanced[slot.object.id] = self._opened(slot, slot.codec.glance)
        return self._glanced[slot.object.id]

    def _opened(self, slot: Slot, read: Callable[[Sequence[Path], Sequence[int], Lost], Adapter]) -> Adapter:
        sums = self.facts(slot).sums
        if not sums and not slot.codec.self_checking:
            self.check_bytes(slot)
        with self._standing():
            with refusals(self.path, "read"):
                path, files = self.slot_path(slot), self.slot_files(slot)

            def lost(what: str) -> CorruptShelf:
                return self._corrupt([_damaged(slot, what)], path)

            try:
                return read(files, sums, lost)
            except AdapterFormatError as error:
                raise self._corrupt([_damaged(slot, "; ".join(error.faults))], path) from error

    def facts(self, slot: Slot) -> Facts:
        """Return the recorded facts of a slot's object; none if the page is damaged, so that the object is hashed."""
        if isinstance(slot.object.facts, Facts):
            return slot.object.facts
        with contextlib.suppress(CorruptShelf):
            return self._recorded(slot.object.facts)
        return NOTHING

    def _recorded(self, identity: str) -> Facts:
        """Read the facts on a page. Raises CorruptShelf."""
        try:
            return Facts.read(json.loads(read_page(self.path, identity)))
        except (ValueError, TypeError, AttributeError) as error:
            where = str(page_path(self.path, identity))
            what = f"the facts of an object cannot be read: {error}"
            raise CorruptShelf(what, where=where, cure=f"lorashelf repair {self.path}") from error

    def average(self, slot: Slot) -> Average:
        """Return the average from which the next fold starts: norm restoration divided out. Raises as `stored`."""
        average = Average(self.stored(slot), slot.history).plain
        if not average.noise_fits:
            raise self._corrupt([f"slot {slot.id}: the manifest's noise has another number of modules"], self.path)
        return average

    def located(self, task: str) -> tuple[Slot, Mapping[str, Any]]:
        """Return Θ(t), the slot of a task, and the task's details. Raises UnknownName with the nearest names."""
        task = unicodedata.normalize("NFC", task)  # as names are stored
        slot = self.manifest.slot_of(task)
        if slot is None:
            raise UnknownName("task", task, sorted(self.manifest.tasks), where=str(self.path))
        return slot, self.manifest.tasks[task]

    def check_bytes(self, *slots: Slot) -> None:
        """Raise CorruptShelf unless the stored bytes of these slots match the ids of their objects.

        An object is hashed once per process, and again if the times of its files have changed.
        """
        stored = [slot for slot in slots if slot.id not in self.pending]
        with self._standing():
            faults = {slot: fault for slot, fault in zip(stored, at_once(self._fault, stored), strict=True) if fault}
            if faults:
                where = self.slot_path(*faults) if len(faults) == 1 else self.path
                raise self._corrupt([*faults.values()], where)

    def _fault(self, slot: Slot, *, anew: bool = False) -> str | None:
        """Return the fault of the stored bytes of a slot, None if sound; hashed `anew`, or by a known digest."""
        with refusals(self.path, "read"):
            path, files = self.slot_path(slot), self.slot_files(slot)
            try:
                found = object_digest(files) if anew else known_digest(files)
            except PermissionError:
                raise
            except OSError as error:
                return _damaged(slot, f"{Path(error.filename or path).name} cannot be read: {error.strerror}")
        if found == slot.object.id:
            return None
        return _damaged(slot, "; ".join(slot.codec.damaged(files)) or DAMAGED)

    def _corrupt(self, faults: Sequence[str], where: Path) -> CorruptShelf:
        return CorruptShelf("; ".join(faults), where=str(where), cure=f"lorashelf repair {self.path}")

    def problems(self, slot: Slot) -> list[str]:
        """Return the faults of a slot's object, in sentences: its bytes, their number, the squared norms."""
        if not slot.readable:
            return [f"slot {slot.id} is not checked: the encoding {slot.object.encoding!r} needs a newer lorashelf"]
        try:
            if fault := self._fault(slot, anew=True):
                return [fault]
            if isinstance(slot.object.facts, str):
                self._recorded(slot.object.facts)
            files, adapter = self.slot_files(slot), self.stored(slot)
            with refusals(files[0], "read"):
                size = sum(file.stat().st_size for file in files)
            if size != slot.object.bytes:
                return [_damaged(slot, f"it has {size} bytes, the manifest records {slot.object.bytes}")]
            if self.facts(slot).squared_norms and not squared_norms_hold(adapter):
                return [_damaged(slot, "the squared norms recorded are not those of its values")]
        except (CorruptShelf, StaleShelf) as error:
            return [error.what]
        except DiskError as error:
            return [_damaged(slot, error.what)]
        return []

    def after(self, plan: Plan, *, hashed: bool = True) -> Snapshot:
        """Return the shelf as it would be after this plan; nothing is written. Plans made on it cannot be committed.
        Unless the new objects are `hashed`, the size is not exact.
        """
        if plan.refused is not None:
            return self
        manifest = plan.sealed(self._hashed(plan), PENDING_TIME) if hashed else plan.manifest
        pending = {**self.pending, **plan.writes}
        return replace(
            self,
            head=f"b2-{plan.manifest.sequence:064d}",  # no manifest's id, but as long as one
            manifest=manifest,
            kept={self.head: self.manifest, **self.kept},
            pending=pending,
            _served={},
            _known={x: self._known[x] for x in pending.values() if x in self._known},
        )

    @property
    def resting(self) -> int:
        """The bytes under the shelf after a sweep."""
        parts = _parts(self.manifest)
        return self._size(self._retained(parts), parts)

    def at_rest(self, plan: Plan, *, hashed: bool = True) -> int:
        """Return the bytes under the shelf after this plan is committed and unreferenced files are deleted.

        Exact if the new objects are `hashed`; otherwise an upper bound.
        """
        after, slack = self.after(plan, hashed=hashed), 0
        if not hashed:  # placeholders of digests and sums compress better than the real ones
            slack = sum(
                2 * len(PENDING) + 8 * len(_sums(slot)) for slot in plan.manifest.slots if slot.id in plan.writes
            )
        parts = _parts(after.manifest)
        return after._size(after._retained(parts), parts) + slack

    def _hashed(self, plan: Plan) -> Mapping[int, Stored]:
        """Return each object that a plan writes as it will be stored; hashed once."""
        for number, adapter in plan.writes.items():
            if adapter not in self._known:
                self._known[adapter] = plan.manifest.slot(number).codec.encode(adapter).stored()
        return {number: self._known[adapter] for number, adapter in plan.writes.items()}

    def retained(self) -> dict[str, Manifest]:
        """Return the manifests kept with the head, by id: where undo and redo lead, `keep` predecessors and, for `keep`
        commits, what could be redone before a change, if it fits into the bytes.
        """
        return self._retained(_parts(self.manifest))

    def _retained(self, parts: Mapping[object, int]) -> dict[str, Manifest]:
        limit, line = self.settings.budget.bytes, self.timeline
        recent = dict(islice(self.ancestors.items(), self.keep))
        reached = {i: self.kept[i] for i in (line.state, *line.undo, *line.redo) if i in self.kept}
        stay = {**recent, **reached}
        for manifest in (self.manifest, *recent.values()):
            for identity in manifest.ended:
                if identity in self.kept and identity not in stay:
                    more = {**stay, identity: self.kept[identity]}
                    if limit is None or self._size(more, parts) <= limit:
                        stay = more
        return stay

    def _size(self, stay: Mapping[str, Manifest], parts: Mapping[object, int]) -> int:
        """Return the bytes under a shelf with the head, these parts of its objects, and the states in `stay`."""
        leaving = list(self.ancestors.items())[self.keep :]
        states = {self.head: self.manifest, **stay}
        stored = {part: size for manifest in stay.values() for part, size in _parts(manifest).items()}
        pages = {identity: data for each in states.values() for identity, data in each.files.pages.items()}
        others = {name: size for name, size in self.files.items() if name.parts[0] not in _SWEPT}
        return (
            sum(others.values())
            + HEAD_BYTES
            + Log(self.path).size(leaving)
            + sum(len(manifest.files.root) for manifest in states.values())
            + sum(self._page_size(identity, data) for identity, data in pages.items())
            + sum({**stored, **parts}.values())
        )

    def _page_size(self, identity: str, data: bytes | None) -> int:
        """Return the bytes of a page's file, written or not."""
        return self.files.get(page_path(Path(), identity), 0 if data is None else len(compressed(data)))

    @property
    def bytes(self) -> int:
        """The bytes under the shelf."""
        return sum(self.files.values())

    @property
    def files(self) -> Mapping[Path, int]:
        """Relative path → size of every file under the shelf when first requested, except files that a writer deletes
        meanwhile.
        """
        if not self._walked:
            found: dict[Path, int] = {}
            for folder, _, names in os.walk(self.path):
                for name in names:
                    path = Path(folder) / name
                    with contextlib.suppress(FileNotFoundError):
                        found[path.relative_to(self.path)] = path.lstat().st_size
            self._walked.update(found)  # at once, for other threads
        return self._walked


def _parts(manifest: Manifest) -> dict[object, int]:
    """Return key → bytes of the parts of a manifest's objects; shared files count once."""
    parts: dict[object, int] = {}
    for slot in manifest.slots:
        parts.update(slot.object.files or [(_key(slot), slot.object.bytes)])
    return parts


def _key(slot: Slot) -> object:
    """Return a key that distinguishes objects, including those not written yet."""
    return slot.object.id if slot.object.id != PENDING else (slot.id, slot.history.merged)


def _damaged(slot: Slot, what: str) -> str:
    """Return a fault of a slot's object as a sentence with the tasks of the slot."""
    where = "its levels" if slot.object.files else f"objects/{slot.object.id}"
    return f"slot {slot.id}, {where}: {what}; tasks: {', '.join(slot.members)}"


def _sums(slot: Slot) -> Sequence[int]:
    """Return the sums in the record of a planned slot."""
    return slot.object.facts.sums if isinstance(slot.object.facts, Facts) else ()
