"""Every registered partitioner, and what the single ones promise: balance, planted clusters, distances, a seed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from factory import make_adapter
from lorashelf import PARTITIONERS, Adapter, Clustering, Factors, cluster, gram, partition, partitioner, similarity
from lorashelf.errors import MissingExtra, UnknownName, UsageError
from lorashelf.lora.similarity import principal_coordinates, raw_gram
from lorashelf.placement.partition_methods import Losses, Partition, partition_method
from lorashelf.placement.partitioners import average_linkage

EVERY = pytest.mark.parametrize("method", sorted(PARTITIONERS))
WITH_SKLEARN = ["agglomerative", "kmeans", "kmeans_svd"]


def family(count: int, seed: int = 0) -> list[Adapter]:
    return [make_adapter(100 * seed + i, rank=1 + i % 3, scale=1.0 + i) for i in range(count)]


def planted(groups: list[int], seed: int = 0, noise: float = 0.3) -> list[Adapter]:
    """One adapter for each entry, near its group's centre."""
    rng = np.random.default_rng(seed)
    result = []
    for group in groups:
        centre = make_adapter(1000 + 50 * seed + group)
        near = {}
        for path, f in centre.modules.items():
            a, b = (side + noise * rng.standard_normal(side.shape).astype(np.float32) for side in (f.a, f.b))
            near[path] = Factors(a, b, f.scale)
        result.append(centre.with_factors(near))
    return result


def blocks_of(groups: list[int]) -> Partition:
    return sorted([i for i, g in enumerate(groups) if g == group] for group in set(groups))


def assert_partition(blocks: Partition, count: int, k: int) -> None:
    """At most k blocks, none empty, sorted inside and by their first, every index once."""
    assert 1 <= len(blocks) <= k
    assert all(blocks)
    assert all(block == sorted(block) for block in blocks)
    assert [block[0] for block in blocks] == sorted(block[0] for block in blocks)
    assert sorted(i for block in blocks for i in block) == list(range(count))


def split(xs: list[Adapter], k: int, *, method: str, seed: int = 0) -> Partition:
    """`partition`, with losses and few iterations for the methods that ask for losses."""
    if not PARTITIONERS[method].by_loss:
        return partition(xs, k, method=method, seed=seed)
    return partition(xs, k, method=method, seed=seed, losses=losses_of(xs), iterations=20)


def losses_of(xs: list[Adapter]) -> Losses[int]:
    """½ ‖ΔW_t − mean ΔW of the block‖², from the inner products."""
    inner = gram(xs)

    def losses(pairs: Sequence[tuple[frozenset[int], int]]) -> list[float]:
        rows = [(sorted(block), task) for block, task in pairs]
        return [(inner[np.ix_(b, b)].mean() - 2 * inner[t, b].mean() + inner[t, t]) / 2 for b, t in rows]

    return losses


@pytest.mark.parametrize("wrong", [[[0, 1]], [[0], [1], []], [[0], [1], [1, 2]], [[2], [0], [1]], [[0], [1], [2], [3]]])
def test_the_check_of_a_partition_sees_a_wrong_one(wrong: Partition) -> None:
    assert_partition([[0, 2], [1]], 3, 3)
    with pytest.raises(AssertionError):
        assert_partition(wrong, 3, 3)


@EVERY
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_every_adapter_is_in_one_of_at_most_k_blocks(method: str, k: int) -> None:
    for seed in range(3):
        xs = family(7, seed)
        blocks = split(xs, k, method=method, seed=seed)
        assert_partition(blocks, 7, k)
        assert split(xs, k, method=method, seed=seed) == blocks
    if not PARTITIONERS[method].by_loss:  # such a method may leave blocks empty
        assert len(split(family(7), k, method=method)) == (1 if method == "single" else k)


@EVERY
@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_slots_as_adapters_give_each_its_own(method: str, count: int) -> None:
    own = [list(range(count))] if method == "single" else [[i] for i in range(count)]
    for k in (count, count + 3):
        assert split(family(count), k, method=method) == own


@EVERY
def test_one_slot_holds_all(method: str) -> None:
    assert split(family(5), 1, method=method) == [[0, 1, 2, 3, 4]]


@EVERY
@pytest.mark.parametrize(("count", "k"), [(0, 2), (3, 0), (3, -1)])
def test_no_adapters_or_no_slots_are_refused(method: str, count: int, k: int) -> None:
    with pytest.raises(UsageError, match=f"{count} adapters into {k} slots"):
        split(family(count), k, method=method)


def test_an_unknown_method_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownName, match="unknown partition method 'kmean'") as caught:
        partition(family(3), 2, method="kmean")
    assert caught.value.nearest[0] == "kmeans"


@EVERY
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_duplicates_are_partitioned_without_a_warning(method: str, k: int) -> None:
    for seed in range(5):
        for count in (6, 7, 8):
            xs = [make_adapter(10 * seed + i % 3) for i in range(count)]
            assert_partition(split(xs, k, method=method), count, k)
    twins = [make_adapter(0)] * 6
    assert_partition(split(twins, k, method=method), 6, k)


@pytest.mark.parametrize("method", WITH_SKLEARN)
def test_copies_share_a_block_where_there_are_enough_slots(method: str) -> None:
    groups = [0, 1, 2, 0, 1, 2, 0]
    assert partition([make_adapter(g) for g in groups], 3, method=method) == blocks_of(groups)


@pytest.mark.parametrize("method", WITH_SKLEARN)
@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(method: str, seed: int) -> None:
    groups = [int(g) for g in np.random.default_rng(seed).permutation([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])]
    blocks = partition(planted(groups, seed), 4, method=method, seed=seed)
    assert blocks == blocks_of(groups)
    assert blocks != blocks_of(groups[1:] + groups[:1])


def test_agglomerative_does_not_see_scale_or_gauge_and_kmeans_does() -> None:
    groups = [0, 0, 1, 1, 2, 2]
    xs = planted(groups)
    turned = []
    for i, x in enumerate(xs):
        factor = np.float32(4.0 ** (i % 2))
        turned.append(
            x.with_factors({p: Factors(-f.a * factor, -f.b / factor, 10.0 ** (i % 3)) for p, f in x.modules.items()})
        )
    assert partition(turned, 3, method="agglomerative") == blocks_of(groups)
    assert partition(turned, 3, method="kmeans") != blocks_of(groups)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_random_blocks_differ_in_size_by_at_most_one(count: int, k: int, seed: int) -> None:
    xs = [make_adapter(0, layers=1, projections=("v_proj",))] * count
    blocks = partition(xs, k, method="random", seed=seed)
    assert_partition(blocks, count, k)
    assert len(blocks) == min(count, k)
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_draws_the_random_blocks() -> None:
    drawn = {str(partition(family(8), 3, method="random", seed=seed)) for seed in range(20)}
    assert len(drawn) > 10


@given(st.integers(0, 2**20), st.integers(2, 6))
def test_kmeans_coordinates_have_the_distances_of_the_flattened_factors(seed: int, count: int) -> None:
    """Of A and B as stored, lower ranks zero-padded; scales are not applied."""
    xs = [make_adapter(seed + i, rank=1 + (seed + i) % 4, scale=3.0) for i in range(count)]
    rank = max(x.rank for x in xs)
    rows = []
    for x in xs:
        sides = [side for f in x.modules.values() for side in (f.a, f.b.T)]
        rows.append(np.concatenate([np.pad(s, ((0, rank - len(s)), (0, 0))).ravel() for s in sides]).astype(float))
    expected = distances(np.array(rows))
    np.testing.assert_allclose(distances(principal_coordinates(raw_gram(xs))), expected, atol=2e-3, rtol=1e-5)
    wrong = distances(principal_coordinates(raw_gram([*xs[1:], xs[0]])))
    assert count == 2 or np.abs(wrong - expected).max() > 0.1


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_is_that_of_the_flattened_factors_and_kmeans_svd_that_of_the_rows_of_features(k: int, seed: int) -> None:
    xs = [make_adapter(20 * seed + i) for i in range(9)]
    rows = np.array([np.concatenate([s.ravel() for f in x.modules.values() for s in (f.a, f.b.T)]) for x in xs])
    features = similarity(xs, metric="svd_features")
    for method, points, wrong in (("kmeans", rows, features), ("kmeans_svd", features, rows)):
        blocks = partition(xs, k, method=method, seed=seed)
        assert blocks == literal_kmeans(points, k, seed)
        assert blocks != literal_kmeans(wrong, k, seed)


def literal_kmeans(points: np.ndarray, k: int, seed: int) -> Partition:
    return blocks_of([int(label) for label in KMeans(k, n_init=10, random_state=seed).fit_predict(points)])


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None, :], axis=2)


def literal_average_linkage(table: np.ndarray, k: int) -> Partition:
    """Join the two clusters with the least mean distance until k are left."""
    clusters = [[i] for i in range(len(table))]
    while len(clusters) > k:
        i, j = min(
            ((i, j) for i in range(len(clusters)) for j in range(i)),
            key=lambda pair: table[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean(),
        )
        clusters[j] += clusters.pop(i)
    return sorted(sorted(cluster) for cluster in clusters)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_agglomerative_is_average_linkage_on_one_minus_cosine(k: int, seed: int) -> None:
    xs = family(9, seed)
    expected = literal_average_linkage(1 - similarity(xs), k)
    assert partition(xs, k, method="agglomerative") == expected
    assert blocks_of(average_linkage(1 - similarity(xs), k)) == expected
    assert literal_average_linkage(similarity(xs), k) != expected


@pytest.fixture(params=["sklearn", "sklearn.cluster"])
def without_sklearn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if scikit-learn were not installed."""
    monkeypatch.setitem(sys.modules, request.param, None)


@pytest.mark.usefixtures("without_sklearn")
@EVERY
def test_without_scikit_learn_a_method_works_or_names_the_extra(method: str) -> None:
    if method in WITH_SKLEARN:
        with pytest.raises(MissingExtra, match="needs scikit-learn") as caught:
            split(family(4), 2, method=method)
        assert caught.value.extra == "cluster"
        assert "lorashelf[cluster]" in str(caught.value)
    else:
        assert_partition(split(family(4), 2, method=method), 4, 2)
    assert len(split(family(2), 2, method=method)) == (1 if method == "single" else 2)


def test_a_method_that_asks_for_losses_is_refused_without_them() -> None:
    """Whoever clusters: the core, by names, or the command line (test_cluster_d2c.py)."""
    xs = family(3)
    for attempt in (
        lambda: partition(xs, 2, method="d2c"),
        lambda: cluster(dict(zip("abc", xs)), 2, method="d2c"),
    ):
        with pytest.raises(UsageError, match="partition method d2c needs --examples DIR") as caught:
            attempt()
        assert "cluster_by_loss" in str(caught.value.cure)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("d2c", {"iterations": -1}, "iterations is -1; it must be at least 0"),
        ("d2c", {"accept": "all", "propose": "wild"}, "accept is 'all'; choose from task, both; propose is 'wild'"),
        ("d2c", {"iteration": 3}, "partition method d2c has no parameter 'iteration'"),
        ("random", {"iterations": 3}, "partition method random has no parameter 'iterations' (it has: none)"),
    ],
)
def test_parameters_are_those_of_the_method(method: str, parameters: dict, said: str) -> None:
    xs = family(3)
    with pytest.raises(UsageError) as caught:
        partition(xs, 2, method=method, losses=losses_of(xs), **parameters)
    assert said in caught.value.what


def test_a_method_of_ones_own_may_ask_for_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PARTITIONERS, "_values", dict(PARTITIONERS._values))

    @partition_method("worst first", by_loss=True)
    def worst_first(xs, k, seed, losses, watch, *, share: float = 0.5, side: Literal["left", "right"] = "left"):
        from lorashelf.placement.partition_methods import Partitioned

        everyone = frozenset(range(len(xs)))
        order = sorted(everyone, key=dict(zip(everyone, losses([(everyone, i) for i in everyone]))).get)
        return Partitioned([sorted(order[:1]), sorted(order[1:])], {"share": share})

    xs = [make_adapter(i) for i in range(4)]
    found = cluster(dict(zip("abcd", xs)), 2, method="worst first", losses=lambda pairs: [ord(t) for _, t in pairs])
    assert found == Clustering((("a",), ("b", "c", "d")), "worst first", 0, {"share": 0.5})
    with pytest.raises(TypeError, match="losses: the name is reserved for the caller"):

        @partition_method("another")
        def another(xs, k, seed, given, watch, *, losses: Annotated[int, None] = 1): ...


def test_names_and_indices_are_clustered_alike() -> None:
    xs = planted([0, 1, 2] * 4)
    names = [f"t{i:02}" for i in range(12)]
    by_index = partition(xs, 3, method="d2c", seed=3, losses=losses_of(xs))

    def losses(pairs: Sequence[tuple[frozenset[str], str]]) -> Sequence[float]:
        return losses_of(xs)([(frozenset(map(names.index, block)), names.index(task)) for block, task in pairs])

    shuffled = dict(sorted(zip(names, xs), key=lambda item: item[0][::-1]))
    found = cluster(shuffled, 3, method="d2c", seed=3, losses=losses)
    assert found.blocks == tuple(tuple(names[i] for i in block) for block in by_index)
    assert (found.method, found.seed, found.report["proposals"]) == ("d2c", 3, 200)


def test_a_partitioner_is_a_function_of_adapters_slots_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PARTITIONERS, "_values", dict(PARTITIONERS._values))

    @partitioner("alternating")
    def alternating(xs: list[Adapter], k: int, seed: int) -> list[int]:
        return [(i + seed) % k for i in range(len(xs))]

    assert partition(family(5), 2, method="alternating", seed=1) == [[0, 2, 4], [1, 3]]
    with pytest.raises(ValueError, match="already registered"):
        partitioner("alternating")(alternating)
