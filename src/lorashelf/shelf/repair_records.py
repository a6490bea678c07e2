"""Repair of the files of a shelf other than objects: manifests, HEAD, shelf.toml, the log; docs/format.md, "Repair".

An unreadable file is not deleted but renamed to NAME.damaged, except for manifests and pages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .. import atomic
from ..digest import canonical_json
from ..errors import CorruptShelf, ShelfConfigError
from ..version import VERSION
from . import log
from .folder import MANIFESTS, ShelfFolder
from .manifest import Manifest, manifest_id, now, salvaged, stamp
from .pages import FOLDER as PAGES
from .pages import SUFFIX, page_path, read_page
from .settings import FILE, read_toml, recorded, write_toml

LOST = "lost"
"""The operation recorded for a state of which only the sequence is known."""
NOT_WRITTEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors raised by reading a document of another shape."""


def mend(folder: Path) -> list[str]:
    """Repair them all, with the writer's lock held; return what was done, in sentences. Raises CorruptShelf if no
    manifest is left, NewerFormat, DiskError.
    """
    kept, torn, done = _manifests(folder)
    head, said = _mended_head(folder, kept, torn)
    for identity in torn:
        atomic.remove(folder / MANIFESTS / f"{identity}.json")
    return [*done, *said, *_mended_settings(folder, kept[head]), *_mended_log(folder, head, kept, torn)]


def _manifests(folder: Path) -> tuple[dict[str, Manifest], dict[str, Manifest], list[str]]:
    """Return the sound manifests, by id; what is left of those that lack pages; and what was done. A manifest is sound
    if its bytes match its id and its pages can be read. Other manifests, and damaged pages, are deleted.
    """
    if not (folder / MANIFESTS).is_dir() or (folder / MANIFESTS).is_symlink():
        raise _nothing_left(folder)
    with atomic.refusals(folder / MANIFESTS, "read"):
        paths = sorted((folder / MANIFESTS).iterdir())
    sound: dict[str, Manifest] = {}
    torn: dict[str, Manifest] = {}
    lacking: set[str] = set()
    done = []
    for path in paths:
        found = _manifest(folder, path)
        if found is None:
            done.append(f"{MANIFESTS}/{path.name}: damaged, deleted; its state is lost")
            continue
        manifest, lost = found
        (torn if lost else sound)[path.stem] = manifest
        lacking.update(lost)
    if not sound and not torn:
        raise _nothing_left(folder)
    for path in paths:
        if path.stem not in {**sound, **torn}:
            atomic.remove(path)
    for identity in sorted(lacking):
        atomic.remove(page_path(folder, identity))
        done.append(f"{PAGES}/{identity}{SUFFIX}: damaged or gone")
    return sound, torn, done


def _manifest(folder: Path, path: Path) -> tuple[Manifest, list[str]] | None:
    """Read what is left of a manifest, and the ids of its lost pages; None for a file that is not a manifest."""
    data = _bytes(path)
    if data is None or f"{manifest_id(data)}.json" != path.name:
        return None
    with contextlib.suppress(CorruptShelf, *NOT_WRITTEN):  # the name matches the bytes, but no writer made it
        return salvaged(data, str(path), lambda identity: read_page(folder, identity))
    return None


def _bytes(path: Path) -> bytes | None:
    """Read a file; None for a link or what cannot be read. Raises DiskError if permission is denied."""
    if path.is_symlink():
        return None
    try:
        return atomic.read_file(path)
    except PermissionError:
        with atomic.refusals(path, "read"):
            raise
    except OSError:
        return None


def _nothing_left(folder: Path) -> CorruptShelf:
    cure = "make a new shelf and add the adapters again: lorashelf init, lorashelf add"
    return CorruptShelf("no manifest of this shelf is left", where=str(folder), cure=cure)


def _mended_head(folder: Path, kept: dict[str, Manifest], torn: Mapping[str, Manifest]) -> tuple[str, list[str]]:
    """Repair HEAD; return the head and what was done. A head that lacks pages gets a successor with what is left, which
    is added to `kept`; a HEAD that does not name a manifest is set to the newest one.
    """
    path = folder / "HEAD"
    named = (_bytes(path) or b"").decode(errors="replace").strip()
    if named in kept:
        return named, []
    if path.is_dir() and not path.is_symlink():
        _set_aside(path)
    if named in torn or not kept:
        before = named if named in torn else _newest(torn)
        manifest = _successor(before, torn[before], kept)
        kept[ShelfFolder(folder).publish(manifest)] = manifest
        left = f"{len(manifest.tasks)} tasks are left"
        said = f"HEAD: set to a new manifest with what is left of {before[:15]}…; {left}"
    else:
        cause = kept[_newest(kept)].cause
        what = f"#{kept[_newest(kept)].sequence}, {cause.get('operation')} {cause.get('task', '')}".rstrip()
        said = f"HEAD: did not name a sound manifest; set to the newest, {_newest(kept)[:15]}… ({what})"
    head = _newest(kept)
    atomic.replace_file(path, f"{head}\n".encode(), folder / "tmp")
    return head, [said]


def _newest(manifests: Mapping[str, Manifest]) -> str:
    return max(manifests, key=lambda identity: manifests[identity].sequence)


def _successor(before: str, left: Manifest, kept: Mapping[str, Manifest]) -> Manifest:
    """Return the manifest after one that lacks pages, with what is left of it; undo leads to earlier kept manifests."""
    earlier = sorted((i for i in kept if kept[i].sequence < left.sequence), key=lambda i: -kept[i].sequence)
    return replace(
        left,
        parent=before,
        sequence=max(manifest.sequence for manifest in (left, *kept.values())) + 1,
        cause={"operation": "repair", "time": stamp(now), "version": VERSION},
        state=before,  # deleted next, so a reader takes the new manifest as the state
        undo=tuple(i for i in earlier if kept[i].state is None),
        redo=(),
        ended=(),
    )


def _mended_settings(folder: Path, manifest: Manifest) -> list[str]:
    """Replace unreadable settings with those that the manifest recorded; return what was done."""
    path = folder / FILE
    try:
        if not path.is_symlink():
            read_toml(path)
            return []
    except ShelfConfigError:
        pass
    aside = _set_aside(path)
    settings = recorded(manifest.recipe, manifest.budget)
    atomic.replace_file(path, write_toml(settings), folder / "tmp")
    return [f"{FILE}: rewritten from the manifest, without base and base_aliases{aside}"]


def _mended_log(folder: Path, head: str, kept: Mapping[str, Manifest], torn: Mapping[str, Manifest]) -> list[str]:
    """Repair the log; return what was done. Invalid lines are removed. A state with neither line nor manifest gets a
    line, as does a state that the head no longer reaches, whose manifest will be deleted.
    """
    path = folder / log.FILE
    data = _bytes(path) if path.exists() or path.is_symlink() else b""
    aside = _set_aside(path) if data is None else ""
    data = data or b""
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    newest, reached = kept[head].sequence, _chain(head, kept)
    past = {identity: manifest for identity, manifest in {**torn, **kept}.items() if manifest.sequence < newest}
    taken = {manifest.sequence: identity for identity, manifest in {**past, head: kept[head]}.items()}
    mended = {past[i].sequence: log.line(i, past[i]) for i in past if i not in reached}
    for line in lines:
        record = log.read_line(line)
        if record is None or not 0 <= record["sequence"] <= newest:
            continue
        if taken.setdefault(record["sequence"], record["id"]) == record["id"]:
            mended.setdefault(record["sequence"], line)
    lost = [number for number in range(newest + 1) if number not in taken]
    parents = {manifest.sequence - 1: manifest.parent for manifest in kept.values()}
    for number in lost:
        record = {"id": parents.get(number) or f"b2-{number:064d}", "operation": LOST, "sequence": number}
        mended[number] = canonical_json(record) + b"\n"
    after = [line for _, line in sorted(mended.items())]
    if not aside and {*lines} == {*after}:
        return []
    atomic.replace_file(path, b"".join(after), folder / "tmp")
    dropped, added = len({*lines} - {*after}), len({*after} - {*lines}) - len(lost)
    done = f"{dropped} damaged lines removed, {added} states recorded, {len(lost)} states marked as lost"
    return [f"{log.FILE}: {done}{aside}"]


def _chain(head: str, kept: Mapping[str, Manifest]) -> set[str]:
    """Return the ids of the head and its kept predecessors."""
    found = {head}
    while (parent := kept[head].parent) is not None and parent in kept:
        found.add(head := parent)
    return found


def _set_aside(path: Path) -> str:
    """Rename a path to NAME.damaged; return the end of a sentence that states the new name."""
    if not path.exists() and not path.is_symlink():
        return ""
    aside = path.with_name(f"{path.name}.damaged")
    atomic.remove(aside)
    atomic.publish(path, aside)
    return f"; the old one is now {aside.name}"
