"""Repair of what a shelf has beside its objects: manifests, HEAD, shelf.toml, the log; docs/format.md, "Repair".

What cannot be read is not deleted but set aside as NAME.damaged, except for manifests, which are named by their bytes.
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
"""The operation of a state of which only the sequence is known."""
NOT_WRITTEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a document of another shape raises."""


def mend(folder: Path) -> list[str]:
    """Put all of it right; what was done, in sentences. The writer's lock is held. Raises CorruptShelf where no
    manifest is left, NewerFormat, DiskError.
    """
    kept, torn, done = _manifests(folder)
    head, said = _mended_head(folder, kept, torn)
    for identity in torn:
        atomic.remove(folder / MANIFESTS / f"{identity}.json")
    return [*done, *said, *_mended_settings(folder, kept[head]), *_mended_log(folder, head, kept, torn)]


def _manifests(folder: Path) -> tuple[dict[str, Manifest], dict[str, Manifest], list[str]]:
    """The manifests whose bytes are those they are named by and whose pages are there; what is left of those that lack
    pages; what was done: the others, and damaged pages, are deleted.
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
    """What is left of the manifest in a file, and the pages that are lost; None for a file that is not a manifest."""
    data = _bytes(path)
    if data is None or f"{manifest_id(data)}.json" != path.name:
        return None
    with contextlib.suppress(CorruptShelf, *NOT_WRITTEN):  # its name is right, but no writer made it
        return salvaged(data, str(path), lambda identity: read_page(folder, identity))
    return None


def _bytes(path: Path) -> bytes | None:
    """The content of a file; None for a link, for anything but a file, and if it cannot be read but by permission."""
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
    """The head, and what was done: one that lacks pages gets a successor of what is left, which is then kept as well;
    one that names no manifest is set to the newest that there is.
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
        said = f"HEAD: what is left of the manifest {before[:15]}… is written as a new one; {left}"
    else:
        cause = kept[_newest(kept)].cause
        what = f"#{kept[_newest(kept)].sequence}, {cause.get('operation')} {cause.get('task', '')}".rstrip()
        said = f"HEAD: named no sound manifest; the newest is {_newest(kept)[:15]}… ({what})"
    head = _newest(kept)
    atomic.replace_file(path, f"{head}\n".encode(), folder / "tmp")
    return head, [said]


def _newest(manifests: Mapping[str, Manifest]) -> str:
    return max(manifests, key=lambda identity: manifests[identity].sequence)


def _successor(before: str, left: Manifest, kept: Mapping[str, Manifest]) -> Manifest:
    """The manifest after one that lacks pages, with what is left of it; undo leads to the kept manifests before."""
    earlier = sorted((i for i in kept if kept[i].sequence < left.sequence), key=lambda i: -kept[i].sequence)
    return replace(
        left,
        parent=before,
        sequence=max(manifest.sequence for manifest in (left, *kept.values())) + 1,
        cause={"operation": "repair", "time": stamp(now), "version": VERSION},
        state=before,  # which goes, so that a reader takes the new manifest for the state
        undo=tuple(i for i in earlier if kept[i].state is None),
        redo=(),
        ended=(),
    )


def _mended_settings(folder: Path, manifest: Manifest) -> list[str]:
    """What was done: settings that cannot be read are those that the manifest recorded."""
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
    return [f"{FILE}: written anew as the manifest recorded it, without base and base_aliases{aside}"]


def _mended_log(folder: Path, head: str, kept: Mapping[str, Manifest], torn: Mapping[str, Manifest]) -> list[str]:
    """What was done: lines that are none are taken out, a state without a line or manifest gets one, and so does a
    state that the head does not reach any more, whose manifest will go.
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
        told = log.read_line(line)
        if told is None or not 0 <= told["sequence"] <= newest:
            continue
        if taken.setdefault(told["sequence"], told["id"]) == told["id"]:
            mended.setdefault(told["sequence"], line)
    lost = [number for number in range(newest + 1) if number not in taken]
    parents = {manifest.sequence - 1: manifest.parent for manifest in kept.values()}
    for number in lost:
        entry = {"id": parents.get(number) or f"b2-{number:064d}", "operation": LOST, "sequence": number}
        mended[number] = canonical_json(entry) + b"\n"
    after = [line for _, line in sorted(mended.items())]
    if not aside and {*lines} == {*after}:
        return []
    atomic.replace_file(path, b"".join(after), folder / "tmp")
    dropped, added = len({*lines} - {*after}), len({*after} - {*lines}) - len(lost)
    done = f"{dropped} damaged lines removed, {added} states recorded, {len(lost)} states marked as lost"
    return [f"{log.FILE}: {done}{aside}"]


def _chain(head: str, kept: Mapping[str, Manifest]) -> set[str]:
    """The head and its kept predecessors."""
    found = {head}
    while (parent := kept[head].parent) is not None and parent in kept:
        found.add(head := parent)
    return found


def _set_aside(path: Path) -> str:
    """Give what lies there another name; how it is called, for a sentence."""
    if not path.exists() and not path.is_symlink():
        return ""
    aside = path.with_name(f"{path.name}.damaged")
    atomic.remove(aside)
    atomic.publish(path, aside)
    return f"; what was there is {aside.name}"
