"""Untrained adapters and modules (ΔW = 0, as before training): they change nothing, so they must not change others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command import Command
from factory import assert_same_delta, make_adapter, write_peft
from lorashelf import (
    METHODS,
    Adapter,
    Modules,
    Shelf,
    cluster,
    merge,
    new_settings,
    norm,
    plan_add,
    plan_cluster,
    plan_remove,
    plan_update,
)
from lorashelf.merging.average import without
from lorashelf.merging.spec import MergeSpec
from lorashelf.placement.partitioners import PARTITIONERS, partition
from lorashelf.report.preview import forecast
from test_content import folded

EVERY = pytest.mark.parametrize("method", sorted(METHODS))


def untrained(seed: int, *projections: str, side: str = "b") -> Adapter:
    """An adapter with lora_B (or lora_A) at 0 in these modules, in all if none is named."""
    x = make_adapter(seed)
    return x.with_factors(
        {
            path: replace(f, **{side: getattr(f, side) * 0}) if path.endswith(projections or ("",)) else f
            for path, f in x.modules.items()
        }
    )


@EVERY
@pytest.mark.parametrize("side", ["a", "b"])
def test_an_untrained_adapter_takes_no_part_in_a_merge(method: str, side: str) -> None:
    xs, idle = [make_adapter(0), make_adapter(1)], untrained(2, side=side)
    expected = merge(xs, method=method)
    for everyone in ([*xs, idle], [idle, *xs]):
        assert_same_delta(expected, merge(everyone, method=method))
    assert_same_delta(merge(xs, [0.7, 0.2], method=method), merge([*xs, idle], [0.7, 0.2, 5.0], method=method))
    assert norm(merge([untrained(3), untrained(4, side="a")], method=method)) == 0.0


@EVERY
def test_an_untrained_module_takes_no_part_either(method: str) -> None:
    whole, part = make_adapter(0), untrained(1, "q_proj")
    lacking = replace(part, modules=Modules({p: f for p, f in part.modules.items() if p.endswith("v_proj")}))
    params = {"density": 1.0} if METHODS[method].random else {}  # a mask depends on the adapter's digest
    expected = merge([whole, lacking], method=method, **params)
    assert_same_delta(expected, merge([whole, part], method=method, **params))


def held(shelf: Shelf, slot: int = 0) -> Adapter:
    return shelf.snapshot().stored(shelf.snapshot().manifest.slot(slot))


def test_an_untrained_adapter_neither_opens_a_slot_nor_enters_an_average(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(2, policy="kmerge"))
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(0), "a"))
    before = held(shelf).digest
    plan = plan_add(shelf.snapshot(), untrained(1), "idle")
    assert (plan.report["decision"], plan.report["merged"], plan.report["untrained"]) == ("fold", False, True)
    shelf.commit(plan)
    slot = shelf.snapshot().manifest.slot(0)
    assert (held(shelf).digest, slot.members, len(slot.history.merged)) == (before, ("a", "idle"), 1)
    assert plan_add(shelf.snapshot(), make_adapter(2), "b").report["decision"] == "open"


def test_a_slot_with_nothing_but_an_untrained_adapter_is_free(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(1, policy="kmerge"))
    shelf.commit(plan_add(shelf.snapshot(), untrained(0), "idle"))
    assert shelf.snapshot().manifest.slot(0).members == ("idle",)
    plan = plan_add(shelf.snapshot(), make_adapter(1), "a")
    assert (plan.report["decision"], plan.report["slot"], plan.report["members"]) == ("open", 0, ["a", "idle"])
    shelf.commit(plan)
    assert held(shelf).digest == make_adapter(1).digest
    shelf.commit(plan_add(shelf.snapshot(), make_adapter(2), "b"))
    assert_same_delta(merge([make_adapter(1), make_adapter(2)], method="linear"), held(shelf))
    assert shelf.verify() == []


def test_a_task_whose_adapter_was_left_out_is_removed_and_updated_for_itself(tmp_path: Path) -> None:
    shelf = Shelf.create(tmp_path / "s", new_settings(1, policy="kmerge"))
    a, b, c = (make_adapter(i) for i in range(3))
    for task, x in (("a", a), ("idle", untrained(9)), ("gone", untrained(8))):
        shelf.commit(plan_add(shelf.snapshot(), x, task))
    report = plan_remove(shelf.snapshot(), "gone", untrained(8)).report
    assert (report["removed"], "untrained" in report["reason"]) == ("route", True)
    shelf.commit(plan_remove(shelf.snapshot(), "gone"))
    shelf.commit(plan_update(shelf.snapshot(), "a", b))  # the only one averaged: no original is needed
    assert held(shelf).digest == b.digest
    shelf.commit(plan_update(shelf.snapshot(), "idle", c))
    assert_same_delta(merge([b, c], method="linear"), held(shelf))
    shelf.commit(plan_update(shelf.snapshot(), "idle", untrained(9), c))
    assert_same_delta(b, held(shelf))


@pytest.mark.parametrize("method", ["linear", "factor_mean"])
def test_what_was_left_out_of_a_fold_is_left_out_of_the_take_out(method: str) -> None:
    recipe = MergeSpec(method=method)
    whole, part = make_adapter(0), untrained(1, "q_proj")
    content = folded([whole, part], recipe)
    assert_same_delta(whole, without(content, part.digest, part, recipe)[0].adapter)
    assert_same_delta(part, without(content, whole.digest, whole, recipe)[0].adapter)
    late = make_adapter(2)
    content = folded([part, untrained(3, "q_proj"), late], recipe)  # q_proj is what the last one brought
    lacking = [x.with_factors({p: f for p, f in x.modules.items() if "v_proj" in p}) for x in (part, make_adapter(3))]
    assert_same_delta(merge([*lacking, late], method=method), content.adapter)


@pytest.mark.parametrize("method", ["linear", "factor_mean"])
def test_a_side_that_adapters_cancel_is_not_taken_for_untrained(method: str) -> None:
    x, late = make_adapter(0), make_adapter(1)
    opposite = x.with_factors({p: replace(f, a=-f.a) for p, f in x.modules.items()})
    content = folded([x, opposite, late], MergeSpec(method=method))
    assert norm(folded([x, opposite], MergeSpec(method=method)).adapter) == 0.0
    assert_same_delta(merge([x, opposite, late], method=method), content.adapter)


@pytest.mark.parametrize("method", [name for name, method in PARTITIONERS.items() if not method.by_loss])
def test_an_untrained_adapter_does_not_take_a_block(method: str) -> None:
    xs = [make_adapter(i) for i in range(6)]
    alone = partition(xs, 3, method=method)
    first, *others = partition([*xs, untrained(9)], 3, method=method)
    assert [[i for i in first if i != 6], *others] == alone
    assert 6 in first
    assert partition([untrained(0), untrained(1), untrained(2)], 2, method=method)


def test_clusters_and_forecasts_leave_it_out(tmp_path: Path) -> None:
    named = {f"t-{i}": make_adapter(i) for i in range(4)}
    with_idle = {**named, "u": untrained(9)}
    rows, expected = (forecast(some, [2], MergeSpec())[0] for some in (with_idle, named))
    assert rows["blocks"] == [[*expected["blocks"][0], "u"], *expected["blocks"][1:]]
    assert (rows["bytes"], rows["norm_ratio"]) == (expected["bytes"], expected["norm_ratio"])
    plans = [
        plan_cluster(
            Shelf.create(tmp_path / name, new_settings(2)).snapshot(), some, cluster(some, 2, method="agglomerative")
        )
        for name, some in (("a", with_idle), ("b", named))
    ]
    assert [x.digest for x in plans[0].writes.values()] == [x.digest for x in plans[1].writes.values()]
    assert [len(slot.history.merged) for slot in plans[0].manifest.slots] == [
        len(slot.history.merged) for slot in plans[1].manifest.slots
    ]


@pytest.mark.parametrize(
    ("idle", "said"),
    [(untrained(1), "idle: untrained (ΔW is 0 in every module)"), (untrained(1, "q_proj"), "idle: 2 of 4 modules are")],
)
def test_every_command_that_averages_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], idle: Adapter, said: str
) -> None:
    a, b = write_peft(tmp_path / "a", make_adapter(0)), write_peft(tmp_path / "idle", idle)

    command = Command(capsys)

    def run(*words: Any) -> dict[str, Any]:
        code, document = command(*words)
        assert code == 0
        assert command.stderr.count(said) == (0 if words[0] == "init" else 1)
        assert "left out of averages" in command.stderr or "averages" not in command.stderr
        return document

    run("init", tmp_path / "s", "--slots", 1)
    run("add", tmp_path / "s", a, b)
    run("merge", a, b, "-o", tmp_path / "m", "--method", "linear")
    run("cluster", a, b, "-o", tmp_path / "c", "--slots", 1, "--method", "single")
    run("plan", a, b, "--slots", 1)
