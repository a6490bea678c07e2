"""Encodings of stored objects: coded slots, and that an unknown encoding concerns its own tasks only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from factory import assert_same_delta, make_adapter, tree, write_peft
from lorashelf import (
    Adapter,
    BaseId,
    Factors,
    Modules,
    Shelf,
    Slot,
    candidates,
    combine,
    new_settings,
    norm,
    plan_add,
    plan_remove,
    plan_set,
    plan_update,
    read_adapter,
    route,
)
from lorashelf.errors import CorruptShelf, NewerFormat, UsageError
from lorashelf.formats.peft import encode
from lorashelf.lora.quality import MOST_QUALITY
from lorashelf.merging.average import Average
from lorashelf.shelf.allocation import coarser
from lorashelf.shelf.plan_parts import planned
from lorashelf.shelf.repair import repair
from lorashelf.shelf.routing import materialised
from manifests import FACTS, forged, put
from test_attacks import command


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """Three slots; what serves "later" was written by a lorashelf of the future."""
    shelf = Shelf.create(tmp_path / "s", new_settings(4, policy="kmerge"))
    for seed, task in enumerate(["now", "later", "also"]):
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(seed), task))
    forged(shelf.path, lambda document: document["slots"][1].update(encoding="holographic"))
    return shelf


@pytest.mark.parametrize(
    "use",
    [
        lambda shelf: shelf.snapshot().adapter("later"),
        lambda shelf: route(shelf.snapshot(), "later"),
        lambda shelf: shelf.snapshot().average(shelf.snapshot().manifest.slot(1)),
    ],
)
def test_a_task_of_an_unknown_encoding_asks_for_a_newer_lorashelf(shelf: Shelf, use: Callable[[Shelf], Any]) -> None:
    with pytest.raises(NewerFormat, match=r"holographic.*tasks: later") as caught:
        use(shelf)
    assert caught.value.cure == "upgrade lorashelf"


def test_the_other_tasks_are_served_changed_and_undone(shelf: Shelf, tmp_path: Path) -> None:
    snapshot = shelf.snapshot()
    for task in ("now", "also"):
        assert snapshot.adapter(task).digest == snapshot.manifest.tasks[task]["digest"]
        assert command("route", shelf.path, task)[0] == 0
    code, listed = command("route", shelf.path, "--json")
    assert (code, json.loads(listed)["later"]["path"]) == (0, None)
    code, listed = command("ls", shelf.path, "--json")
    assert [slot["path"] is None for slot in json.loads(listed)["slots"]] == [False, True, False]
    write_peft(tmp_path / "new", make_adapter(7))
    assert command("add", shelf.path, tmp_path / "new")[0] == 0
    shelf.commit(plan_remove(shelf.snapshot(), "also"))
    shelf.undo()
    assert sorted(shelf.snapshot().manifest.tasks) == ["also", "later", "new", "now"]
    assert shelf.snapshot().manifest.slot(1).object.encoding == "holographic"


def test_what_a_newer_lorashelf_stored_stays_whatever_is_changed_or_repaired(shelf: Shelf, tmp_path: Path) -> None:
    """Its object under its id beside the files that its record names, and facts of another kind."""

    def later(document: dict[str, Any]) -> None:
        record = document["slots"][1]
        record["files"] = [["0123456789abcdef.new", record["bytes"]]]
        for name in FACTS:
            record.pop(name)
        record["facts"] = put(shelf.path, {"of another kind": [1, 2]})

    (shelf.path / "objects" / "0123456789abcdef.new").write_bytes(b"new")
    forged(shelf.path, later)
    slot = shelf.snapshot().manifest.slot(1)
    kept = {name: content for name, content in tree(shelf.path).items() if slot.object.id in name}
    assert kept
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(7), "new"))
    shelf.commit(plan_remove(shelf.snapshot(), "also"))
    assert repair(shelf)["files"] == []
    shelf.gc()
    after = tree(shelf.path)
    assert kept.items() <= after.items()
    assert {"objects/0123456789abcdef.new", f"pages/{slot.object.facts}.json.gz"} <= after.keys()
    assert shelf.snapshot().manifest.slot(1) == slot


def test_a_shelf_of_bytes_goes_on_beside_what_it_cannot_read(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(None, bytes=200_000))
    for seed, task in enumerate(["now", "later"]):
        shelf.commit(plan_add(shelf.snapshot(), wide(seed), task))
    forged(shelf.path, lambda document: document["slots"][1].update(encoding="holographic"))
    before = shelf.snapshot().manifest.slot(1)
    shelf.commit(plan_add(shelf.snapshot(), wide(2), "new"))
    shelf.commit(plan_update(shelf.snapshot(), "now", wide(3)))
    assert sorted(shelf.snapshot().manifest.tasks) == ["later", "new", "now"]
    assert shelf.snapshot().manifest.slot(1) == before


def test_no_fold_into_what_cannot_be_read_is_offered(shelf: Shelf) -> None:
    assert [each.action.slot for each in candidates(shelf.snapshot(), make_adapter(7), "new")] == [3, 0, 2]


def test_verify_names_what_it_cannot_check_and_repair_leaves_it(shelf: Shelf) -> None:
    (problem,) = shelf.verify()
    assert "slot 1 is not checked" in problem
    before = shelf.snapshot().manifest.slots
    assert repair(shelf)["slots"] == []
    assert shelf.snapshot().manifest.slots == before


# coded ----------------------------------------------------------------------------------------------------------------

TASKS = ("a", "b", "c")


def wide(seed: int) -> Adapter:
    """Large enough that values, not descriptions, are what takes bytes."""
    rng = np.random.default_rng(seed)

    def side(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    pairs = {f"m.{i}": Factors(side(4, 192), side(160, 4)) for i in range(4)}
    return Adapter(Modules(pairs), BaseId("acme/tiny"), "f16")


@pytest.fixture
def coded(tmp_path: Path) -> Shelf:
    """Three tasks, each alone in a coded slot."""
    shelf = Shelf.create(tmp_path / "coded", new_settings(3, policy="kmerge", encoding="coded", quality=0.98))
    for seed, task in enumerate(TASKS):
        shelf.commit(plan_add(shelf.snapshot(), wide(seed), task))
    return shelf


def error_of(shelf: Shelf, task: str, original: Adapter) -> float:
    return norm(combine([shelf.snapshot().adapter(task), original], [1.0, -1.0])) / norm(original)


def levels(shelf: Shelf, slot: int = 0) -> list[Path]:
    return [*shelf.snapshot().slot_files(shelf.snapshot().manifest.slot(slot))]


def test_coded_slots_take_few_bytes_and_serve_what_the_manifest_promises(coded: Shelf) -> None:
    snapshot = coded.snapshot()
    for seed, task in enumerate(TASKS):
        slot, _ = snapshot.located(task)
        assert slot.object.encoding == "coded"
        assert slot.object.bytes == sum(path.stat().st_size for path in levels(coded, slot.id))
        assert slot.object.bytes < encode(wide(seed)).size / 4
        assert error_of(coded, task, wide(seed)) == pytest.approx(slot.history.error, abs=0.02)
        assert 0.1 < slot.history.error < 0.7
        assert error_of(coded, task, wide(9)) > 1.2
    assert coded.verify() == []
    assert snapshot.adapter("a") is snapshot.adapter("a")


def test_more_quality_takes_more_bytes_and_leaves_less_error(coded: Shelf) -> None:
    coded.configure({"quality": MOST_QUALITY})
    before = coded.snapshot().manifest.slot(0)
    coded.commit(plan_remove(coded.snapshot(), "a"))
    coded.commit(plan_add(coded.snapshot(), wide(0), "a"))
    after = coded.snapshot().manifest.slot(0)
    assert after.object.bytes > 1.2 * before.object.bytes
    assert after.history.error < 0.8 * before.history.error


@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone", "another level"])
def test_a_damaged_level_is_found_and_mended_to_the_bit_from_the_original(coded: Shelf, damage: str) -> None:
    held = coded.snapshot().manifest.slots
    path = levels(coded)[-1]
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "another level":
        path.write_bytes(levels(coded)[0].read_bytes())
    else:
        path.write_bytes(data[:-3] if damage == "cut off" else data[:40] + bytes([data[40] ^ 4]) + data[41:])
    (problem,) = coded.verify()
    assert problem.startswith("slot 0, its levels: ")
    assert path.name in problem
    assert "tasks: a" in problem
    with pytest.raises(CorruptShelf, match="tasks: a"):
        coded.snapshot().adapter("a")
    assert coded.snapshot().adapter("b").rank
    (mended,) = repair(coded, {"a": wide(0)})["slots"]
    assert mended["how"] == "rewritten"
    assert coded.verify() == []
    assert coded.snapshot().manifest.slots == held


def test_a_coarser_version_shares_the_levels_that_it_keeps(coded: Shelf) -> None:
    """To lower the rate of what is stored needs no original and writes no level; the others stay for `keep` commits."""
    snapshot, files = coded.snapshot(), levels(coded)
    slot = snapshot.manifest.slot(0)
    fewer = coarser(Average(snapshot.stored(slot), slot.history), slot.codec, 1)
    slots = snapshot.manifest.with_slot(Slot.planned(0, fewer, slot.members, "coded"))
    plan = planned(snapshot, replace(snapshot.manifest, slots=slots), {0: fewer.adapter}, {"operation": "set"}, {})
    held = {path: path.stat().st_mtime_ns for path in (coded.path / "objects").iterdir()}
    predicted = snapshot.at_rest(plan)
    coded.commit(plan)
    assert {path: path.stat().st_mtime_ns for path in (coded.path / "objects").iterdir()} == held
    assert coded.snapshot().bytes == predicted
    assert levels(coded) == files[:1]
    assert coded.snapshot().adapter("a").digest == fewer.adapter.digest
    assert fewer.history.error > slot.history.error
    coded.undo()
    assert levels(coded) == files
    coded.redo()
    coded.commit(plan_set(coded.snapshot(), "a", {"prompt": "one commit more"}))
    coded.commit(plan_set(coded.snapshot(), "a", {"prompt": "and one more"}))
    assert [path.exists() for path in files] == [True] + [False] * (len(files) - 1)
    assert coded.verify() == []


def test_undo_update_and_remove_work_on_coded_tasks(coded: Shelf) -> None:
    first = coded.snapshot().adapter("a").digest
    coded.commit(plan_update(coded.snapshot(), "a", wide(7)))
    assert error_of(coded, "a", wide(7)) < 0.7
    coded.undo()
    assert coded.snapshot().adapter("a").digest == first
    coded.commit(plan_remove(coded.snapshot(), "b"))
    assert [slot.id for slot in coded.snapshot().manifest.slots] == [0, 2]


def test_a_fold_into_a_coded_slot_works_and_cannot_be_taken_apart(coded: Shelf) -> None:
    doubled = wide(0).with_factors({p: Factors(f.a, f.b, 2.0) for p, f in wide(0).modules.items()})
    plan = plan_add(coded.snapshot(), doubled, "d")
    assert (plan.report["decision"], plan.report["slot"], plan.report["reversible"]) == ("fold", 0, False)
    coded.commit(plan)
    slot = coded.snapshot().manifest.slot(0)
    assert slot.object.encoding == "coded"
    assert slot.history.irreversible == "the slot's adapters cannot be taken apart: stored in the encoding coded"


def test_route_writes_a_folder_that_peft_loads(coded: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))
    served = coded.snapshot().adapter("a")
    first = materialised(coded.snapshot(), "a")["path"]
    assert_same_delta(served, read_adapter(first), 2e-3)
    assert materialised(coded.snapshot(), "a")["path"] == first
    tensors = Path(first) / "adapter_model.safetensors"
    sound = tensors.read_bytes()
    tensors.write_bytes(sound[:-2] + b"\x11\x11")
    assert materialised(coded.snapshot(), "a")["path"] == first
    assert tensors.read_bytes() == sound
    tensors.unlink()
    assert materialised(coded.snapshot(), "a")["path"] == first
    assert tensors.read_bytes() == sound
    given = materialised(coded.snapshot(), "b", tmp_path / "given")["path"]
    assert given == str(tmp_path / "given")
    with pytest.raises(UsageError, match="already exists"):
        materialised(coded.snapshot(), "b", tmp_path / "given")
    assert coded.snapshot().bytes == sum(p.stat().st_size for p in coded.path.rglob("*") if p.is_file())


def test_the_cache_of_routed_folders_is_bounded(coded: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASHELF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorashelf.shelf.routing.MOST_KEPT", 2)
    for task in TASKS:
        path = materialised(coded.snapshot(), task)["path"]
    assert len(list((tmp_path / "cache" / "routes").iterdir())) == 2
    assert Path(path).exists()


def test_a_shelf_may_change_its_encoding(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(3, policy="kmerge"))
    shelf.commit(plan_add(shelf.snapshot(), wide(0), "a"))
    shelf.configure({"encoding": "coded"})
    shelf.commit(plan_add(shelf.snapshot(), wide(1), "b"))
    assert [slot.object.encoding for slot in shelf.snapshot().manifest.slots] == ["peft", "coded"]
    assert error_of(shelf, "a", wide(0)) < 1e-3
    assert shelf.verify() == []
    shelf.undo()
    shelf.redo()
    assert error_of(shelf, "b", wide(1)) < 0.7


def test_an_encoding_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        new_settings(2, encoding="zip", quality=0)
    assert "'zip'" in caught.value.what
    assert "quality is 0" in caught.value.what
    with pytest.raises(UsageError, match=r"at most 0\.997"):
        new_settings(2, quality=0.999)
    with pytest.raises(UsageError, match="restore_norm"):
        new_settings(2, encoding="coded", restore_norm=True)


def test_an_untrained_adapter_and_a_tiny_one_are_coded_too(tmp_path: Path) -> None:
    zero = wide(0).with_factors({p: Factors(f.a, f.b * 0, 1.0) for p, f in wide(0).modules.items()})
    for name, adapter in (("nothing", zero), ("tiny", make_adapter(3))):
        shelf = Shelf.create(tmp_path / name, new_settings(2, encoding="coded"))
        shelf.commit(plan_add(shelf.snapshot(), adapter, name))
        assert norm(shelf.snapshot().adapter(name)) == pytest.approx(norm(adapter), rel=0.3)
        assert shelf.verify() == []
