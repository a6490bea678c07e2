"""The files of a shelf: HEAD, manifests, objects, staging; read, written and swept. The shelf holds the lock."""

from __future__ import annotations

from pathlib import Path

from .. import atomic
from ..atomic import no_links
from ..digest import is_digest
from ..errors import CorruptShelf, DiskError
from ..formats.codec import Codec
from ..formats.objects import Stored
from ..lora.adapter import Adapter
from . import log
from .manifest import Manifest, manifest_id
from .snapshot import Snapshot

FOLDERS = ("manifests", "objects", "tmp")


class ShelfFolder:
    """The folder of a shelf."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = log.History(path)

    def make_folders(self) -> None:
        """Archives drop empty ones."""
        for folder in FOLDERS:
            no_links(self.path / folder)
            if not (self.path / folder).exists():
                atomic.make_folder(self.path / folder)

    def head(self) -> tuple[str, Manifest]:
        """Read HEAD and its manifest; a writer may retire them in between, so look again."""
        before = None
        while True:
            head = self.named_by_head()
            if is_digest(head) and (manifest := self.manifest(head)) is not None:
                return head, manifest
            if head == before:
                where, cure = str(self.path / "HEAD"), f"lorashelf repair {self.path}"
                raise CorruptShelf(f"HEAD says {head[:80]!r}, which is not a manifest here", where=where, cure=cure)
            before = head

    def named_by_head(self) -> str:
        """What HEAD says. Raises CorruptShelf where it cannot be read."""
        no_links(self.path / "HEAD", *(self.path / folder for folder in FOLDERS))
        try:
            return atomic.read_file(self.path / "HEAD").decode().strip()
        except PermissionError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            where, cure = str(self.path / "HEAD"), f"lorashelf repair {self.path}"
            raise CorruptShelf(f"HEAD cannot be read: {error}", where=where, cure=cure) from error

    def manifest_path(self, identity: str) -> Path:
        """Where the manifest of this id lies."""
        return self.path / "manifests" / f"{identity}.json"

    def manifest(self, identity: str) -> Manifest | None:
        """The manifest of this id, None if it is not kept."""
        path = self.manifest_path(identity)
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

    def store(self, adapter: Adapter, codec: Codec) -> Stored:
        """Write an object, unless it is there and whole already. Raises DiskError."""
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

    def publish(self, manifest: Manifest) -> str:
        """Write a manifest; its id. Raises CorruptShelf for one that could not be read again, DiskError."""
        data = manifest.encode()
        identity = manifest_id(data)
        Manifest.decode(data, str(self.manifest_path(identity)))
        staged = self.path / "tmp" / f".{identity}.json"
        atomic.remove(staged)
        atomic.write_file(staged, [data])
        atomic.publish(staged, self.manifest_path(identity))
        return identity

    def move_head(self, identity: str) -> None:
        """Let HEAD name a manifest. Raises DiskError, which states whether the commit stands."""
        try:
            atomic.replace_file(self.path / "HEAD", f"{identity}\n".encode(), self.path / "tmp")
        except DiskError as error:
            if self.named_by_head() != identity:
                raise
            raise error.amended(  # the rename was done, what failed is to make it durable
                what=f"{error.what}; the commit stands, but a power cut may take it back",
                cure=f"check the disk, then lorashelf verify {self.path}",
            ) from error.__cause__

    def sweep_staging(self) -> list[str]:
        """Delete what a killed writer left in tmp/; the lock is held, so nobody else is writing there."""
        left = sorted((self.path / "tmp").iterdir())
        for path in left:
            atomic.remove(path)
        return [f"tmp/{path.name}" for path in left]

    def sweep(self, snapshot: Snapshot) -> list[str]:
        """Log the manifests beyond `keep`, then delete what nothing reaches: manifests, then objects."""
        retained = snapshot.retained()
        leaving = list(snapshot.ancestors.items())[snapshot.keep :]
        if leaving:
            self.history.append(reversed(leaving))
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
