"""The online rules: decision tables, thresholds, and K-Merge transcribed literally against a real shelf."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory import assert_same_delta, dense, make_adapter
from lorashelf import POLICIES, Adapter, Factors, Modules, Shelf, plan_add, policy
from lorashelf.placement.policies import (
    NO_ROOM,
    Decision,
    Fold,
    Open,
    Refuse,
    View,
    auto_threshold,
    median_similarity,
    nearest,
)

SCORES = st.dictionaries(st.integers(0, 9), st.floats(-1, 1), max_size=6)
THREE = {0: 0.10, 1: 0.30, 4: 0.20}


# decision tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scores", "view", "decision"),
    [
        ("kmerge", {}, View(free=0), Open(0)),
        ("kmerge", THREE, View(free=2), Open(2)),
        ("kmerge", THREE, View(free=2, threshold=-1.0), Open(2)),
        ("kmerge", THREE, View(free=None), Fold(1)),
        ("kmerge", {}, View(free=None), Refuse(NO_ROOM)),
        ("kmerge++", {}, View(free=0, threshold=0.2), Open(0)),
        ("kmerge++", {}, View(free=0, threshold=-1.0), Open(0)),
        ("kmerge++", THREE, View(free=2, threshold=0.31), Open(2)),
        ("kmerge++", THREE, View(free=2, threshold=0.30), Fold(1)),
        ("kmerge++", THREE, View(free=2, threshold=0.05), Fold(1)),
        ("kmerge++", THREE, View(free=2, threshold=None), Open(2)),
        ("kmerge++", THREE, View(free=None, threshold=0.9), Fold(1)),
        ("kmerge++", THREE, View(free=None, threshold=None), Fold(1)),
        ("kmerge++", {0: -0.2, 1: -0.1}, View(free=2, threshold=-0.1), Fold(1)),
        ("kmerge++", {}, View(free=None, threshold=0.1), Refuse(NO_ROOM)),
        ("half", {}, View(free=0), Open(0)),
        ("half", THREE, View(free=2), Open(2)),
        ("half", THREE, View(free=None), Fold(1, weighting="half")),
        ("half", {}, View(free=None), Refuse(NO_ROOM)),
        ("random", {}, View(free=0), Open(0)),
        ("random", THREE, View(free=2), Open(2)),
        ("random", {7: 0.0}, View(free=None), Fold(7)),
        ("random", {}, View(free=None), Refuse(NO_ROOM)),
        ("oracle", {}, View(free=0, type="qa"), Open(0)),
        ("oracle", THREE, View(free=2, type="qa", types={0: frozenset({"qa", "sum"}), 1: frozenset({"gec"})}), Fold(0)),
        ("oracle", THREE, View(free=2, type="qa", types={0: frozenset({"sum"}), 1: frozenset({"gec"})}), Open(2)),
        ("oracle", THREE, View(free=None, type="qa", types={0: frozenset({"qa"})}), Fold(0)),
        ("oracle", THREE, View(free=None, type="qa", types={0: frozenset({"sum"})}), Fold(1)),
        ("oracle", THREE, View(free=None, type="qa", types=dict.fromkeys((0, 4), frozenset({"qa"}))), Fold(4)),
        ("oracle", {}, View(free=None, type="qa"), Refuse(NO_ROOM)),
    ],
)
def test_a_policy_decides_by_its_table(name: str, scores: dict[int, float], view: View, decision: Decision) -> None:
    assert POLICIES[name](scores, view) == decision


@given(SCORES.filter(bool))
def test_the_nearest_slot_has_the_largest_score_and_ties_go_to_the_lowest_id(scores: dict[int, float]) -> None:
    best = max(scores.values())
    chosen = min(slot for slot, score in scores.items() if score == best)
    assert nearest(scores) == chosen
    assert nearest(dict(reversed(scores.items()))) == chosen
    assert nearest(dict.fromkeys(scores, 0.5)) == min(scores)
    for name in ("kmerge", "kmerge++", "half"):
        assert POLICIES[name](scores, View(free=None, threshold=best)).slot == chosen


@given(SCORES, st.none() | st.integers(0, 9), st.none() | st.floats(-1, 1))
def test_every_policy_folds_into_a_filled_slot_opens_a_free_one_or_refuses(
    scores: dict[int, float], free: int | None, threshold: float | None
) -> None:
    averaged = {slot: frozenset({f"b2-{slot}"}) for slot in scores}
    types = {slot: frozenset({"qa" if slot % 2 else "sum"}) for slot in scores}
    for rule in POLICIES.values():
        decision = rule(scores, View(free, threshold, "qa", types, averaged))
        if isinstance(decision, Open):
            assert decision.slot == free
        elif isinstance(decision, Fold):
            assert decision.slot in scores
            assert set(decision.sources) <= scores.keys()
        else:
            assert free is None
            assert not scores


def test_an_empty_shelf_opens_whatever_the_threshold() -> None:
    for rule in POLICIES.values():
        assert rule({}, View(free=0, threshold=-2.0)) == Open(0)


@given(SCORES.filter(bool), st.floats(-1, 1))
def test_kmerge_plus_folds_exactly_where_a_score_reaches_the_threshold(
    scores: dict[int, float], threshold: float
) -> None:
    decision = POLICIES["kmerge++"](scores, View(free=9, threshold=threshold))
    assert isinstance(decision, Fold) == any(score >= threshold for score in scores.values())


def test_random_draws_uniformly_and_by_its_generator() -> None:
    def draws(seed: int, count: int = 600) -> list[int]:
        return [POLICIES["random"](THREE, View(free=None, seed=(seed, i))).slot for i in range(count)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)
    counts = Counter(draws(2))
    assert counts.keys() == THREE.keys()
    # χ² with 2 degrees of freedom: 13.8 is passed once in a thousand seeds
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 13.8
    always_nearest = Counter({1: 600})
    assert sum((always_nearest[slot] - 200) ** 2 / 200 for slot in THREE) > 13.8


@pytest.mark.parametrize(
    ("averaged", "decision"),
    [
        ({0: "a", 1: "b", 4: "c"}, Fold(1, (0, 1, 4))),
        ({0: "a", 1: "abc", 4: "b"}, Fold(1, (1,))),
        ({0: "ab", 1: "ab", 4: "c"}, Fold(1, (0, 4))),
        ({0: "a", 1: "a", 4: "a"}, Fold(1, (0,))),
        ({0: "abc", 1: "abcd", 4: "e"}, Fold(1, (1, 4))),
    ],
)
def test_all_folds_disjoint_sources_that_cover_every_adapter(averaged: dict[int, str], decision: Decision) -> None:
    histories = {slot: frozenset(digests) for slot, digests in averaged.items()}
    assert POLICIES["all"](THREE, View(free=None, averaged=histories)) == decision
    assert POLICIES["all"](THREE, View(free=2, averaged=histories)) == Open(2)


def test_all_refuses_where_histories_overlap_without_covering_each_other() -> None:
    histories = {0: frozenset("ab"), 1: frozenset("bc")}
    decision = POLICIES["all"]({0: 0.1, 1: 0.2}, View(free=None, averaged=histories))
    assert isinstance(decision, Refuse)
    assert "overlap" in decision.reason


def test_a_policy_is_a_function_of_scores_and_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))

    @policy("last")
    def last(scores: dict[int, float], view: View) -> Decision:
        return Fold(max(scores)) if scores else Open(view.free)

    assert POLICIES["last"](THREE, View(free=2)) == Fold(4)
    with pytest.raises(ValueError, match="already registered"):
        policy("last")(last)


# thresholds ---------------------------------------------------------------------------------------------------------


def test_there_is_no_automatic_threshold_before_two_scores() -> None:
    assert auto_threshold([]) is None
    assert auto_threshold([0.5]) is None
    assert auto_threshold([0.5, 0.5]) == 0.5
    assert auto_threshold([0.0, 0.0]) is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.randoms())
def test_the_automatic_threshold_lies_half_a_deviation_above_the_mean_in_any_order(
    scores: list[float], random: Random
) -> None:
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    random.shuffle(scores)
    expected = mean + deviation / 2
    if abs(expected) > 1e-9:  # nothing seen was alike: no threshold
        assert auto_threshold(scores) == (pytest.approx(expected, abs=1e-9) if expected > 0 else None)


@pytest.mark.parametrize("factor", [0.01, 3.0])
def test_the_automatic_threshold_has_the_unit_of_the_scores(factor: float) -> None:
    scores = [0.01, 0.05, -0.02, 0.3, 0.04]
    assert auto_threshold([factor * s for s in scores]) == pytest.approx(factor * auto_threshold(scores))
    assert auto_threshold([*scores, 0.3]) != pytest.approx(auto_threshold(scores))


def test_the_held_out_threshold_is_the_median_over_pairs() -> None:
    table = np.array([[1.0, 0.1, 0.2], [0.1, 1.0, 0.6], [0.2, 0.6, 1.0]])
    assert median_similarity(table) == 0.2
    assert median_similarity(table) != np.median(table)
    assert median_similarity(table[:2, :2]) == 0.1


# K-Merge, transcribed -----------------------------------------------------------------------------------------------


def dense_cosine(x: Adapter, y: Adapter) -> float:
    left, right = dense(x), dense(y)
    norms = {p: np.linalg.norm(left[p]) * np.linalg.norm(right[p]) for p in left}
    return float(np.mean([np.sum(left[p] * right[p]) / norms[p] for p in left]))


def peft_linear(x: Adapter, y: Adapter, weights: list[float]) -> Adapter:
    """PEFT's linear merge: Σ √(w s) A and Σ √(w s) B."""
    modules = {}
    for path, f in x.modules.items():
        g = y.modules[path]
        u, v = (math.sqrt(w * h.scale) for w, h in zip(weights, (f, g)))
        modules[path] = Factors(u * f.a + v * g.a, u * f.b + v * g.b)
    return Adapter(Modules(modules))


def k_merge(adapters: list[Adapter], slots: int, threshold: float | None) -> tuple[list[int], list[Adapter]]:
    """The slot of each adapter and the clusters, as the paper has it; with a threshold it is K-Merge++."""
    clusters: list[Adapter] = []
    counts: list[int] = []
    assigned = []
    for adapter in adapters:
        scores = [dense_cosine(adapter, cluster) for cluster in clusters]
        dissimilar = threshold is None or not scores or max(scores) < threshold
        if len(clusters) < slots and dissimilar:
            clusters.append(adapter)
            counts.append(1)
            assigned.append(len(clusters) - 1)
        else:
            best = int(np.argmax(scores))
            counts[best] += 1
            t = counts[best]
            clusters[best] = peft_linear(clusters[best], adapter, [1 - 1 / t, 1 / t])
            assigned.append(best)
    return assigned, clusters


def arrivals(seed: int) -> list[Adapter]:
    """Twelve adapters, some near one of four centres, so that some scores pass a threshold and some do not."""
    rng = np.random.default_rng(seed)
    centres = [make_adapter(100 * seed + i) for i in range(4)]
    result = []
    for _ in range(12):
        centre, spread = centres[rng.integers(4)], float(rng.choice([0.5, 1.0, 2.0]))
        near = {}
        for path, f in centre.modules.items():
            a, b = (side + spread * rng.standard_normal(side.shape).astype(np.float32) for side in (f.a, f.b))
            near[path] = Factors(a, b, float(rng.choice([0.5, 1.0, 4.0])))
        result.append(centre.with_factors(near))
    return result


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of commits spend nearly all their time in fsync; nothing here is about power cuts."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def on_a_shelf(shelf: Shelf, adapters: list[Adapter]) -> tuple[list[int], list[Adapter]]:
    assigned = []
    for i, adapter in enumerate(adapters):
        plan = plan_add(shelf.snapshot(), adapter, f"task-{i}")
        shelf.commit(plan)
        assigned.append(plan.report["slot"])
    snapshot = shelf.snapshot()
    return assigned, [snapshot.stored(slot) for slot in snapshot.manifest.slots]


@pytest.mark.usefixtures("no_waiting_for_the_disk")
@pytest.mark.parametrize(("name", "threshold"), [("kmerge", None), ("kmerge++", 0.15)])
@pytest.mark.parametrize("seed", range(10))
def test_a_shelf_assigns_and_merges_as_the_paper_transcribed(
    name: str, threshold: float | None, seed: int, new_shelf: Callable[..., Shelf]
) -> None:
    adapters = arrivals(seed)
    options: dict[str, Any] = {"policy": name} if threshold is None else {"policy": name, "threshold": threshold}
    assigned, contents = on_a_shelf(new_shelf(4, **options), adapters)
    expected, clusters = k_merge(adapters, 4, threshold)
    assert assigned == expected
    assert len(contents) == len(clusters)
    for content, cluster in zip(contents, clusters):
        assert_same_delta(cluster, content, 1e-5)
    assert max(Counter(assigned).values()) > 1
    with pytest.raises(AssertionError):
        assert_same_delta(clusters[0], contents[1], 1e-5)


def test_the_two_rules_and_another_threshold_are_told_apart() -> None:
    differing = [k_merge(arrivals(s), 4, None)[0] != k_merge(arrivals(s), 4, 0.15)[0] for s in range(10)]
    assert sum(differing) >= 5
    assert any(k_merge(arrivals(s), 4, 0.05)[0] != k_merge(arrivals(s), 4, 0.15)[0] for s in range(10))


def test_the_draws_of_a_policy_go_on_from_each_other() -> None:
    view, again = View(None, seed=(3, 1)), View(None, seed=(3, 1))
    draws = [float(view.rng.random()) for _ in range(4)]
    assert len(set(draws)) == 4
    assert draws == [float(again.rng.random()) for _ in range(4)]
