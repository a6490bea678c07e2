"""The metrics against their definitions on dense updates, and the laws they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD

from factory import dense, make_adapter, sharing_init
from lorashelf import METRICS, Adapter, Factors, Modules, merge, read_adapter, similarity, write_adapter
from lorashelf.errors import UnknownName, UsageError
from lorashelf.lora.similarity import SHARED_INIT, init_similarity, principal_coordinates, raw_gram

SEEDS = st.integers(0, 2**32 - 1)
METRIC = pytest.mark.parametrize("metric", sorted(METRICS))


def assorted(seed: int) -> list[Adapter]:
    """Adapters of mixed ranks and scales, of different sets of modules, one untrained."""
    full, wide = make_adapter(seed, rank=3), make_adapter(seed + 1, rank=5, scale=0.25)
    narrow = make_adapter(seed + 2, projections=("q_proj",), scales={"q_proj": 8.0})
    return [full, wide, narrow, make_adapter(seed + 3, projections=("v_proj",)), untrained(make_adapter(seed + 4))]


def untrained(x: Adapter) -> Adapter:
    return x.with_factors({p: Factors(f.a, np.zeros_like(f.b), f.scale) for p, f in x.modules.items()})


def scaled(x: Adapter, factor: float) -> Adapter:
    return x.with_factors({p: Factors(f.a, f.b, f.scale * factor) for p, f in x.modules.items()})


def regauged(x: Adapter, seed: int) -> Adapter:
    """(B G, G⁻¹ A) for a random well-conditioned G a module."""
    rng = np.random.default_rng(seed)
    modules = {}
    for path, f in x.modules.items():
        r = f.shape.rank
        g = np.linalg.qr(rng.standard_normal((r, r)))[0] * np.exp(rng.uniform(-2, 2, r))
        modules[path] = Factors((np.linalg.inv(g) @ f.a).astype("f4"), (f.b @ g).astype("f4"), f.scale)
    return x.with_factors(modules)


def literal_cosine(x: Adapter, y: Adapter) -> float:
    """The mean over the union of the modules of cos(vec ΔW, vec ΔW'); 0 where one side is zero or lacks it."""
    left, right = dense(x), dense(y)
    cosines = []
    for path in left.keys() | right.keys():
        u, v = (np.ravel(side.get(path, 0.0)) for side in (left, right))
        length = np.linalg.norm(u) * np.linalg.norm(v)
        cosines.append(float(np.sum(u * v) / length) if length else 0.0)
    return float(np.mean(cosines))


def literal_l2(x: Adapter, y: Adapter) -> float:
    left, right = dense(x), dense(y)
    distances = [np.linalg.norm(left.get(p, 0.0) - right.get(p, np.zeros(()))) for p in left.keys() | right.keys()]
    return float(np.mean([1 / (1 + d) for d in distances]))


def literal_norm(order: float) -> Callable[[Adapter, Adapter], float]:
    def mean(x: Adapter, y: Adapter) -> float:
        left, right = dense(x), dense(y)
        both = [np.ravel(left.get(p, 0.0) - right.get(p, np.zeros(()))) for p in left.keys() | right.keys()]
        return float(np.mean([1 / (1 + np.linalg.norm(d.astype(np.float64), order)) for d in both]))

    return mean


def literal_svd_features(xs: list[Adapter], quantile: float = 0.8) -> np.ndarray:
    """MBC: flatten, set what is not above the quantile of the magnitudes to zero, SVD, cosine of the rows."""
    rows = np.stack([np.concatenate([s.ravel() for f in x.modules.values() for s in (f.a, f.b)]) for x in xs])
    rows = rows.astype(np.float64)
    rows[np.abs(rows) <= np.quantile(np.abs(rows), quantile, axis=1, keepdims=True)] = 0.0
    features = TruncatedSVD(min(64, len(xs) - 1), algorithm="arpack", random_state=0).fit_transform(rows)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features @ features.T


LITERAL = {
    "cosine": literal_cosine,
    "l1": literal_norm(1),
    "l2": literal_l2,
    "linf": literal_norm(np.inf),
}


@pytest.mark.parametrize("metric", sorted(LITERAL))
@given(seed=st.integers(0, 2**20))
def test_a_metric_equals_its_definition_on_dense_updates(metric: str, seed: int) -> None:
    xs, ys = assorted(seed), assorted(seed + 3)  # the two share adapters
    expected = [[LITERAL[metric](x, y) for y in ys] for x in xs]
    np.testing.assert_allclose(similarity(xs, ys, metric), expected, atol=1e-6)
    expected = [[LITERAL[metric](x, y) for y in xs] for x in xs]
    np.testing.assert_allclose(similarity(xs, metric=metric), expected, atol=1e-6)


@pytest.mark.parametrize("metric", sorted(LITERAL))
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_adapters_in_files_compare_as_those_in_memory(metric: str, dtype: str, tmp_path: Path) -> None:
    """Like modules of a file are compared as one array; of mixed ranks, or absent, they are not alike."""
    xs = [
        make_adapter(0, layers=12, dtype=dtype),
        make_adapter(1, layers=12, rank=7, dtype=dtype),
        make_adapter(2, layers=3, ranks={"q_proj": 2}, dtype=dtype),
        merge([make_adapter(3, layers=12, dtype=dtype), make_adapter(4, layers=5, dtype=dtype)], method="cat"),
    ]
    read = []
    for i, x in enumerate(xs):
        write_adapter(x, tmp_path / str(i))
        read.append(read_adapter(tmp_path / str(i)))
    for i, x in enumerate(read):
        expected = [LITERAL[metric](x, y) for y in read]
        np.testing.assert_allclose(similarity([x], read, metric)[0], expected, atol=1e-6)
        in_memory = similarity(
            [x.with_factors(dict(x.modules))], [y.with_factors(dict(y.modules)) for y in read], metric
        )
        np.testing.assert_allclose(similarity([x], read, metric), in_memory, atol=1e-12, err_msg=str(i))


@pytest.mark.parametrize("metric", sorted(LITERAL))
def test_products_beyond_float32_and_ranks_beyond_the_dense_size_compare_too(metric: str) -> None:
    for size, rank in ((1e7, 4), (1.0, 90)):
        xs = [make_adapter(seed, rank=rank) for seed in range(3)]
        xs = [
            x.with_factors({p: Factors(f.a * size, f.b * size**2, size**-3) for p, f in x.modules.items()}) for x in xs
        ]
        expected = [LITERAL[metric](xs[0], y) for y in xs]
        np.testing.assert_allclose(similarity(xs[:1], xs, metric)[0], expected, atol=1e-6)


@pytest.mark.parametrize("metric", sorted(LITERAL))
def test_the_definition_sees_another_scale_gauge_or_module(metric: str) -> None:
    x, y = make_adapter(0), make_adapter(1)
    paths = list(y.modules)
    dropped = Adapter(Modules({p: y.modules[p] for p in paths[:-1]}))
    turned = y.with_factors({p: replace(f, scale=-f.scale) for p, f in y.modules.items()})
    for wrong in (dropped, turned):
        assert (
            abs(similarity([x], [wrong], metric)[0, 0] - LITERAL[metric](x, y)) > 1e-5
        )  # tolerance of the equality: 1e-6


@pytest.mark.parametrize("rank", [4, 5])
def test_svd_features_equal_a_literal_truncated_svd_of_the_flattened_factors(rank: int) -> None:
    xs = [make_adapter(seed, rank=rank) for seed in range(7)]
    np.testing.assert_allclose(similarity(xs, metric="svd_features"), literal_svd_features(xs), atol=1e-4)
    wrong = literal_svd_features(xs, quantile=0.5)
    assert np.abs(similarity(xs, metric="svd_features") - wrong).max() > 1e-2


def test_svd_features_depend_on_the_gauge_and_not_on_the_scale() -> None:
    xs = [make_adapter(seed) for seed in range(5)]
    plain = similarity(xs, metric="svd_features")
    np.testing.assert_array_equal(similarity([scaled(x, 3.0) for x in xs], metric="svd_features"), plain)
    assert np.abs(similarity([regauged(xs[0], 0), *xs[1:]], metric="svd_features") - plain).max() > 1e-3


@METRIC
def test_a_metric_is_symmetric_bounded_and_the_same_as_a_matrix_or_one_against_many(metric: str) -> None:
    xs = assorted(0)
    table = similarity(xs, metric=metric)
    assert table.shape == (5, 5)
    assert table.dtype == np.float64
    assert np.isfinite(table).all()
    assert np.all(np.abs(table) <= 1.0)
    np.testing.assert_array_equal(table, table.T)
    np.testing.assert_allclose(similarity(xs, xs, metric), similarity(xs, xs, metric).T, atol=1e-6)
    if metric != "svd_features":  # its features belong to the whole set
        rows = [similarity([x], xs, metric)[0] for x in xs]
        np.testing.assert_allclose(rows, table, atol=1e-6)
        np.testing.assert_allclose(similarity(xs, xs, metric), table, atol=1e-6)


@METRIC
def test_the_order_of_the_adapters_orders_the_matrix_and_nothing_else(metric: str) -> None:
    xs = [make_adapter(seed) for seed in range(5)]
    order = [3, 0, 4, 1, 2]
    table = similarity(xs, metric=metric)
    np.testing.assert_allclose(
        similarity([xs[i] for i in order], metric=metric), table[np.ix_(order, order)], atol=1e-5
    )


@METRIC
def test_an_adapter_is_entirely_like_itself(metric: str) -> None:
    x = make_adapter(0)
    others = [make_adapter(seed) for seed in (1, 2)]
    twin = x.with_factors({p: Factors(f.a.copy(), f.b.copy(), f.scale) for p, f in x.modules.items()})
    table = similarity([x, twin, *others], metric=metric)
    np.testing.assert_allclose([table[0, 0], table[0, 1]], 1.0, atol=1e-6)
    assert table[0, 2] < 0.9


@pytest.mark.parametrize("rank", [1, 3, 5, 7])
@pytest.mark.parametrize("seed", range(6))
def test_l2_of_a_duplicate_is_exactly_one_among_any_others(seed: int, rank: int) -> None:
    x, *others = (make_adapter(10 * seed + i, rank=rank, scale=0.3) for i in range(3))
    twin = x.with_factors({p: Factors(f.a.copy(), f.b.copy(), f.scale) for p, f in x.modules.items()})
    assert similarity([x, twin], metric="l2").tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert similarity([x], [twin, *others], "l2")[0, 0] == similarity([twin, *others], [x], "l2")[0, 0] == 1.0
    assert similarity([x], [scaled(x, 1.001)], "l2")[0, 0] < 1.0


@METRIC
def test_a_zero_update_gives_numbers_and_cosine_zero(metric: str) -> None:
    x = make_adapter(0)
    zero = x.with_factors({p: Factors(f.a * 0, f.b * 0, f.scale) for p, f in x.modules.items()})
    muted = scaled(x, 0.0)
    xs = [zero, untrained(x), muted, x]
    for table in (similarity(xs, metric=metric), similarity(xs, xs, metric)):
        assert np.isfinite(table).all()
        if metric == "cosine":
            np.testing.assert_allclose(table, np.diag([0, 0, 0, 1.0]), atol=1e-6)


def test_cosine_counts_a_module_that_one_side_lacks_as_zero() -> None:
    x = make_adapter(0)
    half = Adapter(Modules({p: f for p, f in x.modules.items() if p.endswith("q_proj")}))
    assert similarity([x], [half])[0, 0] == pytest.approx(0.5, abs=1e-6)
    other = Adapter(Modules({p: f for p, f in x.modules.items() if p.endswith("v_proj")}))
    assert similarity([half], [other])[0, 0] == 0.0
    assert similarity([half], [other], "l2")[0, 0] < 1.0


@given(SEEDS, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_cosine_does_not_see_positive_scales(seed: int, s: float, t: float) -> None:
    x, y = make_adapter(seed), make_adapter(seed + 1, rank=2)
    plain = similarity([x], [y])[0, 0]
    assert similarity([scaled(x, s)], [scaled(y, t)])[0, 0] == pytest.approx(plain, abs=1e-12)
    assert similarity([scaled(x, -s)], [y])[0, 0] == pytest.approx(-plain, abs=1e-12)


@given(SEEDS)
def test_metrics_of_the_update_do_not_see_the_gauge(seed: int) -> None:
    x, y = make_adapter(seed), make_adapter(seed + 1, rank=2)
    for metric in LITERAL:
        plain = similarity([x], [y], metric)
        np.testing.assert_allclose(similarity([regauged(x, seed)], [regauged(y, seed + 1)], metric), plain, atol=2e-6)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_cosine_holds_where_one_factor_is_tiny_and_the_other_huge(factor: float) -> None:
    x, y = make_adapter(0), make_adapter(1)
    skewed = x.with_factors(
        {p: Factors(f.a * np.float32(factor), f.b / np.float32(factor), f.scale) for p, f in x.modules.items()}
    )
    assert similarity([skewed], [y])[0, 0] == pytest.approx(similarity([x], [y])[0, 0], abs=1e-6)


def test_an_unknown_metric_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownName, match="unknown metric 'cosin'") as caught:
        similarity([make_adapter(0)], metric="cosin")
    assert caught.value.nearest == ["cosine"]
    assert caught.value.exit_code == UsageError.exit_code == 2


# the raw factors' Gram matrix, on which K-Means and the features stand ----------------------------------------------


def flattened(xs: list[Adapter], rank: int) -> np.ndarray:
    """All A and B of each adapter in one row, zero-padded to `rank`."""
    rows = []
    for x in xs:
        sides = [side for f in x.modules.values() for side in (f.a, f.b.T)]
        rows.append(np.concatenate([np.pad(s, ((0, rank - len(s)), (0, 0))).ravel() for s in sides]))
    return np.stack(rows).astype(np.float64)


def test_the_raw_gram_is_that_of_the_flattened_padded_factors_as_stored() -> None:
    xs = [make_adapter(0, rank=2), make_adapter(1, rank=4, scale=9.0), make_adapter(2, rank=3)]
    rows = flattened(xs, 4)
    np.testing.assert_allclose(raw_gram(xs), rows @ rows.T, rtol=1e-5, atol=1e-3)
    assert np.abs(raw_gram([*xs[1:], xs[0]]) - rows @ rows.T).max() > 1.0


def test_principal_coordinates_keep_every_inner_product_and_fall_in_variance() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 40))
    points = principal_coordinates(rows @ rows.T)
    np.testing.assert_allclose(points @ points.T, rows @ rows.T, atol=1e-9)
    assert np.all(np.diff(np.sum(points**2, axis=0)) <= 1e-9)
    np.testing.assert_allclose(principal_coordinates(np.ones((3, 3)))[:, 1:], 0.0, atol=1e-7)


def cosine_of_a(x: Adapter, y: Adapter) -> float:
    sides = [(x.modules[path].a, y.modules[path].a) for path in x.modules]
    return float(np.mean([np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in sides]))


def test_a_shared_initialisation_is_told_from_separate_ones() -> None:
    same, own = sharing_init(5, moved=0.1), [make_adapter(seed) for seed in range(5)]
    for xs, alike in ((same, True), (own, False), ([*same[:1], *own[1:]], False)):
        literal = [cosine_of_a(xs[i], xs[j]) for i in range(5) for j in range(i)]
        assert init_similarity(xs) == pytest.approx(np.mean(literal), abs=1e-6)
        assert (init_similarity(xs) > SHARED_INIT) is alike


def test_an_initialisation_is_compared_where_two_adapters_have_a_module_of_one_shape() -> None:
    x = make_adapter(0)
    zero = x.with_factors({p: Factors(f.a * 0, f.b, f.scale) for p, f in x.modules.items()})
    assert init_similarity([x]) == init_similarity([x, zero]) == init_similarity([x, make_adapter(0, rank=3)]) == 0.0
    assert init_similarity([make_adapter(0, projections=("q_proj",)), make_adapter(0, projections=("v_proj",))]) == 0.0
    assert init_similarity([x, regauged(x, 1)]) < SHARED_INIT < init_similarity([x, scaled(x, 3.0)])


def test_modules_are_sampled_evenly() -> None:
    many = [make_adapter(seed, layers=40, projections=("q_proj",)) for seed in range(2)]
    paths = list(many[0].modules)
    shared = {p: Factors(many[0].modules[p].a, f.b, f.scale) for p, f in many[1].modules.items() if paths.index(p) % 2}
    half = many[1].with_factors({**many[1].modules, **shared})
    assert init_similarity([many[0], half]) == pytest.approx(
        init_similarity(many), abs=1e-9
    )  # every other of 40: even ones
    assert init_similarity([many[0], many[1].with_factors({p: many[0].modules[p] for p in paths})]) == pytest.approx(
        1.0
    )


def test_linear_adds_up_adapters_of_one_initial_a_and_svd_averages() -> None:
    xs = sharing_init(4)
    for path in xs[0].modules:
        total = np.sum([dense(x)[path] for x in xs], axis=0)
        roots = np.sqrt([x.modules[path].scale for x in xs])  # linear: √s on either side
        summed = np.sum([root * x.modules[path].b for root, x in zip(roots, xs, strict=True)], axis=0)
        expected = roots.mean() * summed @ xs[0].modules[path].a
        np.testing.assert_allclose(dense(merge(xs, method="linear"))[path], expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(dense(merge(xs, method="svd"))[path], total / 4, rtol=1e-4, atol=1e-3)
