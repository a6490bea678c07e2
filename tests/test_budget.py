"""A budget in bytes never leads to a shelf that cannot go on, and every cure that a refusal names works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashelf import (
    Adapter,
    BaseId,
    Factors,
    Modules,
    Shelf,
    cluster,
    new_settings,
    plan_add,
    plan_cluster,
    plan_remove,
    plan_update,
)
from lorashelf.errors import OverBudget
from lorashelf.formats.peft import encode
from lorashelf.shelf.budget import _with_room

LIMIT = 10_000  # what manifests, log and settings take here at most


def adapter(seed: int, *, rank: int = 8, dtype: str = "f32") -> Adapter:
    """Of few modules with many values, so that manifests are small beside it."""
    rng = np.random.default_rng(seed)
    shapes = {f"model.layers.{i}.q_proj": (rank, 512) for i in range(2)}
    sides = {path: rng.standard_normal((2, *shape)).astype(np.float32) for path, shape in shapes.items()}
    modules = {path: Factors(a, np.ascontiguousarray(b.T), 2.0) for path, (a, b) in sides.items()}
    return Adapter(Modules(modules), BaseId("acme/tiny"), dtype)


SIZE = encode(adapter(0)).size  # 66 kB


def options_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"--(\w+) (\w+)", text)


def configured(shelf: Shelf, option: str, value: str) -> None:
    shelf.configure({option: int(value) if value.isdecimal() else value})


@pytest.mark.parametrize("policy", ["kmerge", "kmerge++", "half", "random"])
@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("objects", [2.5, 3.5, 4.7, 6.5])
def test_every_slot_can_be_changed_again_and_again(tmp_path: Path, policy: str, keep: int, objects: float) -> None:
    """Slots of one size in a budget of so many of them: as many open as leave room for `keep` old states."""
    limit = int(objects * SIZE) + LIMIT
    shelf = Shelf.create(tmp_path / "s", new_settings(3, policy=policy, keep=keep, bytes=limit, threshold=1.0))
    plans = []
    for i in range(8):
        plans.append(plan_add(shelf.snapshot(), adapter(i), f"task-{i}"))
        shelf.commit(plans[-1])
    slots = min(3, int(objects) - keep)
    if slots < 1:
        assert all(plan.refused for plan in plans)
        return
    assert [plan.report["decision"] for plan in plans] == ["open"] * slots + ["fold"] * (8 - slots)
    assert [bool(plan.report.get("reason")) for plan in plans] == [
        slots <= i < 3 or (i >= slots and slots < 3) for i in range(8)
    ]
    for i in range(8):
        snapshot = shelf.snapshot()
        slot = snapshot.located(f"task-{i}")[0]
        if slot.history.method or len(slot.members) == 1:
            shelf.commit(plan_update(snapshot, f"task-{i}", adapter(50 + i), adapter(i)))
        assert shelf.snapshot().bytes <= limit
    assert shelf.verify() == []


def refused(tmp_path: Path, case: str) -> tuple[Shelf, Any]:
    """A shelf whose budget refuses something, and that something."""
    path, f16 = tmp_path / "s", {"dtype": "f16"} if case.endswith("f16") else {}
    keep = 0 if "keep 0" in case else 1
    room = SIZE // 2 if f16 else SIZE
    if case.startswith("open"):
        shelf = Shelf.create(path, new_settings(2, keep=keep, bytes=int((0.8 + 0.7 * keep) * room) + LIMIT // 2))
        return shelf, lambda: plan_add(shelf.snapshot(), adapter(0, **f16), "a")
    shelf = Shelf.create(path, new_settings(2, policy="kmerge", keep=keep))
    for i in range(2):
        shelf.commit(plan_add(shelf.snapshot(), adapter(i, **f16), f"task-{i}"))
    shelf.configure({"bytes": shelf.snapshot().bytes + int(0.6 * room)})
    if case.startswith("fold"):
        return shelf, lambda: plan_add(shelf.snapshot(), adapter(2, **{**f16, "rank": 16 - 8 * keep}), "late")
    return shelf, lambda: plan_update(shelf.snapshot(), "task-1", adapter(3, **{**f16, "rank": 16 - 8 * keep}))


def carried_out(shelf: Shelf, planned: Any) -> str | None:
    """Why it is refused, None if it is committed."""
    try:
        plan = planned()
        if plan.refused:
            return str(plan.refused)
        shelf.commit(plan)
    except OverBudget as error:
        return f"{error.what}; {error.cure}"
    return None


CASES = [
    f"{what}{keep}{dtype}" for what in ("open", "fold", "update") for keep in ("", " keep 0") for dtype in ("", " f16")
]


@pytest.mark.parametrize("case", CASES)
def test_every_cure_that_a_refusal_names_works(tmp_path: Path, case: str) -> None:
    shelf, planned = refused(tmp_path / "look", case)
    why = carried_out(shelf, planned)
    assert why is not None
    named = options_of(why)
    expected = (
        {"bytes"} | ({"keep"} if "keep 0" not in case else set()) | ({"rank"}) | (set() if "f16" in case else {"dtype"})
    )
    assert {option for option, _ in named} == expected, why
    for option, value in named:
        shelf, planned = refused(tmp_path / option, case)
        configured(shelf, option, value)
        assert carried_out(shelf, planned) is None, (option, value)
        limit = shelf.snapshot().settings.budget.bytes
        assert limit is not None
        assert shelf.snapshot().bytes <= limit


@pytest.mark.parametrize("case", CASES)
def test_the_cures_go_no_further_than_is_needed(tmp_path: Path, case: str) -> None:
    shelf, planned = refused(tmp_path / "look", case)
    for option, value in options_of(str(carried_out(shelf, planned))):
        less = {"bytes": int(value) - 100, "keep": int(value) + 1, "rank": int(value) + 1} if value.isdecimal() else {}
        if option in less:
            shelf, planned = refused(tmp_path / option, case)
            shelf.configure({option: less[option]})
            assert carried_out(shelf, planned) is not None, (option, value)


def test_a_shelf_that_is_full_already_goes_on_after_a_task_is_removed(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(3, policy="kmerge", keep=1))
    for i in range(3):
        shelf.commit(plan_add(shelf.snapshot(), adapter(i), f"task-{i}"))
    shelf.configure({"bytes": shelf.snapshot().bytes + SIZE // 2})
    assert plan_add(shelf.snapshot(), adapter(3), "late").refused
    shelf.commit(plan_remove(shelf.snapshot(), "task-1"))
    assert carried_out(shelf, lambda: plan_update(shelf.snapshot(), "task-0", adapter(4))) is None
    plan = plan_add(shelf.snapshot(), adapter(3), "late")
    assert plan.report["decision"] == "fold"
    assert "one more slot would leave no room to change any" in plan.report["reason"]


def test_clusters_leave_room_to_go_on(tmp_path: Path) -> None:
    named = {f"task-{i}": adapter(i) for i in range(4)}

    found = cluster(named, 2, method="random")

    def clustered(name: str, **options: Any) -> Shelf:
        settings = new_settings(2, **options)
        Shelf.create_with(tmp_path / name, settings, lambda snapshot: plan_cluster(snapshot, named, found))
        return Shelf(tmp_path / name)

    limit = int(2.5 * SIZE)
    with pytest.raises(OverBudget, match="no room to change any") as caught:
        clustered("s", bytes=limit)
    for option, value in options_of(str(caught.value.cure)):
        shelf = clustered(option, **{"bytes": limit, option: int(value) if value.isdecimal() else value})
        if option != "rank":
            assert carried_out(shelf, lambda shelf=shelf: plan_add(shelf.snapshot(), adapter(9), "late")) is None
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("modules", [1, 100])
def test_the_room_that_is_counted_is_enough_for_every_later_change(tmp_path: Path, modules: int, keep: int) -> None:
    """To the byte, with the facts of the objects that later changes write."""

    def small(seed: int) -> Adapter:
        rng = np.random.default_rng(seed)
        sides = {f"model.layers.{i}.q_proj": rng.standard_normal((2, 35_000 // modules)) for i in range(modules)}
        found = {path: Factors(np.float32(x[:1]), np.float32(x[1:]).T.copy(), 1.0) for path, x in sides.items()}
        return Adapter(Modules(found), BaseId("acme/tiny"), "f16")

    shelf = Shelf.create(tmp_path / "s", new_settings(2, policy="kmerge", keep=keep, bytes=999_999))
    shelf.commit(plan_add(shelf.snapshot(), small(0), "a"))
    needed = _with_room(shelf.snapshot(), plan_add(shelf.snapshot(), small(1), "b"))
    assert 100_000 <= needed < 999_999  # so that the setting takes as many bytes
    shelf.configure({"bytes": needed})
    plan = plan_add(shelf.snapshot(), small(1), "b")
    assert plan.report["decision"] == "open"
    shelf.commit(plan)
    for seed in range(2, 8):
        shelf.commit(plan_update(shelf.snapshot(), "ab"[seed % 2], small(seed)))
    assert shelf.snapshot().bytes <= needed
