"""Guided D2C: what the surrogate expects, against brute force; how few losses it asks a known model for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from factory import make_adapter
from lorashelf import Adapter, Clustering, MergeSpec, cluster_by_loss, combine, gram, partition
from lorashelf.lora.arrays import Cube, Square
from lorashelf.placement.d2c import Change, Guided, both_fall, moved_falls, moving, search
from lorashelf.placement.surrogate import Surrogate
from test_d2c import Counting, sets_of
from test_partition import losses_of, planted

GROUPS = [i % 4 for i in range(24)]
Inputs = dict[str, np.ndarray]


def weighed(xs: Sequence[Adapter]) -> Surrogate:
    """Every task weighs updates by their weights."""
    return Surrogate(np.broadcast_to(gram(xs), (len(xs),) * 3))


def by_inputs(xs: Sequence[Adapter]) -> tuple[list[Inputs], Cube]:
    """Random inputs of every task's modules, and the inner products of the updates on them."""
    rng = np.random.default_rng(len(xs))
    inputs = [
        {path: rng.standard_normal((3, shape.din)) for path, shape in xs[0].shapes.items()} for _ in range(len(xs))
    ]
    rows = [[on_inputs(x, seen) for x in xs] for seen in inputs]
    return inputs, np.stack([np.array(row) @ np.array(row).T for row in rows])


def on_inputs(x: Adapter, inputs: Inputs | None) -> np.ndarray:
    """The outputs of an update on inputs; its entries without inputs."""
    updates = {path: f.scale * f.b.astype("f8") @ f.a.astype("f8") for path, f in x.modules.items()}
    if inputs is None:
        return np.concatenate([update.ravel() for update in updates.values()])
    return np.concatenate([(inputs[path] @ update.T).ravel() for path, update in updates.items()])


def agreement(xs: Sequence[Adapter], blocks: Sequence[frozenset[int]], inputs: Sequence[Inputs | None]) -> float:
    """Σ_t cos(ΔW_t, Σ ΔW of t's block) on t's inputs, each cosine by itself."""
    total = 0.0
    for block in filter(None, blocks):
        for i in block:
            own, whole = on_inputs(xs[i], inputs[i]), sum(on_inputs(xs[j], inputs[i]) for j in block)
            size = np.linalg.norm(own) * np.linalg.norm(whole)
            total += float(own @ whole / size) if size else 0.0
    return total


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_expected_gains_are_those_of_every_move_and_swap(seed: int, seen: bool) -> None:
    xs = [make_adapter(10 * seed + i, rank=1 + i % 3) for i in range(6)]
    xs[4] = combine([xs[4]], [0.0])  # untrained: like no other
    inputs, grams = by_inputs(xs) if seen else ([None] * 6, np.broadcast_to(gram(xs), (6, 6, 6)))
    blocks = [frozenset({0, 1, 4}), frozenset({2, 3}), frozenset({5}), frozenset()]
    moves, swaps = Surrogate(grams).gains(blocks)
    now = agreement(xs, blocks, inputs)

    def after(change: Change[int]) -> float:
        changed = dict(zip(change.places, change.after))
        return agreement(xs, [changed.get(place, block) for place, block in enumerate(blocks)], inputs) - now

    home = {task: place for place, block in enumerate(blocks) for task in block}
    for task, place in itertools.product(range(6), range(4)):
        if home[task] == place:
            assert moves[task, place] == -np.inf
        else:
            assert moves[task, place] == pytest.approx(after(moving(blocks, {task: place})), abs=1e-6)
    for one, other in itertools.product(range(6), repeat=2):
        if one < other and home[one] != home[other]:
            expected = after(moving(blocks, {one: home[other], other: home[one]}))
            assert swaps[one, other] == pytest.approx(expected, abs=1e-6)
        else:
            assert swaps[one, other] == -np.inf


def test_the_most_promising_change_that_was_not_refused_is_proposed_until_none_is() -> None:
    xs, rng = planted(GROUPS[:8]), np.random.default_rng(0)
    guided, surrogate = Guided(weighed(xs)), weighed(xs)
    blocks = [frozenset({0, 1, 4}), frozenset({5, 2}), frozenset({3, 6, 7}), frozenset[int]()]
    refused: set[Change[int]] = set()
    gains = []
    while (change := guided(blocks, rng, refused)) is not None:
        assert change not in refused
        refused.add(change)
        (one, *others), places = change.moved, dict(zip(change.places, change.after))
        there = next(place for place, block in places.items() if one in block)
        moves, swaps = surrogate.gains(blocks)
        gains.append(float(swaps[one, others[0]] if others else moves[one, there]))
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == sum(int((found > 1e-8).sum()) for found in surrogate.gains(blocks)) > 3
    assert gains[-1] > 0
    right = [frozenset(i for i in range(8) if GROUPS[i] == c) for c in range(4)]
    assert guided(right, rng) is None


def clustered(adapters: dict[str, Adapter], backend: Counting, merge: str, seed: int, **options: object) -> Clustering:
    return cluster_by_loss(adapters, 4, MergeSpec(merge, seed=seed), backend, sets_of(adapters, 1), **options)


@pytest.mark.parametrize("merge", ["ties", "svd"])
@pytest.mark.parametrize("seed", range(3))
def test_guided_ends_no_worse_for_a_fifth_of_the_evaluations(merge: str, seed: int) -> None:
    """Planted clusters, whose partition is the optimum under an exact average."""
    names = [f"t{i:02}" for i in range(len(GROUPS))]
    adapters = dict(zip(names, planted(GROUPS, seed, noise=0.6)))
    plain = clustered(adapters, Counting(adapters), merge, seed)
    guided = clustered(adapters, Counting(adapters), merge, seed, propose="guided")
    assert guided.report["loss"]["search"] <= plain.report["loss"]["search"] * (1 + 1e-9)
    assert 0 < guided.report["evaluations"] <= plain.report["evaluations"] / 5
    assert plain.report["proposals"] == 200 > guided.report["proposals"]
    assert set(guided.blocks) == {tuple(n for n, g in zip(names, GROUPS) if g == group) for group in range(4)}


def test_the_loss_decides_whatever_the_surrogate_promises() -> None:
    xs = planted(GROUPS)
    asked: list[tuple[frozenset[int], int]] = []

    def unmoved(pairs: Sequence[tuple[frozenset[int], int]]) -> list[float]:
        asked.extend(pairs)
        return [1.0] * len(pairs)

    found = search(range(len(xs)), 4, unmoved, iterations=30, propose=Guided(weighed(xs)))
    assert found.blocks == found.start
    assert (found.proposals, found.accepted) == (30, 0)
    assert len(set(asked)) > 30


@pytest.mark.parametrize("budget", [1, 2, 7, 20])
def test_a_budget_is_never_exceeded_and_goes_to_what_promises_most(budget: int) -> None:
    xs = planted(GROUPS)
    right = [[i for i, g in enumerate(GROUPS) if g == group] for group in range(4)]
    asked: list[tuple[frozenset[int], int]] = []

    def drawn(pairs: Sequence[tuple[frozenset[int], int]]) -> list[float]:
        asked.extend(pairs)
        return [hash((tuple(sorted(block)), task)) % 97 for block, task in pairs]

    propose = Guided(weighed(xs), beyond=True)
    found = search(range(24), 4, drawn, start=right, propose=propose, budget=budget, iterations=50)
    assert (found.proposals > 0) == (budget > 1)  # every change here promises a loss
    assert budget - 4 < len(set(asked)) <= budget


def test_no_task_is_proposed_for_a_block_twice_beyond_the_expected_gains() -> None:
    xs = planted(GROUPS[:8])
    propose, rng = Guided(weighed(xs), beyond=True), np.random.default_rng(0)
    blocks = [frozenset(i for i in range(8) if GROUPS[i] == c) for c in range(4)]
    moves = []
    while (change := propose(blocks, rng)) is not None:
        moves.append(change)
    assert len(moves) == len(set(moves)) == 8 * 3 + 8 * 6 // 2
    assert propose([blocks[1], blocks[0], *blocks[2:]], rng) is not None  # those are other places


def test_a_guided_start_measures_nothing_and_ends_where_no_gain_is_expected() -> None:
    xs = planted(GROUPS)

    def never(pairs: Sequence[tuple[frozenset[int], int]]) -> list[float]:
        raise AssertionError

    found = partition(xs, 4, method="d2c", losses=never, init="guided", propose="guided")
    assert found == [[i for i, g in enumerate(GROUPS) if g == group] for group in range(4)]
    for k in (1, 24):
        assert len(partition(xs, k, method="d2c", losses=never, init="guided", propose="guided")) == k


def test_what_a_model_shows_of_the_tasks_inputs_decides_what_promises() -> None:
    """Adapters in planted groups, whose tasks read only what other groups share."""
    adapters = dict(zip([f"t{i:02}" for i in range(len(GROUPS))], planted(GROUPS)))
    others = [i // 6 for i in range(24)]

    class Showing(Counting):
        def effects(self, xs: Sequence[Adapter], sets: Sequence[object]) -> Iterator[Square]:
            assert [list(adapters.values()).index(x) for x in xs] == list(range(24))
            assert [each.task for each in sets] == list(adapters)
            same = np.equal.outer(others, others)
            return iter([same + np.eye(24)] * 24)

    backend = Showing(adapters)
    found = clustered(adapters, backend, "ties", 0, init="guided", propose="guided", iterations=0)
    names = list(adapters)
    assert set(found.blocks) == {tuple(names[6 * g : 6 * g + 6]) for g in range(4)}
    plain = clustered(adapters, Counting(adapters), "ties", 0, init="guided", iterations=0)
    assert set(plain.blocks) != set(found.blocks)


def test_a_swap_is_one_proposal_of_two_moves() -> None:
    """Two pairs that lie crosswise, in blocks of a size that no single move improves for both."""
    blocks = [frozenset({0, 1}), frozenset({2, 3})]
    change = moving(blocks, {1: 1, 2: 0})
    assert change == Change((0, 1), (blocks[0], blocks[1]), (frozenset({0, 2}), frozenset({1, 3})), (1, 2))
    right = {frozenset({0, 2}), frozenset({1, 3})}

    def losses(pairs: Sequence[tuple[frozenset[int], int]]) -> list[float]:
        return [0.0 if block in right else 1.0 for block, _ in pairs]

    assert moved_falls(change, losses)
    assert both_fall(change, losses)
    found = search(range(4), 2, losses, start=[[0, 1], [2, 3]], propose=lambda b, *_: change if b == blocks else None)
    assert found.blocks == ((0, 2), (1, 3))
    assert (found.moves, found.proposals, found.accepted) == (((0, 1), (0, 2)), 1, 1)
    assert found.start == ((0, 1), (2, 3))


@pytest.mark.parametrize("propose", ["uniform", "guided"])
def test_restarts_keep_the_best_of_several_searches(propose: str) -> None:
    xs = [make_adapter(i) for i in range(14)]
    losses = losses_of(xs)

    def total(blocks: Sequence[Sequence[int]]) -> float:
        return sum(losses([(frozenset(block), task) for block in blocks for task in block]))

    def found(restarts: int) -> list[list[int]]:
        return partition(xs, 4, method="d2c", seed=1, losses=losses, iterations=15, propose=propose, restarts=restarts)

    reached = [total(found(restarts)) for restarts in range(5)]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < reached[0]
