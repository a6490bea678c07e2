"""Repair of the files of a shelf other than objects: manifests, HEAD, shelf.toml, the log; docs/format.md, "Repair".

An unreadable file is not deleted but renamed to NAME.damaged, except for manifests and pages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .. import atomic
from ..digest import canonical_json, digest
from ..errors import AdapterFormatError, CorruptShelf, NewerFormat, ShelfConfigError
from ..formats.objects import object_digest
from ..version import VERSION
from . import log
from .folder import MANIFESTS, OBJECTS, ShelfFolder
from .manifest import Manifest, now, stamp
from .pages import FOLDER as PAGES
from .pages import SUFFIX, Pages, compressed, page_path, read_page
from .salvage import Salvage, salvaged
from .settings import FILE, read_toml, recorded, write_toml
from .slot import Facts, Slot, StoredObject

LOST = "lost"
"""The operation recorded for a state of which only the sequence is known."""
NOT_WRITTEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors raised by reading a document of another shape."""


def mend(folder: Path) -> list[str]:
    """Repair them all, with the writer's lock held; return what was done, in sentences. Raises CorruptShelf if no
    manifest is left, NewerFormat, DiskError.
    """
    settings_lost = _settings_lost(folder / FILE)
    kept, torn, done = _manifests(folder)
    head, said = _mended_head(folder, kept, torn)
    done += said
    if settings_lost:
        done += _mended_settings(folder, kept[head])
    done += _mended_log(folder, head, kept, torn)
    for identity in torn:  # last: until then the log may lack their lines
        atomic.remove(folder / MANIFESTS / f"{identity}.json")
    return done


def _manifests(folder: Path) -> tuple[dict[str, Manifest], dict[str, Manifest], list[str]]:
    """Return the sound manifests, by id; what is left of those that lack pages; and what was done. A manifest is sound
    if its bytes match its id and its pages can be read. Other manifests, and damaged pages, are deleted; lost facts
    are computed again.
    """
    if not (folder / MANIFESTS).is_dir() or (folder / MANIFESTS).is_symlink():
        raise _nothing_left(folder)
    with atomic.refusals(folder / MANIFESTS, "read"):
        paths = sorted((folder / MANIFESTS).iterdir())
    found: dict[Path, Salvage | None] = {path: _manifest(folder, path) for path in paths}
    left = {path.stem: salvage for path, salvage in found.items() if salvage is not None}
    if not left:
        raise _nothing_left(folder)
    done = [f"{MANIFESTS}/{p.name}: damaged, deleted; its state is lost" for p, each in found.items() if each is None]
    for path in paths:
        if found[path] is None:
            atomic.remove(path)
    lost_facts = {identity: slot for salvage in left.values() for identity, slot in salvage.facts.items()}
    restored = {identity for identity, slot in lost_facts.items() if _restored_facts(folder, identity, slot)}
    for identity in sorted({*lost_facts, *(page for salvage in left.values() for page in salvage.lost)}):
        if identity in restored:
            done.append(f"{PAGES}/{identity}{SUFFIX}: computed again from the object")
        else:
            atomic.remove(page_path(folder, identity))
            done.append(f"{PAGES}/{identity}{SUFFIX}: damaged or gone")
    torn = {i: each.left for i, each in left.items() if each.lost or not restored.issuperset(each.facts)}
    sound = {i: each.manifest for i, each in left.items() if i not in torn}
    return sound, torn, done


def _restored_facts(folder: Path, identity: str, slot: Slot) -> bool:
    """Compute the facts of a slot's object again and write their page, if they have this id; they may have another one
    where another machine computed them. Raises DiskError.
    """
    pages, facts = Pages(), _facts(folder, slot)
    if facts is None or pages.add(facts.document()) != identity:
        return False
    path = page_path(folder, identity)
    atomic.remove(path)
    atomic.replace_file(path, compressed(pages[identity] or b""), folder / "tmp")
    return True


def _facts(folder: Path, slot: Slot) -> Facts | None:
    """Return the facts of a slot's object, None if it is damaged or in an unknown encoding."""

    def lost(what: str) -> CorruptShelf:
        return CorruptShelf(what, where=str(folder))

    with contextlib.suppress(AdapterFormatError, CorruptShelf, NewerFormat, FileNotFoundError, NotADirectoryError):
        files = slot.codec.paths(folder / OBJECTS, slot.object.names)
        atomic.no_links(*files)
        if object_digest(files) == slot.object.id:
            adapter = slot.codec.open(files, (), lost)
            facts = StoredObject.pending(adapter, slot.object.encoding).facts
            sums = slot.codec.encode(adapter).stored().sums
            return replace(facts, sums=sums) if isinstance(facts, Facts) else None
    return None


def _manifest(folder: Path, path: Path) -> Salvage | None:
    """Read what is left of a manifest; None for a file that is not one."""
    data = _bytes(path)
    if data is None or f"{digest([data])}.json" != path.name:
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


def _settings_lost(path: Path) -> bool:
    """Return whether the settings cannot be read. Raises NewerFormat, DiskError."""
    try:
        if not path.is_symlink():
            read_toml(path)
            return False
    except ShelfConfigError:
        pass
    return True


def _mended_settings(folder: Path, manifest: Manifest) -> list[str]:
    """Replace unreadable settings with those that the manifest recorded; return what was done."""
    path = folder / FILE
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
    taken = {past[identity].sequence: identity for identity in past}
    taken |= {kept[identity].sequence: identity for identity in reached}  # rather than others of the same sequence
    mended = {past[i].sequence: log.line(i, past[i]) for i in past if i not in reached and taken[past[i].sequence] == i}
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
