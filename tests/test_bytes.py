"""Policy `bytes`: a coded object per task, and stored ones that get coarser as space runs out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from command import Command
from factory import tree, write_peft
from lorashelf import (
    Adapter,
    BaseId,
    Factors,
    Modules,
    Shelf,
    candidates,
    combine,
    new_settings,
    norm,
    plan_add,
    plan_cluster,
    plan_remove,
    plan_update,
)
from lorashelf.errors import UsageError
from lorashelf.formats.coded.decoder import inspect
from lorashelf.formats.coded.encoder import Encoder
from lorashelf.formats.coded.ladder import ladder
from lorashelf.lora.quality import MOST_QUALITY, quality
from lorashelf.placement.clustering import cluster
from lorashelf.placement.rates import Rate, steps
from lorashelf.shelf.packing import plan_pack
from lorashelf.shelf.repair import repair
from lorashelf.shelf.settings import read_toml


def adapter(seed: int) -> Adapter:
    """Of a falling spectrum, as trained ones have; large beside what describes it."""
    rng, rank = np.random.default_rng(seed), 6
    found = {}
    for i in range(3):
        a = rng.standard_normal((rank, 1152), dtype=np.float32)
        b = rng.standard_normal((1024, rank), dtype=np.float32) * np.float32(0.6) ** np.arange(rank, dtype=np.float32)
        found[f"model.layers.{i}.q_proj"] = Factors(a, b * rng.uniform(0.3, 1.0), 1.0)
    return Adapter(Modules(found), BaseId("acme/tiny"), "f16")


FINEST = 9_800  # about what the finest coding of one takes


@pytest.fixture(scope="module")
def adapters() -> Sequence[Adapter]:
    return [adapter(seed) for seed in range(12)]


def on_disk(shelf: Shelf) -> int:
    return sum(path.stat().st_size for path in shelf.path.rglob("*") if path.is_file())


def qualities(shelf: Shelf) -> dict[str, float]:
    """Task → its predicted quality, from the values that are served."""
    return {
        task: quality(1 - slot.history.error**2) for slot in shelf.snapshot().manifest.slots for task in slot.members
    }


def levels(shelf: Shelf, slot: int) -> list[bytes]:
    """The bytes of every level of a slot's object."""
    snapshot = shelf.snapshot()
    return [path.read_bytes() for path in snapshot.slot_files(snapshot.manifest.slot(slot))]


def filled(path: Path, adapters: Sequence[Adapter], **options: Any) -> Shelf:
    shelf = Shelf.create(path, new_settings(None, **options))
    for i, x in enumerate(adapters):
        plan = plan_add(shelf.snapshot(), x, f"task-{i}")
        assert plan.refused is None
        shelf.commit(plan)
    return shelf


# which levels -------------------------------------------------------------------------------------------------------

CURVES = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=4), min_size=1, max_size=3
)


def curve(increments: list[tuple[int, int]]) -> list[Rate]:
    sums = np.cumsum(increments, axis=0)
    return [Rate(int(size), float(kept)) for size, kept in sums]


@given(CURVES, st.integers(0, 60))
def test_the_first_steps_are_the_best_choice_at_their_slope(increments: list[Any], floor: int) -> None:
    curves = [curve(each) for each in increments]
    found = steps(curves, [floor] * len(curves))
    levels = [len(each) for each in curves]
    allowed = [[n for n in range(1, len(c) + 1) if n == len(c) or c[n - 1].quality >= floor] for c in curves]
    for place, step in enumerate(found):
        freed = curves[step.object][levels[step.object] - 1].bytes - curves[step.object][step.levels - 1].bytes
        assert freed == step.bytes > 0
        levels[step.object] = step.levels
        if place + 1 == len(found) or found[place + 1].slope > step.slope:

            def worth(choice: Sequence[int], slope: float = step.slope) -> float:
                rates = [c[n - 1] for c, n in zip(curves, choice, strict=True)]
                return sum(rate.quality - slope * rate.bytes for rate in rates)

            assert worth(levels) == pytest.approx(max(map(worth, product(*allowed))))
    assert [step.slope for step in found] == sorted(step.slope for step in found)


# a shelf of bytes ---------------------------------------------------------------------------------------------------


def test_a_shelf_with_room_codes_every_task_alone_at_the_highest_quality(
    tmp_path: Path, adapters: Sequence[Adapter]
) -> None:
    shelf = filled(tmp_path / "s", [*adapters[:3], adapters[0]], bytes=10**6)
    assert shelf.snapshot().settings == read_toml(shelf.path / "shelf.toml")
    slots = shelf.snapshot().manifest.slots
    assert [slot.members for slot in slots] == [("task-0", "task-3"), ("task-1",), ("task-2",)]
    assert {slot.object.encoding for slot in slots} == {"coded"}
    assert all(MOST_QUALITY <= each < MOST_QUALITY + 5e-4 for each in qualities(shelf).values())
    for task, x in zip(("task-0", "task-1", "task-2"), adapters, strict=False):
        served = shelf.snapshot().adapter(task)
        assert norm(combine([served, x], [1, -1])) / norm(x) < 0.25
    assert shelf.snapshot().manifest.budget == {"slots": None, "bytes": 10**6, "keep": 1}
    assert shelf.verify() == []


def test_like_adapters_are_not_folded(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    alike = adapters[0].with_factors({p: Factors(f.a, f.b, 2.0) for p, f in adapters[0].modules.items()})
    shelf = filled(tmp_path / "s", [adapters[0], alike], bytes=10**6)
    assert len(shelf.snapshot().manifest.slots) == 2
    (offered,) = candidates(shelf.snapshot(), adapters[1], "new")
    assert (offered.action.slot, offered.bytes > shelf.snapshot().bytes) == (2, True)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_the_budget_holds_through_every_operation(tmp_path: Path, adapters: Sequence[Adapter], keep: int) -> None:
    limit = 4 * FINEST + 25_000
    shelf = Shelf.create(tmp_path / "s", new_settings(None, bytes=limit, keep=keep))
    for i, x in enumerate(adapters[:8]):
        plan = plan_add(shelf.snapshot(), x, f"task-{i}")
        before = {slot.id: slot for slot in shelf.snapshot().manifest.slots}
        stored = {slot: levels(shelf, slot) for slot in before}
        shelf.commit(plan)
        after = shelf.snapshot()
        assert on_disk(shelf) <= limit
        assert after.manifest.cause.get("coarser", {}) == plan.report["coarser"]
        for slot_id, held in stored.items():
            slot = after.manifest.slot(slot_id)
            now = levels(shelf, slot_id)
            assert now == held[: len(now)]
            change = plan.report["coarser"].get(slot.members[0])
            assert (change is not None) == (len(now) < len(held))
            if change:
                assert change["levels"] == [len(held), len(now)]
                assert change["bytes"] == [before[slot_id].object.bytes, slot.object.bytes]
    assert min(qualities(shelf).values()) >= 0.8
    shelf.commit(plan_update(shelf.snapshot(), "task-2", adapters[9]))
    assert on_disk(shelf) <= limit
    if keep:
        served = shelf.snapshot().adapter("task-2").digest
        shelf.undo()
        shelf.redo()
        assert shelf.snapshot().adapter("task-2").digest == served
        assert on_disk(shelf) <= limit
    shelf.commit(plan_remove(shelf.snapshot(), "task-0"))
    shelf.commit(plan_add(shelf.snapshot(), adapters[10], "late"))
    assert on_disk(shelf) <= limit
    assert shelf.verify() == []


def test_an_add_that_needs_room_is_undone_to_the_bit(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(None, bytes=3 * FINEST + 20_000))
    for i, x in enumerate(adapters):
        before = {task: shelf.snapshot().adapter(task).digest for task in shelf.snapshot().manifest.tasks}
        plan = plan_add(shelf.snapshot(), x, f"task-{i}")
        shelf.commit(plan)
        if plan.report["coarser"]:
            break
    lost = [task for task in before if shelf.snapshot().adapter(task).digest != before[task]]
    assert lost == sorted(plan.report["coarser"]) != []
    shelf.undo()
    assert {task: shelf.snapshot().adapter(task).digest for task in before} == before


def test_a_dry_run_holds_no_more_adapters_than_slots(tmp_path: Path) -> None:
    snapshot = Shelf.create(tmp_path / "s", new_settings(2, bytes=10**7, policy="kmerge")).snapshot()
    for i in range(6):
        snapshot = snapshot.after(plan_add(snapshot, adapter(i), f"task-{i}"))
    assert len(snapshot._known) <= 2


def test_a_dry_run_of_several_adds_decides_as_they_do(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(None, bytes=3 * FINEST + 20_000, keep=0))
    snapshot, planned = shelf.snapshot(), []
    for i, x in enumerate(adapters[:7]):
        planned.append(plan_add(snapshot, x, f"task-{i}"))
        snapshot = snapshot.after(planned[-1])
    for i, x in enumerate(adapters[:7]):
        plan = plan_add(shelf.snapshot(), x, f"task-{i}")
        assert plan.report == planned[i].report
        shelf.commit(plan)
    assert any(plan.report["coarser"] for plan in planned)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_below_the_floor_an_add_is_refused_with_a_budget_that_would_do(
    tmp_path: Path, adapters: Sequence[Adapter], keep: int
) -> None:
    def full() -> tuple[Shelf, Any]:
        path = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
        shelf = Shelf.create(
            path, new_settings(None, bytes=(2 + keep) * FINEST + 4_000 * (1 + keep), keep=keep, floor=0.98)
        )
        for i, x in enumerate(adapters * 2):
            plan = plan_add(shelf.snapshot(), x, f"task-{i}")
            if plan.refused:
                return shelf, lambda x=x: plan_add(shelf.snapshot(), x, "late")
            if i < 12:
                shelf.commit(plan)
        raise AssertionError("never refused")

    shelf, again = full()
    before = tree(shelf.path)
    plan = again()
    shelf.commit(plan)
    assert tree(shelf.path) == before
    assert "at least 0.98 (floor)" in plan.refused
    needed = int(re.search(r"--bytes (\d+)", plan.refused)[1])
    assert min(qualities(shelf).values()) >= 0.98
    shelf.configure({"bytes": needed - 400})
    assert again().refused
    shelf.configure({"bytes": needed})
    plan = again()
    assert plan.refused is None
    shelf.commit(plan)
    assert on_disk(shelf) <= needed
    assert min(qualities(shelf).values()) >= 0.98


def test_levels_that_were_dropped_come_back_with_the_original_only(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    shelf = filled(tmp_path / "s", adapters[:6], bytes=4 * FINEST + 16_000)
    before = qualities(shelf)
    coarse = min(before, key=lambda task: before[task])
    shelf.configure({"bytes": 10**6})
    shelf.commit(plan_add(shelf.snapshot(), adapters[8], "late"))
    assert qualities(shelf)[coarse] == before[coarse] < MOST_QUALITY
    shelf.commit(plan_remove(shelf.snapshot(), coarse))
    shelf.commit(plan_add(shelf.snapshot(), adapters[int(coarse.removeprefix("task-"))], coarse))
    assert qualities(shelf)[coarse] >= MOST_QUALITY


def test_a_lower_floor_makes_room(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    settings = new_settings(None, bytes=4 * FINEST + 10_000, floor=0.99, keep=0)
    shelf = Shelf.create(tmp_path / "s", settings)
    for i, x in enumerate(adapters):
        plan = plan_add(shelf.snapshot(), x, f"task-{i}")
        if plan.refused:
            break
        shelf.commit(plan)
    assert plan.refused
    shelf.configure({"floor": 0.6})
    assert plan_add(shelf.snapshot(), x, f"task-{i}").refused is None


def test_an_object_that_lost_levels_is_mended_to_the_bit_from_its_original(
    tmp_path: Path, adapters: Sequence[Adapter]
) -> None:
    shelf = filled(tmp_path / "s", adapters[:8], bytes=4 * FINEST + 16_000)
    slot = min(shelf.snapshot().manifest.slots, key=lambda slot: slot.object.bytes)
    task = slot.members[0]
    served = shelf.snapshot().adapter(task).digest
    path = shelf.snapshot().slot_files(slot)[1]
    path.write_bytes(path.read_bytes()[:-1])
    original = adapters[int(task.removeprefix("task-"))]
    (mended,) = repair(shelf, {task: original})["slots"]
    assert mended["how"] == "rewritten"
    assert shelf.snapshot().adapter(task).digest == served
    assert shelf.verify() == []


# tasks with one adapter ---------------------------------------------------------------------------------------------


def members(shelf: Shelf) -> dict[int, tuple[str, ...]]:
    return {slot.id: slot.members for slot in shelf.snapshot().manifest.slots}


def test_tasks_that_share_an_adapter_keep_it_when_one_is_updated(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    shelf = filled(tmp_path / "s", [adapters[0], adapters[0], adapters[1]], bytes=10**6)
    old, other = (shelf.snapshot().adapter(task).digest for task in ("task-0", "task-2"))
    plan = plan_update(shelf.snapshot(), "task-0", adapters[2])
    shelf.commit(plan)
    assert (plan.report["slot"], plan.report["members"], [*plan.report["coded"]]) == (2, ["task-0"], ["task-0"])
    assert members(shelf) == {0: ("task-1",), 1: ("task-2",), 2: ("task-0",)}
    assert [shelf.snapshot().adapter(f"task-{i}").digest for i in (1, 2)] == [old, other]
    assert shelf.snapshot().manifest.tasks["task-0"]["digest"] == adapters[2].digest
    assert norm(combine([shelf.snapshot().adapter("task-0"), adapters[2]], [1, -1])) / norm(adapters[2]) < 0.25
    plan = plan_update(shelf.snapshot(), "task-1", adapters[1])  # which the shelf holds
    assert (plan.writes, plan.report["members"]) == ({}, ["task-1", "task-2"])
    assert plan.report["coded"]["task-1"]["bytes"] == shelf.snapshot().located("task-2")[0].object.bytes
    shelf.commit(plan)
    assert members(shelf) == {1: ("task-1", "task-2"), 2: ("task-0",)}
    assert shelf.verify() == []
    shelf.undo()
    shelf.snapshot().slot_files(shelf.snapshot().manifest.slot(0))[0].write_bytes(b"")
    assert [slot["how"] for slot in repair(shelf, {"task-1": adapters[0]})["slots"]] == ["rewritten"]
    assert shelf.snapshot().adapter("task-1").digest == old


def test_an_untrained_adapter_is_not_replaced_by_the_next(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    idle = adapters[0].with_factors({p: Factors(f.a, 0 * f.b, f.scale) for p, f in adapters[0].modules.items()})
    shelf = filled(tmp_path / "s", [idle, adapters[1]], bytes=10**6)
    assert members(shelf) == {0: ("task-0",), 1: ("task-1",)}
    assert norm(shelf.snapshot().adapter("task-0")) == 0


def test_room_for_a_task_with_an_adapter_that_is_held_is_made(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    shelf = filled(tmp_path / "s", adapters[:2], bytes=10**6, keep=0, floor=0.5)
    shelf.configure({"bytes": shelf.snapshot().bytes + 60})
    plan = plan_add(shelf.snapshot(), adapters[0], "copy")
    assert (plan.refused, [*plan.report["coarser"]]) == (None, ["task-1"])
    shelf.commit(plan)
    assert on_disk(shelf) <= shelf.snapshot().settings.budget.bytes


def test_people_read_who_shares_an_object(tmp_path: Path, run: Command, adapters: Sequence[Adapter]) -> None:
    folders = [write_peft(tmp_path / f"{i}", x) for i, x in enumerate(adapters[:2])]
    run("init", tmp_path / "s", "--bytes", "1MB")
    code, text = run("add", tmp_path / "s", f"a: b={folders[0]}", f"copy={folders[0]}", as_json=False)
    assert code == 0
    rate = r"[\d.]+ kB \([\d.]+ % of 16 bits\)"
    assert re.fullmatch(rf"a: b: {rate}, predicted quality 0.997\ncopy: {rate}, shared with a: b, .* 0.997\n", text)
    code, text = run("update", tmp_path / "s", "a: b", folders[1], as_json=False)
    assert re.fullmatch(rf"a: b: replaced, {rate}, predicted quality 0.997\n", text)


# what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "options", "message"),
    [
        (None, {"bytes": 10**6, "policy": "kmerge"}, "policy 'kmerge' needs slots"),
        (None, {"bytes": 10**6, "policy": "kmerge++"}, "policy 'kmerge++' needs slots"),
        (None, {}, "policy 'kmerge++' needs slots: --slots K; or policy 'bytes', which needs none, with --bytes SIZE"),
        (5, {"bytes": 10**6, "policy": "bytes"}, "counts bytes, not slots"),
        (None, {"policy": "bytes"}, "needs a budget in bytes"),
        (None, {"bytes": 10**6, "encoding": "peft"}, "needs encoding 'coded'"),
        (None, {"bytes": 10**6, "floor": 1.5}, "floor is 1.5; a number from 0 to"),
        (None, {"bytes": 10**6, "floor": "high"}, "floor is 'high'"),
        (None, {"bytes": 10**6, "floor": 0.9, "quality": 0.8}, "floor is 0.9, above the quality 0.8"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(
    slots: int | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        new_settings(slots, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "neither slots nor bytes are given"),
        (("--policy", "bytes"), "neither slots nor bytes are given"),
        (("--bytes", "20MB", "--merge", "svd"), "policy 'bytes' merges nothing, and does not use --merge"),
        (("--bytes", "20MB", "--policy", "bytes", "-p", "density=0.3"), "does not use -p"),
        (("--bytes", "20MB", "--policy", "kmerge"), "policy 'kmerge' needs slots"),
        (("--slots", 3, "--floor", 0.9), "policy 'kmerge++' has no floor"),
        (("--bytes", "20MB", "--slots", 3, "--policy", "bytes"), "leave slots out"),
        (("--bytes", "20MB", "--encoding", "peft"), "needs encoding 'coded'"),
        (("--bytes", "20MB", "--threshold", 0.1), "policy 'bytes' has no threshold"),
        (("--bytes", 300), "an empty shelf alone takes"),
    ],
)
def test_init_refuses_what_cannot_be(tmp_path: Path, run: Command, words: Sequence[object], message: str) -> None:
    code, document = run("init", tmp_path / "s", *words)
    assert code == (4 if "empty" in message else 2)
    assert message in document["error"]["message"]
    assert "another value" not in document["error"]["cure"]
    assert not (tmp_path / "s").exists()


def test_the_cure_of_a_policy_without_slots_works(tmp_path: Path, run: Command) -> None:
    error = run("init", tmp_path / "s", "--bytes", "20MB", "--policy", "kmerge")[1]["error"]
    assert error["cure"] == "give --slots K, or --bytes SIZE and no other policy for a coded object per task"
    assert run("init", tmp_path / "a", "--bytes", "20MB", "--policy", "kmerge", "--slots", 3)[0] == 0
    assert run("init", tmp_path / "b", "--bytes", "20MB")[0] == 0


def test_a_shelf_with_another_encoding_says_which_slots_stand_in_the_way(
    tmp_path: Path, adapters: Sequence[Adapter]
) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(3, policy="kmerge"))
    for i, x in enumerate(adapters[:2]):
        shelf.commit(plan_add(shelf.snapshot(), x, f"task-{i}"))
    shelf.configure({"slots": None, "policy": "bytes", "bytes": 10**6, "encoding": "coded", "quality": 0.997})
    before = tree(shelf.path)
    for plan in (
        lambda: plan_add(shelf.snapshot(), adapters[3], "late"),
        lambda: plan_update(shelf.snapshot(), "task-0", adapters[3]),
    ):
        with pytest.raises(UsageError, match="slot 1 is peft: task-1") as caught:
            plan()
        assert "convert" in str(caught.value.cure)
    assert tree(shelf.path) == before
    assert norm(shelf.snapshot().adapter("task-0")) == pytest.approx(norm(adapters[0]), rel=1e-3)


def test_cluster_needs_slots(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    named = {f"task-{i}": x for i, x in enumerate(adapters[:3])}
    shelf = Shelf.create(tmp_path / "s", new_settings(None, bytes=10**6))
    with pytest.raises(UsageError, match="stores each alone"):
        plan_cluster(shelf.snapshot(), named, cluster(named, 2, method="random"))


def side(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape, dtype=np.float32)


STRANGE: dict[str, Callable[[np.random.Generator], dict[str, Factors]]] = {
    "zero": lambda rng: {f"m.{i}": Factors(side(rng, 4, 96), np.zeros((80, 4), np.float32), 1.0) for i in range(2)},
    "rank-deficient": lambda rng: {
        f"m.{i}": Factors(np.repeat(side(rng, 1, 96), 4, 0), side(rng, 80, 4), 1.0) for i in range(2)
    },
    "one module": lambda rng: {"m": Factors(side(rng, 4, 96), side(rng, 80, 4), 1.0)},
    "one entry": lambda rng: {"m": Factors(side(rng, 1, 1), side(rng, 1, 1), 1.0)},
    "norms 10^6 apart": lambda rng: {
        f"m.{i}": Factors(side(rng, 4, 96), side(rng, 80, 4) * np.float32(10.0 ** (6 * i)), 1.0) for i in range(2)
    },
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("room", ["ample", "short"])
def test_adapters_of_every_kind_are_coded_or_refused_whole(tmp_path: Path, kind: str, room: str) -> None:
    strange = [
        Adapter(Modules(STRANGE[kind](np.random.default_rng(seed))), BaseId("acme/tiny"), "f32") for seed in range(9)
    ]
    limit = 10**6 if room == "ample" else 14_000
    shelf = Shelf.create(tmp_path / "s", new_settings(None, bytes=limit))
    added = 0
    for i, x in enumerate(strange):
        plan = plan_add(shelf.snapshot(), x, f"task-{i}")
        before = tree(shelf.path)
        shelf.commit(plan)
        if plan.refused:
            assert tree(shelf.path) == before
            break
        added += 1
        served = shelf.snapshot().adapter(f"task-{i}")
        least = 0.8 if norm(x) else 1.0
        assert least <= quality(1 - shelf.snapshot().located(f"task-{i}")[0].history.error ** 2) <= 1
        assert norm(served) == pytest.approx(norm(x), rel=0.5)
        assert on_disk(shelf) <= limit
    assert added == 9 or (room == "short" and added >= 1)
    assert shelf.verify() == []


# the command line ---------------------------------------------------------------------------------------------------


def test_every_command_works_on_a_shelf_of_bytes(tmp_path: Path, run: Command, adapters: Sequence[Adapter]) -> None:
    shelf = tmp_path / "s"
    folders = [write_peft(tmp_path / f"task-{i}", x) for i, x in enumerate(adapters[:6])]
    code, document = run("init", shelf, "--bytes", "60kB")
    assert (code, document["slots"], document["policy"]) == (0, None, "bytes")
    code, document = run("add", shelf, *folders)
    assert code == 0
    last = document["added"][-1]
    assert last["decision"] == "open"
    assert last["coded"]["task-5"]["predicted_quality"] >= 0.8
    assert any(each["coarser"] for each in document["added"])
    code, document = run("ls", shelf)
    assert document["budget"]["slots"] is None
    for slot in document["slots"]:
        assert slot["percent"] == pytest.approx(100 * slot["bytes"] / (2 * adapters[0].parameters))
        assert 0.8 <= slot["predicted_quality"] <= 0.998
    code, text = run("ls", shelf, as_json=False)
    assert "predicted quality" in text
    assert "6 objects" in text
    assert run("route", shelf, "task-1", "-o", tmp_path / "out")[0] == 0
    assert run("update", shelf, "task-1", write_peft(tmp_path / "new", adapters[7]))[0] == 0
    assert run("remove", shelf, "task-2")[0] == 0
    assert run("undo", shelf)[0] == 0
    assert run("verify", shelf)[0] == 0
    assert run("repair", shelf)[0] == 0
    code, document = run("set", shelf, "--floor", 0.7)
    assert document["changed"] == {"floor": [0.8, 0.7]}
    assert json.loads(json.dumps(document["settings"]))["floor"] == 0.7
    assert "floor = 0.7" in (shelf / "shelf.toml").read_text()
    assert sum(path.stat().st_size for path in shelf.rglob("*") if path.is_file()) <= 60_000


# pack -----------------------------------------------------------------------------------------------------------------


def packed(path: Path, named: dict[str, Adapter], **options: Any) -> Shelf:
    Shelf.create_with(path, new_settings(None, **options), lambda snapshot: plan_pack(snapshot, named))
    return Shelf(path)


def mean_quality(shelf: Shelf) -> float:
    return float(np.mean(list(qualities(shelf).values())))


@pytest.mark.parametrize(("keep", "objects"), [(0, 1.2), (0, 5.5), (1, 6.5)])
def test_adds_in_any_order_end_within_two_percent_of_packing_all_at_once(
    tmp_path: Path, adapters: Sequence[Adapter], keep: int, objects: float
) -> None:
    named = {f"task-{i}": x for i, x in enumerate(adapters)}
    limit = int(objects * FINEST) + (keep + 2) * 10_000
    best = mean_quality(packed(tmp_path / "packed", named, bytes=limit, keep=keep, floor=0.6))
    assert best < 0.9955  # there is something to lose
    for order in (sorted(named), sorted(named, reverse=True), np.random.default_rng(0).permutation(sorted(named))):
        shelf = Shelf.create(
            tmp_path / f"s{len(list(tmp_path.iterdir()))}", new_settings(None, bytes=limit, keep=keep, floor=0.6)
        )
        for task in map(str, order):
            plan = plan_add(shelf.snapshot(), named[task], task)
            assert plan.refused is None
            shelf.commit(plan)
        assert best * 0.98 <= mean_quality(shelf) <= best * 1.005
        assert on_disk(shelf) <= limit


def test_pack_gives_all_tasks_one_slope_and_spends_the_budget(tmp_path: Path, adapters: Sequence[Adapter]) -> None:
    named = {f"task-{i}": x for i, x in enumerate(adapters)}
    shelf = packed(tmp_path / "s", {**named, "copy": adapters[0]}, bytes=4 * FINEST + 20_000, keep=0)
    assert 0.9 * (4 * FINEST + 20_000) < on_disk(shelf) <= 4 * FINEST + 20_000
    assert shelf.snapshot().located("copy")[0].members == ("copy", "task-0")
    slots = shelf.snapshot().manifest.slots
    curves = []
    for slot in slots:
        x = adapters[int(slot.members[-1].removeprefix("task-"))]
        n, curve, total = len(levels(shelf, slot.id)), [], 0
        for level in inspect(list(ladder(Encoder(x), MOST_QUALITY)))[2]:
            total += level.bytes
            curve.append(Rate(total, level.quality * len(slot.members)))
        curves.append((curve, n))
    # no byte moved from one task to another would raise the sum: the best gain per byte is below the least loss
    gains = [(c[n].quality - c[n - 1].quality) / (c[n].bytes - c[n - 1].bytes) for c, n in curves if n < len(c)]
    losses = [(c[n - 1].quality - c[n - 2].quality) / (c[n - 1].bytes - c[n - 2].bytes) for c, n in curves if n > 1]
    assert max(gains) <= min(losses) * 1.05
    assert shelf.verify() == []


def test_pack_writes_a_shelf_and_says_what_it_keeps(tmp_path: Path, run: Command, adapters: Sequence[Adapter]) -> None:
    folders = [write_peft(tmp_path / f"task-{i}", x) for i, x in enumerate(adapters[:6])]
    code, document = run("pack", *folders, "-o", tmp_path / "s", "--bytes", "50kB")
    assert code == 0
    kept = {task: each["predicted_quality"] for task, each in document["tasks"].items()}
    assert document["predicted_quality"]["mean"] == pytest.approx(np.mean(list(kept.values())))
    assert document["predicted_quality"]["least"] == kept[document["predicted_quality"]["task"]] == min(kept.values())
    assert kept == pytest.approx(qualities(Shelf(tmp_path / "s")))
    assert document["bytes"] == on_disk(Shelf(tmp_path / "s")) <= 50_000
    assert run("add", tmp_path / "s", write_peft(tmp_path / "late", adapters[8]))[0] == 0
    assert run("log", tmp_path / "s")[1][1]["operation"] == "pack"


def test_pack_refuses_what_does_not_fit_whole_and_its_cure_works(
    tmp_path: Path, run: Command, adapters: Sequence[Adapter]
) -> None:
    folders = [write_peft(tmp_path / f"task-{i}", x) for i, x in enumerate(adapters[:6])]
    before = tree(tmp_path)
    words = ("pack", *folders, "-o", tmp_path / "s", "--floor", 0.95, "--bytes")
    code, document = run(*words, "8kB")
    assert code == 4
    assert tree(tmp_path) == before
    needed = int(re.search(r"--bytes (\d+)", document["error"]["cure"])[1])
    assert run(*words, needed)[0] == 0
    assert min(qualities(Shelf(tmp_path / "s")).values()) >= 0.95
    assert run(*words, needed)[0] == 4


# plan -----------------------------------------------------------------------------------------------------------------


def test_plan_draws_the_curve_that_pack_then_follows(tmp_path: Path, run: Command, adapters: Sequence[Adapter]) -> None:
    folders = [write_peft(tmp_path / f"task-{i}", x) for i, x in enumerate(adapters[:4])]
    before = tree(tmp_path)
    code, document = run("plan", *folders, "--coded", "--bytes", "20kB")
    assert code == 0
    assert tree(tmp_path) == before
    curve = document["curve"]
    for name in ("bytes", "percent", "mean"):
        assert [row[name] for row in curve] == sorted(row[name] for row in curve)
    assert curve[-1]["bytes"] / curve[-1]["percent"] * 100 == pytest.approx(2 * 4 * adapters[0].parameters)
    assert document["within"] == max((row for row in curve if row["bytes"] <= 20_000), key=lambda row: row["bytes"])
    shelf = packed(tmp_path / "s", {f"task-{i}": x for i, x in enumerate(adapters[:4])}, bytes=24_000, keep=0, floor=0)
    held = sum(slot.object.bytes for slot in shelf.snapshot().manifest.slots)
    row = max((row for row in curve if row["bytes"] <= held), key=lambda row: row["bytes"])
    assert row["mean"] == pytest.approx(mean_quality(shelf), abs=2e-3)
    code, text = run("plan", *folders, "--coded", as_json=False)
    assert "predicted quality, mean" in text


def test_plan_follows_the_cures_of_its_errors(tmp_path: Path, run: Command, adapters: Sequence[Adapter]) -> None:
    other = write_peft(tmp_path / "other", adapters[1], base_model_name_or_path="acme/tiny-4bit")
    words = ("plan", write_peft(tmp_path / "a", adapters[0]), other, "--coded")
    code, document = run(*words)
    assert (code, "--assume-base" in document["error"]["cure"]) == (3, True)
    code, document = run(*words, "--assume-base", "--bytes", 100)
    assert code == 2
    needed = re.search(r"--bytes (\d+)", document["error"]["cure"])[1]
    assert f"100 bytes are too few: the least for 2 adapters is {needed}" in document["error"]["message"]
    assert run(*words, "--assume-base", "--bytes", needed)[1]["within"]["bytes"] == int(needed)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plan_draws_a_file(tmp_path: Path, run: Command, adapters: Sequence[Adapter], ending: str) -> None:
    folder, file = write_peft(tmp_path / "a", adapters[0]), tmp_path / f"curve.{ending}"
    assert run("plan", folder, "--coded", "--plot", file, "--bytes", "5kB")[0] == 0
    drawn = file.read_bytes()
    assert drawn.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])
    assert drawn.rstrip().endswith({"png": b"IEND\xaeB`\x82", "svg": b"</svg>"}[ending])
    assert run("plan", folder, "--coded", "--plot", file, "--bytes", "5kB")[0] == 0
    assert file.read_bytes() == drawn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bytes", "1MB"), "--bytes and --plot are for coded objects"),
        (("--coded", "--bytes", 100, "--plot", "curve.png"), "100 bytes are too few: the least for 1 adapter is"),
        (("--coded", "--plot", "curve.xyz"), "cannot draw a .xyz file"),
        (("--coded", "--slots", "1..8"), "--coded does not use --slots"),
        (("--coded", "--merge", "svd", "-p", "a=1"), "--coded does not use --merge, -p"),
        (("--coded", "--rank", 4, "--dtype", "f16"), "--coded does not use --rank, --dtype"),
    ],
)
def test_plan_refuses_what_cannot_be(
    tmp_path: Path,
    run: Command,
    adapters: Sequence[Adapter],
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_peft(tmp_path / "a", adapters[0])
    before = tree(tmp_path)
    code, document = run("plan", folder, *words)
    assert code == 2
    assert message in document["error"]["message"]
    assert document["error"]["cure"]
    assert tree(tmp_path) == before


# convert --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path, adapters: Sequence[Adapter]) -> Shelf:
    """Three slots of whole adapters: task-0 and task-3 share one, task-1 and its copy another, task-2 is alone."""
    shelf = Shelf.create(tmp_path / "old", new_settings(3, policy="kmerge"))
    for i, x in enumerate(adapters[:3]):
        shelf.commit(plan_add(shelf.snapshot(), x, f"task-{i}", details={"prompt": f"prompt {i}"}))
    alike = adapters[0].with_factors({p: Factors(f.a, f.b, 2.0) for p, f in adapters[0].modules.items()})
    shelf.commit(plan_add(shelf.snapshot(), alike, "task-3"))
    shelf.commit(plan_add(shelf.snapshot(), adapters[1], "copy"))
    write_peft(tmp_path / "first", adapters[0])
    write_peft(tmp_path / "fourth", alike, lora_alpha=2.0 * alike.rank)
    return shelf


@pytest.mark.parametrize("words", [("--bytes", "60kB"), ("--slots", 4), ("--slots", 4, "--quality", 0.95)])
def test_convert_gives_every_task_a_coded_object_of_its_own(
    tmp_path: Path, run: Command, shared: Shelf, words: Sequence[object]
) -> None:
    before, output = tree(shared.path), tmp_path / "new"
    originals = ("--adapter", f"task-0={tmp_path / 'first'}", "--adapter", f"task-3={tmp_path / 'fourth'}")
    code, document = run("convert", shared.path, "-o", output, "--encoding", "coded", *words, *originals)
    assert code == 0
    assert tree(shared.path) == before
    made, old = Shelf(output).snapshot(), shared.snapshot()
    assert made.manifest.tasks == old.manifest.tasks
    assert sorted(slot.members for slot in made.manifest.slots) == [
        ("copy", "task-1"),
        ("task-0",),
        ("task-2",),
        ("task-3",),
    ]
    assert made.settings.placement.policy == ("bytes" if "--bytes" in words else "kmerge")
    least = 0.95 if 0.95 in words else 0.98
    for task, kept in qualities(Shelf(output)).items():
        assert document["tasks"][task]["predicted_quality"] == pytest.approx(kept)
        assert kept >= least - 1e-9
        if task in ("task-1", "task-2"):
            x, y = made.adapter(task), old.adapter(task)
            assert norm(combine([x, y], [1, -1])) / norm(y) < 0.8
    assert document["bytes"] == on_disk(Shelf(output))
    assert Shelf(output).verify() == []


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (("--encoding", "coded", "--bytes", "60kB"), "merged with others in their slots: task-0, task-3", 4),
        (("--encoding", "peft"), "--encoding 'peft'", 2),
        (("--encoding", "coded", "--slots", 0), "slots is 0", 2),
        (("--encoding", "coded", "--floor", 0.9), "--floor is for a shelf that counts bytes", 2),
        (("--encoding", "coded", "--bytes", "60kB", "--slots", 4, "--floor", 0.9), "--floor is for", 2),
        (("--encoding", "coded", "--quality", 1.5), "quality is 1.5", 2),
        (("--encoding", "coded", "--adapter", "task-2=FIRST"), "this is not the adapter of 'task-2'", 4),
        (
            ("--encoding", "coded", "--adapter", "task-0=FIRST", "--adapter", "task-3=FOURTH"),
            "4 adapters need a slot",
            2,
        ),
        (
            ("--encoding", "coded", "--bytes", 3000, "--adapter", "task-0=FIRST", "--adapter", "task-3=FOURTH"),
            "budget is 3000",
            4,
        ),
    ],
)
def test_convert_refuses_what_cannot_be_and_changes_nothing(
    tmp_path: Path, run: Command, shared: Shelf, words: Sequence[object], message: str, status: int
) -> None:
    before = tree(tmp_path)
    given = {"FIRST": str(tmp_path / "first"), "FOURTH": str(tmp_path / "fourth")}
    texts = [str(word).replace("FIRST", given["FIRST"]).replace("FOURTH", given["FOURTH"]) for word in words]
    code, document = run("convert", shared.path, "-o", tmp_path / "new", *texts)
    assert message in document["error"]["message"]
    assert document["error"]["cure"]
    assert code == status
    assert tree(tmp_path) == before


def test_an_empty_shelf_is_converted_into_an_empty_one(tmp_path: Path, run: Command) -> None:
    old = Shelf.create(tmp_path / "old", new_settings(3)).path
    code, document = run("convert", old, "-o", tmp_path / "new", "--encoding", "coded", "--bytes", "60kB")
    assert (code, document["tasks"], document["predicted_quality"]) == (0, {}, None)
    assert run("add", tmp_path / "new", write_peft(tmp_path / "a", adapter(0)))[0] == 0


@pytest.mark.parametrize(
    ("old", "words", "budget", "recipe"),
    [
        ({"slots": 3, "bytes": 10**7, "policy": "kmerge"}, (), (3, 10**7), {"policy": "kmerge", "quality": 0.99}),
        ({"slots": 3, "bytes": 10**7}, ("--slots", 4), (4, 10**7), {"policy": "kmerge++", "threshold": "auto"}),
        ({"slots": 3, "threshold": 0.2}, ("--slots", 4, "--bytes", 70_000), (4, 70_000), {"threshold": 0.2}),
        ({"slots": 3, "encoding": "coded", "quality": 0.95}, (), (3, None), {"quality": 0.95}),
        ({"slots": 3, "threshold": 0.6, "similarity": "l2"}, (), (3, None), {"threshold": 0.6, "similarity": "l2"}),
        ({"bytes": 70_000, "floor": 0.9}, (), (None, 70_000), {"policy": "bytes", "floor": 0.9, "quality": 0.997}),
        ({"bytes": 70_000, "floor": 0.9}, ("--floor", 0.7), (None, 70_000), {"floor": 0.7}),
        ({"bytes": 70_000, "quality": 0.95}, ("--bytes", 60_000), (None, 60_000), {"floor": 0.8, "quality": 0.95}),
        ({"bytes": 70_000}, ("--slots", 4), (4, 70_000), {"policy": "kmerge++", "encoding": "coded", "quality": 0.99}),
    ],
)
def test_a_converted_shelf_has_the_settings_given_and_else_the_old_ones(
    tmp_path: Path,
    run: Command,
    old: dict[str, Any],
    words: Sequence[object],
    budget: tuple[int | None, int | None],
    recipe: dict[str, Any],
) -> None:
    shelf = Shelf.create(tmp_path / "old", new_settings(old.pop("slots", None), keep=2, dtype="f16", **old))
    shelf.commit(plan_add(shelf.snapshot(), adapter(0), "task-0"))
    code, document = run("convert", shelf.path, "-o", tmp_path / "new", "--encoding", "coded", *words)
    assert code == 0, document
    settings = Shelf(tmp_path / "new").snapshot().settings
    assert settings.budget.document() == {"slots": budget[0], "bytes": budget[1], "keep": 2}
    assert {name: settings.recipe[name] for name in recipe} == recipe
    assert settings.merge.dtype == "f16"


def test_a_limit_that_the_old_shelf_has_holds_for_the_new_one_and_its_cure_works(tmp_path: Path, run: Command) -> None:
    shelf = Shelf.create(tmp_path / "old", new_settings(3, bytes=10**6, policy="kmerge"))
    for i in range(2):
        shelf.commit(plan_add(shelf.snapshot(), adapter(i), f"task-{i}"))
    shelf.commit(plan_remove(shelf.snapshot(), "task-1"))
    words = ("convert", shelf.path, "-o", tmp_path / "new", "--encoding", "coded", "--slots", 1, "--bytes")
    code, document = run(*words, 6_000)
    assert code == 4
    needed = int(re.search(r"--bytes (\d+)", document["error"]["cure"])[1])
    assert run(*words, needed)[0] == 0
    assert on_disk(Shelf(tmp_path / "new")) <= needed


def test_convert_reports_that_norms_are_no_longer_restored(tmp_path: Path, run: Command) -> None:
    for name, restored in (("with", True), ("without", False)):
        shelf = filled_with_slots(tmp_path / name, restore_norm=restored)
        assert run("convert", shelf.path, "-o", tmp_path / f"{name}-new", "--encoding", "coded")[0] == 0
        assert ("norm restoration is off on the new shelf" in run.stderr) is restored
        assert Shelf(tmp_path / f"{name}-new").snapshot().settings.merge.restore_norm is False


def test_what_is_coded_already_keeps_its_levels_and_what_was_lost_before_counts(tmp_path: Path, run: Command) -> None:
    shelf = filled(tmp_path / "old", [adapter(0)], bytes=10**6)
    words = ("convert", shelf.path, "--encoding", "coded", "-o")
    assert run(*words, tmp_path / "same")[0] == 0
    assert levels(Shelf(tmp_path / "same"), 0) == (held := levels(shelf, 0))
    assert qualities(Shelf(tmp_path / "same")) == qualities(shelf)
    assert run(*words, tmp_path / "less", "--quality", 0.9)[0] == 0
    assert levels(Shelf(tmp_path / "less"), 0) == held[: len(levels(Shelf(tmp_path / "less"), 0))] != held
    assert 0.9 <= qualities(Shelf(tmp_path / "less"))["task-0"] < qualities(shelf)["task-0"]
    shelf = filled_with_slots(tmp_path / "cut", rank=2)
    (slot,) = shelf.snapshot().manifest.slots
    assert run("convert", shelf.path, "--encoding", "coded", "-o", tmp_path / "coded")[0] == 0
    lost = norm(combine([adapter(0), Shelf(tmp_path / "coded").snapshot().adapter("task-0")], [1, -1]))
    kept = qualities(Shelf(tmp_path / "coded"))["task-0"]
    assert kept < quality(1 - slot.history.error**2)
    assert kept == pytest.approx(quality(1 - (lost / norm(adapter(0))) ** 2), abs=0.01)


def filled_with_slots(path: Path, **options: Any) -> Shelf:
    """A shelf of one slot with one adapter."""
    shelf = Shelf.create(path, new_settings(1, **options))
    shelf.commit(plan_add(shelf.snapshot(), adapter(0), "task-0"))
    return shelf
