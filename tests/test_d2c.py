"""D2C against a literal transcription of the algorithm, its options, its counts, and what its journal promises."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import make_adapter
from lorashelf import Adapter, Clustering, MergeSpec, merge
from lorashelf.errors import UsageError
from lorashelf.merging.blocks import merger
from lorashelf.models.protocol import Loss, Pair, mean_loss
from lorashelf.models.quadratic import QuadraticBackend
from lorashelf.placement.d2c import Block, both_fall, replayed, search
from lorashelf.result_store import ResultStore
from lorashelf.search.block_loss import BlockLoss
from lorashelf.search.cluster import cluster_by_loss
from lorashelf.tasks.folders import Example, ExampleSet

TASKS = ("a", "b", "c", "d", "e", "f", "g", "h", "i")
METHOD = "ties"


def related(seed: int) -> dict[str, Adapter]:
    """Nine adapters in three families: a common part and one of their own."""
    from lorashelf import combine, compress

    families = [make_adapter(100 * seed + i) for i in range(3)]
    own = [make_adapter(100 * seed + 10 + i) for i in range(len(TASKS))]
    return {task: compress(combine([families[i % 3], own[i]], [0.6, 0.4]), 4)[0] for i, task in enumerate(TASKS)}


def sets_of(tasks: Iterable[str], count: int = 2) -> dict[str, ExampleSet]:
    examples = tuple(Example(f"in {i}", f"out {i}") for i in range(count))
    return {task: ExampleSet(task, "Mend:", examples) for task in tasks}


class Counting(QuadraticBackend):
    """One that counts pairs, and can be told to stop after some."""

    def __init__(self, targets: dict[str, Adapter], stop_after: int | None = None) -> None:
        super().__init__(targets)
        self.pairs, self._stop_after = 0, stop_after

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        if self._stop_after is not None and self.pairs >= self._stop_after:
            raise KeyboardInterrupt
        self.pairs += len(pairs)
        return super().nll(pairs)


def objective(adapters: dict[str, Adapter], backend: Counting | QuadraticBackend, **options: Any) -> BlockLoss:
    def merged(block: Sequence[str]) -> Adapter:
        return merge([adapters[t] for t in block], method=METHOD) if len(block) > 1 else adapters[block[0]]

    return BlockLoss(adapters, sets_of(adapters), backend, merged, **options)


def literal(adapters, examples, backend, k, iterations, seed, wrong=False):
    """Algorithm 1, read literally: no cache, no objective; only merge and nll."""

    def loss(block, task):
        xs = [adapters[t] for t in sorted(block)]
        x = xs[0] if len(xs) == 1 else merge(xs, method=METHOD)
        return mean_loss(backend.nll([(x, examples[task])])[0])

    labels = np.random.default_rng(seed).permutation(np.arange(len(adapters)) % k)
    blocks = [{t for t, label in zip(sorted(adapters), labels) if label == c} for c in range(k)]
    moves = []
    for i in range(iterations):
        rng = np.random.default_rng([seed, i])
        filled = [c for c in range(k) if blocks[c]]
        c = filled[rng.integers(len(filled))]
        others = [d for d in range(k) if d != c]
        d = others[rng.integers(len(others))]
        t = sorted(blocks[c])[rng.integers(len(blocks[c]))]
        before, after = loss(blocks[c], t), loss(blocks[d] | {t}, t)
        if after > before if wrong else after < before:
            blocks[c].remove(t)
            blocks[d].add(t)
            moves.append((i, t))
    return moves, sorted(tuple(sorted(b)) for b in blocks if b)


@pytest.mark.parametrize("seed", range(20))
def test_a_literal_transcription_takes_the_same_moves(seed: int) -> None:
    adapters = related(seed)
    backend = QuadraticBackend(adapters)
    found = search(TASKS, 3, objective(adapters, backend), iterations=40, seed=seed)
    moves, blocks = literal(adapters, sets_of(adapters), backend, 3, 40, seed)
    assert list(found.moves) == moves
    assert list(found.blocks) == blocks


def test_the_transcription_tells_a_search_that_moves_against_the_loss() -> None:
    """Its twin: a rule that is not the paper's takes other moves."""
    adapters = related(0)
    backend = QuadraticBackend(adapters)
    right, _ = literal(adapters, sets_of(adapters), backend, 3, 20, 0)
    wrong, _ = literal(adapters, sets_of(adapters), backend, 3, 20, 0, wrong=True)
    assert right != wrong


def test_what_is_measured_is_what_is_distinct() -> None:
    adapters = related(1)
    backend = Counting(adapters)
    losses = objective(adapters, backend)
    asked: list[tuple[Block, str]] = []

    def watched(pairs: Sequence[tuple[Block, str]]) -> list[float]:
        asked.extend(pairs)
        return losses(pairs)

    found = search(TASKS, 3, watched, iterations=60, seed=1)
    assert found.proposals == 60
    assert losses.asked == len(asked) == 120
    assert backend.pairs == losses.measured == len(losses.known) == len(set(asked)) < 120


def total(adapters: dict[str, Adapter], blocks: Iterable[Iterable[str]]) -> float:
    losses = objective(adapters, QuadraticBackend(adapters))
    return sum(losses([(frozenset(block), task) for block in map(list, blocks) for task in block]))


@pytest.mark.parametrize("seed", range(3))
def test_the_search_ends_where_no_single_move_helps(seed: int) -> None:
    adapters = related(seed)
    losses = objective(adapters, QuadraticBackend(adapters))
    found = search(TASKS, 3, losses, iterations=400, seed=seed, accept=both_fall)
    start = search(TASKS, 3, losses, iterations=0, seed=seed).blocks
    reached = total(adapters, found.blocks)
    assert reached < total(adapters, start)
    blocks = [set(block) for block in found.blocks]
    blocks += [set() for _ in range(3 - len(blocks))]
    for task in TASKS:
        for target in blocks:
            moved = [block - {task} | ({task} if block is target else set()) for block in blocks]
            assert total(adapters, [sorted(block) for block in moved if block]) >= reached - 1e-6 * reached


def test_accepting_for_both_blocks_never_raises_the_total() -> None:
    adapters = related(2)
    losses = objective(adapters, QuadraticBackend(adapters))
    before = None
    for iterations in range(0, 60, 6):
        found = search(TASKS, 3, losses, iterations=iterations, seed=2, accept=both_fall)
        now = total(adapters, found.blocks)
        assert before is None or now <= before
        before = now


@pytest.mark.parametrize("seed", range(5))
def test_the_best_partition_seen_is_kept(seed: int) -> None:
    adapters = related(seed)
    losses = objective(adapters, QuadraticBackend(adapters))
    kept = search(TASKS, 4, losses, iterations=50, seed=seed, keep_best=True)
    seen = [search(TASKS, 4, losses, iterations=i, seed=seed).blocks for i in range(51)]
    assert total(adapters, kept.blocks) == pytest.approx(min(total(adapters, blocks) for blocks in seen))


def test_it_starts_where_it_is_told() -> None:
    adapters = related(3)
    losses = objective(adapters, QuadraticBackend(adapters))
    start = [TASKS[:2], TASKS[2:]]
    assert search(TASKS, 3, losses, iterations=0, start=start).blocks == (TASKS[:2], TASKS[2:])
    with pytest.raises(UsageError, match="not a partition"):
        search(TASKS, 3, losses, start=[TASKS[:2]])
    with pytest.raises(UsageError, match="not a partition"):
        search(TASKS, 1, losses, start=start)


@pytest.mark.parametrize(("k", "blocks"), [(9, 9), (12, 9), (1, 1)])
def test_as_many_slots_as_adapters_or_one_ask_for_no_loss(k: int, blocks: int) -> None:
    def never(pairs: Sequence[tuple[Block, str]]) -> list[float]:
        raise AssertionError

    assert len(search(TASKS, k, never).blocks) == blocks


def test_a_block_that_was_emptied_may_be_filled_again_and_is_no_slot() -> None:
    """Where apart is worse than together all gather in one block; the others are empty and left out."""
    adapters = dict.fromkeys("abc", make_adapter(1))

    def fewer(pairs: Sequence[tuple[Block, str]]) -> list[float]:
        return [1.0 / len(block) for block, _ in pairs]

    assert search(sorted(adapters), 2, fewer, iterations=50).blocks == (("a", "b", "c"),)


@pytest.mark.parametrize("slots", [0, -1])
def test_no_slots_are_refused(slots: int) -> None:
    with pytest.raises(UsageError, match="into"):
        search(TASKS, slots, lambda pairs: [0.0 for _ in pairs])


# the journal ---------------------------------------------------------------------------------------------------------


def clustered(adapters: dict[str, Adapter], backend: Counting, journal: Path | None = None, **options: Any):
    recipe = MergeSpec(method=METHOD, seed=4)
    return cluster_by_loss(
        adapters,
        3,
        recipe,
        backend,
        sets_of(adapters),
        journal=journal,
        **{"iterations": 40, **options},
    )


def without_counts(clustering: Clustering) -> dict[str, Any]:
    return {name: value for name, value in clustering.report.items() if name != "evaluations"}


def test_an_interrupted_search_goes_on_from_its_journal(tmp_path: Path) -> None:
    adapters = related(4)
    whole = Counting(adapters)
    expected = clustered(adapters, whole)
    first = Counting(adapters, stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        clustered(adapters, first, tmp_path / "j.jsonl")
    second = Counting(adapters)
    resumed = clustered(adapters, second, tmp_path / "j.jsonl")
    assert resumed.blocks == expected.blocks
    assert without_counts(resumed) == without_counts(expected)
    assert 0 < first.pairs < whole.pairs
    assert first.pairs + second.pairs == whole.pairs


@pytest.mark.parametrize("torn", [1, 5, 40])
def test_a_torn_last_line_is_measured_again(tmp_path: Path, torn: int) -> None:
    adapters = related(5)
    journal = tmp_path / "j.jsonl"
    expected = clustered(adapters, Counting(adapters), journal)
    data = journal.read_bytes()
    journal.write_bytes(data[:-torn])
    backend = Counting(adapters)
    assert clustered(adapters, backend, journal).blocks == expected.blocks
    assert backend.pairs == 1
    assert sorted(journal.read_bytes().splitlines()) == sorted(data.splitlines())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"iterations": 41}, "iterations"), ({"accept": "both"}, "accept"), ({"keep_best": True}, "keep_best")],
)
def test_a_journal_of_other_settings_is_refused_by_name(tmp_path: Path, change: dict, named: str) -> None:
    adapters = related(6)
    journal = tmp_path / "j.jsonl"
    clustered(adapters, Counting(adapters), journal)
    before = journal.read_bytes()
    with pytest.raises(UsageError, match=named):
        clustered(adapters, Counting(adapters), journal, **change)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("shape", [[], {}, "0.5", True])
def test_a_loss_of_another_shape_is_measured_again(
    tmp_path: Path, shape: object, caplog: pytest.LogCaptureFixture
) -> None:
    adapters, file = related(5), tmp_path / "j.jsonl"
    expected = clustered(adapters, Counting(adapters), file)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    file.write_bytes(b"")
    journal = ResultStore(file)
    for line in lines:
        journal.put(line["unit"], shape if line is lines[-1] else line["result"])
    backend = Counting(adapters)
    assert clustered(adapters, backend, file).blocks == expected.blocks
    assert backend.pairs == 1
    assert caplog.text.count("another form") == 1


@pytest.mark.parametrize("shape", [[], "settings", 3])
def test_settings_of_another_shape_are_no_search_of_ours(tmp_path: Path, shape: object) -> None:
    adapters, file = related(5), tmp_path / "j.jsonl"
    clustered(adapters, Counting(adapters), file)
    losses = [json.loads(line) for line in file.read_bytes().splitlines()][1:]
    file.write_bytes(b"")
    journal = ResultStore(file)
    for unit, result in [({"what": "settings"}, shape), *((line["unit"], line["result"]) for line in losses)]:
        journal.put(unit, result)
    with pytest.raises(UsageError, match="does not record the settings"):
        clustered(adapters, Counting(adapters), file)


def test_losses_whose_settings_are_damaged_are_not_taken_for_those_of_another_search(tmp_path: Path) -> None:
    adapters, file = related(5), tmp_path / "j.jsonl"
    clustered(adapters, Counting(adapters), file)
    first, *others = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first.replace(b'"iterations":40', b'"iterations":41') + b"".join(others))
    with pytest.raises(UsageError, match="does not record the settings"):
        clustered(adapters, Counting(adapters), file, iterations=41)


def test_a_journal_of_other_adapters_examples_or_merge_is_refused(tmp_path: Path) -> None:
    adapters = related(7)
    journal = tmp_path / "j.jsonl"
    clustered(adapters, Counting(adapters), journal)
    changed = {**adapters, "a": make_adapter(1)}
    with pytest.raises(UsageError, match="adapters differ"):
        clustered(changed, Counting(changed), journal)
    sets, backend = sets_of(adapters, count=3), Counting(adapters)
    with pytest.raises(UsageError, match="examples differ"):
        cluster_by_loss(adapters, 3, MergeSpec(method=METHOD, seed=4), backend, sets, iterations=40, journal=journal)
    with pytest.raises(UsageError, match="recipe differ"):
        cluster_by_loss(
            adapters, 3, MergeSpec(method="linear", seed=4), backend, sets_of(adapters), iterations=40, journal=journal
        )
    assert backend.pairs == 0


@pytest.mark.parametrize("content", ["no json\n", '{"settings": 3}\n{"x": 1}\n', "[]\n"])
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    adapters = related(8)
    journal = tmp_path / "j.jsonl"
    journal.write_text(content)
    with pytest.raises(UsageError, match="does not record the settings"):
        clustered(adapters, Counting(adapters), journal)
    assert journal.read_text() == content


def test_the_journal_holds_what_was_measured(tmp_path: Path) -> None:
    adapters = related(9)
    searched = clustered(adapters, Counting(adapters), tmp_path / "j.jsonl")
    settings, *losses = [json.loads(line)["unit"]["what"] for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert settings == "settings"
    assert set(losses) == {"loss"}
    assert len(losses) >= searched.report["losses"]["distinct"] == searched.report["evaluations"]


# the losses of a clustering ------------------------------------------------------------------------------------------


def test_losses_on_the_examples_searched_with_and_on_others_are_reported() -> None:
    adapters = related(10)
    backend = Counting(adapters)
    held_out = sets_of(adapters, count=5)
    recipe = MergeSpec(method=METHOD, seed=4)
    searched = cluster_by_loss(adapters, 3, recipe, backend, sets_of(adapters), held_out=held_out, iterations=40)
    mean = total(adapters, searched.blocks) / len(TASKS)
    assert searched.report["loss"]["search"] == pytest.approx(mean, rel=1e-5)
    assert searched.report["loss"]["held_out"] == pytest.approx(mean, rel=1e-5)
    start = search(TASKS, 3, objective(adapters, backend), iterations=0, seed=4).blocks
    assert searched.report["loss"]["start"] == pytest.approx(total(adapters, start) / len(TASKS), rel=1e-5)
    assert searched.report["loss"]["search"] < searched.report["loss"]["start"]


@pytest.mark.parametrize(("slots", "held_out"), [(2, False), (2, True), (20, True)])
def test_each_block_is_merged_once_and_few_merges_are_held(
    slots: int, held_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reporting on other examples merges nothing anew, also where there are more blocks than merges are kept."""
    from lorashelf.search import cluster

    adapters = {f"t{i:02}": make_adapter(i) for i in range(8 if slots == 2 else 40)}
    merges: list[tuple[str, ...]] = []
    alive: weakref.WeakSet[Adapter] = weakref.WeakSet()
    most = 0

    def counting(adapters: dict[str, Adapter], spec: MergeSpec) -> Any:
        plain = merger(adapters, spec)

        def merged(tasks: Sequence[str]) -> Adapter:
            nonlocal most
            merges.append(tuple(tasks))
            found = replace(plain(tasks))  # a block of one is the adapter itself
            alive.add(found)
            most = max(most, len(alive))
            return found

        return merged

    monkeypatch.setattr(cluster, "merger", counting)
    sets = sets_of(adapters)
    backend, others = QuadraticBackend(adapters), sets_of(adapters, 3) if held_out else None
    spec = MergeSpec(method="linear")
    cluster.cluster_by_loss(adapters, slots, spec, backend, sets, held_out=others, iterations=0)
    assert len(merges) == len(set(merges)) == slots
    assert most <= 17


def test_copies_are_merged_once() -> None:
    adapters = related(11)
    adapters["b"] = adapters["a"]
    losses = objective(adapters, QuadraticBackend(adapters))
    (both, alone) = losses([(frozenset("ab"), "a"), (frozenset("a"), "a")])
    assert both == alone


@pytest.mark.parametrize("seed", [0, 7])
def test_the_registered_method_is_the_transcription(seed: int) -> None:
    adapters, backend = related(seed), QuadraticBackend(related(seed))
    spec = MergeSpec(METHOD, seed=seed)
    found = cluster_by_loss(adapters, 3, spec, backend, sets_of(adapters), iterations=40)
    moves, blocks = literal(adapters, sets_of(adapters), backend, 3, 40, seed)
    assert list(found.blocks) == blocks
    assert (found.method, found.seed) == ("d2c", seed)
    assert (found.report["proposals"], found.report["accepted"]) == (40, len(moves))


def test_what_decided_is_reported() -> None:
    adapters = related(1)
    backend, sets = QuadraticBackend(adapters), sets_of(adapters)
    spec = MergeSpec(METHOD)

    def report(examples: dict[str, ExampleSet] = sets, **options: Any) -> dict[str, Any]:
        return dict(cluster_by_loss(adapters, 3, spec, backend, examples, iterations=3, **options).report)

    plain = report()
    assert plain["model"] == {
        "name": backend.name,
        "weights": backend.weights,
        "dtype": backend.dtype,
        "prompt": backend.prompt_id,
    }
    assert [plain[name] for name in ("iterations", "accept", "init", "propose", "restarts", "keep_best")] == [
        *(3, "task", "random", "uniform", 0, False)
    ]
    assert report() == plain == report(dict(reversed(sets.items())))
    assert report({**sets, "a": sets_of("a", 3)["a"]})["examples"] != plain["examples"]
    assert report(accept="both")["accept"] == "both"
    json.dumps(plain, allow_nan=False)


def test_an_agglomerative_start_is_that_partition() -> None:
    from lorashelf.placement.partitioners import partition

    adapters = related(12)
    searched = clustered(adapters, Counting(adapters), init="agglomerative", iterations=0)
    expected = partition([adapters[t] for t in TASKS], 3, method="agglomerative")
    assert [list(block) for block in searched.blocks] == [[TASKS[i] for i in block] for block in expected]


@pytest.mark.parametrize("options", [{}, {"propose": "guided", "accept": "both"}])
def test_the_moves_of_a_search_replay_every_shorter_one(options: dict[str, Any]) -> None:
    adapters = related(3)

    def found(iterations: int, **more: Any) -> Clustering:
        spec, backend = MergeSpec(METHOD, seed=5), QuadraticBackend(adapters)
        return cluster_by_loss(adapters, 3, spec, backend, sets_of(adapters), iterations=iterations, **options, **more)

    longest = found(60)
    assert len(longest.moves) > 3
    ends = set()
    for iterations in (0, 1, 2, 5, 10, 20, 40, 60):
        blocks = tuple(tuple(block) for block in replayed(longest.start, longest.moves, iterations))
        assert blocks == found(iterations).blocks
        ends.add(blocks)
    assert len(ends) > 2
    assert found(60, keep_best=True).moves == found(60, restarts=1).moves == ()  # not the whole way
