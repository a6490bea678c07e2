"""The files of a shelf: HEAD, manifests, pages, objects, staging; read, written, swept. `Shelf` holds the lock."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from functools import cache
from pathlib import Path

from .. import atomic
from ..atomic import no_links
from ..digest import digest, is_digest
from ..errors import CorruptShelf, DiskError
from ..formats.codec import Codec
from ..formats.objects import Stored
from ..lora.adapter import Adapter
from . import log
from .manifest import Manifest
from .pages import FOLDER as PAGES
from .pages import SUFFIX, Reader, compressed, page_path, read_page
from .snapshot import Snapshot

MANIFESTS, OBJECTS = "manifests", "objects"
FOLDERS = (MANIFESTS, PAGES, OBJECTS, "tmp")


class ShelfFolder:
    """The folder of a shelf."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = log.Log(path)

    def make_folders(self) -> None:
        """Make the missing folders: archives drop empty ones."""
        for folder in FOLDERS:
            no_links(self.path / folder)
            if not (self.path / folder).exists():
                atomic.make_folder(self.path / folder)

    def head(self, reader: Reader) -> tuple[str, Manifest]:
        """Read HEAD and its manifest, again if a writer moved HEAD in between. Raises CorruptShelf, NewerFormat."""
        before = None
        while True:
            head = self.named_by_head()
            if is_digest(head) and (manifest := self.manifest(head, reader)) is not None:
                return head, manifest
            if head == before:
                where, cure = str(self.path / "HEAD"), f"lorashelf repair {self.path}"
                raise CorruptShelf(f"HEAD names {head[:80]!r}, which is not a manifest here", where=where, cure=cure)
            before = head

    def named_by_head(self) -> str:
        """Read the id in HEAD. Raises CorruptShelf if HEAD cannot be read."""
        no_links(self.path / "HEAD", *(self.path / folder for folder in FOLDERS))
        try:
            return atomic.read_file(self.path / "HEAD").decode().strip()
        except PermissionError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            where, cure = str(self.path / "HEAD"), f"lorashelf repair {self.path}"
            raise CorruptShelf(f"HEAD cannot be read: {error}", where=where, cure=cure) from error

    def manifest_path(self, identity: str) -> Path:
        """Return the path of the manifest of this id."""
        return self.path / MANIFESTS / f"{identity}.json"

    def reader(self) -> Reader:
        """Return a reader of pages that reads each page once."""
        return cache(lambda identity: read_page(self.path, identity))

    def manifest(self, identity: str, reader: Reader) -> Manifest | None:
        """Read the manifest of this id with its pages; None if it is not kept. Raises CorruptShelf, NewerFormat."""
        path = self.manifest_path(identity)
        no_links(path)
        try:
            data = atomic.read_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            cure = f"lorashelf repair {self.path}"
            raise CorruptShelf(f"manifest cannot be read: {error.strerror}", where=str(path), cure=cure) from error
        if digest([data]) != identity:
            cure = f"lorashelf repair {self.path}"
            raise CorruptShelf("the manifest was changed after it was written", where=str(path), cure=cure)
        try:
            manifest = Manifest.decode(data, str(path), reader)
            for page, content in manifest.files.pages.items():
                if content is not None:  # perhaps cached from before the page was damaged
                    reader(page)
        except CorruptShelf:
            if not path.exists():  # a writer deletes a manifest before its pages
                return None
            raise
        return manifest

    def store(self, adapter: Adapter, codec: Codec) -> Stored:
        """Write the files of an object that are not there yet. Raises DiskError."""
        return codec.encode(adapter).publish(self.path / OBJECTS, self.path / "tmp")

    def publish(self, manifest: Manifest, before: Manifest | None = None) -> str:
        """Write a manifest, its new pages first; return its id. The pages of `before` were just read. Raises
        CorruptShelf for a manifest that could not be read back, DiskError.
        """
        files, path = manifest.files, self.manifest_path(manifest.files.id)
        pages = {identity: data for identity, data in files.pages.items() if data is not None}
        Manifest.decode(files.root, str(path), lambda identity: pages[identity])
        sound = before.files.pages if before else {}
        for identity, data in pages.items():
            if sound.get(identity) is None and not self._has(identity):
                atomic.place_file(page_path(self.path, identity), compressed(data), self.path / "tmp")
        atomic.settle(self.path / PAGES)
        atomic.place_file(path, files.root, self.path / "tmp")
        atomic.settle(self.path / MANIFESTS)
        return files.id

    def _has(self, identity: str) -> bool:
        """Return whether the page of this id exists and is sound."""
        with contextlib.suppress(CorruptShelf, OSError):
            return bool(read_page(self.path, identity))
        return False

    def move_head(self, identity: str) -> None:
        """Make HEAD name a manifest. Raises DiskError, which states whether the commit was made."""
        try:
            atomic.replace_file(self.path / "HEAD", f"{identity}\n".encode(), self.path / "tmp")
        except DiskError as error:
            if self.named_by_head() != identity:
                raise
            raise error.amended(  # the rename succeeded; making it durable failed
                what=f"{error.what}; the commit was made, but a power failure may undo it",
                cure=f"check the disk, then lorashelf verify {self.path}",
            ) from error.__cause__

    def sweep_staging(self) -> list[str]:
        """Delete what a killed writer left in tmp/; return the paths. The lock is held, so nobody else writes there."""
        left = sorted((self.path / "tmp").iterdir())
        for path in left:
            atomic.remove(path)
        return [f"tmp/{path.name}" for path in left]

    def sweep(self, snapshot: Snapshot) -> list[str]:
        """Log the manifests beyond `keep`, then delete unreferenced manifests, pages and objects; return the paths."""
        retained = snapshot.retained()
        leaving = list(snapshot.ancestors.items())[snapshot.keep :]
        if leaving:
            self.log.append(reversed(leaving))
        stay = {snapshot.head: snapshot.manifest, **retained}
        gone = self._deleted(MANIFESTS, {f"{identity}.json" for identity in stay})
        if gone:  # before their pages and objects: a power failure may bring a manifest back
            atomic.settle(self.path / MANIFESTS)
        pages = {f"{identity}{SUFFIX}" for manifest in stay.values() for identity in manifest.files.pages}
        objects = {name for manifest in stay.values() for slot in manifest.slots for name in slot.reserved}
        return [*gone, *self._deleted(PAGES, pages), *self._deleted(OBJECTS, objects)]

    def _deleted(self, folder: str, stay: Collection[str]) -> list[str]:
        """Delete the files of a folder with other names; return their relative paths."""
        gone = [path for path in sorted((self.path / folder).iterdir()) if path.name not in stay]
        for path in gone:
            atomic.remove(path)
        return [f"{folder}/{path.name}" for path in gone]
