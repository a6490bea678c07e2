"""The online rules: decision tables, thresholds, and K-Merge transcribed literally against a real shelf."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory import assert_same_delta, dense, make_adapter
from lorashelf import (
    POLICIES,
    Adapter,
    Factors,
    Modules,
    Shelf,
    candidates,
    new_settings,
    plan_add,
    policy,
    similarity,
)
from lorashelf.errors import UsageError
from lorashelf.placement.actions import Action, Candidate, Fold, Open, Refuse, nearest
from lorashelf.placement.policies import BYTES, NO_OBJECT, NO_ROOM, View, auto_threshold, median_similarity

SCORES = st.dictionaries(st.integers(0, 9), st.floats(-1, 1), max_size=6)
THREE = {0: 0.10, 1: 0.30, 4: 0.20}
Decision = Action | Refuse


def offered(scores: Mapping[int, float], free: int | None) -> list[Candidate]:
    opening = [] if free is None else [Candidate.opening(free)]
    return [*opening, *(Candidate.folding(slot, score) for slot, score in scores.items())]


def decided(name: str, scores: Mapping[int, float], free: int | None, view: View) -> Any:
    """The action of the policy's choice, or its refusal."""
    chosen = POLICIES[name](offered(scores, free), view)
    return chosen.action if isinstance(chosen, Candidate) else chosen


# decision tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scores", "free", "view", "decision"),
    [
        ("kmerge", {}, 0, View(), Open(0)),
        ("kmerge", THREE, 2, View(), Open(2)),
        ("kmerge", THREE, 2, View(threshold=-1.0), Open(2)),
        ("kmerge", THREE, None, View(), Fold(1)),
        ("kmerge", {}, None, View(), Refuse(NO_ROOM)),
        ("kmerge++", {}, 0, View(threshold=0.2), Open(0)),
        ("kmerge++", {}, 0, View(threshold=-1.0), Open(0)),
        ("kmerge++", THREE, 2, View(threshold=0.31), Open(2)),
        ("kmerge++", THREE, 2, View(threshold=0.30), Fold(1)),
        ("kmerge++", THREE, 2, View(threshold=0.05), Fold(1)),
        ("kmerge++", THREE, 2, View(threshold=None), Open(2)),
        ("kmerge++", THREE, None, View(threshold=0.9), Fold(1)),
        ("kmerge++", THREE, None, View(threshold=None), Fold(1)),
        ("kmerge++", {0: -0.2, 1: -0.1}, 2, View(threshold=-0.1), Fold(1)),
        ("kmerge++", {}, None, View(threshold=0.1), Refuse(NO_ROOM)),
        ("half", {}, 0, View(), Open(0)),
        ("half", THREE, 2, View(), Open(2)),
        ("half", THREE, None, View(), Fold(1, weighting="half")),
        ("half", {}, None, View(), Refuse(NO_ROOM)),
        ("random", {}, 0, View(), Open(0)),
        ("random", THREE, 2, View(), Open(2)),
        ("random", {7: 0.0}, None, View(), Fold(7)),
        ("random", {}, None, View(), Refuse(NO_ROOM)),
        ("oracle", {}, 0, View(type="qa"), Open(0)),
        ("oracle", THREE, 2, View(type="qa", types={0: frozenset({"qa", "sum"}), 1: frozenset({"gec"})}), Fold(0)),
        ("oracle", THREE, 2, View(type="qa", types={0: frozenset({"sum"}), 1: frozenset({"gec"})}), Open(2)),
        ("oracle", THREE, None, View(type="qa", types={0: frozenset({"qa"})}), Fold(0)),
        ("oracle", THREE, None, View(type="qa", types={0: frozenset({"sum"})}), Fold(1)),
        ("oracle", THREE, None, View(type="qa", types=dict.fromkeys((0, 4), frozenset({"qa"}))), Fold(4)),
        ("oracle", {}, None, View(type="qa"), Refuse(NO_ROOM)),
        ("bytes", THREE, 2, View(threshold=-1.0), Open(2)),
        ("bytes", THREE, None, View(), Refuse(NO_OBJECT)),
    ],
)
def test_a_policy_decides_by_its_table(
    name: str, scores: dict[int, float], free: int | None, view: View, decision: Decision
) -> None:
    assert decided(name, scores, free, view) == decision


@given(SCORES.filter(bool))
def test_the_nearest_slot_has_the_largest_score_and_ties_go_to_the_lowest_id(scores: dict[int, float]) -> None:
    best = max(scores.values())
    chosen = min(slot for slot, score in scores.items() if score == best)
    assert nearest(offered(scores, None)).action.slot == chosen
    assert nearest(offered(dict(reversed(scores.items())), None)).action.slot == chosen
    assert nearest(offered(dict.fromkeys(scores, 0.5), None)).action.slot == min(scores)
    for name in ("kmerge", "kmerge++", "half"):
        assert decided(name, scores, None, View(threshold=best)).slot == chosen


@given(SCORES, st.none() | st.integers(0, 9), st.none() | st.floats(-1, 1))
def test_every_policy_folds_into_a_filled_slot_opens_a_free_one_or_refuses(
    scores: dict[int, float], free: int | None, threshold: float | None
) -> None:
    averaged = {slot: frozenset({f"b2-{slot}"}) for slot in scores}
    types = {slot: frozenset({"qa" if slot % 2 else "sum"}) for slot in scores}
    for name in POLICIES:
        decision = decided(name, scores, free, View(threshold, "qa", types, averaged))
        if isinstance(decision, Open):
            assert decision.slot == free
        elif isinstance(decision, Fold):
            assert decision.slot in scores
            assert set(decision.sources) <= scores.keys()
        else:
            assert free is None
            assert name == BYTES or not scores


def test_an_empty_shelf_opens_whatever_the_threshold() -> None:
    for name in POLICIES:
        assert decided(name, {}, 0, View(threshold=-2.0)) == Open(0)


@given(SCORES.filter(bool), st.floats(-1, 1))
def test_kmerge_plus_folds_exactly_where_a_score_reaches_the_threshold(
    scores: dict[int, float], threshold: float
) -> None:
    decision = decided("kmerge++", scores, 9, View(threshold=threshold))
    assert isinstance(decision, Fold) == any(score >= threshold for score in scores.values())


def test_random_draws_uniformly_and_by_its_generator() -> None:
    def draws(seed: int, count: int = 600) -> list[int]:
        return [decided("random", THREE, None, View(seed=(seed, i))).slot for i in range(count)]

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
    assert decided("all", THREE, None, View(averaged=histories)) == decision
    assert decided("all", THREE, 2, View(averaged=histories)) == Open(2)


def test_all_refuses_where_histories_overlap_without_covering_each_other() -> None:
    histories = {0: frozenset("ab"), 1: frozenset("bc")}
    decision = decided("all", {0: 0.1, 1: 0.2}, None, View(averaged=histories))
    assert isinstance(decision, Refuse)
    assert "overlap" in decision.reason


def test_a_policy_is_a_function_of_candidates_and_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_values", dict(POLICIES._values))

    @policy("last")
    def last(candidates: Sequence[Candidate], view: View) -> Candidate:
        return max(candidates, key=lambda candidate: candidate.action.slot)

    assert decided("last", THREE, 2, View()) == Fold(4)
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
    view, again = View(seed=(3, 1)), View(seed=(3, 1))
    draws = [float(view.rng.random()) for _ in range(4)]
    assert len(set(draws)) == 4
    assert draws == [float(again.rng.random()) for _ in range(4)]


# candidates of a real shelf -----------------------------------------------------------------------------------------


def test_candidates_foretell_what_each_action_writes_and_takes(new_shelf: Callable[..., Shelf]) -> None:
    for chosen in range(3):
        shelf = new_shelf(3, name=f"{chosen}.shelf", policy="kmerge")
        for seed in (0, 1):
            shelf.commit(plan_add(shelf.snapshot(), make_adapter(seed), f"task-{seed}"))
        found = candidates(shelf.snapshot(), make_adapter(2), "new")
        assert [type(each.action) for each in found] == [Open, Fold, Fold]
        assert [each.quality for each in found] == [1.0, *((1 + each.score) / 2 for each in found[1:])]
        action = found[chosen].action
        plan = _planned_by(shelf, lambda offered, _, action=action: next(c for c in offered if c.action == action))
        assert {slot: x.digest for slot, x in plan.writes.items()} == {
            slot: x.digest for slot, x in found[chosen].writes.items()
        }
        shelf.commit(plan)
        assert shelf.snapshot().bytes == found[chosen].bytes


def test_no_slot_of_its_own_is_offered_where_the_bytes_lack(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(3, policy="kmerge", bytes=12_000)
    while candidates(shelf.snapshot(), make_adapter(9), "new")[0].action == Open(len(shelf.snapshot().manifest.slots)):
        count = len(shelf.snapshot().manifest.slots)
        shelf.commit(plan_add(shelf.snapshot(), make_adapter(count), f"task-{count}"))
    assert 0 < len(shelf.snapshot().manifest.slots) < 3
    assert all(isinstance(each.action, Fold) for each in candidates(shelf.snapshot(), make_adapter(9), "new"))


def test_an_action_that_a_policy_makes_up_is_refused(new_shelf: Callable[..., Shelf]) -> None:
    shelf = new_shelf(2)
    with pytest.raises(UsageError, match=r"returned Open\(slot=7\)"):
        _planned_by(shelf, lambda offered, _: Candidate.opening(7))


def _planned_by(shelf: Shelf, rule: Any) -> Any:
    """The plan of an add under a policy of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(POLICIES, "_values", {**POLICIES._values, shelf.snapshot().settings.placement.policy: rule})
        return plan_add(shelf.snapshot(), make_adapter(2), "new")


@pytest.mark.parametrize("metric", ["l1", "l2", "linf"])
def test_a_shelf_scores_arrivals_by_its_metric_also_after_it_is_opened_again(tmp_path: Path, metric: str) -> None:
    x, y = make_adapter(0), make_adapter(1)
    shelf = Shelf.create(tmp_path / "s", new_settings(2, policy="kmerge", similarity=metric))
    shelf.commit(plan_add(shelf.snapshot(), x, "x"))
    plan = plan_add(Shelf(tmp_path / "s").snapshot(), y, "y")
    assert plan.report["scores"]["0"] == pytest.approx(similarity([y], [x], metric)[0, 0])
    assert shelf.snapshot().settings.placement.similarity == metric


def test_an_unknown_metric_of_a_shelf_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown metric 'l3'"):
        new_settings(2, similarity="l3")
