"""The equations of the algebra against a dense float64 reference: products, sums, best approximations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from factory import assert_same_delta, dense, make_adapter
from lorashelf import Adapter, Factors, Modules, combine, compress, gram, inner, norm
from lorashelf.errors import AdapterError, UsageError
from lorashelf.lora import algebra

PATHS = ("layers.0.q", "layers.0.v", "layers.1.q")
SCALES = st.sampled_from([1.0, 2.0, 0.25, -1.5, 1e-3, 32.0])
SEEDS = st.integers(0, 2**32 - 1)


def random_factors(rng: np.random.Generator, rank: int, dout: int, din: int, scale: float = 1.0) -> Factors:
    a = rng.standard_normal((rank, din)).astype(np.float32)
    return Factors(a, rng.standard_normal((dout, rank)).astype(np.float32), scale)


def reference(f: Factors | None) -> np.ndarray:
    """ΔW in float64."""
    return np.zeros(1) if f is None else f.scale * (f.b.astype(np.float64) @ f.a.astype(np.float64))


def best_approximation(delta: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Eckart-Young by NumPy's dense SVD: the best matrix of this rank, and the energy it drops."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], float(np.sum(s[rank:] ** 2))


@st.composite
def families(draw: st.DrawFn) -> list[Adapter]:
    """Two to four adapters of one base: ranks, scales and sets of modules differ, and B is zero here and there."""
    rng = np.random.default_rng(draw(SEEDS))
    sizes = {path: (draw(st.integers(1, 9)), draw(st.integers(1, 9))) for path in PATHS}
    family = []
    for _ in range(draw(st.integers(2, 4))):
        modules = {}
        for path in draw(st.lists(st.sampled_from(PATHS), min_size=1, unique=True)):
            f = random_factors(rng, draw(st.integers(1, 12)), *sizes[path], draw(SCALES))
            modules[path] = Factors(f.a, f.b * np.float32(draw(st.sampled_from([1, 1, 1, 0]))), f.scale)
        family.append(Adapter(Modules(modules)))
    return family


# inner, norm, gram, combine -----------------------------------------------------------------------------------------


@given(families())
def test_gram_inner_and_norm_equal_those_of_the_dense_updates(xs: list[Adapter]) -> None:
    deltas = [dense(x) for x in xs]
    expected = np.array(
        [[sum(float(np.sum(u[p] * v[p])) for p in u.keys() & v.keys()) for v in deltas] for u in deltas]
    )
    sizes = np.sqrt(np.diagonal(expected))
    margin = 1e-12 * np.outer(sizes, sizes) + 1e-30
    assert np.all(np.abs(gram(xs) - expected) <= margin)
    assert np.all(np.abs(np.array([[inner(x, y) for y in xs] for x in xs]) - expected) <= margin)
    assert np.all(np.abs(np.array([norm(x) for x in xs]) - sizes) <= 1e-12 * sizes + 1e-15)


@given(families(), st.lists(st.sampled_from([0.0, 1.0, 0.25, -2.0]), min_size=4, max_size=4))
def test_combine_is_the_weighted_sum_of_the_updates_and_the_ranks_add(xs: list[Adapter], weights: list[float]) -> None:
    weights = weights[: len(xs)]
    result = dense(combine(xs, weights))
    assert result.keys() == set().union(*(x.shapes for x in xs))
    for path, total in result.items():
        present = [(w, x.modules[path]) for w, x in zip(weights, xs, strict=True) if path in x.shapes]
        size = sum(abs(w * f.scale) * np.linalg.norm(f.a) * np.linalg.norm(f.b) for w, f in present)
        assert np.linalg.norm(total - sum(w * reference(f) for w, f in present)) <= 1e-6 * size
        ranks = [x.shapes[path].rank for x in xs if path in x.shapes]
        assert combine(xs, weights).shapes[path].rank == sum(ranks)


def test_combine_wants_one_weight_for_each_adapter() -> None:
    with pytest.raises(UsageError, match="1 weight for 2 adapters"):
        combine([make_adapter(0), make_adapter(1)], [1.0])


def test_a_wrong_scale_is_seen_by_the_reference() -> None:
    x, wrong = make_adapter(0, scale=2.0), make_adapter(0, scale=2.0001)
    assert inner(x, x) != pytest.approx(inner(x, wrong), rel=1e-6)
    with pytest.raises(AssertionError):
        assert_same_delta(combine([x], [1.0]), wrong)


# one module --------------------------------------------------------------------------------------------------------


def test_the_update_of_a_huge_module_is_never_formed() -> None:
    """ΔW would take 640 GB here."""
    f = random_factors(np.random.default_rng(0), 3, 400_000, 400_000, 2.0)
    x = Adapter(Modules({"m": f}))
    small, error = compress(x, 2)
    values = algebra.singular_values(f)
    assert norm(x) == pytest.approx(np.linalg.norm(values))
    assert error == pytest.approx(values[2] / np.linalg.norm(values))
    assert inner(x, small) == pytest.approx(np.sum(values[:2] ** 2), rel=1e-6)


@given(SEEDS, st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(1, 40))
def test_the_inner_product_of_a_module_is_that_of_the_dense_updates_at_any_rank(
    seed: int, dout: int, din: int, rank: int, other: int
) -> None:
    rng = np.random.default_rng(seed)
    f, g = random_factors(rng, rank, dout, din, -1.5), random_factors(rng, other, dout, din, 0.25)
    factors = [abs(x.scale) * np.linalg.norm(x.a) * np.linalg.norm(x.b) for x in (f, g)]
    assert abs(algebra.module_inner(f, g) - np.sum(reference(f) * reference(g))) <= 1e-13 * np.prod(factors)
    assert algebra.module_squared_norm(f) == pytest.approx(
        np.sum(reference(f) ** 2), abs=1e-13 * float(factors[0]) ** 2
    )


@pytest.mark.parametrize("count", [1, 5, 40])
def test_gram_and_row_of_a_module_are_its_inner_products_and_none_is_zero(count: int) -> None:
    rng = np.random.default_rng(count)
    fs = [random_factors(rng, int(rng.integers(1, 9)), 12, 16, float(rng.normal())) for _ in range(count)]
    expected = np.array([[np.sum(reference(f) * reference(g)) for g in fs] for f in fs])
    with_gaps = [None, *fs, None]
    table = algebra.module_gram(with_gaps)
    size = np.sqrt(np.outer(np.diagonal(expected), np.diagonal(expected)))
    assert np.all(np.abs(table[1:-1, 1:-1] - expected) <= 1e-12 * size)
    assert np.array_equal(table, table.T)
    assert not table[[0, -1]].any()
    inner, own, others = algebra.module_row(fs[0], with_gaps)
    np.testing.assert_allclose(inner, table[1], atol=1e-12 * size.max())
    np.testing.assert_allclose([own, *others], [expected[0, 0], *np.diagonal(table)], rtol=1e-12)
    assert not algebra.module_gram([None, None]).any()
    assert not algebra.module_row(None, with_gaps)[0].any()


# compress, truncate, truncate_dense, singular_values ----------------------------------------------------------------


@given(families(), st.integers(1, 12))
def test_compress_is_the_best_approximation_and_reports_its_measured_error(xs: list[Adapter], rank: int) -> None:
    for x in xs:
        small, error = compress(x, rank)
        before, after = dense(x), dense(small)
        total = sum(float(np.sum(d**2)) for d in before.values())
        measured = sum(float(np.sum((before[p] - after[p]) ** 2)) for p in before)
        best = sum(best_approximation(d, rank)[1] for d in before.values())
        assert small.rank <= rank or small.rank == x.rank <= rank
        assert np.isfinite(list(map(np.sum, after.values()))).all()
        assert abs(measured - best) <= 1e-6 * total  # Eckart-Young: nothing of this rank is nearer
        assert abs(error - np.sqrt(measured / total if total else 0.0)) <= 1e-5
        assert [s[:1] + s[2:] for s in small.shapes.values()] == [s[:1] + s[2:] for s in x.shapes.values()]


@given(families(), st.integers(1, 12))
def test_compress_is_idempotent_and_leaves_what_is_within_the_rank_untouched(xs: list[Adapter], rank: int) -> None:
    for x in xs:
        once, _ = compress(x, rank)
        twice, error = compress(once, rank)
        assert (twice.digest, error) == (once.digest, 0.0)
        kept, error = compress(x, x.rank)
        assert (kept.digest, error) == (x.digest, 0.0)
        for path, shape in x.shapes.items():
            if shape.rank <= rank:
                assert once.modules[path].a is x.modules[path].a


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", [{"dout": 12, "din": 16}, {"dout": 16, "din": 12}, {"dout": 4, "din": 4}])
def test_truncate_and_truncate_dense_agree_on_factors_and_energies(rank: int, sizes: dict[str, int]) -> None:
    f = random_factors(np.random.default_rng(rank), 6, **sizes, scale=-0.5)
    expected, energy = best_approximation(reference(f), rank)
    for g, dropped, kept in (algebra.truncate(f, rank), algebra.truncate_dense(reference(f), rank)):
        assert g.shape == (sizes["dout"], rank, sizes["din"])
        np.testing.assert_allclose(reference(g), expected, atol=1e-5)
        assert dropped == pytest.approx(energy, rel=1e-9)
        assert dropped + kept == pytest.approx(float(np.sum(reference(f) ** 2)), rel=1e-12)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(reference(g), best_approximation(reference(f), rank + 1)[0], atol=1e-5)


@given(SEEDS, st.integers(2, 8), st.integers(1, 6))
def test_the_same_update_in_another_gauge_compresses_to_the_same_factors(seed: int, rank: int, target: int) -> None:
    assume(target < rank)
    rng = np.random.default_rng(seed)
    f = random_factors(rng, rank, 20, 24, 2.0)
    values = algebra.singular_values(f)
    assume(np.all(values[:-1] - values[1:] > 0.05 * values[0]))  # else the directions themselves are not determined
    gauge = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * np.exp(rng.uniform(-1, 1, rank))
    a = (np.linalg.inv(gauge) @ f.a).astype(np.float32)
    g = Factors(a, (f.b @ gauge).astype(np.float32), 2.0)
    flipped = Factors(-f.a, -f.b, 2.0)
    first = algebra.truncate(f, target)[0]
    peaks = first.a[np.arange(target), np.abs(first.a).argmax(axis=1)]
    assert np.all(peaks > 0)
    runners_up = np.sort(np.abs(first.a), axis=1)[:, -2]
    assume(np.all(peaks - runners_up > 1e-4))  # else rounding may choose another peak
    for other, tolerance in ((flipped, 1e-6), (g, 2e-5)):
        second = algebra.truncate(other, target)[0]
        np.testing.assert_allclose(second.a, first.a, atol=tolerance * values[0] ** 0.5)
        np.testing.assert_allclose(second.b, first.b, atol=tolerance * values[0] ** 0.5)


def test_singular_values_are_split_evenly_over_both_factors() -> None:
    g = algebra.truncate(random_factors(np.random.default_rng(3), 6, 12, 16, 4.0), 3)[0]
    assert g.scale == 1.0
    np.testing.assert_allclose(np.linalg.norm(g.a, axis=1), np.linalg.norm(g.b, axis=0), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(g.a, axis=1) ** 2, algebra.singular_values(g), rtol=1e-5)


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), SCALES)
def test_singular_values_are_those_of_the_dense_update(seed: int, dout: int, din: int, rank: int, scale: float) -> None:
    f = random_factors(np.random.default_rng(seed), rank, dout, din, scale)
    found = algebra.singular_values(f)
    expected = np.linalg.svd(reference(f), compute_uv=False)[: len(found)]
    assert len(found) == min(rank, dout, din)
    assert np.all(found >= 0)
    assert np.all(np.diff(found) <= 0)
    np.testing.assert_allclose(found, expected, atol=1e-12 * max(expected[0], 1.0) * 100)


@pytest.mark.parametrize("target", [1, 2, 5])
def test_a_rank_deficient_update_loses_nothing_and_a_zero_one_stays_zero(target: int) -> None:
    rng = np.random.default_rng(0)
    thin = random_factors(rng, 1, 12, 16)
    repeated = Factors(np.tile(thin.a, (6, 1)), np.tile(thin.b, (1, 6)))
    zero = Factors(thin.a.repeat(6, axis=0), np.zeros((12, 6), np.float32))
    for f in (repeated, zero):
        wide = Factors(f.a.repeat(4, axis=0), f.b.repeat(4, axis=1))  # rank 24 > 12: the dense way
        for each in (f, wide):
            g, dropped, _ = algebra.truncate(each, target)
            size = float(np.sum(reference(each) ** 2))
            assert g.shape.rank == target
            assert dropped <= 1e-12 * size
            assert np.linalg.norm(reference(g) - reference(each)) <= 1e-6 * np.sqrt(size)
    x = Adapter(Modules({"m": zero}))
    small, error = compress(x, target)
    assert error == 0.0
    assert norm(small) == 0.0
    assert np.all(algebra.singular_values(zero) == 0)


def test_a_worse_approximation_is_seen_to_be_worse() -> None:
    x = make_adapter(0)
    good, _ = compress(x, 2)
    bad = x.with_factors({p: Factors(f.a[:2], f.b[:, :2], f.scale) for p, f in x.modules.items()})

    def lost(y: Adapter) -> float:
        return sum(float(np.sum((dense(x)[p] - dense(y)[p]) ** 2)) for p in x.modules)

    best = sum(best_approximation(d, 2)[1] for d in dense(x).values())
    assert lost(good) == pytest.approx(best, rel=1e-5)
    assert lost(bad) > 1.1 * best


@pytest.mark.parametrize(
    ("a", "b", "scale"),
    [
        (np.ones((2, 3)), np.ones((4, 3)), 1.0),
        (np.ones((2, 3)), np.ones((2, 4)), 1.0),
        (np.ones(3), np.ones((4, 1)), 1.0),
        (np.ones((1, 3)), np.ones((4, 1, 1)), 1.0),
        (np.ones((0, 3)), np.ones((4, 0)), 1.0),
        (np.ones((2, 3)), np.ones((4, 2)), math.nan),
        (np.ones((2, 3)), np.ones((4, 2)), -math.inf),
    ],
)
def test_factors_that_are_no_update_cannot_be_made(a: Any, b: Any, scale: float) -> None:
    with pytest.raises(AdapterError):
        Factors(np.float32(a), np.float32(b), scale)


def test_an_adapter_names_all_that_is_wrong_with_it() -> None:
    with pytest.raises(AdapterError) as caught:
        Adapter({"m": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32))}, dtype="f8")
    assert [fault.split(":")[0].split(" is ")[0] for fault in caught.value.faults] == ["modules", "dtype"]
    with pytest.raises(AdapterError, match="there are no modules"):
        Adapter(Modules({}))
