"""Guided D2C: what the surrogate expects, against brute force; how few losses it asks a known model for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from factory import make_adapter
from lorashelf import Adapter, Clustering, MergeSpec, cluster_by_loss, combine, gram, inner, norm, partition
from lorashelf.placement.d2c import Change, Guided, both_fall, moved_falls, moving, search
from lorashelf.placement.surrogate import Surrogate
from test_d2c import Counting, sets_of
from test_partition import losses_of, planted

GROUPS = [i % 4 for i in range(24)]


def agreement(xs: Sequence[Adapter], blocks: Sequence[frozenset[int]]) -> float:
    """Σ_t cos(ΔW_t, Σ ΔW of t's block), each cosine by itself."""
    total = 0.0
    for block in filter(None, blocks):
        whole = combine([xs[i] for i in sorted(block)], [1.0] * len(block))
        total += sum(inner(xs[i], whole) / (norm(xs[i]) * norm(whole)) for i in block if norm(xs[i]))
    return total


@pytest.mark.parametrize("seed", range(3))
def test_expected_gains_are_those_of_every_move_and_swap(seed: int) -> None:
    xs = [make_adapter(10 * seed + i, rank=1 + i % 3) for i in range(6)]
    xs[4] = combine([xs[4]], [0.0])  # untrained: like no other
    blocks = [frozenset({0, 1, 4}), frozenset({2, 3}), frozenset({5}), frozenset()]
    moves, swaps = Surrogate(gram(xs)).gains(blocks)
    now = agreement(xs, blocks)

    def after(change: Change[int]) -> float:
        changed = dict(zip(change.places, change.after))
        return agreement(xs, [changed.get(place, block) for place, block in enumerate(blocks)]) - now

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
    guided, surrogate = Guided(gram(xs)), Surrogate(gram(xs))
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

    found = search(range(len(xs)), 4, unmoved, iterations=30, propose=Guided(gram(xs)))
    assert found.blocks == found.start
    assert (found.proposals, found.accepted) == (30, 0)
    assert len(set(asked)) > 30


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
