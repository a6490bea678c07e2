"""Repair: whatever was damaged, the shelf is sound afterwards, and what could be restored is restored to the bit."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crash.disk import in_memory, watched
from factory import make_adapter, write_peft
from lorashelf import (
    Adapter,
    BaseId,
    Clustering,
    Shelf,
    new_settings,
    plan_add,
    plan_cluster,
    plan_remove,
    plan_update,
    read_adapter,
)
from lorashelf.digest import digest
from lorashelf.errors import CorruptShelf, DiskError, NewerFormat, NotReversible, ShelfNotFound
from lorashelf.shelf import pages
from lorashelf.shelf.packing import plan_pack
from lorashelf.shelf.repair import repair
from manifests import forged, manifest, page, page_of, put, written
from test_attacks import command, state

A, B, C, D = (make_adapter(seed, rank=2, layers=1) for seed in range(4))
NAMED = {"a": A, "b": B, "c": C, "d": D}


def filled(path: Path, *tasks: str, slots: int = 1, keep: int = 1, **options: Any) -> Shelf:
    shelf = Shelf.create(path, new_settings(slots, policy=options.pop("policy", "kmerge"), keep=keep, **options))
    for task in tasks:
        shelf.commit(plan_add(shelf.snapshot(), NAMED[task], task))
    return shelf


def tensors(shelf: Shelf, slot: int = 0) -> Path:
    return shelf.snapshot().slot_path(shelf.snapshot().manifest.slot(slot)) / "adapter_model.safetensors"


def flip(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def files(shelf: Shelf) -> dict[str, bytes]:
    return {str(p.relative_to(shelf.path)): p.read_bytes() for p in shelf.path.rglob("*") if p.is_file()}


def given(*tasks: str) -> dict[str, Adapter]:
    return {task: NAMED[task] for task in tasks}


def how(report: dict[str, Any]) -> list[tuple[str, list[str], list[str]]]:
    return [(slot["how"], slot["tasks"], slot["unrouted"]) for slot in report["slots"]]


# slots ---------------------------------------------------------------------------------------------------------------


def clustered(path: Path, **options: Any) -> Shelf:
    all_in_one = Clustering((("a", "b", "c"),), "single")
    Shelf.create_with(
        path, new_settings(1, **options), lambda snapshot: plan_cluster(snapshot, given("a", "b", "c"), all_in_one)
    )
    return Shelf(path)


MAKERS: dict[str, Callable[[Path], Shelf]] = {
    "one adapter": lambda path: filled(path, "a"),
    "one adapter in f16": lambda path: filled(path, "a", dtype="f16"),
    "one adapter cut": lambda path: filled(path, "a", rank=1),
    "two folded": lambda path: filled(path, "a", "b"),
    "three folded": lambda path: filled(path, "a", "b", "c"),
    "folded in f16": lambda path: filled(path, "a", "b", "c", dtype="f16"),
    "folded and cut": lambda path: filled(path, "a", "b", "c", rank=2),
    "folded by factor_mean": lambda path: filled(path, "a", "b", "c", merge="factor_mean"),
    "folded by svd": lambda path: filled(path, "a", "b", "c", merge="svd"),
    "folded by ties": lambda path: filled(path, "a", "b", "c", merge="ties"),
    "folded by a drawn method": lambda path: filled(path, "a", "b", merge="dare_linear", seed=3),
    "folded by halves": lambda path: filled(path, "a", "b", "c", policy="half"),
    "norms restored": lambda path: filled(path, "a", "b", "c", restore_norm=True),
    "clustered": clustered,
    "clustered by ties": lambda path: clustered(path, merge="ties"),
}


@pytest.mark.parametrize("damage", [flip, os.unlink, lambda path: os.truncate(path, 90)], ids=["bit", "gone", "cut"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_slot_is_restored_to_the_bit_from_all_its_originals(
    name: str, damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    shelf = MAKERS[name](tmp_path / "a.shelf")
    before, members = files(shelf), list(shelf.snapshot().manifest.slots[0].members)
    damage(tensors(shelf))
    assert shelf.verify() != []
    report = repair(shelf, given(*members))
    assert how(report) == [("rewritten", members, [])]
    assert files(shelf) == before
    assert repair(shelf) == {"head": report["head"], "files": [], "slots": [], "states": [], "unused": []}


def test_an_object_that_took_the_others_base_is_restored_to_the_bit(tmp_path: Path) -> None:
    originals = {"a": make_adapter(0), "b": replace(make_adapter(1), base=BaseId())}
    settings = new_settings(None, bytes=10**6, floor=0.1)
    Shelf.create_with(tmp_path / "s", settings, lambda snapshot: plan_pack(snapshot, originals))
    shelf = Shelf(tmp_path / "s")
    before = {path: path.read_bytes() for path in (shelf.path / "objects").rglob("*") if path.is_file()}
    for path in before:
        os.truncate(path, 20)
    report = repair(shelf, originals)
    assert {entry["how"] for entry in report["slots"]} == {"rewritten"}
    assert {path: path.read_bytes() for path in before} == before


def test_a_slot_is_restored_to_the_bit_from_a_kept_state_and_what_was_folded_in_since(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c")
    before = files(shelf)
    flip(tensors(shelf))
    report = repair(shelf, given("c"))
    assert how(report) == [("rewritten", ["a", "b", "c"], [])]
    assert report["slots"][0]["state"] == shelf.snapshot().manifest.parent
    assert report["slots"][0]["given"] == ["c"]
    assert files(shelf) == before


def test_without_originals_a_slot_goes_back_to_a_kept_state_and_serves_the_tasks_of_then(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c")
    earlier = shelf.snapshot().ancestors[shelf.snapshot().manifest.parent].slots[0]
    flip(tensors(shelf))
    report = repair(shelf)
    assert how(report) == [("earlier", ["a", "b"], ["c"])]
    snapshot = shelf.snapshot()
    assert shelf.verify() == []
    assert sorted(snapshot.manifest.tasks) == ["a", "b"]
    assert snapshot.manifest.slots[0] == earlier
    assert snapshot.manifest.cause["operation"] == "repair"
    assert [entry["operation"] for entry in shelf.log()] == ["init", "add", "add", "add", "repair"]
    shelf.commit(plan_add(snapshot, C, "c"))
    assert shelf.verify() == []


def test_undo_after_a_repair_leads_to_sound_states_only(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", keep=3)
    flip(tensors(shelf))
    two, one = list(shelf.snapshot().ancestors)[:2]
    repair(shelf)
    assert shelf.snapshot().timeline.undo[:2] == (two, one)
    for expected in (two, one):
        shelf.undo()
        assert shelf.snapshot().timeline.state == expected
        assert shelf.verify() == []
    shelf.redo()
    shelf.redo()
    assert sorted(shelf.snapshot().manifest.tasks) == ["a", "b"]
    assert shelf.verify() == []


def test_what_nothing_sound_is_left_of_is_unrouted_and_the_rest_stays(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", slots=2)
    kept = shelf.snapshot().manifest.slot(1)
    flip(tensors(shelf))
    report = repair(shelf)
    assert how(report) == [("none", [], ["a"])]
    assert shelf.snapshot().manifest.slots == (kept,)
    assert list(shelf.snapshot().manifest.tasks) == ["b"]
    assert shelf.snapshot().kept == {}
    assert shelf.verify() == []
    shelf.commit(plan_add(shelf.snapshot(), A, "a"))
    assert shelf.snapshot().manifest.slot_of("a").id == 0


def test_of_some_originals_their_tasks_are_served(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", keep=0)
    flip(tensors(shelf))
    report = repair(shelf, given("a", "c"))
    assert how(report) == [("merged", ["a", "c"], ["b"])]
    assert shelf.verify() == []
    assert [m.task for m in shelf.snapshot().manifest.slots[0].history.merged] == ["a", "c"]
    assert shelf.snapshot().manifest.slots[0].history.method == "linear"


def test_after_an_exact_removal_and_an_update_the_originals_are_merged_anew(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", keep=0)
    shelf.commit(plan_remove(shelf.snapshot(), "b", B))
    shelf.commit(plan_update(shelf.snapshot(), "c", D, C))
    flip(tensors(shelf))
    report = repair(shelf, {"a": A, "c": D})
    assert how(report) == [("merged", ["a", "c"], [])]
    assert shelf.verify() == []
    shelf.commit(plan_remove(shelf.snapshot(), "a", A))


def test_a_kept_state_that_is_damaged_is_restored_or_no_longer_kept(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", keep=3)
    older = shelf.snapshot().ancestors[shelf.snapshot().manifest.parent].slots[0]
    before = files(shelf)
    damaged = shelf.path / "objects" / older.object.id / "adapter_model.safetensors"
    flip(damaged)
    head = shelf.snapshot().head
    assert repair(shelf, given("a", "b"))["states"] == []
    assert files(shelf) == before
    flip(damaged)
    report = repair(shelf)
    assert (report["head"], report["slots"], len(report["states"])) == (head, [], 1)
    assert shelf.verify() == []
    assert len(shelf.log()) == 4


def test_another_adapter_than_a_tasks_own_is_refused_and_one_that_is_not_on_the_shelf_not_used(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b")
    flip(tensors(shelf))
    before = files(shelf)
    with pytest.raises(NotReversible, match="this is not the adapter of 'a'"):
        repair(shelf, {"a": D})
    assert files(shelf) == before
    assert repair(shelf, {"b": B, "d": D})["unused"] == ["d"]


def test_interrupted_at_any_call_a_repair_is_done_by_the_next(tmp_path: Path) -> None:
    with in_memory(tmp_path) as room:
        base = filled(room / "base" / "a.shelf" if (room / "base").mkdir() is None else room, "a", "b", "c")
        flip(tensors(base))
        (base.path / "HEAD").write_text("garbage\n")
        shutil.copytree(room / "base", room / "whole")
        with watched(room / "whole") as watcher:
            report = repair(Shelf(room / "whole" / "a.shelf"))
        assert how(report) == [("earlier", ["a", "b"], ["c"])]
        for number in range(len(watcher.calls)):
            root = shutil.copytree(room / "base", room / str(number))

            def before(count: int, name: str, arguments: tuple[Any, ...], last: int = number) -> None:
                if count >= last:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt), watched(root, before=before):
                repair(Shelf(root / "a.shelf"))
            shelf = Shelf(root / "a.shelf")
            repair(shelf)
            assert shelf.verify() == []
            assert sorted(shelf.snapshot().manifest.tasks) == ["a", "b"]


# files ---------------------------------------------------------------------------------------------------------------


def link(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to("elsewhere")


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "garbage": lambda path: path.write_bytes(b"\xff{[garbage\n"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": os.unlink,
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
    "a link": link,
    "a bit": lambda path: flip(path, 12),
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
}


PLACES: dict[str, Callable[[Shelf], Path]] = {
    "HEAD": lambda shelf: shelf.path / "HEAD",
    "shelf.toml": lambda shelf: shelf.path / "shelf.toml",
    "log.jsonl": lambda shelf: shelf.path / "log.jsonl",
    "the manifest": lambda shelf: shelf.path / "manifests" / f"{shelf.snapshot().head}.json",
    "a page of slots": lambda shelf: page_of(shelf.path, "slots"),
    "a page of tasks": lambda shelf: page_of(shelf.path, "tasks"),
    "a page of facts": lambda shelf: page_of(shelf.path, "facts"),
    "the manifest before": lambda shelf: shelf.path / "manifests" / f"{shelf.snapshot().manifest.parent}.json",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", PLACES)
def test_every_file_is_put_right(place: str, damage: str, tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", slots=2)
    path, content = PLACES[place](shelf), shelf.snapshot().manifest
    DAMAGE[damage](path)
    damaged = Shelf(shelf.path).verify()
    report = repair(Shelf(shelf.path))
    assert shelf.verify() == []
    now = shelf.snapshot().manifest
    if place == "the manifest":
        assert sorted(now.tasks) == ["a", "b"]
    elif place == "a page of slots":
        assert not now.tasks
    elif place == "a page of tasks":
        assert now.tasks == content.tasks
        assert [slot.document() for slot in now.slots] == [slot.document() for slot in content.slots]
    else:
        assert now == content
    assert report["slots"] == []
    assert bool(report["files"]) or not damaged
    assert [entry["sequence"] for entry in shelf.log()] == list(range(now.sequence + 1))
    assert repair(shelf)["files"] == []
    shelf.commit(plan_add(shelf.snapshot(), D, "d"))
    assert shelf.verify() == []


def test_settings_are_those_recorded_and_the_old_text_is_set_aside(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", slots=3, merge="ties", keep=4)
    text = (shelf.path / "shelf.toml").read_text().replace("[budget]", "[budget")
    (shelf.path / "shelf.toml").write_text(text)
    (sentence,) = repair(shelf)["files"]
    assert "shelf.toml.damaged" in sentence
    assert (shelf.path / "shelf.toml.damaged").read_text() == text
    settings = shelf.snapshot().settings
    assert (settings.budget.slots, settings.budget.keep, settings.merge.method) == (3, 4, "ties")


def test_a_state_of_which_nothing_is_left_stands_in_the_log_as_lost(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", slots=3)
    (shelf.path / "log.jsonl").write_bytes(b"")
    repair(shelf)
    assert [(entry["sequence"], entry["operation"]) for entry in shelf.log()] == [
        (0, "lost"),
        (1, "lost"),
        (2, "add"),
        (3, "add"),
    ]


def test_without_any_manifest_nothing_is_changed_and_a_later_format_is_left_alone(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a")
    for path in (shelf.path / "manifests").iterdir():
        flip(path, 30)
    before = state(tmp_path)
    with pytest.raises(CorruptShelf, match="no manifest of this shelf is left"):
        repair(shelf)
    assert state(tmp_path) == before
    other = filled(tmp_path / "b.shelf", "a")
    (other.path / "shelf.toml").write_text("format = 3\n")
    before = state(tmp_path)
    with pytest.raises(NewerFormat):
        repair(other)
    assert state(tmp_path) == before
    (other.path / "HEAD").write_text("damaged\n")
    before = state(tmp_path)
    with pytest.raises(NewerFormat):
        repair(other)
    assert state(tmp_path) == before
    with pytest.raises(ShelfNotFound):
        Shelf(tmp_path / "none")


def test_lost_facts_are_computed_again_and_no_state_is_lost(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", slots=3, keep=3)
    before, facts = shelf.snapshot(), page_of(shelf.path, "facts")
    content = gzip.decompress(facts.read_bytes())
    facts.unlink()
    assert repair(shelf)["files"] == [f"pages/{facts.name}: computed again from the object"]
    assert gzip.decompress(facts.read_bytes()) == content
    after = shelf.snapshot()
    assert (after.head, after.timeline) == (before.head, before.timeline)


def test_facts_that_another_machine_computed_are_lost_but_not_their_slot(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", slots=2, keep=3)
    forged(shelf.path, lambda document: [slot.pop("squared_norms") for slot in document["slots"]])
    page_of(shelf.path, "facts").unlink()
    assert "a new manifest with what is left" in repair(shelf)["files"][-2]
    assert shelf.verify() == []
    assert sorted(shelf.snapshot().manifest.tasks) == ["a", "b"]
    assert not shelf.snapshot().facts(shelf.snapshot().manifest.slot(0)).sums


def test_no_task_of_forty_in_one_slot_is_lost_with_a_page_of_sources(tmp_path: Path) -> None:
    adapters = {f"t{seed:02d}": make_adapter(seed, rank=2, layers=1) for seed in range(40)}
    shelf = Shelf.create(tmp_path / "a.shelf", new_settings(1, policy="kmerge"))
    clustering = Clustering((tuple(adapters),), method="type", seed=0)
    shelf.commit(plan_cluster(shelf.snapshot(), adapters, clustering))
    sources = page(shelf.path, manifest(shelf.path)["slots"][0])[0]["merged"]
    (shelf.path / "pages" / f"{sources[0]}.json.gz").unlink()
    repair(shelf)
    assert shelf.verify() == []
    now = shelf.snapshot().manifest
    assert {task: details["digest"] for task, details in now.tasks.items()} == {
        t: x.digest for t, x in adapters.items()
    }
    assert 0 < len(now.slot(0).history.merged) < 40
    assert now.slot(0).history.fixed == "a part of the record of what was merged is lost"


@pytest.mark.parametrize("name", ["../../victim", "aaa", "b2-" + "0" * 63 + "/", 7, None])
@pytest.mark.parametrize("place", ["slots", "tasks", "merged", "facts"])
def test_an_id_that_does_not_name_a_page_leads_nowhere(tmp_path: Path, place: str, name: Any) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", slots=2)
    victim = tmp_path / "victim.json.gz"
    victim.write_bytes(b"not a page")
    document, before = manifest(shelf.path), shelf.snapshot()
    if place in ("slots", "tasks"):
        document[place] = [name]
    else:
        records = page(shelf.path, document["slots"][0])
        records[0][place] = [name] if place == "merged" else name
        document["slots"][0] = put(shelf.path, records)
    written(shelf.path, document)
    with pytest.raises(CorruptShelf):
        shelf.snapshot()
    repair(shelf)
    assert victim.read_bytes() == b"not a page"
    assert shelf.snapshot().head == before.head
    assert shelf.verify() == []


@pytest.mark.parametrize("data", [b"[" * 100_000, b"{}", b"[7]", b'[{"slot":0}]', b"NaN", b'"text"'])
@pytest.mark.parametrize("place", ["slots", "tasks"])
def test_a_page_that_no_writer_made_is_damage(tmp_path: Path, place: str, data: bytes) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", slots=2)
    document, before = manifest(shelf.path), shelf.snapshot()
    document[place] = [digest([data])]
    (shelf.path / "pages" / f"{digest([data])}.json.gz").write_bytes(gzip.compress(data))
    written(shelf.path, document)
    with pytest.raises(CorruptShelf):
        shelf.snapshot()
    repair(shelf)
    assert before.head in {shelf.snapshot().head, shelf.snapshot().manifest.parent}
    assert shelf.verify() == []


def test_of_two_manifests_of_one_sequence_the_log_has_the_one_that_the_head_reaches(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", slots=3, keep=2)
    head = shelf.snapshot().head
    before = manifest(shelf.path, shelf.snapshot().manifest.parent)
    written(shelf.path, before | {"arrived": 9})
    (shelf.path / "HEAD").write_text("damaged\n")
    repair(shelf)
    assert shelf.snapshot().head == head
    assert shelf.verify() == []


def test_a_page_that_may_not_be_read_is_an_error_and_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = filled(tmp_path / "a.shelf", "a")
    locked, read = page_of(shelf.path, "slots"), pages.read_file

    def refusing(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(pages, "read_file", refusing)
    before = state(tmp_path)
    for use in (shelf.snapshot, lambda: repair(shelf)):
        with pytest.raises(DiskError, match="Permission denied"):
            use()
    assert "Permission denied" in shelf.verify()[0]
    assert state(tmp_path) == before


def is_same_page(path: Path, data: bytes) -> bool:
    """Whether a page's file still has the JSON of its id: the header of gzip holds bits without a meaning."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        return path.parent.name == "pages" and gzip.decompress(data) == gzip.decompress(path.read_bytes())
    return False


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_anywhere_is_put_right(seed: int, tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", "d", slots=2, keep=2)
    served = set(shelf.snapshot().manifest.tasks)
    pages_of_slots = {page_of(shelf.path, "slots")}
    draw = random.Random(seed)
    path = draw.choice(sorted(p for p in shelf.path.rglob("*") if p.is_file() and p.name != "lock"))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    harmless = path.name in ("shelf.toml", "log.jsonl") or is_same_page(path, bytes(data))
    path.write_bytes(bytes(data))
    damaged = Shelf(shelf.path).verify()
    repair(Shelf(shelf.path), NAMED)
    assert shelf.verify() == []
    lost = served - set(shelf.snapshot().manifest.tasks)
    assert lost == set() or (path.parent.name == "manifests" and lost == {"d"}) or path in pages_of_slots
    assert damaged or harmless


# the command ---------------------------------------------------------------------------------------------------------


def test_the_cure_that_every_error_names_is_one(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b", "c", slots=2)
    flip(tensors(shelf, 0))
    write_peft(tmp_path / "d", D)
    write_peft(tmp_path / "b", B)
    cure = f"cure:  lorashelf repair {shelf.path}"
    for words in (["add", shelf.path, tmp_path / "d"], ["route", shelf.path]):
        code, said = command(*words)
        assert (code, cure in said) == (4, True), said
    code, said = command("repair", shelf.path)
    assert code == 0, said
    assert command("verify", shelf.path)[0] == 0
    lost = {"a", "b", "c"} - set(shelf.snapshot().manifest.tasks)
    for task in lost:
        assert f"{task}=ADAPTER" in said
        assert command("add", shelf.path, f"{task}={write_peft(tmp_path / task, NAMED[task])}")[0] == 0
    assert command("add", shelf.path, tmp_path / "d")[0] == 0


def test_the_command_reports_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b")
    original = write_peft(tmp_path / "b", B)
    assert read_adapter(original).digest == B.digest
    flip(tensors(shelf))
    capsys.readouterr()
    code, said = command("repair", shelf.path, "--adapter", f"b={original}", "--json")
    assert code == 0, said
    document = json.loads(said[said.index("{") :])
    assert document["ok"] is True
    assert document["problems"] == []
    (slot,) = document["slots"]
    assert (slot["slot"], slot["how"], slot["tasks"], slot["unrouted"]) == (0, "rewritten", ["a", "b"], [])
    code, said = command("repair", shelf.path, "--adapter", f"b={write_peft(tmp_path / 'd', D)}")
    assert (code, "this is not the adapter of 'b'" in said) == (4, True)
    code, said = command("repair", shelf.path)
    assert (code, said.strip().endswith("ok")) == (0, True)


def test_a_manifest_that_no_writer_could_have_made_is_damage(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "a.shelf", "a", "b")
    before = shelf.snapshot()
    parent = before.manifest.parent
    forged(shelf.path, lambda document: document.update(arrived="two"))
    with pytest.raises(CorruptShelf, match="arrived") as caught:
        shelf.snapshot()
    assert caught.value.cure is not None
    assert "lorashelf repair" in caught.value.cure
    repair(shelf)
    assert shelf.verify() == []
    assert {parent, before.head} & {shelf.snapshot().head, shelf.snapshot().manifest.parent}
