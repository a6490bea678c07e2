"""Creation of a shelf: where it may be, its first files, and how the folder appears whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import atomic
from ..errors import DiskError, LorashelfError, OverBudget, ShelfError
from ..version import VERSION
from .folder import FOLDERS, MANIFESTS
from .manifest import Clock, Manifest, stamp
from .settings import FILE, Settings, write_toml
from .snapshot import HEAD_BYTES


def check_vacant(path: Path) -> Path:
    """Return the folder of a new shelf, following a link to an empty folder. Raises ShelfError if it is taken."""
    folder = path.resolve()
    if not atomic.is_vacant(folder):
        raise _taken(path)
    if folder == Path.cwd():  # replacing it would leave the caller in a deleted folder
        cure = "give a new folder's name: lorashelf init NAME"
        raise ShelfError("this is the folder you are in", where=str(path), cure=cure)
    return folder


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a staged folder that gets its final name at the end. Raises ShelfError if the name is or becomes taken."""
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


def first_files(path: Path, settings: Settings, clock: Clock) -> Mapping[str, bytes]:
    """Return the files of an empty shelf, in the order of writing. Raises UsageError, OverBudget."""
    settings.checked()
    cause = {"operation": "init", "time": stamp(clock), "version": VERSION}
    first = Manifest(None, 0, settings.recipe, settings.budget.document(), cause).files
    written = write_toml(settings)
    empty, limit = HEAD_BYTES + len(first.root) + len(written), settings.budget.bytes
    if limit is not None and empty > limit:
        what = f"an empty shelf alone takes {empty} bytes, the budget is {limit}"
        raise OverBudget(what, where=str(path), cure="raise the budget (--bytes, budget.bytes)")
    return {FILE: written, f"{MANIFESTS}/{first.id}.json": first.root, "HEAD": f"{first.id}\n".encode()}


def fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a shelf into an empty folder. Raises DiskError."""
    for name in FOLDERS:
        atomic.make_folder(folder / name)
    for name, data in files.items():
        atomic.write_file(folder / name, [data])
    atomic.settle(folder / MANIFESTS)


def _taken(path: Path) -> ShelfError:
    cure = "choose another path, or delete this one; to change a shelf, use add"
    return ShelfError("this path already exists", where=str(path), cure=cure)
