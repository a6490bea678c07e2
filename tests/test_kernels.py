"""Every fast kernel against the equation in algebra.py that it computes, within the bound that it states."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashelf import Adapter, Factors, Modules, similarity
from lorashelf.lora import algebra, kernels

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from([1.0, 0.25, -1.5, 1e-3, 32.0])
KINDS = ("plain", "plain", "plain", "zero", "cancelling", "repeated", "tiny", "huge", "absent")
FACTORED = {"dout": 24, "din": 32}  # with ranks up to 4 the factored way costs less, whatever is multiplied
DENSE = {"dout": 3, "din": 2}  # with ranks from 24 on the dense way does


def random_factors(rng: np.random.Generator, rank: int, dout: int, din: int, scale: float = 1.0) -> Factors:
    a = rng.standard_normal((rank, din)).astype(np.float32)
    return Factors(a, rng.standard_normal((dout, rank)).astype(np.float32), scale)


def factors(kind: str, rng: np.random.Generator, rank: int, dout: int, din: int, scale: float) -> Factors | None:
    """A module as trained, untrained, of ranks that cancel but for 1e-3, of equal ranks, or beyond float32's range."""
    f = random_factors(rng, rank, dout, din, scale)
    if kind == "absent":
        return None
    if kind == "zero":
        return Factors(f.a, np.zeros_like(f.b), scale)
    if kind == "cancelling":
        moved = f.a * (1 + 1e-3 * rng.standard_normal(f.a.shape)).astype(np.float32)
        return Factors(np.concatenate([f.a, moved]), np.concatenate([f.b, -f.b], axis=1), scale)
    if kind == "repeated":
        return Factors(np.tile(f.a, (3, 1)), np.tile(f.b, (1, 3)), scale)
    size = np.float32({"tiny": 1e-14, "huge": 1e9}.get(kind, 1.0))
    return Factors(f.a * size, f.b * size, scale)


@st.composite
def families(draw: st.DrawFn) -> list[Adapter]:
    """Two to five adapters of one base: kinds, ranks, scales and sets of modules differ."""
    rng = np.random.default_rng(draw(SEEDS))
    found = []
    sizes = {name: (draw(st.integers(1, 40)), draw(st.integers(1, 40))) for name in "qv"}
    for _ in range(draw(st.integers(2, 5))):
        rank, scale = draw(st.integers(1, 24)), draw(SCALES)
        paths = [f"layers.{layer}.{name}" for name in "qv" for layer in range(3)]
        drawn = {path: factors(draw(st.sampled_from(KINDS)), rng, rank, *sizes[path[-1]], scale) for path in paths}
        present = {path: f for path, f in drawn.items() if f is not None}
        found.append(Adapter(Modules(present or {paths[0]: random_factors(rng, rank, *sizes["q"])})))
    return found


def within(found: Any, expected: Any, margin: Any) -> bool:
    return bool(np.all(np.abs(np.asarray(found) - expected) <= margin))


@given(families())
def test_gram_is_module_gram(xs: list[Adapter]) -> None:
    for path in algebra.union(xs):
        fs = [x.modules.get(path) for x in xs]
        expected = algebra.module_gram(fs)
        lengths = np.sqrt(np.diagonal(expected))
        assert within(kernels.gram(fs), expected, 1e-6 * np.outer(lengths, lengths))


@given(families())
def test_row_is_module_row(xs: list[Adapter]) -> None:
    x, *ys = xs
    for paths in kernels.runs(xs):
        found, own, squared = kernels.row(x, ys, paths)
        for i, path in enumerate(paths):
            inner, square, squares = algebra.module_row(x.modules.get(path), [y.modules.get(path) for y in ys])
            assert within(found[i], inner, 1e-6 * np.sqrt(square * squares))
            assert within(own[i], square, 1e-5 * square)
            assert within(squared[i], squares, 1e-5 * squares)


@given(families())
def test_squared_norms_are_module_squared_norm_and_hold(xs: list[Adapter]) -> None:
    for x in xs:
        assert not kernels.squared_norms_hold(x)
        for path, found in kernels.squared_norms(x).items():
            expected = algebra.module_squared_norm(x.modules[path])
            assert within(found, expected, 1e-5 * expected)
        assert kernels.squared_norms_hold(x)


@given(families())
def test_cosines_by_kernels_are_those_of_the_equations(xs: list[Adapter]) -> None:
    total, count = np.zeros((len(xs), len(xs))), np.zeros((len(xs), len(xs)))
    for path in algebra.union(xs):
        fs = [x.modules.get(path) for x in xs]
        table, has = algebra.module_gram(fs), np.array([f is not None for f in fs])
        lengths = np.sqrt(np.outer(np.diagonal(table), np.diagonal(table)))
        total += np.divide(table, lengths, out=np.zeros_like(table), where=lengths > 0)
        count += has[:, None] | has
    expected = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    assert within(similarity(xs), expected, 2e-6)
    assert within(similarity(xs, xs), expected, 2e-6)


@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.integers(1, 600), st.integers(1, 600))
def test_a_long_side_cut_into_pieces_gives_the_same_product(
    seed: int, wide: int, tall: int, n: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    length = 4 * width
    shapes = (n % 3 + 1, wide, length), (n % 3 + 1, length, tall)
    x, y = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)  # whose sums float32 holds exactly
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_piece", lambda length, area: width)
        np.testing.assert_array_equal(kernels._in_pieces(x, y), x @ y)


def kernels_listed() -> dict[str, str]:
    """Kernel → its equation, by the table at the head of kernels.py."""
    lines = (kernels.__doc__ or "").partition("kernel  ")[2].splitlines()[1:]
    table = itertools.takewhile(bool, lines)
    return {kernel: equation for kernel, equation, *_ in map(str.split, table)}


def test_every_kernel_stands_beside_its_equation_and_is_compared_with_it() -> None:
    listed = kernels_listed()
    public = {name for name, value in vars(kernels).items() if inspect.isfunction(value) and name[0] != "_"}
    here = {name for name in public if getattr(kernels, name).__module__ == kernels.__name__}
    assert listed.keys() == here - {"runs", "squared_norms_hold"}  # which compute no inner product
    assert all(inspect.isfunction(getattr(algebra, equation)) for equation in listed.values())
    compared = [inspect.getsource(test) for name, test in globals().items() if name.startswith("test_")]
    for kernel, equation in listed.items():
        assert any(f"kernels.{kernel}(" in test and f"algebra.{equation}" in test for test in compared), kernel


def test_a_wrong_kernel_is_seen() -> None:
    rng = np.random.default_rng(0)
    fs = [random_factors(rng, 4, 12, 16) for _ in range(3)]
    expected = algebra.module_gram(fs)
    lengths = np.sqrt(np.diagonal(expected))
    wrong = kernels.gram([fs[1], fs[0], fs[2]])
    assert not within(wrong, expected, 1e-2 * np.outer(lengths, lengths))


# which way is taken --------------------------------------------------------------------------------------------------


def dense_ways(patch: pytest.MonkeyPatch) -> list[bool]:
    taken: list[bool] = []
    plain = kernels._dense_gram
    patch.setattr(kernels, "_dense_gram", lambda *given: taken.append(True) or plain(*given))
    return taken


@pytest.mark.parametrize(("sizes", "ranks", "dense_way"), [(FACTORED, (1, 4), False), (DENSE, (24, 40), True)])
@pytest.mark.parametrize("seed", range(5))
def test_both_ways_of_gram_agree_with_the_equation(
    sizes: dict[str, int], ranks: tuple[int, int], dense_way: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    fs = [random_factors(rng, int(rng.integers(*ranks)), **sizes, scale=float(rng.normal())) for _ in range(4)]
    taken = dense_ways(monkeypatch)
    found, expected = kernels.gram(fs), algebra.module_gram(fs)
    assert bool(taken) == dense_way
    lengths = np.sqrt(np.diagonal(expected))
    assert within(found, expected, 1e-6 * np.outer(lengths, lengths))


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_the_cheaper_way_is_taken(count: int, rank: int, dout: int, din: int) -> None:
    """Multiplications, those of the dense way counted double for the memory that it moves."""
    factored = (count * rank) ** 2 * (dout + din)
    dense_way = 2 * (2 * count * rank * dout * din + 2 * count**2 * dout * din)
    fs = [random_factors(np.random.default_rng(i), rank, dout, din) for i in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        taken = dense_ways(patch)
        kernels.gram(fs)
    assert bool(taken) == (factored > dense_way)


@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30))
def test_stacked_modules_of_large_rank_take_the_equation(rank: int, dout: int, din: int) -> None:
    fs = [random_factors(np.random.default_rng(i), rank, dout, din, 0.5) for i in range(3)]
    stack = Modules(dict(zip("abc", fs, strict=True))).stack("abc")
    calls: list[Factors] = []
    plain = algebra.module_squared_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "module_squared_norm", lambda f: calls.append(f) or plain(f))
        found = kernels.stack_squared_norms(stack)
    np.testing.assert_allclose(found, [plain(f) for f in fs], rtol=2e-6)
    assert len(calls) in ((3,) if rank**2 * (dout + din) > 4 * (rank + 1) * dout * din else (0, 1, 2, 3))


def test_many_adapters_are_multiplied_in_panels_with_the_same_result() -> None:
    rng = np.random.default_rng(0)
    ranks = (100, 7, 200, 300, 1, 90, 60)
    fs = [random_factors(rng, rank, 400, 500, 0.5) for rank in ranks]
    assert len(kernels._panels(np.cumsum((0, *ranks)))) > 2
    expected = algebra.module_gram(fs)
    lengths = np.sqrt(np.diagonal(expected))
    found, sound = kernels._factored_gram(fs)
    assert sound
    assert within(found * 0.25, expected, 1e-6 * np.outer(lengths, lengths))


def test_dense_products_of_many_rows_are_summed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    fs = [random_factors(rng, 5, 17, 6) for _ in range(3)]
    monkeypatch.setattr(kernels, "_BLOCK", 6 * 6 * 4)
    heights, plain = [], kernels._dense_rows
    monkeypatch.setattr(kernels, "_dense_rows", lambda fs, rows: heights.append(rows) or plain(fs, rows))
    np.testing.assert_allclose(kernels._dense_gram(fs), algebra.module_gram(fs), rtol=1e-10)
    assert heights == [slice(start, start + 4) for start in (0, 4, 8, 12, 16)]


def cancelling(drift: float, seed: int) -> Factors:
    """What PEFT makes of PiSSA: A = [A₁; A₀], B = [B₁, -B₀], the second half the first before training."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((16, 256)), rng.standard_normal((256, 16))
    moved = [side * (1 + drift * rng.standard_normal(side.shape)) for side in (a, b)]
    return Factors(np.concatenate([moved[0], a]).astype("f4"), np.concatenate([moved[1], -b], axis=1).astype("f4"))


@pytest.mark.parametrize("drift", [1e-1, 1e-2, 1e-3, 1e-4])
def test_where_ranks_cancel_float32_is_not_trusted(drift: float) -> None:
    fs = [cancelling(drift, 0), cancelling(drift, 1), random_factors(np.random.default_rng(2), 32, 256, 256)]
    deltas = [f.b.astype("f8") @ f.a.astype("f8") for f in fs]
    exact = np.array([[np.sum(x * y) for y in deltas] for x in deltas])
    lengths = np.sqrt(np.diagonal(exact))
    np.testing.assert_allclose(kernels.gram(fs), exact, atol=1e-6 * np.outer(lengths, lengths).min())
    xs = [Adapter(Modules({"m": f})) for f in fs]
    for i, x in enumerate(xs):
        assert kernels.squared_norms(x)["m"] == pytest.approx(exact[i, i], rel=1e-5)
        inner_products, _, squared = kernels.row(x, xs, ["m"])
        np.testing.assert_allclose(
            inner_products[0] / (lengths[i] * lengths), exact[i] / (lengths[i] * lengths), atol=2e-6
        )
        np.testing.assert_allclose(squared[0], lengths**2, rtol=1e-5)


@pytest.mark.parametrize(("side", "other"), [(1e-12, 1e-12), (1e-2, 1e-22), (1e-22, 1e-2), (1e-22, 1e6), (1e9, 1e9)])
def test_squared_norms_and_products_beyond_float32_s_range(side: float, other: float) -> None:
    f = random_factors(np.random.default_rng(0), 4, 12, 16)
    x = Adapter(Modules({"m": Factors(f.a * np.float32(side), f.b * np.float32(other))}))
    exact = float(np.sum((x.modules["m"].b.astype("f8") @ x.modules["m"].a.astype("f8")) ** 2))
    assert kernels.squared_norms(x)["m"] == pytest.approx(exact, rel=1e-5)
    assert kernels.row(x, [x], ["m"])[0][0, 0] == pytest.approx(exact, rel=1e-5)
    assert kernels.gram([x.modules["m"]] * 2) == pytest.approx(np.full((2, 2), exact), rel=1e-5)
