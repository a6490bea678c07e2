"""Experiments as data: suites, cells, assignments, results; resumed after a kill at any point, shared by processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import make_adapter
from lorashelf import Adapter, Factors, Shelf, merge, new_settings, plan_add, read_adapter
from lorashelf.bench import page
from lorashelf.bench.assignment import Inputs, _known_search, arrival, assign, bytes_of
from lorashelf.bench.plot import _lines as points_of
from lorashelf.bench.plot import drawn
from lorashelf.bench.results import DRAWS, Sample, mean_over_tasks, path_of, read_results, shares_kept
from lorashelf.bench.run import CLAIMS, MEASURED, run, status
from lorashelf.bench.suite import Cell, Suite, read_suite
from lorashelf.cli import main
from lorashelf.errors import UsageError
from lorashelf.lora.algebra import combine, compress, norm
from lorashelf.models.hf import HFBackend
from lorashelf.result_store import sole
from lorashelf.tasks.folders import Example, Task
from test_evaluation import tiny_adapter
from tiny_base import tiny_base

ROOT = Path(__file__).parent.parent
SUITE = """
format = 1
title = "Five tasks"
reference = "random"

[[cells]]
serve = ["base", "own"]

[[cells]]
cluster = ["random", "type"]
slots = 2
seed = [0, 1]

[[cells]]
code = "coded"
percent = [60, 100]

[[cells]]
arrive = "kmerge"
slots = 2
priority = 0
measure = ["loss", "answers"]

[[cells]]
search = "d2c"
slots = 2
iterations = 6
examples_per_task = 2
"""


def written(folder: Path, text: str = SUITE) -> Suite:
    path = folder / "five.toml"
    path.write_text(text)
    return read_suite(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Adapter], dict[str, Task], HFBackend]:
    """Five tasks of two types with examples and adapters of a tiny base."""
    base = tiny_base(tmp_path_factory.mktemp("base"))
    names = ["a-de", "a-en", "b-de", "b-en", "b-fr"]
    adapters = {name: tiny_adapter(seed, str(base)) for seed, name in enumerate(names)}
    examples = tuple(Example(f"text {i}", f"answer {i}") for i in range(4))
    splits = {"train": examples[:2], "validation": examples}
    tasks = {name: Task(name, f"Do {name}:", name[0], name[2:], "f1", 4, splits) for name in names}
    return adapters, tasks, HFBackend.open(str(base), dtype="f32")


# suites -------------------------------------------------------------------------------------------------------------


def test_a_list_makes_a_cell_per_element_and_priority_comes_first(tmp_path: Path) -> None:
    suite = written(tmp_path)
    assert [cell.label for cell in suite.cells] == [
        "kmerge slots=2",
        "base",
        "own",
        "random slots=2",
        "random slots=2 seed=1",
        "type",
        "type seed=1",
        "coded percent=60",
        "coded percent=100",
        "d2c slots=2 iterations=6 examples_per_task=2",
    ]
    assert len({cell.id for cell in suite.cells}) == 10


def test_every_fault_of_a_suite_is_named(tmp_path: Path) -> None:
    text = """
format = 2
limit = 0
colour = "red"
shares = [1]
tasks = ["a-en", 1]
measured_tasks = ["b-en"]
[[cells]]
cluster = ["random", "rnadom"]
slots = 0
merge = "ties"
parameters = {density = 0.5}
[[cells]]
serve = "own"
slots = 3
[[cells]]
slots = 3
[[cells]]
code = "zip"
percent = [0, "5", 101]
levels = 0
slots = 3
[[cells]]
code = "coded"
[[cells]]
arrive = "kmerge"
order = "best"
threshold = 2
merge = ["linear", "mean"]
measure = ["speed"]
similarity = "l3"
after = 0
hours = -1
[[cells]]
cluster = "random"
alpha = 1
[[cells]]
cluster = "dirichlet"
alpha = [0, "1"]
over = "size"
[[cells]]
cluster = "blocks_of"
restore_norm = "yes"
[[cells]]
cluster = "type"
slots = 3
[[cells]]
code = ["rank_bits", "loraquant"]
rank = 0
bits = 9
ratio = 2
k = 3
"""
    with pytest.raises(UsageError) as caught:
        written(tmp_path, text)
    for fault in (
        "format is 2",
        "limit is 0",
        "unknown key 'colour'",
        "tasks is not a list of names",
        "measured_tasks has 'b-en', which tasks lacks",
        "cluster is 'rnadom'",
        "slots is 0",
        "serve has no option 'slots'",
        "cells 3: give one of serve, code, cluster, arrive, search",
        "cells 4: code is 'zip'; choose from coded, rank_bits, loraquant, vlora, lorashare",
        "percent is 0, not a number above 0 and at most 100",
        "percent is '5'",
        "percent is 101",
        "levels is 0",
        "code has no option 'slots'",
        "cells 5: percent is None",
        "order is 'best'",
        "threshold is 2",
        "merge is 'mean'",
        "measure is ['speed']",
        "shares is not a list of names",
        "similarity is 'l3'",
        "after is 0",
        "hours is -1",
        "cells 7: cluster has no option 'alpha'",
        "alpha is 0, not a positive number",
        "alpha is '1'",
        "over is 'size'",
        "cells 9: result is None, not the name of a result",
        "restore_norm is 'yes', not true or false",
        "cells 10: cluster has no option 'slots'",
        "cells 11: code has no option 'k'",
        "rank is 0; it must be at least 1",
        "bits is 9; it must be from 1 to 8",
        "ratio is 2; it must be from 0 to 1",
    ):
        assert fault in str(caught.value)


def test_a_parameter_that_the_method_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="linear has no parameter 'density'"):
        written(tmp_path, 'format = 1\n[[cells]]\ncluster = "random"\nparameters = {density = 0.5}\n')


def test_titles_and_order_leave_a_suites_digest_as_it_is(tmp_path: Path) -> None:
    suite = written(tmp_path)
    assert replace(suite, title="x", cells=suite.cells[::-1]).digest == suite.digest
    assert replace(suite, limit=3).digest != suite.digest
    assert replace(suite, cells=suite.cells[1:]).digest != suite.digest


def test_a_cell_listed_twice_has_every_measure_and_the_lowest_priority(tmp_path: Path) -> None:
    text = """
format = 1
[[cells]]
serve = "own"
measure = ["loss", "answers"]
priority = 3
[[cells]]
serve = ["base", "own"]
"""
    assert [(c.method, c.priority, c.measure) for c in written(tmp_path, text).cells] == [
        ("own", 1, ("loss", "answers")),
        ("base", 1, ("loss",)),
    ]


def test_options_that_came_later_leave_the_names_of_older_results_as_they_are() -> None:
    """The results that are committed are those of the suites' cells."""
    for name in ("small", "first_table", "frontier"):
        suite = read_suite(ROOT / "suites" / f"{name}.toml")
        alone = replace(suite, shared=())  # without the cells that other suites have measured
        assert set(read_results(alone, suite.folder)) == {
            path.stem.rpartition("-")[2] for path in suite.folder.glob("*.json")
        }


@pytest.mark.parametrize("name", ["d2c", "d2c_scores", "kmerge", "kmerge_scores", "next", "seeds", "seeds_one"])
def test_the_head_of_a_suite_states_the_hours_of_its_priorities(name: str) -> None:
    path = ROOT / "suites" / f"{name}.toml"
    hours: Counter[int] = Counter()
    for cell in read_suite(path).cells:
        assert cell.hours is not None, cell.label
        hours[cell.priority] += cell.hours
    stated = re.findall(r"^# priority (\d+) \((\d+\.\d) h\): ", path.read_text(), re.MULTILINE)
    assert stated == [(str(number), f"{total:.1f}") for number, total in sorted(hours.items())]


# assignments --------------------------------------------------------------------------------------------------------


COMMON = {"slots": 2, "merge": "linear", "parameters": {}, "rank": None, "dtype": "f32", "seed": 0}


def cell(how: Any, method: str, **options: Any) -> Cell:
    return Cell(how, method, COMMON | options, ("loss",))


def test_the_worst_order_has_all_tasks_of_a_type_in_a_row() -> None:
    types = {f"{kind}-{i}": kind for kind in "abc" for i in range(4)}
    for seed in range(5):
        order = arrival(cell("arrive", "kmerge", order="worst", seed=seed), types)
        assert sorted(order) == sorted(types)
        assert sum(types[x] != types[y] for x, y in itertools.pairwise(order)) == 2
    drawn = [arrival(cell("arrive", "kmerge", order="random", seed=seed), types) for seed in range(5)]
    assert any(sum(types[x] != types[y] for x, y in itertools.pairwise(o)) > 2 for o in drawn)
    assert len({tuple(order) for order in drawn}) == 5


def test_arrivals_are_those_of_a_shelf(tmp_path: Path) -> None:
    adapters = {f"t{i}-en": make_adapter(i) for i in range(6)}
    tasks = {name: Task(name, "p", name[:2]) for name in adapters}
    found = assign(cell("arrive", "kmerge++", order="random", threshold=0.01), Inputs(adapters, tasks, None, tmp_path))
    shelf = Shelf.create(tmp_path / "s", new_settings(2, threshold=0.01, dtype="f32"))
    for task in found.provenance["order"]:
        shelf.commit(plan_add(shelf.snapshot(), adapters[task], task))
    snapshot = shelf.snapshot()
    for slot in snapshot.manifest.slots:
        served = [found.serving[task] for task in slot.members]
        assert {x.digest for x in served if x} == {snapshot.stored(slot).digest}
    assert found.provenance["blocks"] == [list(slot.members) for slot in snapshot.manifest.slots]


def test_sizes_are_compared_at_the_dtype_of_the_own_adapters(tmp_path: Path) -> None:
    """Merges are computed and kept in float32, which must not count as storage."""
    adapters = {name: make_adapter(i, dtype="f16") for i, name in enumerate(["a-en", "b-en", "c-en", "d-en"])}
    tasks = {name: Task(name, "p", name[:1]) for name in adapters}
    merged = assign(cell("cluster", "random"), Inputs(adapters, tasks, None, tmp_path))
    assert {x.dtype for x in merged.serving.values() if x} == {"f32"}
    assert merged.bytes("f16") == pytest.approx(bytes_of(adapters.values(), "f16") / 2, rel=0.02)
    distinct = {x.digest: x for x in merged.serving.values() if x}.values()
    values = 2 * sum(x.parameters for x in distinct)
    assert merged.bytes("f32") - merged.bytes("f16") == pytest.approx(values, abs=64)  # offsets have more digits


def test_adapters_are_truncated_before_they_are_served_or_merged(tmp_path: Path) -> None:
    adapters = {name: make_adapter(i, rank=4) for i, name in enumerate(["a-en", "b-en"])}
    inputs = Inputs(adapters, {name: Task(name, "p", "any") for name in adapters}, None, tmp_path)
    cut = {name: compress(x, 1)[0] for name, x in adapters.items()}
    own = assign(Cell("serve", "own", {"adapter_rank": 1}, ("loss",)), inputs)
    assert {name: x.digest for name, x in own.serving.items() if x} == {name: x.digest for name, x in cut.items()}
    chosen = cell("cluster", "single", slots=1)
    merged = assign(replace(chosen, options={**chosen.options, "adapter_rank": 1}), inputs)
    wanted = assign(chosen, replace(inputs, adapters=cut))
    whole = assign(chosen, inputs)
    assert merged.serving["a-en"] is not None
    assert merged.serving["a-en"].digest == wanted.serving["a-en"].digest != whole.serving["a-en"].digest
    options = {**COMMON, "adapter_rank": 1, "order": "name", "threshold": "auto"}
    arrived = assign(Cell("arrive", "kmerge", options, ("loss",)), inputs)
    assert arrived.serving["a-en"] is not None
    assert arrived.serving["a-en"].digest == cut["a-en"].digest


def test_blocks_by_language_are_those_of_the_tasks(tmp_path: Path) -> None:
    adapters = {name: make_adapter(i) for i, name in enumerate(["a-de", "a-en", "b-de"])}
    tasks = {name: Task(name, "p", name[0], name[2:]) for name in adapters}
    found = assign(cell("cluster", "language"), Inputs(adapters, tasks, None, tmp_path))
    assert found.provenance["blocks"] == [["a-de", "b-de"], ["a-en"]]


def test_blocks_by_type_are_those_of_the_tasks(tmp_path: Path) -> None:
    adapters = {name: make_adapter(i) for i, name in enumerate(["x", "y", "z"])}
    tasks = {name: Task(name, "p", "odd" if name == "y" else "even") for name in adapters}
    found = assign(cell("cluster", "type"), Inputs(adapters, tasks, None, tmp_path))
    assert found.provenance["blocks"] == [["x", "z"], ["y"]]


@pytest.mark.parametrize("over", ["type", "language"])
def test_dirichlet_blocks_are_balanced_and_purer_the_smaller_alpha_is(tmp_path: Path, over: str) -> None:
    names = [f"{kind}-{language}" for kind in "abcde" for language in ("de", "en", "es", "fr")]
    adapters = {name: make_adapter(i) for i, name in enumerate(names)}
    tasks = {name: Task(name, "p", name[0], name[2:]) for name in names}

    def purity(alpha: float, seed: int) -> float:
        chosen = Cell("cluster", "dirichlet", {**COMMON, "slots": 4, "alpha": alpha, "over": over, "seed": seed}, ())
        blocks = assign(chosen, Inputs(adapters, tasks, None, tmp_path)).provenance["blocks"]
        assert sorted(name for block in blocks for name in block) == sorted(names)
        assert [len(block) for block in blocks] == [5, 5, 5, 5]
        return sum(max(Counter(getattr(tasks[t], over) for t in block).values()) for block in blocks) / len(names)

    pure, mixed = (np.mean([purity(alpha, seed) for seed in range(10)]) for alpha in (0.05, 100))
    assert pure > mixed + 0.2
    assert purity(1, 0) == purity(1, 0)


def test_the_blocks_of_another_result_are_merged_by_another_method(tmp_path: Path) -> None:
    adapters = {f"t{i}": make_adapter(i) for i in range(4)}
    tasks = {name: Task(name, "p", "t") for name in adapters}
    blocks = [["t0", "t3"], ["t1", "t2"]]
    chosen = Cell("cluster", "blocks_of", {**COMMON, "merge": "svd", "result": "d2c-abc"}, ())
    found = assign(chosen, Inputs(adapters, tasks, None, tmp_path, results={"abc": {"provenance": {"blocks": blocks}}}))
    assert found.provenance == {"blocks": blocks}
    served = found.serving["t0"]
    assert served.digest == found.serving["t3"].digest == merge([adapters["t0"], adapters["t3"]], method="svd").digest
    for results in ({}, {"abc": {"provenance": {}}}, {"abc": {"provenance": {"blocks": blocks[:1]}}}):
        with pytest.raises(UsageError, match="d2c-abc"):
            assign(chosen, Inputs(adapters, tasks, None, tmp_path, results=results))


@pytest.mark.parametrize("how", [("cluster", "single"), ("arrive", "kmerge")])
def test_a_cell_may_restore_the_norm_of_its_merges(how: tuple[str, str], tmp_path: Path) -> None:
    adapters = {f"t{i}": make_adapter(i) for i in range(3)}
    tasks = {name: Task(name, "p", "t") for name in adapters}
    way = {"order": "name", "threshold": "auto"} if how[0] == "arrive" else {}
    inputs = Inputs(adapters, tasks, None, tmp_path)
    sizes = [
        norm(assign(cell(*how, slots=1, merge="factor_mean", **way, **more), inputs).serving["t0"])
        for more in ({}, {"restore_norm": True})
    ]
    assert sizes[1] == pytest.approx(np.mean([norm(x) for x in adapters.values()]), rel=1e-5)
    assert sizes[0] < 0.8 * sizes[1]


def test_a_cell_that_does_not_restore_norms_has_the_identity_that_it_had_before(tmp_path: Path) -> None:
    plain, restored = written(tmp_path, 'format = 1\n[[cells]]\ncluster = "type"\nrestore_norm = [false, true]\n').cells
    assert plain.document() == {"how": "cluster", "method": "type", **{k: COMMON[k] for k in COMMON if k != "slots"}}
    assert restored.document() == {**plain.document(), "restore_norm": True}
    assert restored.label == "type restore_norm=True"


def test_after_some_arrivals_only_those_tasks_are_served(tmp_path: Path) -> None:
    adapters = {f"t{i}-en": make_adapter(i) for i in range(6)}
    tasks = {name: Task(name, "p", name[:2]) for name in adapters}
    options = {"order": "random", "threshold": "auto"}
    whole, part = (
        assign(cell("arrive", "kmerge", **options, **more), Inputs(adapters, tasks, None, tmp_path))
        for more in ({}, {"after": 4})
    )
    assert part.provenance["order"] == whole.provenance["order"][:4]
    assert sorted(part.serving) == sorted(whole.provenance["order"][:4])
    held = {task: x.digest for task, x in part.serving.items() if x}
    shelf = Shelf.create(tmp_path / "s", new_settings(2, policy="kmerge", dtype="f32"))
    for task in part.provenance["order"]:
        shelf.commit(plan_add(shelf.snapshot(), adapters[task], task))
    assert held == {task: shelf.snapshot().adapter(task).digest for task in held}


def test_arrivals_may_be_compared_by_another_metric(tmp_path: Path) -> None:
    """Adapters of two sizes: by distance the small ones are alike, by cosine each is like its large one."""
    small = {f"s{i}-en": make_adapter(i, scale=0.01) for i in range(2)}
    large = {f"l{i}-en": make_adapter(i, scale=5.0) for i in range(2)}
    adapters = {"l0-en": large["l0-en"], "m-en": small["s1-en"], "z-en": small["s0-en"]}
    tasks = {name: Task(name, "p", "t") for name in adapters}
    options = {"order": "name", "threshold": "auto"}
    blocks = {
        metric: assign(
            cell("arrive", "kmerge", similarity=metric, **options), Inputs(adapters, tasks, None, tmp_path)
        ).provenance["blocks"]
        for metric in ("cosine", "l1", "l2", "linf")
    }
    assert blocks["cosine"] == [["l0-en", "z-en"], ["m-en"]]
    assert blocks["l1"] == blocks["l2"] == blocks["linf"] == [["l0-en"], ["m-en", "z-en"]]


def test_codes_share_the_bytes_and_each_serves_its_own_task(tmp_path: Path) -> None:
    """An adapter that is four in one, and so takes more bytes to keep as much, gets more of them."""
    adapters = {f"{i}-en": make_adapter(i, layers=3, rank=2) for i in range(3)}
    adapters["wide-en"] = make_adapter(9, layers=3, rank=8)
    tasks = {name: Task(name, "p", "any") for name in adapters}
    size = int(2 * sum(x.parameters for x in adapters.values()) * 0.4)
    chosen = Cell("code", "coded", {"percent": 40, "levels": 3}, ("loss",))
    found = assign(chosen, Inputs(adapters, tasks, None, tmp_path))
    assert 0.95 * size < found.bytes("f16") <= size
    assert found.bytes("f16") == sum(sum(code["levels"]) for code in found.coded.values())
    assert {len(code["levels"]) for code in found.coded.values()} <= {1, 2, 3}
    for task, own in adapters.items():
        decoded = found.serving[task]
        assert decoded is not None
        gone = norm(combine([own, decoded], [1, -1])) ** 2 / norm(own) ** 2
        assert gone == pytest.approx(1 - found.coded[task]["energy_kept"], abs=0.02)
    assert found.coded["wide-en"]["bytes"] > max(found.coded[f"{i}-en"]["bytes"] for i in range(3))


def test_gains_of_codes_are_fitted_to_training_examples_and_resumed(
    world: tuple[dict[str, Adapter], dict[str, Task], HFBackend], tmp_path: Path
) -> None:
    adapters, tasks, backend = world
    plain = Cell("code", "coded", {"percent": 90, "levels": 2}, ("loss",))
    tasks = {name: replace(t, splits={**t.splits, "test": t.splits["train"]}) for name, t in tasks.items()}
    fitted = replace(plain, options={**plain.options, "fit": 2})
    inputs = Inputs(adapters, tasks, backend, tmp_path, partial(Interrupting(3), fitted))
    with pytest.raises(KeyboardInterrupt):
        assign(fitted, inputs)
    (journal,) = tmp_path.glob("gains-*.jsonl")
    begun = journal.read_bytes()
    assert len(begun.splitlines()) == 3
    found, before = (assign(cell, replace(inputs, watch=iter)) for cell in (fitted, plain))
    assert journal.read_bytes().startswith(begun)
    assert len(journal.read_bytes().splitlines()) == len(adapters)
    gains = {line["unit"]["task"]: line["result"] for line in map(json.loads, journal.read_text().splitlines())}
    assert any(factor != 1 for factors in gains.values() for factor in factors.values())
    for task, served in found.serving.items():
        wanted = before.serving[task]
        assert served is not None
        assert wanted is not None
        scaled = {p: Factors(f.a, f.b, f.scale * gains[task][p]) for p, f in wanted.modules.items()}
        assert norm(combine([served, wanted.with_factors(scaled)], [1, -1])) < 0.1 * norm(served)
    assert found.bytes("f16") <= 0.9 * sum(2 * x.parameters for x in adapters.values())
    some = sorted(adapters)[:2]
    (tmp_path / "b").mkdir()
    assign(fitted, replace(inputs, folder=tmp_path / "b", watch=iter, split="test", measured_tasks=some))
    (other,) = (tmp_path / "b").glob("gains-*.jsonl")
    units = {line["unit"]["task"]: line["unit"] for line in map(json.loads, other.read_text().splitlines())}
    first = {line["unit"]["task"]: line["unit"] for line in map(json.loads, journal.read_text().splitlines())}
    assert sorted(units) == some
    for task, unit in units.items():
        assert unit["check"] == backend.fitting(tasks[task].examples("validation"))[0].drawn(2, 0).digest
        assert unit["check"] != first[task]["check"]


def test_a_codes_bytes_stand_beside_its_losses(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    (cell,) = (cell for cell in suite.cells if cell.label == "coded percent=60")
    result = read_results(suite, folder)[cell.id]
    assert result["bytes"] == sum(task["bytes"] for task in result["tasks"].values())
    assert all(task["bytes"] == sum(task["levels"]) for task in result["tasks"].values())
    assert all(0.5 < task["energy_kept"] < 1 for task in result["tasks"].values())
    assert result["bytes"] <= 0.6 * 2 * 5 * 336


# running ------------------------------------------------------------------------------------------------------------


class Interrupting:
    """A watch that stops after so many steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, _: Cell, steps: Sequence[Any]) -> Any:
        for step in steps:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield step


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what differs from run to run."""
    rest = {name: value for name, value in result.items() if name != "seconds"}
    search = rest["provenance"].get("search")
    if search:
        rest["provenance"] = {**rest["provenance"], "search": {**search, "evaluations": None}}
    return rest


@pytest.mark.parametrize("after", [1, 6, 14, 24])
def test_an_interrupted_run_goes_on_and_measures_nothing_twice(world: Any, tmp_path: Path, after: int) -> None:
    adapters, tasks, backend = world
    suite = written(tmp_path)
    whole = {c.id: plain(r) for c, r in run(suite, adapters, tasks, backend, tmp_path / "whole")}
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        list(run(suite, adapters, tasks, backend, folder, Interrupting(after)))
    begun = set(read_results(suite, folder))
    rest = {c.id for c, _ in run(suite, adapters, tasks, backend, folder)}
    assert begun.isdisjoint(rest)
    assert {identity: plain(r) for identity, r in read_results(suite, folder).items()} == whole
    lines = [
        json.loads(line)["unit"]
        for path in (folder / MEASURED).glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == len({json.dumps(unit, sort_keys=True) for unit in lines})
    assert list(run(suite, adapters, tasks, backend, folder)) == []


def test_a_run_up_to_a_priority_leaves_the_cells_after_it(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    suite = written(tmp_path)
    cells = tuple(replace(cell, priority=1 + i // 2) for i, cell in enumerate(suite.cells[:6]))
    suite = replace(suite, cells=cells)
    first = [c.id for c, _ in run(suite, adapters, tasks, backend, tmp_path / "out", priority=2)]
    assert first == [cell.id for cell in cells[:4]]
    assert [c.id for c, _ in run(suite, adapters, tasks, backend, tmp_path / "out")] == [cell.id for cell in cells[4:]]


def test_a_cell_that_another_process_measures_is_passed_over(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    suite, folder = written(tmp_path), tmp_path / "out"
    taken = suite.cells[2]
    (folder / CLAIMS).mkdir(parents=True)
    with sole(folder / CLAIMS / taken.id, "", folder, ""):
        done = {c.id for c, _ in run(suite, adapters, tasks, backend, folder)}
        states = {c["id"]: c["state"] for c in status(suite, folder)["cells"]}
    assert done == {c.id for c in suite.cells} - {taken.id}
    assert states[taken.id] == "running"
    assert status(suite, folder)["done"] == len(suite.cells) - 1
    assert [c.id for c, _ in run(suite, adapters, tasks, backend, folder)] == [taken.id]


def test_the_claim_of_a_killed_process_is_taken_over(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    suite, folder = written(tmp_path), tmp_path / "out"
    suite = replace(suite, cells=suite.cells[1:3])
    lock = folder / CLAIMS / suite.cells[0].id
    lock.parent.mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path; from lorashelf.result_store import sole\n"
        "with sole(Path(sys.argv[1]), '', Path('.'), ''): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert [c["state"] for c in status(suite, folder)["cells"]] == ["running", "waiting"]
            assert [c.id for c, _ in run(suite, adapters, tasks, backend, folder)] == [suite.cells[1].id]
        finally:
            holder.kill()
    assert holder.returncode == -signal.SIGKILL
    assert lock.exists()
    assert [c["state"] for c in status(suite, folder)["cells"]] == ["waiting", "done"]
    assert [c.id for c, _ in run(suite, adapters, tasks, backend, folder)] == [suite.cells[0].id]


def test_cells_of_a_shared_suite_are_not_measured_again(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    first = written(tmp_path)
    for each in run(replace(first, cells=first.cells[1:5]), adapters, tasks, backend, first.folder):
        assert each
    path = tmp_path / "second.toml"
    path.write_text(SUITE.replace('reference = "random"', 'reference = "random"\nshares = ["five"]\n'))
    second = read_suite(path)
    assert status(second, second.folder)["done"] == 4
    assert len(page.rows(second, read_results(second, second.folder))) == 3
    taken = next(cell for cell in second.cells if cell.method == "type")
    with sole(first.folder / CLAIMS / taken.id, "", first.folder, ""):  # the other suite measures this cell
        measured = {c.id for c, _ in run(second, adapters, tasks, backend, second.folder)}
    assert measured == {c.id for c in second.cells} - {c.id for c in first.cells[1:5]} - {taken.id}
    assert not path_of(first.cells[1], second.folder).exists()
    apart = replace(second, limit=2)  # under other conditions nothing is shared
    assert status(apart, apart.folder)["done"] == 0


def test_a_shorter_search_is_read_off_a_longer_one(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    text = """
format = 1
[[cells]]
search = "d2c"
slots = 2
iterations = [12, 4, 0]
examples_per_task = 2
merge = "ties"
"""
    suite = written(tmp_path, text)
    results = {c.options["iterations"]: r for c, r in run(suite, adapters, tasks, backend, tmp_path / "together")}
    assert ["replayed" in results[n]["provenance"] for n in (12, 4, 0)] == [False, True, True]
    for cell in suite.cells[1:]:
        ((_, alone),) = run(replace(suite, cells=(cell,)), adapters, tasks, backend, tmp_path / "alone")
        assert "search" in alone["provenance"]
        assert alone["provenance"]["blocks"] == results[cell.options["iterations"]]["provenance"]["blocks"]
        assert alone["tasks"] == results[cell.options["iterations"]]["tasks"]
    rows = {row["options"]: row for row in page.rows(suite, read_results(suite, tmp_path / "together"))}
    counted = {name: row["evaluations"] for name, row in rows.items()}
    losses = results[12]["provenance"]["search"]["losses"]
    assert sorted(counted.values(), key=str) == [losses["distinct"], None, None]
    another = {**results[12], "cell": {**results[12]["cell"], "iterations": 8}}  # as one from another processor
    assert _known_search(suite.cells[1], {"8": another, "12": results[12]}) is results[12]
    eight = replace(suite.cells[1], options={**suite.cells[1].options, "iterations": 8})
    assert _known_search(eight, {"8": another, "12": results[12]}) is another


def test_some_tasks_are_measured_while_adapters_are_assigned_to_all(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    text = """
format = 1
measured_tasks = ["a-de", "b-fr"]
[[cells]]
cluster = "single"
slots = 1
"""
    suite = written(tmp_path, text)
    ((_, result),) = run(suite, adapters, tasks, backend, suite.folder)
    assert set(result["tasks"]) == {"a-de", "b-fr"}
    assert result["provenance"]["blocks"] == [sorted(adapters)]
    whole = replace(suite, measured_tasks=None)
    assert read_results(whole, suite.folder) == {}  # other conditions
    ((_, both),) = run(whole, adapters, tasks, backend, tmp_path / "whole")
    assert {name: both["tasks"][name] for name in result["tasks"]} == result["tasks"]
    assert both["bytes"] == result["bytes"]


def test_a_search_of_a_shared_suite_serves_a_suite_of_other_examples(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    text = """
format = 1
[[cells]]
search = "d2c"
slots = 2
iterations = 4
examples_per_task = 2
"""
    first = written(tmp_path, text)
    ((_, searched),) = run(first, adapters, tasks, backend, first.folder)
    path = tmp_path / "answers.toml"
    more = 'shares = ["five"]\nsplit = "train"\nlimit = 1\n[[cells]]\nmeasure = ["loss", "answers"]\n'
    path.write_text(text.replace("[[cells]]\n", more))
    second = read_suite(path)
    ((_, taken),) = run(second, adapters, tasks, backend, second.folder)
    assert taken["provenance"] == {"blocks": searched["provenance"]["blocks"], "replayed": 4}
    assert taken["tasks"]["a-de"]["statistics"]
    assert len(taken["tasks"]["a-de"]["nll"]) == 1 < len(searched["tasks"]["a-de"]["nll"])
    ((_, anew),) = run(replace(second, model_dtype="bf16"), adapters, tasks, backend, second.folder)  # another model
    assert "search" in anew["provenance"]
    ((_, own),) = run(replace(first, limit=1), adapters, tasks, backend, first.folder)  # would lose its own search
    assert "search" in own["provenance"]


def test_a_cell_may_name_a_result_of_a_shared_suite_measured_under_other_conditions(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    first = written(tmp_path, 'format = 1\n[[cells]]\ncluster = "random"\nslots = 2\n')
    ((drawn, result),) = run(first, adapters, tasks, backend, first.folder)
    path = tmp_path / "second.toml"
    name = path_of(drawn, first.folder).stem
    text = f'shares = ["five"]\nlimit = 1\nmodel_dtype = "bf16"\n[[cells]]\ncluster = "blocks_of"\nresult = "{name}"\n'
    path.write_text("format = 1\n" + text)
    second = read_suite(path)
    ((_, named),) = run(second, adapters, tasks, backend, second.folder)
    assert named["provenance"] == {"blocks": result["provenance"]["blocks"]}
    path_of(drawn, first.folder).write_text("[]")
    with pytest.raises(UsageError, match="this is not a result"):
        list(run(second, adapters, tasks, backend, tmp_path / "again"))


def test_every_kind_of_cell_of_the_papers_runs_and_what_is_left_is_listed(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    text = """
format = 1
[[cells]]
serve = ["base", "own"]
hours = 0.1
[[cells]]
cluster = "dirichlet"
over = ["type", "language"]
alpha = [0.1, 100]
slots = 2
hours = 0.1
[[cells]]
arrive = "kmerge"
after = [1, 3]
slots = 2
seed = [0, 1]
[[cells]]
arrive = "kmerge"
similarity = ["l1", "l2", "linf"]
slots = 2
order = "worst"
[[cells]]
arrive = ["half", "random", "oracle", "all"]
slots = 2
[[cells]]
arrive = "kmerge"
merge = ["opcm", "knots_ties", "dare_linear", "dare_ties"]
slots = 2
priority = 2
hours = 0.5
"""
    suite = written(tmp_path, text)
    waiting = status(suite, suite.folder)
    assert [(p["priority"], p["left"], p["of"]) for p in waiting["priorities"]] == [(1, 17, 17), (2, 4, 4)]
    assert [p["seconds_left"] for p in waiting["priorities"]] == [None, 7200.0]
    first = replace(suite, cells=tuple(c for c in suite.cells if c.priority == 1))
    for each in run(first, adapters, tasks, backend, suite.folder):
        assert each
    results = read_results(suite, suite.folder)
    assert len(results) == 17
    rows = page.rows(suite, results)
    after = {row["options"]: row for row in rows if "after" in row["options"]}
    assert sorted(after) == [
        "slots=2 after=1",
        "slots=2 after=3",
        "slots=2 seed=1 after=1",
        "slots=2 seed=1 after=3",
    ]
    assert after["slots=2 after=1"]["loss_kept"][0] == pytest.approx(1.0)  # its own adapter
    fewest_first = dict(sorted(results.items(), key=lambda item: len(item[1]["tasks"])))
    assert page.table(suite, fewest_first, rows).startswith(f"{len(adapters)} tasks, ")  # not those of one arrival
    left = page.unmeasured(suite, results)
    assert "4 of 21 cells" in left
    assert "| 2 | 4 | 2.0 | kmerge opcm, kmerge knots_ties, kmerge dare_linear, kmerge dare_ties |" in left
    for each in run(suite, adapters, tasks, backend, suite.folder):
        assert each
    assert page.unmeasured(suite, read_results(suite, suite.folder)) == ""
    assert [p["seconds_left"] for p in status(suite, suite.folder)["priorities"]] == [0, 0]


def test_results_under_other_conditions_are_measured_anew(world: Any, tmp_path: Path) -> None:
    adapters, tasks, backend = world
    suite, folder = written(tmp_path), tmp_path / "out"
    suite = replace(suite, cells=suite.cells[1:3])
    list(run(suite, adapters, tasks, backend, folder))
    fewer = replace(suite, limit=2)
    assert read_results(fewer, folder) == {}
    (first, result), *_ = run(fewer, adapters, tasks, backend, folder)
    assert {len(task["nll"]) for task in result["tasks"].values()} == {2}
    assert path_of(first, folder).exists()


# statistics ---------------------------------------------------------------------------------------------------------


def entry(nll: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    return {"nll": list(nll), "tokens": list(tokens)}


def sample(*tables: dict[str, Any]) -> Sample:
    return Sample(tuple({"tasks": table} for table in tables))


def test_intervals_are_those_of_a_bootstrap_by_hand() -> None:
    rng = np.random.default_rng(0)
    nll, tokens = rng.uniform(1.0, 5.0, 40), rng.integers(1, 9, 40)
    losses = sample({"t": entry(nll, tokens)}).losses["t"]
    assert len(losses) == DRAWS + 1
    assert losses[0] == pytest.approx(nll.sum() / tokens.sum())
    drawn = [rng.integers(40, size=40) for _ in range(4000)]
    by_hand = np.array([nll[i].sum() / tokens[i].sum() for i in drawn])
    np.testing.assert_allclose(np.percentile(losses[1:], [2.5, 97.5]), np.percentile(by_hand, [2.5, 97.5]), rtol=0.05)


def test_differences_are_paired_and_own_keeps_all_in_every_resample() -> None:
    rng = np.random.default_rng(1)
    hard = rng.exponential(5.0, 30)  # examples differ far more than methods do
    zero, own = sample({"t": entry(hard + 1.0, [1] * 30)}), sample({"t": entry(hard, [1] * 30)})
    half = sample({"t": entry(hard + 0.5, [1] * 30)})
    difference = zero.losses["t"] - own.losses["t"]
    assert np.ptp(difference) < 1e-9 < np.ptp(own.losses["t"])
    np.testing.assert_allclose(shares_kept(half.losses, own.losses, zero.losses)["t"], 0.5)
    np.testing.assert_allclose(shares_kept(own.losses, own.losses, zero.losses)["t"], 1.0)


def test_the_worst_task_is_named_with_its_own_interval(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    results = read_results(suite, folder)
    row = next(row for row in page.rows(suite, results) if row["options"] == "percent=60")
    losses = {
        cell.label: {name: sum(t["nll"]) / sum(t["tokens"]) for name, t in results[cell.id]["tasks"].items()}
        for cell in suite.cells
    }
    zero, own, coded = (losses[label] for label in ("base", "own", "coded percent=60"))
    shares = {t: (zero[t] - coded[t]) / (zero[t] - own[t]) for t in zero if zero[t] - own[t] >= 0.02}
    assert row["worst_task"] == min(shares, key=lambda t: shares[t])
    value, low, high = row["worst"]
    assert value == pytest.approx(min(shares.values()), rel=1e-2)
    assert low < value < high
    assert row["loss_kept"][0] == pytest.approx(np.mean(list(shares.values())), rel=1e-2)


def test_the_worst_task_is_that_of_each_repetition() -> None:
    """Each repetition loses another task: the mean of a task over repetitions hides both."""
    own, zero, first, second = (
        {"a": entry([a] * 3, [1] * 3), "b": entry([b] * 3, [1] * 3)} for a, b in ((1, 1), (2, 2), (2.5, 1), (1, 2.1))
    )
    shares, names = page._worst(sample(first, second), sample(own), sample(zero))
    assert shares is not None
    np.testing.assert_allclose(shares, (-0.5 - 0.1) / 2)
    assert names == "a, b"
    assert page._worst(sample(first), None, sample(zero)) == (None, None)


def test_seeds_are_averaged_task_by_task() -> None:
    two = sample({"t": entry([2.0, 4.0], [1, 1])}, {"t": entry([4.0, 6.0], [1, 1])})
    mean = mean_over_tasks(two.losses)
    assert mean is not None
    assert mean[0] == 4.0


# the page and the commands ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path]:
    adapters, tasks, backend = world
    folder = tmp_path_factory.mktemp("suite")
    suite = written(folder)
    list(run(suite, adapters, tasks, backend, suite.folder))
    return suite, suite.folder


def test_the_table_has_a_row_per_method_with_the_figures_of_the_results(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    results = read_results(suite, folder)
    rows = {row["method"]: row for row in page.rows(suite, results)}
    assert rows.keys() == {"base", "own", "random", "type", "coded", "kmerge", "d2c"}
    assert rows["random"]["seeds"] == 2
    assert rows["own"]["loss_kept"][0] == pytest.approx(1.0)
    assert rows["base"]["loss_kept"] == (0.0, 0.0, 0.0)
    assert rows["own"]["storage"] == 1.0
    assert rows["kmerge"]["score"] is not None
    assert rows["type"]["score"] is None
    (base,) = [results[c.id] for c in suite.cells if c.method == "base"]
    by_task = [sum(task["nll"]) / sum(task["tokens"]) for task in base["tasks"].values()]
    assert rows["base"]["loss"][0] == pytest.approx(np.mean(by_task), rel=1e-4)
    kept = []
    for seed in (0, 1):
        few = {c.id: results[c.id] for c in suite.cells if c.method != "random" or c.options["seed"] == seed}
        kept.append(next(row for row in page.rows(suite, few) if row["method"] == "random")["loss_kept"][0])
    assert rows["random"]["spread"]["loss_kept"] == pytest.approx(abs(kept[0] - kept[1]) / 2**0.5)
    assert rows["type"]["spread"]["score"] is None
    assert rows["own"]["spread"] == {"loss_kept": None, "score": None}
    text = page.table(suite, results, page.rows(suite, results))
    assert f" ± {100 * rows['random']['spread']['loss_kept']:.1f} |" in text
    assert "5 tasks, 4 examples of the validation split per task" in text
    assert text.count("\n| ") == 9
    assert "− random" in text


def test_table_and_status_need_no_model(measured: tuple[Suite, Path]) -> None:
    suite, _ = measured
    code = "import sys; from lorashelf.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for command in ("status", "table"):
        words = [sys.executable, "-c", code, "bench", command, str(suite.path), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        document, torch = done.stdout.strip().splitlines()
        assert torch == "False"
        assert json.loads(document)


def test_scores_are_compared_with_the_references_on_the_same_examples() -> None:
    suite = read_suite(ROOT / "suites" / "scores.toml")
    results = read_results(suite, suite.path.with_suffix(".results"))
    rows = {(row["method"], row["merge"], row["options"]): row for row in page.rows(suite, results)}
    row, reference = rows["kmerge++", "linear", ""], rows["type", "linear", ""]
    difference, low, high = row["score_against"]
    assert difference == pytest.approx(row["score"][0] - reference["score"][0])
    assert high - low < row["score"][2] - row["score"][1]  # what the examples share cancels
    assert reference["score_against"] is None
    assert f"{difference:+.1f} ({low:+.1f} … {high:+.1f})" in page.table(suite, results, [row])
    assert page.table(suite, results, [reference]).count("− type") == 1  # without scores to compare, no column


def test_a_row_is_compared_with_the_reference_whatever_the_reference_does_not_know() -> None:
    suite = read_suite(ROOT / "suites" / "d2c.toml")
    results = read_results(suite, suite.path.with_suffix(".results"))
    rows = {(row["method"], row["merge"], row["options"]): row for row in page.rows(suite, results)}
    guided = rows["d2c", "ties", "propose=guided init=guided budget=30"]
    assert guided["against"][0] == pytest.approx(guided["loss"][0] - rows["random", "ties", ""]["loss"][0])
    assert rows["d2c", "ties", "slots=40"]["against"] is None  # random blocks have slots, too, but never 40
    assert rows["random", "ties", ""]["against"] is None


@pytest.mark.parametrize(("x", "y"), [("storage", "loss_kept"), ("slots", "loss"), ("storage", "score")])
@pytest.mark.parametrize("dark", [False, True])
def test_a_plot_is_drawn(measured: tuple[Suite, Path], tmp_path: Path, x: str, y: str, dark: bool) -> None:
    suite, folder = measured
    text = drawn(suite, read_results(suite, folder), "svg", x, y, dark).decode()
    assert "kmerge" in text
    assert ("#0d1117" in text) is dark
    words = ["bench", "plot", str(suite.path), "--file", str(tmp_path / "a.SVG"), "--x", x, "--y", y]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(folder), *(["--dark"] if dark else [])])
    assert ended.value.code == 0
    assert (tmp_path / "a.SVG").read_text() == text


def test_the_rates_of_a_code_are_one_line_with_the_worst_task_below_the_mean(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    results = read_results(suite, folder)
    rows = page.rows(suite, results)
    means, worst = (points_of(suite, results, rows, "storage", y) for y in ("loss_kept", "worst"))
    assert means.keys() == worst.keys()
    assert len(means["coded"]) == 2
    for (place, mean), (same, low) in zip(means["coded"], worst["coded"], strict=True):
        assert place == same
        assert 0 < place <= 100
        assert low[0] <= mean[0]


def test_against_an_option_single_points_are_left_out_beside_longer_lines(measured: tuple[Suite, Path]) -> None:
    suite, folder = measured
    results = read_results(suite, folder)
    (cell,) = (cell for cell in suite.cells if cell.method == "kmerge")
    more = replace(cell, options={**cell.options, "slots": 3})
    longer, other = replace(suite, cells=(*suite.cells, more)), {**results, more.id: results[cell.id]}
    alone, beside = (points_of(s, r, page.rows(s, r), "slots", "loss") for s, r in ((suite, results), (longer, other)))
    assert len(alone) > 1
    assert {len(points) for points in alone.values()} == {1}
    assert {label: [place for place, _ in points] for label, points in beside.items()} == {"kmerge linear": [2, 3]}


def test_what_cannot_be_drawn_is_refused(
    measured: tuple[Suite, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, _ = measured
    for words in (["--file", "a.jpeg5"], ["--file", "a.svg", "--x", "colour"], ["--file", "a.svg", "--y", "speed"]):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", "plot", str(suite.path), "--file", str(tmp_path / words[1]), *words[2:]])
        assert stopped.value.code == 2
        assert "cure" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_measured_task_without_adapter_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = written(tmp_path, 'format = 1\nmeasured_tasks = ["gec-xx"]\n[[cells]]\nserve = "own"\n')
    folders = ["--adapters", str(ROOT / "examples" / "zoo"), "--data", str(ROOT / "examples" / "fewshot")]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "run", str(suite.path), *folders])
    assert stopped.value.code == 2
    assert "no adapter or no examples for gec-xx" in capsys.readouterr().err


def test_all_missing_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = written(tmp_path, 'format = 1\n[[cells]]\nserve = "own"\n')
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "run", str(suite.path), "--adapters", "neither", "--data", "nor", "-o", str(tmp_path / "out")])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "where: neither, nor" in printed
    assert "--adapters DIR" in printed
    assert "--data DIR" in printed
    assert not (tmp_path / "out").exists()


def test_a_priority_that_no_cell_has_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "run", str(ROOT / "suites" / "small.toml"), "-o", str(tmp_path), "--priority", "0"])
    assert stopped.value.code == 2
    assert "no cell has a priority up to 0" in capsys.readouterr().err


def test_a_damaged_result_is_named(measured: tuple[Suite, Path], tmp_path: Path) -> None:
    suite, _ = measured
    path = path_of(suite.cells[0], tmp_path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="this is not a result"):
        read_results(suite, tmp_path)


@pytest.mark.long
def test_the_small_suite_runs_on_the_real_model_after_a_kill(tmp_path: Path) -> None:
    small = ROOT / "suites" / "small.toml"
    words = [sys.executable, "-m", "lorashelf", "bench", "run", str(small), "-o", str(tmp_path)]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(tmp_path.glob("*.json")):
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    done = subprocess.run([*words, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["done"] == document["of"] == 5
    assert 0 < len(document["measured"]) < 5
    suite = read_suite(small)
    rows = {row["method"]: row for row in page.rows(suite, read_results(suite, tmp_path))}
    assert rows["own"]["loss"][0] < rows["type"]["loss"][0] < rows["base"]["loss"][0]
    assert read_adapter(ROOT / "examples" / "zoo" / "qa-de").digest in json.dumps(read_results(suite, tmp_path))
