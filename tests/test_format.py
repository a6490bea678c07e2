"""docs/format.md holds golden bytes: a shelf of fixed values, made with a fixed clock, must be these bytes for ever."""

from __future__ import annotations

import base64
import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from factory import dense, make_adapter, tree
from lorashelf import (
    Adapter,
    BaseId,
    Factors,
    Manifest,
    Modules,
    Shelf,
    new_settings,
    norm,
    plan_add,
    plan_remove,
    plan_set,
    plan_update,
)
from lorashelf.digest import digest
from lorashelf.errors import CorruptShelf, NotStorable, TaskNameError, UsageError
from lorashelf.formats.objects import StoredFile
from lorashelf.merging.average import Average, History, Source, without
from lorashelf.shelf import manifest as manifests_in_memory
from lorashelf.shelf import pages, records
from lorashelf.shelf.pages import compressed, read_page
from lorashelf.shelf.repair import repair
from lorashelf.shelf.slot import Facts, Slot, StoredObject
from manifests import as_format_1, forged, page, unfolded

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def packed(values: Sequence[float]) -> str:
    return base64.b64encode(np.array(values, "<f8").tobytes()).decode()


def unpacked(text: str) -> list[float]:
    return [float(value) for value in np.frombuffer(base64.b64decode(text), "<f8")]


def clock() -> datetime:
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


@patch("lorashelf.shelf.creation.VERSION", "0.1.0")
@patch("lorashelf.shelf.plan_parts.VERSION", "0.1.0")
def golden_shelf(path: Path) -> Shelf:
    """Two orthogonal adapters of one 2×3 module in one slot; every sum is exact, so no machine rounds apart."""
    shelf = Shelf.create(path, new_settings(1, policy="kmerge"), clock)
    factors = {"gec-de": [[1.0, 0.5, 0.0], [0.0, 2.0, 0.0]], "gec-fr": [[0.0, 0.0, 1.0], [0.0, 0.0, -0.5]]}
    for task, rows in factors.items():
        a, b = np.array(rows, np.float32), np.array([[0.5, 0.0], [0.0, 1.0]], np.float32)
        adapter = Adapter(Modules({"m.0": Factors(a, b, 2.0)}), BaseId("acme/tiny"), "f16", {"target_modules": ["m.0"]})
        shelf.commit(plan_add(shelf.snapshot(), adapter, task))
    return shelf


def golden(name: str) -> str:
    found = re.search(rf"<!-- golden: {re.escape(name)} -->\n```\w*\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found, f"docs/format.md has no golden block {name!r}"
    return found[1]


def actual(shelf: Shelf) -> dict[str, str]:
    head = (shelf.path / "HEAD").read_text()
    manifest = (shelf.path / "manifests" / f"{head.strip()}.json").read_text()
    folder = shelf.snapshot().slot_path(shelf.snapshot().manifest.slots[0])
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    document = json.loads(manifest)
    pages = {"page of slots": document["slots"][0], "page of tasks": document["tasks"][0]}
    pages["page of facts"] = page(shelf.path, pages["page of slots"])[0]["facts"]
    return {
        "shelf.toml": (shelf.path / "shelf.toml").read_text(),
        "HEAD": head,
        "manifest": manifest + "\n",
        **{name: f"{read_page(shelf.path, identity).decode()}\n" for name, identity in pages.items()},
        "log.jsonl": (shelf.path / "log.jsonl").read_text(),
        "adapter_config.json": (folder / "adapter_config.json").read_text(),
        "adapter_model.safetensors": "".join(f"{tensors[i : i + 32].hex(' ')}\n" for i in range(0, len(tensors), 32)),
    }


def golden_format_1(path: Path) -> Shelf:
    """The golden shelf as a lorashelf that knew format 1 only made it."""
    shelf = golden_shelf(path)
    first = {which: json.loads(golden(f"log.jsonl{which}").splitlines()[0])["id"] for which in ("", " of format 1")}
    as_format_1(path, {first[""]: first[" of format 1"]})
    return shelf


def test_a_shelf_of_format_1_is_these_bytes(tmp_path: Path) -> None:
    shelf = golden_format_1(tmp_path / "golden.shelf")
    head = (shelf.path / "HEAD").read_text()
    assert head == golden("HEAD of format 1")
    assert (shelf.path / "manifests" / f"{head.strip()}.json").read_text() + "\n" == golden("manifest of format 1")
    assert (shelf.path / "log.jsonl").read_text() == golden("log.jsonl of format 1")


def test_a_shelf_of_format_1_is_read_and_the_next_commit_is_of_format_2(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = golden_format_1(tmp_path / "golden.shelf")
    before = shelf.snapshot()
    assert before.manifest.files.format == 1
    assert shelf.verify() == []
    assert sorted(before.manifest.tasks) == ["gec-de", "gec-fr"]
    plan = plan_remove(before, "gec-fr")
    assert caplog.messages == []
    predicted = before.at_rest(plan)
    shelf.commit(plan)
    assert ["now has format 2, before it had 1" in message for message in caplog.messages] == [True]
    after = shelf.snapshot()
    assert after.bytes == predicted
    assert (after.manifest.files.format, after.manifest.parent) == (2, before.head)
    assert after.kept[before.head].files.format == 1
    shelf.undo()
    again = shelf.snapshot().manifest
    assert (again.tasks, again.state, again.files.format) == (before.manifest.tasks, before.head, 2)
    assert [slot.document() for slot in again.slots] == [slot.document() for slot in before.manifest.slots]
    assert shelf.verify() == []
    assert len(caplog.messages) == 1


def test_a_shelf_of_format_1_can_be_undone_to_before_the_conversion(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(2, policy="kmerge", keep=3), clock)
    for i, task in enumerate("abc"):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(i, dtype="f16"), task))
    as_format_1(shelf.path)
    for tasks in ("ab", "a", ""):
        shelf.undo()
        assert "".join(sorted(shelf.snapshot().manifest.tasks)) == tasks
        assert shelf.verify() == []
    for tasks in ("a", "ab", "abc"):
        shelf.redo()
        assert "".join(sorted(shelf.snapshot().manifest.tasks)) == tasks
    for seed in range(5, 9):  # the manifests of format 1 go as any others
        shelf.commit(plan_update(shelf.snapshot(), "b", make_adapter(seed, dtype="f16")))
    assert {manifest.files.format for manifest in shelf.snapshot().kept.values()} == {2}
    assert shelf.verify() == []


def test_a_task_costs_few_bytes_and_a_commit_writes_few_pages() -> None:
    """Of 1,000 tasks, each in a slot of ten levels or all in one slot: at most 300 bytes beside the object, 64 kB per
    commit.
    """
    for each in (1, 1000):
        manifest = imagined(1000, each)
        pages = manifest.files.pages
        size = len(manifest.files.root) + sum(len(compressed(data)) for data in pages.values() if data)
        assert size / 1000 <= 300
        for seed in range(5):
            new = imagined(1001, each, changed=seed).files
            written = [compressed(data) for identity, data in new.pages.items() if data and identity not in pages]
            assert len(new.root) + sum(map(len, written)) <= 64_000
            assert len(written) <= 4


def imagined(count: int, each: int, changed: int | None = None) -> Manifest:
    """A manifest of tasks that came without a shelf, with all that a task file may give; `changed` has the last one."""
    names = [f"summary-{i:04d}" for i in range(count)]
    places = {name: min(i // each, 1000 // each - 1) for i, name in enumerate(names)}
    if changed is not None:
        places[names[-1]] = random.Random(changed).randrange(1000 // each)
    slots = []
    for number in range(1000 // each):
        members = [name for name in names if places[name] == number]
        sources = tuple(
            Source(
                name,
                "summary",
                digest([name.encode()]),
                1 / len(members),
                8,
                921_600,
                "f16",
                random.Random(name).random(),
            )
            for name in members
        )
        levels = [digest([f"{number} {level}".encode()])[3:19] for level in range(10)] if each == 1 else []
        files = tuple(StoredFile(f"{name}.lsc", 100 * 2**level + number) for level, name in enumerate(levels))
        size = sum(file.bytes for file in files) or 1_840_000
        stored = StoredObject(digest([str(members).encode()]), 8, "f16", size, "coded", files=files)
        slots.append(Slot(number, stored, History(sources, error=random.Random(number).random()), tuple(members)))
    given = {"prompt": "Summarise the text in one sentence. " * 4, "language": "de", "metric": "rouge_l"}
    tasks = {name: {**given, "type": "summary", "digest": digest([name.encode()])} for name in names}
    settings = new_settings(1000)
    return Manifest(digest([]), 7, settings.recipe, settings.budget.document(), {}, slots=tuple(slots), tasks=tasks)


def test_the_bytes_on_disk_are_those_of_the_document(tmp_path: Path) -> None:
    for name, text in actual(golden_shelf(tmp_path / "golden.shelf")).items():
        assert text == golden(name), name


def test_golden_blocks_would_show_a_changed_byte(tmp_path: Path) -> None:
    shelf = golden_shelf(tmp_path / "golden.shelf")
    (shelf.path / "HEAD").write_text("b2-" + "0" * 64 + "\n")
    assert (shelf.path / "HEAD").read_text() != golden("HEAD")


def taken_out(path: Path) -> Shelf:
    """A slot of c after folds of a and b, of which b was taken out again."""
    shelf = Shelf.create(path, new_settings(1, policy="kmerge"), clock)
    for i, task in enumerate("abc"):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(i, dtype="f16"), task))
    assert not {"worn", "noise", "fixed"} & shelf.snapshot().manifest.document()["slots"][0].keys()
    shelf.commit(plan_remove(shelf.snapshot(), "b", make_adapter(1, dtype="f16")))
    return shelf


def test_noise_stands_in_a_manifest_only_where_an_adapter_was_taken_out(tmp_path: Path) -> None:
    snapshot = taken_out(tmp_path / "s").snapshot()
    slot = snapshot.manifest.slots[0]
    assert len(slot.history.noise) == 2 * len(snapshot.stored(slot).modules) + 2
    assert unfolded(snapshot.path)["slots"][0]["noise"] == packed(slot.history.noise)
    assert "noise" not in slot.document()
    held = snapshot.average(slot).noise
    assert held is not None
    assert [float(energy) for pair in [*held.modules.values(), held.elsewhere] for energy in pair] == list(
        slot.history.noise
    )
    with pytest.raises(CorruptShelf, match="noise has another number of modules"):
        snapshot.average(replace(slot, history=replace(slot.history, noise=slot.history.noise[:-2])))


def test_what_earlier_writers_counted_as_worn_is_noise(tmp_path: Path) -> None:
    shelf = taken_out(tmp_path / "s")
    rewritten(shelf, lambda slot: [slot.pop("noise"), slot.update(worn=50)])
    snapshot, c = shelf.snapshot(), make_adapter(2, dtype="f16")
    assert snapshot.manifest.document()["slots"][0]["worn"] == 50
    (slot,) = snapshot.manifest.slots
    fresh = Average(snapshot.stored(slot), replace(slot.history, extra_roundings=0))
    expected = without(fresh, c.digest, c, snapshot.settings.merge)[1]
    assert plan_remove(snapshot, "c", c).report["precision"] == pytest.approx(expected * 26**0.5, rel=0.2)
    rewritten(shelf, lambda slot: slot.update(worn=-2))
    with pytest.raises(CorruptShelf, match="slots\\[0\\]: worn"):
        shelf.snapshot()


def test_the_golden_shelf_verifies(tmp_path: Path) -> None:
    assert golden_shelf(tmp_path / "golden.shelf").verify() == []


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, text in actual(golden_shelf(Path(folder) / "golden.shelf")).items():
            print(f"<!-- golden: {name} -->\n```\n{text}```\n")


def facts(shelf: Shelf) -> list[Facts]:
    return [shelf.snapshot().facts(slot) for slot in shelf.snapshot().manifest.slots]


def filled(path: Path) -> Shelf:
    shelf = Shelf.create(path, new_settings(2, policy="kmerge"), clock)
    for i, task in enumerate(("a", "b", "c")):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(i, dtype="f16"), task))
    return shelf


def rewritten(shelf: Shelf, change: Callable[[dict[str, Any]], None]) -> None:
    """The head's manifest changed, under its new id."""
    forged(shelf.path, lambda document: [change(slot) for slot in document["slots"]])


def test_squared_norms_are_those_of_the_bytes_stored(tmp_path: Path) -> None:
    snapshot = filled(tmp_path / "s").snapshot()
    for slot in snapshot.manifest.slots:
        exact = [float(np.sum(np.square(w, dtype=np.float64))) for _, w in sorted(dense(snapshot.stored(slot)).items())]
        assert snapshot.facts(slot).squared_norms == pytest.approx(exact, rel=1e-6)
        assert "facts" not in slot.document()  # answers are for people and programs, not for the next fold


def test_a_shelf_without_squared_norms_goes_on_and_gets_them_where_it_writes(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    expected = plan_add(shelf.snapshot(), arriving, "new").report
    rewritten(shelf, lambda slot: slot.pop("squared_norms"))
    plan = plan_add(shelf.snapshot(), arriving, "new")
    assert plan.report["scores"] == pytest.approx(expected["scores"], abs=1e-7)
    assert shelf.verify() == []
    shelf.commit(plan)
    assert {bool(found.squared_norms) for found in facts(shelf)} == {True, False}


def test_a_shelf_without_sums_is_checked_against_its_ids_and_gets_them_where_it_writes(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    assert all(found.sums for found in facts(shelf))
    scores = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    rewritten(shelf, lambda slot: slot.pop("sums"))
    slots = shelf.snapshot().manifest.slots
    assert not any(found.sums for found in facts(shelf))
    assert shelf.verify() == []
    plan = plan_add(shelf.snapshot(), arriving, "new")
    assert plan.report["scores"] == scores
    folder = shelf.snapshot().slot_path(slots[0]) / "adapter_model.safetensors"
    data = folder.read_bytes()
    folder.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for read in (lambda: plan_add(shelf.snapshot(), arriving, "new"), lambda: shelf.snapshot().stored(slots[0])):
        with pytest.raises(CorruptShelf, match="its bytes have changed"):
            read()
    folder.write_bytes(data)
    shelf.commit(plan)
    assert {bool(found.sums) for found in facts(shelf)} == {True, False}


def test_sums_are_those_of_the_bytes_stored(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "s")
    for slot in shelf.snapshot().manifest.slots:
        folder = shelf.snapshot().slot_path(slot)
        config = (folder / "adapter_config.json").read_bytes()
        data = (folder / "adapter_model.safetensors").read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        spans = [entry["data_offsets"] for name, entry in json.loads(data[8:size]).items() if name != "__metadata__"]
        tensors = [zlib.crc32(data[size + start : size + stop]) for start, stop in sorted(spans)]
        assert shelf.snapshot().facts(slot).sums == (zlib.crc32(config + data[:size]), *tensors)


IMPOSSIBLE = ["AAAA", "%%%", "é", 3, None]


@pytest.mark.parametrize("name", ["squared_norms", "sums"])
@pytest.mark.parametrize("value", [*IMPOSSIBLE, packed([-1.0]), packed([float("nan")]), packed([np.inf])])
def test_facts_that_cannot_be_are_passed_over_and_seen_by_verify(tmp_path: Path, name: str, value: Any) -> None:
    """Without them all the bytes of an object are checked against its id. (Bytes of doubles may be sums: not these.)"""
    if name == "sums" and value not in IMPOSSIBLE:
        value = value[:-1]
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    scores = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    rewritten(shelf, lambda slot: slot.update({name: value}))
    assert plan_add(shelf.snapshot(), arriving, "new").report["scores"] == pytest.approx(scores, abs=1e-7)
    assert len(shelf.verify()) == 2
    repair(shelf)
    assert shelf.verify() == []
    assert len(shelf.snapshot().manifest.tasks) == 3


@pytest.mark.parametrize("name", ["energies", "sums"])
@pytest.mark.parametrize("value", IMPOSSIBLE)
def test_arrays_of_format_1_that_cannot_be_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    shelf = filled(tmp_path / "s")
    as_format_1(shelf.path)
    rewritten(shelf, lambda slot: slot.update({name: value}))
    with pytest.raises(CorruptShelf, match="manifest cannot be read"):
        shelf.snapshot()


def test_the_next_fold_takes_squared_norms_from_the_manifest(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    scores = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    rewritten(shelf, lambda slot: slot.update(squared_norms=packed([4 * v for v in unpacked(slot["squared_norms"])])))
    halved = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    assert halved == pytest.approx({slot: score / 2 for slot, score in scores.items()}, abs=1e-7)
    assert shelf.verify() == [
        f"slot {slot.id}, objects/{slot.object.id}: the squared norms recorded are not those of its values; "
        f"tasks: {', '.join(slot.members)}"
        for slot in shelf.snapshot().manifest.slots
    ]


def test_squared_norms_of_another_number_of_modules_are_passed_over_and_seen_by_verify(tmp_path: Path) -> None:
    shelf, arriving = filled(tmp_path / "s"), make_adapter(9, dtype="f16")
    scores = plan_add(shelf.snapshot(), arriving, "new").report["scores"]
    rewritten(shelf, lambda slot: slot.update(squared_norms=packed(unpacked(slot["squared_norms"])[1:])))
    assert plan_add(shelf.snapshot(), arriving, "new").report["scores"] == pytest.approx(scores, abs=1e-7)
    assert len(shelf.verify()) == 2


def test_squared_norms_of_another_writer_and_of_huge_values_hold(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "s")
    exact = {slot.id: norm(shelf.snapshot().stored(slot)) for slot in shelf.snapshot().manifest.slots}
    more = 1 + 1e-5
    rewritten(
        shelf, lambda slot: slot.update(squared_norms=packed([v * more for v in unpacked(slot["squared_norms"])]))
    )
    assert shelf.verify() == []
    assert sorted(exact) == [0, 1]
    sum_of_halves = new_settings(1, policy="kmerge", merge="dare_linear", parameters={"density": 0.1})
    grown = Shelf.create(tmp_path / "huge", sum_of_halves, clock)
    for seed in range(2):  # merged values beyond what an adapter may arrive with
        x = make_adapter(seed, scale=1.0)
        modules = {p: Factors(f.a * np.float32(1e8), f.b * np.float32(1e-9)) for p, f in x.modules.items()}
        grown.commit(plan_add(grown.snapshot(), x.with_factors(modules), f"t-{seed}"))
    assert grown.verify() == []


@pytest.mark.parametrize("ranks", ["cancel", "cancel to nothing"])
def test_squared_norms_hold_where_ranks_cancel(tmp_path: Path, ranks: str) -> None:
    f = next(iter(make_adapter(0).modules.values()))
    moved = f.a if ranks == "cancel to nothing" else f.a * np.float32(1.001)
    pair = Factors(np.concatenate([moved, f.a]), np.concatenate([f.b, -f.b], axis=1), 2.0)
    shelf = Shelf.create(tmp_path / "s", new_settings(1), clock)
    shelf.commit(plan_add(shelf.snapshot(), Adapter(Modules({"m.0": pair}), BaseId("acme/tiny")), "a"))
    assert shelf.verify() == []


def test_nothing_becomes_the_head_that_cannot_be_read_again(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "s")
    before = shelf.snapshot()
    plan = plan_add(before, make_adapter(9, dtype="f16"), "new")
    broken = replace(
        plan.manifest,
        slots=tuple(replace(slot, history=replace(slot.history, restored=0.0)) for slot in plan.manifest.slots),
    )
    with pytest.raises(CorruptShelf):
        shelf.commit(replace(plan, manifest=broken))
    assert shelf.snapshot().head == before.head
    assert shelf.verify() == []


def test_an_object_that_is_there_already_counts_once(tmp_path: Path) -> None:
    x, y = make_adapter(0), make_adapter(1)
    shelf = Shelf.create(tmp_path / "s", new_settings(1, policy="kmerge", keep=2), clock)
    shelf.commit(plan_add(shelf.snapshot(), x, "a"))
    shelf.commit(plan_update(shelf.snapshot(), "a", y))
    snapshot = shelf.snapshot()
    plan = plan_update(snapshot, "a", x)
    predicted = snapshot.at_rest(plan)
    size = plan.manifest.slots[0].object.bytes
    assert predicted + size <= snapshot.at_rest(plan, hashed=False) <= predicted + size + 1000
    toml = (shelf.path / "shelf.toml").read_text()
    (shelf.path / "shelf.toml").write_text(toml.replace("# bytes: room", f"bytes = {predicted + 200} # room"))
    plan = plan_update(shelf.snapshot(), "a", x)
    predicted = shelf.snapshot().at_rest(plan)
    shelf.commit(plan)
    assert shelf.snapshot().bytes == predicted


def test_the_rank_that_would_fit_fits(tmp_path: Path) -> None:
    """Of modules of several ranks, the small ones keep theirs."""
    rng = np.random.default_rng(0)
    sizes = {"m.0": 32, **{f"m.{i}": 4 for i in range(1, 9)}}
    modules = {
        path: Factors(rng.standard_normal((r, 64)).astype("f4"), rng.standard_normal((64, r)).astype("f4"))
        for path, r in sizes.items()
    }
    x = Adapter(Modules(modules), BaseId("acme/tiny"))
    refused = plan_add(Shelf.create(tmp_path / "s", new_settings(1, bytes=30_000), clock).snapshot(), x, "a").refused
    assert refused
    fits = re.search(r"--rank (\d+)", refused)
    assert fits, refused
    for rank, name in ((int(fits[1]), "fitting"), (int(fits[1]) + 1, "too much")):
        shelf = Shelf.create(tmp_path / name, new_settings(1, bytes=30_000, rank=rank), clock)
        assert (plan_add(shelf.snapshot(), x, "a").refused is None) == (name == "fitting")


@pytest.mark.parametrize("value", [2**60, float("nan"), "\ud800", Path("x")])
def test_details_that_json_cannot_hold_are_refused(tmp_path: Path, value: Any) -> None:
    snapshot = filled(tmp_path / "s").snapshot()
    with pytest.raises(UsageError, match="details of task 'new' cannot be stored"):
        plan_add(snapshot, make_adapter(9), "new", details={"max_new_tokens": value})
    with pytest.raises(TaskNameError):
        plan_add(snapshot, make_adapter(9), "new", details={"type": 3})


def test_a_page_that_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = filled(tmp_path / "s")
    before = tree(tmp_path)
    monkeypatch.setattr(pages, "MOST_BYTES", 5_000)
    with pytest.raises(NotStorable, match="the most is 5000") as caught:
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(9), "new", details={"prompt": "p" * 5_000}))
    assert "prompts" in str(caught.value.cure)
    assert tree(tmp_path) == before


def test_many_threads_read_many_shelves_with_a_small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads what is there: what another thread drops from the cache is read again."""
    for cache in (manifests_in_memory._decoded, records._decoded, records._encoded):
        monkeypatch.setattr(cache, "_most", 2)
    shelves = [filled(tmp_path / name) for name in "xyz"]
    heads = [shelf.snapshot().manifest for shelf in shelves]
    for shelf in shelves:
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(9, dtype="f16"), "d"))

    def read(number: int) -> bool:
        shelf, head = shelves[number % 3], heads[number % 3]
        snapshot = shelf.snapshot()
        again = replace(snapshot.manifest, arrived=number).files  # encodes
        return snapshot.kept[head.files.id] == head and set(again.pages) == set(snapshot.manifest.files.pages)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(200)))


def test_what_manifests_share_is_decoded_once(tmp_path: Path) -> None:
    shelf = filled(tmp_path / "s")
    shelf.configure({"keep": 3})
    shelf.commit(plan_set(shelf.snapshot(), "a", {"language": "de"}))
    now, before = shelf.snapshot().manifest, next(iter(shelf.snapshot().kept.values()))
    assert now.slots == before.slots
    assert all(one is other for one, other in zip(now.slots, before.slots, strict=True))
