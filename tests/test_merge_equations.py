"""Merge methods of papers against their equations, written here on dense float64 updates ΔW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from factory import dense, make_adapter
from lorashelf import Adapter, merge
from lorashelf.errors import UsageError
from lorashelf.merging.driver import merge_measured

SAME = 1e-5
WEIGHTS = [1.0, 0.5, -2.0]
Matrix = Any


def adapters(seed: int = 0) -> list[Adapter]:
    """Three adapters of different ranks, scales and modules; all have the layers 0 and 1 of q_proj."""
    return [
        make_adapter(seed, rank=3, scale=2.0),
        make_adapter(seed + 1, rank=4, scale=0.5, layers=3),
        make_adapter(seed + 2, rank=2, scale=-4.0, projections=("q_proj",)),
    ]


def updates(xs: Sequence[Adapter], path: str) -> list[tuple[int, Matrix]]:
    """The dense updates of a module in float64, with the adapters' positions."""
    return [
        (i, f.scale * f.b.astype(float) @ f.a.astype(float))
        for i, x in enumerate(xs)
        if path in x.shapes
        for f in [x.modules[path]]
    ]


def assert_merged(expected: Any, xs: Sequence[Adapter], method: str, **options: Any) -> None:
    """Compare with `expected(deltas, weights, sides)` on every module that several adapters have."""
    result = dense(merge(xs, WEIGHTS, method=method, **options))
    several = [path for path in result if len(updates(xs, path)) > 1]
    assert len(several) == 4
    for path in several:
        found = updates(xs, path)
        sides = [
            (root * x.modules[path].b.astype(float), root * x.modules[path].a.astype(float))
            for x in (xs[i] for i, _ in found)
            for root in [math.sqrt(abs(x.modules[path].scale))]
        ]
        wanted = expected([delta for _, delta in found], [WEIGHTS[i] for i, _ in found], sides)
        np.testing.assert_allclose(result[path], wanted, atol=SAME * np.linalg.norm(wanted))


def cut(matrix: Matrix, rank: int) -> Matrix:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def procrustes(x: Matrix) -> Matrix:
    """The orthogonal factor of the polar decomposition, as in the released code of TSV-M."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def tsv(deltas: Sequence[Matrix], weights: Sequence[float], kept: Sequence[int]) -> Matrix:
    parts = [np.linalg.svd(delta) for delta in deltas]
    u = np.concatenate([u[:, :k] for (u, _, _), k in zip(parts, kept, strict=True)], axis=1)
    s = np.concatenate([w * s[:k] for w, (_, s, _), k in zip(weights, parts, kept, strict=True)])
    vt = np.concatenate([vt[:k] for (_, _, vt), k in zip(parts, kept, strict=True)])
    return procrustes(u) @ np.diag(s) @ procrustes(vt)


@pytest.mark.parametrize(("directions", "share"), [("all", 1), ("equal", 2)])
def test_tsv_m_sums_the_singular_directions_made_orthogonal(directions: str, share: int) -> None:
    xs = adapters()[:2]
    ranks = [max(x.rank // share, 1) for x in xs]
    result = dense(merge(xs, [1.0, -2.0], method="tsv_m", directions=directions, rank=16))
    for path in result:
        deltas = [delta for _, delta in updates(xs, path)]
        if len(deltas) == 2:
            expected = tsv(deltas, [1.0, -2.0], ranks)
            np.testing.assert_allclose(result[path], expected, atol=SAME * np.linalg.norm(expected))


def test_directions_of_tsv_m_are_orthogonal_so_that_the_cut_keeps_the_largest_singular_values() -> None:
    xs = [make_adapter(i, rank=2) for i in range(3)]
    path = next(iter(xs[0].shapes))
    sizes = np.concatenate([np.linalg.svd(delta)[1][:2] for _, delta in updates(xs, path)])
    found = np.linalg.svd(dense(merge(xs, method="tsv_m"))[path])[1]
    np.testing.assert_allclose(found[:2], np.sort(sizes)[::-1][:2], rtol=1e-5)
    assert found[2] < 1e-5 * found[0]


def test_iso_c_gives_all_directions_of_the_sum_the_mean_singular_value() -> None:
    def expected(deltas: Sequence[Matrix], weights: Sequence[float], _: Any, rank: int = 4) -> Matrix:
        u, s, vt = np.linalg.svd(sum(w * delta for w, delta in zip(weights, deltas, strict=True)))
        return s[:rank].mean() * u[:, :rank] @ vt[:rank]

    assert_merged(expected, adapters(), "iso_c")
    assert_merged(lambda *given: expected(*given, rank=2), adapters(), "iso_c", rank=2)


@pytest.mark.parametrize("method", ["iso_c", "ctm_ties"])
def test_the_error_of_a_subspace_merge_is_the_share_of_the_sum_outside_the_subspace(method: str) -> None:
    """What the rule makes of the values inside does not count."""
    xs = [make_adapter(i, rank=4) for i in range(3)]
    plain = {"iso_c": "svd", "ctm_ties": "ctm_linear"}[method]
    found, expected = (merge_measured(xs, method=each, rank=4)[1] for each in (method, plain))
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0.05 < found < 0.9


def calibrated(deltas: Sequence[Matrix], sides: Any) -> list[Matrix]:
    """`calibrate_layer` of the released code."""
    u, sigma, _ = np.linalg.svd(np.concatenate([b for b, _ in sides], axis=1), full_matrices=False)
    collision = sigma**2 / (sigma**2).sum()
    coefficients = 1 / (1 + (len(deltas) - 1) * collision) - 1
    return [delta + u @ (coefficients[:, None] * (u.T @ delta)) for delta in deltas]


def compensated(merged: Matrix, deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """`compensate_energy` of the released code, with weights."""
    target = sum(abs(w) * np.linalg.norm(delta) for w, delta in zip(weights, deltas, strict=True))
    return merged * target / np.linalg.norm(merged)


@pytest.mark.parametrize("then", ["sum", "tsv_m"])
def test_pico_damps_the_output_directions_that_adapters_share_and_keeps_the_mean_norm(then: str) -> None:
    def expected(deltas: Sequence[Matrix], weights: Sequence[float], sides: Any) -> Matrix:
        after = calibrated(deltas, sides)
        if then == "sum":
            merged = sum(w * delta for w, delta in zip(weights, after, strict=True))
        else:
            merged = tsv(after, weights, [len(a) for _, a in sides])
        return compensated(merged, deltas, weights)

    assert_merged(expected, adapters(), "pico", then=then, rank=16)


def test_pico_weakens_a_direction_that_all_share_against_one_that_is_an_adapters_own() -> None:
    shared, own = np.eye(12)[:, :1], np.eye(12)[:, 1:4]
    xs = [make_adapter(i, rank=2, layers=1, projections=("q_proj",)) for i in range(3)]
    path = next(iter(xs[0].shapes))
    xs = [
        x.with_factors(
            {path: type(f)(np.eye(16, dtype="f4")[[2 * i, 2 * i + 1]], np.hstack([shared, own[:, [i]]]).astype("f4"))}
        )
        for i, x in enumerate(xs)
        for f in [x.modules[path]]
    ]
    merged = dense(merge(xs, method="pico", rank=6))[path]
    assert np.abs(merged[0]).max() == pytest.approx(np.abs(merged[1]).max() * (1 + 2 / 6) / (1 + 2 * 3 / 6), rel=1e-5)


def ties(parts: Sequence[Matrix], weights: Sequence[float], density: float) -> Matrix:
    trimmed = []
    for part in parts:
        least = np.sort(np.abs(part), None)[::-1][int(density * part.size) - 1]
        trimmed.append(np.where(np.abs(part) >= least * (1 - 1e-9), part, 0))
    sign = np.where(sum(trimmed) >= 0, 1, -1)
    agreeing = [np.where(part * sign > 0, part, 0) for part in trimmed]
    total = sum(w * part for w, part in zip(weights, agreeing, strict=True))
    return total / np.maximum(sum((part != 0).astype(int) for part in agreeing), 1)


def test_core_ties_merges_in_the_singular_bases_of_the_stacked_factors() -> None:
    def expected(deltas: Sequence[Matrix], weights: Sequence[float], sides: Any) -> Matrix:
        u = np.linalg.svd(np.concatenate([b for b, _ in sides], axis=1), full_matrices=False)[0]
        vt = np.linalg.svd(np.concatenate([a for _, a in sides]), full_matrices=False)[2]
        return u @ ties([u.T @ delta @ vt.T for delta in deltas], weights, 0.5) @ vt

    assert_merged(expected, adapters(), "core_ties", rank=16)


def partial_tucker(parts: Sequence[Matrix], rank: int) -> tuple[Matrix, Matrix]:
    """HOOI on both sides, from the leading singular vectors of the unfoldings, until it rests."""

    def leading(stack: Matrix) -> Matrix:
        return np.linalg.svd(stack, full_matrices=False)[0][:, :rank]

    u, v = leading(np.hstack(parts)), leading(np.hstack([part.T for part in parts]))
    errors: list[float] = []
    while len(errors) < 2 or abs(errors[-2] - errors[-1]) >= 1e-6:
        u = leading(np.hstack([part @ v for part in parts]))
        v = leading(np.hstack([part.T @ u for part in parts]))
        lost = sum(np.sum(part**2) - np.sum((u.T @ part @ v) ** 2) for part in parts)
        errors.append(math.sqrt(lost / sum(np.sum(part**2) for part in parts)))
    return u, v


@pytest.mark.parametrize("method", ["ctm_linear", "ctm_ties"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rank", [2, 4])
def test_ctm_merges_in_the_bases_of_a_partial_tucker_decomposition(method: str, beta: float, rank: int) -> None:
    def expected(deltas: Sequence[Matrix], weights: Sequence[float], _: Any) -> Matrix:
        sizes = [np.linalg.norm(delta) for delta in deltas]
        u, v = partial_tucker(
            [
                delta / size * (size * beta + np.mean(sizes) * (1 - beta))
                for delta, size in zip(deltas, sizes, strict=True)
            ],
            rank,
        )
        cores = [u.T @ delta @ v for delta in deltas]
        core = (
            sum(w * core for w, core in zip(weights, cores, strict=True))
            if method == "ctm_linear"
            else ties(cores, weights, 0.5)
        )
        return u @ core @ v.T

    density = {"density": 0.5} if method == "ctm_ties" else {}
    assert_merged(expected, adapters(), method, beta=beta, rank=rank, **density)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("tsv_m", {"directions": "most"}, "choose from all, equal"),
        ("pico", {"then": "ties"}, "choose from sum, tsv_m"),
        ("ctm_linear", {"beta": 1.5}, "beta is 1.5; it must be from 0 to 1"),
        ("ctm_ties", {"beta": -1, "density": 2.0}, "beta is -1.*density is 2.0"),
    ],
)
def test_parameters_outside_their_ranges_are_refused(method: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge(adapters(), method=method, **wrong)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "pico", "core_ties", "ctm_linear", "ctm_ties"])
def test_adapters_that_cancel_merge_into_nothing_or_something_finite(method: str) -> None:
    x = make_adapter(0)
    result = merge([x, x], [1.0, -1.0], method=method)
    assert all(np.isfinite(delta).all() for delta in dense(result).values())
