"""Taking a task off a shared slot: exactly, or by its route with the reason and a cure that works."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import assert_same_delta, make_adapter
from lorashelf import Adapter, BaseId, Shelf, new_settings, norm, plan_add, plan_remove, plan_update
from lorashelf.cli.arguments import slot_range
from lorashelf.errors import BaseMismatch, NotReversible, UsageError
from lorashelf.formats.peft import rounded
from lorashelf.lora.algebra import scaled
from lorashelf.merging.spec import MergeSpec
from lorashelf.report.preview import forecast

CANNOT = {
    "ties": ({"merge": "ties"}, "merged by ties"),
    "svd": ({"merge": "svd"}, "merged by svd"),
    "rank": ({"rank": 2}, "cut to rank 2"),
    "half": ({"policy": "half"}, "folded with half weights"),
}


def one_slot(path: Path, xs: dict[str, Adapter], **options: Any) -> Shelf:
    shelf = Shelf.create(path, new_settings(1, **{"policy": "kmerge", **options}))
    for task, x in xs.items():
        shelf.commit(plan_add(shelf.snapshot(), x, task))
    return shelf


def held(shelf: Shelf, task: str) -> Adapter:
    snapshot = shelf.snapshot()
    return snapshot.stored(snapshot.located(task)[0])


def one_step(seed: int, size: float, dtype: str) -> Adapter:
    """An adapter as after one step of training: A is random, B tiny; ‖ΔW‖ = size."""
    x = make_adapter(seed, dtype=dtype)
    factor = np.float32(size / norm(x))
    return rounded(x.with_factors({path: replace(f, b=f.b * factor) for path, f in x.modules.items()}))


@pytest.mark.parametrize(("dtype", "size"), [("f16", 1e-3), ("bf16", 0.03), ("f32", 1e-8)])
def test_a_task_that_stays_is_not_wiped_by_what_is_taken_out(tmp_path: Path, dtype: str, size: float) -> None:
    large, small = scaled(rounded(make_adapter(0, dtype=dtype)), 0.25), one_step(1, size, dtype)
    shelf = one_slot(tmp_path / "s", {"large": large, "small": small})
    before = held(shelf, "small")
    with pytest.raises(NotReversible, match="the rest is so small compared with this adapter"):
        plan_update(shelf.snapshot(), "large", make_adapter(2, dtype=dtype), large)
    plan = plan_remove(shelf.snapshot(), "large", large)
    assert (plan.report["removed"], plan.report["precision"]) == ("route", None)
    assert "the rest is so small compared with this adapter that rounding would leave" in plan.report["reason"]
    shelf.commit(plan)
    assert held(shelf, "small").digest == before.digest
    assert norm(before) > 0


@pytest.mark.parametrize("name", CANNOT)
def test_a_slot_that_cannot_be_taken_apart_says_why_and_what_to_do(tmp_path: Path, name: str) -> None:
    options, reason = CANNOT[name]
    xs = {task: make_adapter(i) for i, task in enumerate("abc")}
    shelf = one_slot(tmp_path / "s", xs, **options)
    for adapter in (None, xs["b"]):  # the original would not help
        report = plan_remove(shelf.snapshot(), "b", adapter).report
        assert report["removed"] == "route"
        assert report["reason"].startswith(f"the slot's adapters cannot be taken apart: {reason}; ")
    with pytest.raises(NotReversible, match=f"cannot be taken apart: {reason}") as caught:
        plan_update(shelf.snapshot(), "b", make_adapter(9), xs["b"])
    assert "lorashelf remove b, then add the new adapter" in str(caught.value.cure)
    shelf.commit(plan_remove(shelf.snapshot(), "b"))
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(9), "b"))
    assert shelf.snapshot().manifest.slots[0].members == ("a", "b", "c")
    assert "remove the slot's other tasks as well and add their originals anew" in str(caught.value.cure)
    for task in ("a", "b", "c"):
        plan = plan_remove(shelf.snapshot(), task)
        shelf.commit(plan)
    assert plan.report["removed"] == "slot"
    fresh = one_slot(tmp_path / "fresh", {task: xs[task] for task in "ac"}, **options)
    for task in "ac":
        shelf.commit(plan_add(shelf.snapshot(), xs[task], task))
    assert_same_delta(held(fresh, "a"), held(shelf, "a"))


@pytest.mark.parametrize(
    ("options", "folded"),
    [({}, True), ({"merge": "factor_mean"}, True), *((options, False) for options, _ in CANNOT.values())],
)
def test_an_add_reports_whether_it_can_be_taken_out_again(
    tmp_path: Path, options: dict[str, Any], folded: bool
) -> None:
    x, y = make_adapter(0), make_adapter(1)
    shelf = one_slot(tmp_path / "s", {"a": x}, **options)
    assert plan_add(Shelf.create(tmp_path / "t", new_settings(1)).snapshot(), x, "a").report["reversible"] is True
    plan = plan_add(shelf.snapshot(), y, "b")
    assert plan.report["reversible"] is folded
    shelf.commit(plan)
    assert plan_add(shelf.snapshot(), y, "copy").report["reversible"] is folded  # only routed
    assert (plan_remove(shelf.snapshot(), "b", y).report["removed"] == "average") is folded
    refused = plan_add(Shelf.create(tmp_path / "u", new_settings(1, bytes=2000)).snapshot(), x, "a")
    assert (refused.report["decision"], refused.report["reversible"]) == ("refuse", None)


def test_an_adapter_of_two_tasks_in_a_shared_slot_stays_and_the_cure_works(tmp_path: Path) -> None:
    x = make_adapter(0)
    shelf = one_slot(tmp_path / "s", {"a": x, "copy": x, "b": make_adapter(1)})
    with pytest.raises(NotReversible, match="same adapter, which stays in the slot: copy") as caught:
        plan_update(shelf.snapshot(), "a", make_adapter(2), x)
    assert str(caught.value.cure) == "lorashelf remove a, then add the new adapter"
    shelf.commit(plan := plan_remove(shelf.snapshot(), "a", x))
    assert plan.report["reason"] == "another task here is served by the same adapter; it stays in the slot"
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(2), "a"))


def test_an_emptied_shelf_takes_adapters_of_any_base(tmp_path: Path) -> None:
    first, other = make_adapter(0, base="acme/one"), make_adapter(1, base="acme/two")
    shelf = one_slot(tmp_path / "s", {"a": first}, keep=3)
    with pytest.raises(BaseMismatch):
        plan_add(shelf.snapshot(), other, "b")
    shelf.commit(plan_remove(shelf.snapshot(), "a"))
    assert (shelf.snapshot().manifest.base, shelf.snapshot().manifest.scores) == (None, ())
    shelf.commit(plan_add(shelf.snapshot(), other, "b"))
    assert shelf.snapshot().manifest.base == BaseId("acme/two")
    with pytest.raises(BaseMismatch):
        plan_add(shelf.snapshot(), first, "a")
    shelf.undo()
    shelf.undo()
    with pytest.raises(BaseMismatch):  # what is back is of the first base
        plan_add(shelf.snapshot(), other, "b")


def test_a_base_in_the_settings_outlasts_the_adapters(tmp_path: Path) -> None:
    shelf = one_slot(tmp_path / "s", {"a": make_adapter(0, base="acme/one")}, base="acme/one", keep=3)
    shelf.commit(plan_remove(shelf.snapshot(), "a"))
    with pytest.raises(BaseMismatch, match="acme/two"):
        plan_add(shelf.snapshot(), make_adapter(1, base="acme/two"), "b")
    shelf.configure({"base": "acme/two"})
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(1, base="acme/two"), "b"))


@pytest.mark.parametrize(
    ("slots", "fault"),
    [
        ("0..3", "contains 0; the minimum is 1"),
        ("2,0", "contains 0"),
        ("8..1", "runs backwards"),
        ("a..b", "is not a number, a list or a range"),
        ("9" * 5000, "is not a number, a list or a range"),
        ("", "is not a number"),
    ],
)
def test_numbers_of_slots_that_cannot_be_are_refused_in_words(slots: str, fault: str) -> None:
    with pytest.raises(UsageError, match=re.escape(fault)):
        slot_range(slots, 3)


@pytest.mark.parametrize(
    ("slots", "found"),
    [("1..100000000", [1, 2, 3]), ("2..3", [2, 3]), ("7..9", [7]), ("2,100000000", [2, 100000000]), ("5", [5])],
)
def test_a_range_of_slots_ends_where_every_adapter_has_its_own(slots: str, found: list[int]) -> None:
    assert slot_range(slots, 3) == found
    adapters = {str(i): make_adapter(i) for i in range(3)}
    assert [row["filled"] for row in forecast(adapters, found, MergeSpec())] == [min(3, count) for count in found]
