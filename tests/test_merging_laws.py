"""Laws of merging, over the live registry: what a method declares about itself holds, and fails where it is not
declared.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory import assert_same_delta, dense, make_adapter, write_peft
from lorashelf import (
    METHODS,
    Adapter,
    BaseId,
    Factors,
    Modules,
    combine,
    compress,
    merge,
    merge_method,
    norm,
    read_adapter,
    similarity,
)
from lorashelf.errors import BaseMismatch, NotReversible, ShapeMismatch, UnknownName, UsageError
from lorashelf.execution import WORKERS, each
from lorashelf.merging import MergeMethod, Within, merge_measured, unmerge
from lorashelf.merging.parameters import parameters_of

EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
AVERAGES = [m for m in METHODS.values() if m.mean_power is not None]
AVERAGE = pytest.mark.parametrize("method", AVERAGES, ids=[m.name for m in AVERAGES])
UNPRUNED = {  # what a method with a density is at density 1
    "magnitude_prune": "linear",
    "magnitude_prune_svd": "svd",
    "dare_linear": "linear",
    "dare_linear_svd": "svd",
    "ties": "dare_ties",
    "ties_svd": "dare_ties_svd",
    "dare_ties": "ties",
    "dare_ties_svd": "ties_svd",
}
NO_TWIN = {"knots_ties", "core_ties", "ctm_ties"}  # is not another method at density 1
SAME = 1e-5  # relative: float32 sums in another order, one SVD
OTHER = 1e-2
driver = sys.modules["lorashelf.merging.driver"]  # the name is that of the function too
STORED = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def difference(x: Adapter, y: Adapter) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over the union of the modules."""
    left, right = dense(x), dense(y)
    parts = [np.linalg.norm(left.get(p, 0.0) - right.get(p, np.zeros(()))) for p in left.keys() | right.keys()]
    return float(np.linalg.norm(parts)) / norm(x)


def variants(method: MergeMethod, **fixed: Any) -> list[dict[str, Any]]:
    """Every choice among a method's named options, with those of `fixed` that it knows."""
    names = [name for name, parameter in method.parameters.items() if parameter.choices]
    known = {name: value for name, value in fixed.items() if name in method.parameters}
    choices = itertools.product(*(method.parameters[name].choices for name in names))
    return [{**known, **dict(zip(names, chosen))} for chosen in choices]


def declared(
    tensors: Any,
    weights: Any,
    draw: Any,
    *,
    free: str = "a",
    one: Literal["x", "y"] = "x",
    exact: bool = False,
    steps: Annotated[int, Within(1, 9)] = 3,
    density: float = 2.0,
    share: Annotated[float, Within(0.0, 1.0)] = 1,
) -> Any:
    return tensors[0]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"free": 3}, "free is 3, not a string"),
        ({"one": "z"}, "one is 'z'; choose from x, y"),
        ({"exact": "banana"}, "exact is 'banana', not true or false"),
        ({"exact": 1}, "exact is 1, not true or false"),
        ({"steps": True}, "steps is True, not a whole number"),
        ({"steps": 2.5}, "steps is 2.5, not a whole number"),
        ({"steps": 10}, "steps is 10; it must be from 1 to 9"),
        ({"density": math.nan}, "density is nan, not a finite number"),
        ({"density": "0.5"}, "density is '0.5', not a finite number"),
        ({"share": 1.01}, "share is 1.01; it must be from 0 to 1"),
        ({"share": math.inf}, "share is inf, not a finite number"),
    ],
)
def test_a_parameter_is_held_to_its_annotation(given: dict[str, Any], fault: str) -> None:
    method = replace(METHODS["ties"], rule=declared, parameters=parameters_of(declared))
    good = {"free": "b", "one": "y", "exact": True, "steps": 9, "density": 7, "share": 0}
    assert method.checked(good) == good
    with pytest.raises(UsageError, match=re.escape(fault)):
        method.checked(given)


def test_a_parameter_named_density_has_the_range_that_its_annotation_gives() -> None:
    method = replace(METHODS["ties"], rule=declared, parameters=parameters_of(declared))
    assert method.checked({})["density"] == 2.0
    with pytest.raises(UsageError, match="it must be from 0 to 1"):
        METHODS["ties"].checked({"density": 2.0})


def test_a_rule_may_be_wrapped_by_a_decorator_of_another_module() -> None:
    """Its annotations are text, and mean what they mean where the rule is written."""
    other: dict[str, Any] = {"wraps": functools.wraps}
    exec("def logged(rule):\n    return wraps(rule)(lambda *args, **params: rule(*args, **params))", other)
    assert parameters_of(other["logged"](declared)) == parameters_of(declared)


@pytest.mark.parametrize("name", ["xs", "weights", "method", "rank", "seed", "averages", "watch"])
def test_a_name_that_merge_takes_for_itself_is_refused_at_registration(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def rule(tensors, ws, draw, *, {name}: float = 1.0): return tensors[0]", scope)
    with pytest.raises(TypeError, match=f"{name}: the name is reserved for the caller"):
        merge_method(f"takes_{name}", space="delta", cites="nobody")(scope["rule"])
    assert f"takes_{name}" not in METHODS


def test_every_fault_of_a_rules_parameters_is_named_at_registration() -> None:
    def rule(
        tensors: Any,
        weights: Any,
        draw: Any,
        *,
        needed: float,
        bare=1,
        several: list[int] | None = None,
        wrong: Annotated[float, Within(0.0, 1.0)] = 7.0,
    ) -> Any:
        return tensors[0]

    with pytest.raises(TypeError) as caught:
        merge_method("faulty", space="delta", cites="nobody")(rule)
    for fragment in (
        "needed: there is no default",
        "bare: annotate it",
        "several: annotate it",
        "the default of wrong",
    ):
        assert fragment in str(caught.value)
    assert "faulty" not in METHODS


def votes(method: MergeMethod) -> bool:
    """Whether the method elects signs, so that an adapter of weight 0 still has a voice."""
    return "majority_sign_method" in method.parameters


def mixed(seed: int) -> list[Adapter]:
    """Three adapters that differ in ranks, scales and modules."""
    return [
        make_adapter(seed, rank=3, scale=2.0),
        make_adapter(seed + 1, rank=4, scale=0.5, layers=3),
        make_adapter(seed + 2, rank=2, scale=4.0, projections=("q_proj",)),
    ]


def alike(seed: int, count: int = 3, **options: Any) -> list[Adapter]:
    return [make_adapter(10 * seed + i, **options) for i in range(count)]


def zeroed(x: Adapter) -> Adapter:
    return x.with_factors({p: Factors(f.a * 0, f.b * 0, f.scale) for p, f in x.modules.items()})


def scaled(x: Adapter, factor: float) -> Adapter:
    return x.with_factors({p: replace(f, scale=f.scale * factor) for p, f in x.modules.items()})


def regauged(x: Adapter, seed: int) -> Adapter:
    """The same ΔW by (B G, G⁻¹ A)."""
    rng = np.random.default_rng(seed)
    modules = {}
    for path, f in x.modules.items():
        g = np.linalg.qr(rng.standard_normal((f.shape.rank, f.shape.rank)))[0] * np.exp(rng.uniform(-1, 1))
        modules[path] = Factors((np.linalg.inv(g) @ f.a).astype("f4"), (f.b @ g).astype("f4"), f.scale)
    return x.with_factors(modules)


def scale_folded(x: Adapter) -> Adapter:
    """The same ΔW with √s inside A and B."""
    roots = {p: np.float32(math.sqrt(f.scale)) for p, f in x.modules.items()}
    return x.with_factors({p: Factors(f.a * roots[p], f.b * roots[p]) for p, f in x.modules.items()})


def in_storage(x: Adapter, dtype: str) -> Adapter:
    """As it comes back from a file of this dtype."""
    kind = STORED[dtype]
    cast = {
        p: Factors(f.a.astype(kind).astype("f4"), f.b.astype(kind).astype("f4"), f.scale) for p, f in x.modules.items()
    }
    return replace(x.with_factors(cast), dtype=dtype)


# the oracle itself --------------------------------------------------------------------------------------------------


def test_the_oracle_sees_another_adapter_a_scale_and_a_missing_module() -> None:
    x = make_adapter(0)
    missing = Adapter(Modules(dict(list(x.modules.items())[:-1])))
    for wrong in (make_adapter(1), scaled(x, 1.001), missing, zeroed(x)):
        assert difference(x, wrong) > 1e-4
        with pytest.raises(AssertionError):
            assert_same_delta(x, wrong, SAME)
    broken = x.with_factors({p: replace(f, b=f.b * np.float32(math.nan)) for p, f in x.modules.items()})
    with pytest.raises(AssertionError):
        assert_same_delta(x, broken, SAME)
    assert difference(x, regauged(x, 0)) < 1e-6
    assert difference(x, scale_folded(x)) < 1e-6


# identity -----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_a_single_adapter_comes_back_times_its_weight(method: MergeMethod, weight: float) -> None:
    x = make_adapter(0, ranks={"v_proj": 2}, scales={"q_proj": 0.5})
    for params in variants(method, density=0.3):
        assert_same_delta(scaled(x, weight), merge([x], [weight], method=method.name, **params), 1e-12)
    assert merge([x], method=method.name).digest == x.digest


@EVERY
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_zero_adapter_beside_one_changes_nothing_where_nothing_is_pruned(method: MergeMethod, weight: float) -> None:
    x, zero = make_adapter(0), zeroed(make_adapter(1, scale=8.0, layers=3))
    for params in variants(method, density=1.0):
        result = merge([x, zero], [1.0, weight], method=method.name, **params)
        assert_same_delta(x, result, SAME)
        assert not np.any(dense(result)["model.layers.2.self_attn.q_proj"])


@EVERY
def test_an_adapter_of_weight_zero_changes_nothing_unless_it_votes(method: MergeMethod) -> None:
    x, y = alike(0, 2)
    for params in variants(method, density=1.0):
        moved = difference(x, merge([x, y], [1.0, 0.0], method=method.name, **params))
        assert moved > OTHER if votes(method) else moved <= SAME


@EVERY
def test_a_merge_needs_at_least_one_adapter(method: MergeMethod) -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([], method=method.name)


# duplicate, permutation, gauge, scale -------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("count", [2, 3])
def test_copies_merge_into_the_adapter_exactly_where_that_is_declared(method: MergeMethod, count: int) -> None:
    x = make_adapter(0)
    moved = difference(x, merge([x] * count, method=method.name))
    assert moved <= SAME if method.duplicate else moved > OTHER


@EVERY
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_adapters_matters_exactly_where_that_is_declared(method: MergeMethod, seed: int) -> None:
    xs, weights = mixed(seed), [0.7, 0.3, -0.5]
    for params in variants(method):
        first = merge(xs, weights, method=method.name, **params)
        moved = [
            difference(first, merge([xs[i] for i in order], [weights[i] for i in order], method=method.name, **params))
            for order in itertools.permutations(range(3))
        ]
        assert max(moved) > OTHER if method.ordered else max(moved) <= SAME


@EVERY
def test_swapped_weights_are_seen(method: MergeMethod) -> None:
    xs = alike(0, 2)
    first, second = (merge(xs, weights, method=method.name) for weights in ([0.8, 0.2], [0.2, 0.8]))
    assert difference(first, second) > OTHER


@EVERY
def test_the_gauge_does_not_matter_exactly_where_that_is_declared(method: MergeMethod) -> None:
    moved = []
    for seed in range(3):
        xs = mixed(seed)
        for params in variants(method):
            plain = merge(xs, method=method.name, **params)
            moved.append(difference(plain, merge([regauged(xs[0], seed), *xs[1:]], method=method.name, **params)))
    assert max(moved) <= SAME if method.gauge else max(moved) > OTHER


@EVERY
@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 0.5, 4.0)])
def test_a_scale_may_as_well_stand_inside_the_factors(method: MergeMethod, scales: tuple[float, ...]) -> None:
    """Every rule weighs √s on both sides, and what it prunes per tensor does not depend on s.

    One exception, which is PEFT's: TIES on the factors elects the sign of the sum of the raw tensors, before scales.
    Random masks belong to a digest, which knows s, so they are compared unpruned.
    """
    xs = [make_adapter(seed, scale=s) for seed, s in enumerate(scales)]
    for params in variants(method, **({"density": 1.0} if method.random else {})):
        moved = difference(
            merge(xs, method=method.name, **params), merge([scale_folded(x) for x in xs], method=method.name, **params)
        )
        raw_votes = method.space == "factors" and params.get("majority_sign_method") == "total"
        assert moved > OTHER if raw_votes and len(set(scales)) > 1 else moved <= SAME


@EVERY
def test_a_negative_scale_is_the_sign_of_a_factor_but_for_votes_on_raw_factors(method: MergeMethod) -> None:
    x, y, z = alike(0)
    negative = scaled(x, -1.0)
    turned = x.with_factors({p: replace(f, a=-f.a) for p, f in x.modules.items()})
    for params in variants(method, **({"density": 1.0} if method.random else {})):
        expected, found = (merge([each, y, z], method=method.name, **params) for each in (turned, negative))
        moved = difference(expected, found)
        assert moved > OTHER if votes(method) and method.space == "factors" else moved <= SAME
        assert difference(expected, merge([x, y, z], method=method.name, **params)) > OTHER


@EVERY
def test_it_does_not_matter_how_a_folder_writes_its_scale(method: MergeMethod, tmp_path: Path) -> None:
    x, y = alike(0, 2, rank=4, scale=2.0)
    ways = {
        "plain": {"lora_alpha": 8},
        "rslora": {"lora_alpha": 4, "use_rslora": True},
        "pattern": {"lora_alpha": 1, "alpha_pattern": {"q_proj": 8, "self_attn.v_proj": 8.0}},
        "ranks": {"r": 2, "lora_alpha": 8, "rank_pattern": {".*_proj": 4}},
    }
    read = [read_adapter(write_peft(tmp_path / way, x, **changes)) for way, changes in ways.items()]
    assert {each.digest for each in read} == {x.digest}
    assert {merge([each, y], method=method.name).digest for each in read} == {merge([x, y], method=method.name).digest}
    wrong = read_adapter(write_peft(tmp_path / "wrong", x, lora_alpha=8, use_rslora=True))
    assert difference(merge([x, y], method=method.name), merge([wrong, y], method=method.name)) > OTHER


# weights ------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_common_factor_of_the_weights_is_a_factor_of_the_result(method: MergeMethod) -> None:
    """Of ΔW where √|w| goes on either side with the sign on one; squared, and without its sign, where w does."""
    xs, weights = mixed(0), [0.7, 0.3, -0.5]
    for params in variants(method):
        plain = merge(xs, weights, method=method.name, **params)
        for c in (4.0, -1.0, -0.25):
            times = merge(xs, [c * w for w in weights], method=method.name, **params)
            assert_same_delta(scaled(plain, c**2 if method.weighting == "plain" else c), times, SAME)
            with pytest.raises(AssertionError):
                assert_same_delta(plain, scaled(times, 1.1), SAME)


@given(st.integers(0, 2**20), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_exact_methods_give_the_weighted_sum_of_the_updates(seed: int, weights: list[float]) -> None:
    xs = mixed(seed)
    size = sum(abs(w) * norm(x) for w, x in zip(weights, xs))
    for method in METHODS.values():
        if method.space != "exact":
            continue
        result = merge(xs, weights, method=method.name)
        for path, delta in dense(result).items():
            total = sum(w * dense(x)[path] for w, x in zip(weights, xs) if path in x.shapes)
            u, s, vt = np.linalg.svd(total)
            kept = max(x.shapes[path].rank for x in xs if path in x.shapes) if method.rank == "max" else len(s)
            assert np.linalg.norm(delta - (u[:, :kept] * s[:kept]) @ vt[:kept]) <= 2e-6 * size + 1e-12


@EVERY
def test_default_weights_are_those_declared(method: MergeMethod) -> None:
    xs = alike(0)
    default, share = merge(xs, method=method.name), 1 / 3 if method.weights == "mean" else 1.0
    assert default.digest == merge(xs, [share] * 3, method=method.name).digest
    assert default.digest != merge(xs, [share, share, share / 2], method=method.name).digest


@EVERY
@pytest.mark.parametrize(
    ("given_to", "message"),
    [
        ({"weights": [1.0]}, "1 weight for 2 adapters"),
        ({"weights": [1.0, 1.0, 1.0]}, "3 weights for 2 adapters"),
        ({"weights": []}, "0 weights for 2 adapters"),
        ({"weights": [1.0, math.nan]}, "not finite"),
        ({"weights": [math.inf, 1.0]}, "not finite"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"no_such_thing": 1}, "has no parameter 'no_such_thing'"),
    ],
)
def test_unusable_requests_are_refused(method: MergeMethod, given_to: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge(alike(0, 2), method=method.name, **given_to)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if "density" in m.parameters])
def test_a_density_is_a_fraction_from_0_to_1(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match="density is"):
        merge(alike(0, 2), method=name, density=value)


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if votes(m)])
def test_a_sign_is_elected_by_a_known_rule(name: str) -> None:
    with pytest.raises(UsageError, match="choose from total, frequency"):
        merge(alike(0, 2), method=name, majority_sign_method="loudest")


def test_an_unknown_method_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownName, match="unknown merge method 'tie'") as caught:
        merge(alike(0, 2), method="tie")
    assert "ties" in caught.value.nearest


@EVERY
def test_adapters_that_do_not_belong_together_are_refused(method: MergeMethod) -> None:
    x = make_adapter(0)
    with pytest.raises(BaseMismatch):
        merge([x, make_adapter(1, base="acme/other")], method=method.name)
    narrow = {p: Factors(f.a[:, :-1], f.b, f.scale) for p, f in make_adapter(1).modules.items()}
    with pytest.raises(ShapeMismatch):
        merge([x, x.with_factors(narrow)], method=method.name)


# density ------------------------------------------------------------------------------------------------------------


def test_every_method_with_a_density_has_an_unpruned_twin_here() -> None:
    assert UNPRUNED.keys() | NO_TWIN == {m.name for m in METHODS.values() if "density" in m.parameters}


@pytest.mark.parametrize("name", [*UNPRUNED, *sorted(NO_TWIN)])
def test_density_0_gives_zeros_and_no_nan(name: str) -> None:
    for density in (0, 0.0, *([] if METHODS[name].random else [1e-9])):
        for params in variants(METHODS[name], density=density):
            result = merge(mixed(0), method=name, **params)
            assert all(not delta.any() for delta in dense(result).values())


@pytest.mark.parametrize(("name", "twin"), UNPRUNED.items())
def test_density_1_prunes_nothing(name: str, twin: str) -> None:
    xs, weights = mixed(0), [0.7, 0.3, 1.0]
    for params in variants(METHODS[name]):
        other = {"density": 1.0} if "density" in METHODS[twin].parameters else {}
        choice = {key: value for key, value in params.items() if key in METHODS[twin].parameters}
        expected = merge(xs, weights, method=twin, **choice, **other)
        assert_same_delta(expected, merge(xs, weights, method=name, density=1, **params), SAME)
        assert difference(expected, merge(xs, weights, method=name, density=0.5, **params)) > OTHER


@pytest.mark.parametrize("density", [0.1239, 0.25, 0.5, 0.8])
def test_pruning_by_magnitude_keeps_that_fraction_and_a_random_mask_about_that_fraction(density: float) -> None:
    rng = np.random.default_rng(0)
    f = Factors(rng.standard_normal((40, 50)).astype("f4"), rng.standard_normal((60, 40)).astype("f4"))
    x = Adapter(Modules({"m": f}))
    zero = zeroed(x)
    largest = merge([x, zero], method="magnitude_prune", density=density).modules["m"].a
    assert np.count_nonzero(largest) == int(density * f.a.size)
    assert np.abs(f.a[largest == 0]).max() <= np.abs(f.a[largest != 0]).min()
    np.testing.assert_array_equal(largest[largest != 0], f.a[largest != 0])
    drawn = merge([x, zero], method="dare_linear", density=density).modules["m"].a
    assert abs(np.count_nonzero(drawn) / f.a.size - density) < 0.05
    np.testing.assert_allclose(drawn[drawn != 0], f.a[drawn != 0] / density, rtol=1e-6)


def test_equal_magnitudes_are_cut_to_the_exact_count() -> None:
    x = Adapter(Modules({"m": Factors(np.ones((4, 6), "f4"), np.ones((6, 4), "f4"))}))
    kept = merge([x, zeroed(x)], method="magnitude_prune", density=0.5).modules["m"].a
    assert np.count_nonzero(kept) == 12


# rank, dtype, base, finiteness, seeds -------------------------------------------------------------------------------


@EVERY
def test_modules_side_by_side_merge_to_the_same_bytes(method: MergeMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    xs = mixed(0)
    alone = merge_measured(xs, method=method.name, rank=2, seed=5)
    threads = []
    monkeypatch.setattr(driver, "_LARGE", 0)
    monkeypatch.setattr(driver, "each", lambda f, items, workers: threads.append(workers) or each(f, items, 3))
    together = merge_measured(xs, method=method.name, rank=2, seed=5)
    assert (together[0].digest, together[1]) == (alone[0].digest, alone[1])
    assert threads == [1 if method.mean_power is not None else WORKERS]


@EVERY
def test_the_rank_is_bounded_as_declared_and_by_the_rank_asked_for(method: MergeMethod) -> None:
    xs = mixed(0)
    for params in variants(method):
        plain, error = merge_measured(xs, method=method.name, **params)
        for path, shape in plain.shapes.items():
            ranks = [x.shapes[path].rank for x in xs if path in x.shapes]
            assert shape.rank <= (sum(ranks) if method.rank == "sum" else max(ranks))
        assert error == 0.0 or method.space == "delta" or method.rank == "max"
        for rank in (1, 2, 3):
            small, error = merge_measured(xs, method=method.name, rank=rank, **params)
            assert small.rank <= rank
            assert error > 0.0
            kept = any(delta.any() for delta in dense(small).values())  # the error is 1 if all was trimmed
            assert (error < 1.0) == (kept or method.space == "subspace")  # there it is the sum's, before trimming
        assert merge_measured(xs[:1], method=method.name, rank=2)[0].rank == 2


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.space in ("factors", "exact")])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("thin", [None, {"v_proj": 1}], ids=["all cut", "some cut"])
def test_the_reported_error_is_that_of_the_cut_and_the_cut_is_the_best(
    name: str, rank: int, thin: dict[str, int] | None
) -> None:
    xs = mixed(1) if thin is None else alike(1, ranks=thin)
    whole = combine(xs, [1 / 3] * 3) if METHODS[name].space == "exact" else merge(xs, method=name)
    small, error = merge_measured(xs, method=name, rank=rank)
    best, least = compress(whole, rank)
    assert error == pytest.approx(difference(whole, small), rel=1e-4)
    assert error == pytest.approx(least, rel=1e-6)
    assert_same_delta(best, small, SAME)
    assert difference(whole, merge(xs, method=name, rank=rank + 1)) < 0.999 * error


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.space in ("delta", "joint")])
def test_methods_that_always_cut_report_the_error_of_the_cut_too(name: str) -> None:
    xs = mixed(1)
    small, error = merge_measured(xs, method=name, rank=2)
    whole, none = merge_measured(xs, method=name, rank=16)
    assert none <= 1e-7
    assert error == pytest.approx(difference(whole, small), rel=1e-4)
    assert_same_delta(compress(whole, 2)[0], small, SAME)


@EVERY
@pytest.mark.parametrize(
    ("dtypes", "widest"), [(("f16", "f16"), "f16"), (("f16", "bf16"), "f32"), (("bf16", "f32"), "f32")]
)
def test_the_result_is_finite_of_the_widest_dtype_and_of_the_known_base(
    method: MergeMethod, dtypes: tuple[str, str], widest: str
) -> None:
    unknown, x = (in_storage(make_adapter(i), dtype) for i, dtype in enumerate(dtypes))
    for params in variants(method):
        result = merge([replace(unknown, base=BaseId("")), x], method=method.name, **params)
        assert result.dtype == widest
        assert result.base == x.base
        for f in result.modules.values():
            assert f.a.dtype == f.b.dtype == np.float32
            assert np.isfinite(f.a).all()
            assert np.isfinite(f.b).all()
            assert math.isfinite(f.scale)


@EVERY
def test_the_seed_changes_the_result_exactly_where_the_method_is_random(method: MergeMethod) -> None:
    xs = alike(0)
    for params in variants(method):
        digests = [merge(xs, method=method.name, seed=seed, **params).digest for seed in (0, 0, 1, 2)]
        assert digests[0] == digests[1]
        assert len(set(digests)) == (3 if method.random else 1)
    for params in variants(method, density=1.0):
        assert len({merge(xs, method=method.name, seed=seed, **params).digest for seed in (0, 1)}) == 1


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.random])
def test_a_random_mask_is_drawn_afresh_for_every_adapter_module_and_side(name: str) -> None:
    ones = {path: Factors(np.ones((6, 6), "f4"), np.ones((6, 6), "f4")) for path in ("m", "n")}
    x, y = Adapter(Modules(ones)), Adapter(Modules({**ones, "o": ones["m"]}))
    left, right = (merge([each, zeroed(each)], method=name, rank=6) for each in (x, y))
    tensors = [t for each in (left, right) for p in ("m", "n") for t in (each.modules[p].a, each.modules[p].b)]
    assert len({t.tobytes() for t in tensors}) == len(tensors)


@EVERY
def test_modules_are_the_union_and_one_that_a_single_adapter_has_is_that_ones_share(method: MergeMethod) -> None:
    xs, weights = mixed(0), [0.7, 0.5, -2.0]
    for params in variants(method, density=1.0):
        result = merge(xs, weights, method=method.name, **params)
        assert result.shapes.keys() == set().union(*(x.shapes for x in xs))
        share = weights[1] ** 2 if method.weighting == "plain" else weights[1]
        alone = "model.layers.2.self_attn.v_proj"
        expected = share * dense(xs[1])[alone]
        np.testing.assert_allclose(dense(result)[alone], expected, atol=SAME * np.linalg.norm(expected))


def test_a_registered_method_is_offered_to_merge_and_a_taken_name_is_not() -> None:
    with pytest.raises(ValueError, match="already registered"):
        merge_method("linear", space="exact", cites="nobody")(lambda fs, ws: fs[0])


# averages -----------------------------------------------------------------------------------------------------------


def roots_summed(xs: list[Adapter], power: float) -> Adapter:
    """n**-power · Σ of the √s-scaled factors on A and on B, in float64: what a method of that `mean_power` does."""
    modules = {}
    for path in sorted(set().union(*(x.shapes for x in xs))):
        fs = [x.modules[path] for x in xs if path in x.shapes]
        rank = max(f.shape.rank for f in fs)
        a, b = np.zeros((rank, fs[0].shape.din)), np.zeros((fs[0].shape.dout, rank))
        for f in fs:
            a[: f.shape.rank] += math.sqrt(f.scale) * f.a
            b[:, : f.shape.rank] += math.sqrt(f.scale) * f.b
        modules[path] = Factors(a * len(xs) ** -power, b * len(xs) ** -power)
    return replace(xs[0], modules=Modules(modules))


def folded(xs: list[Adapter], method: str, dtype: str = "f32") -> Adapter:
    """The running average: one after the other with n/(n+1), 1/(n+1), stored in `dtype` each time."""
    slot = in_storage(xs[0], dtype)
    for n, x in enumerate(xs[1:], 1):
        slot = in_storage(merge([slot, x], [n / (n + 1), 1 / (n + 1)], method=method), dtype)
    return slot


@EVERY
def test_an_equal_average_is_a_power_of_n_times_the_summed_factors_where_declared(method: MergeMethod) -> None:
    xs = mixed(0)
    result = merge(xs, [1 / 3] * 3, method=method.name)
    powers = [p for p in (0.5, 1.0) if difference(result, roots_summed(xs, p)) <= SAME]
    assert powers == ([] if method.mean_power is None else [method.mean_power])


@AVERAGE
@pytest.mark.parametrize("seed", range(3))
def test_folding_one_by_one_equals_the_offline_merge_in_any_order(method: MergeMethod, seed: int) -> None:
    xs = [*mixed(seed), make_adapter(seed + 50, scale=7.0)]
    offline = merge(xs, method=method.name)
    for order in itertools.permutations(range(4)):
        assert_same_delta(offline, folded([xs[i] for i in order], method.name), SAME)
    with pytest.raises(AssertionError):
        assert_same_delta(offline, folded(xs[:3], method.name), SAME)


def test_a_truncated_sum_folded_one_by_one_does_not_equal_the_offline_one() -> None:
    xs = alike(0, 4)
    assert difference(merge(xs, method="svd"), folded(xs, "svd")) > OTHER


@AVERAGE
@pytest.mark.parametrize("dtype", list(STORED))
@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_unmerge_inverts_a_fold_within_the_precision_it_reports(method: MergeMethod, dtype: str, count: int) -> None:
    for seed in range(8):
        xs = [
            in_storage(make_adapter(100 * seed + i, scale=(1.0, 2.0, 0.3, 7.0)[(seed + i) % 4]), dtype)
            for i in range(count)
        ]
        slot = folded(xs, method.name, dtype)
        for index in (0, count - 1):
            staying = [x for i, x in enumerate(xs) if i != index]
            rest, _, precision = unmerge(slot, xs[index], [norm(x) for x in staying], method=method.name)
            true = roots_summed(staying, method.mean_power)
            measured = difference(true, rest)
            assert measured <= precision <= 30 * measured
            assert difference(true, slot) > 5 * precision


@AVERAGE
def test_unmerge_of_another_adapter_misses_by_far_more_than_its_precision(method: MergeMethod) -> None:
    xs = alike(0, 4)
    staying = [norm(x) for x in xs[1:]]
    rest, _, precision = unmerge(folded(xs, method.name), make_adapter(99), staying, method=method.name)
    assert difference(roots_summed(xs[1:], method.mean_power), rest) > 1e4 * precision


@AVERAGE
def test_unmerge_takes_a_dominant_adapter_out_and_says_what_that_costs(method: MergeMethod) -> None:
    xs = [make_adapter(0, scale=1e4), make_adapter(1), make_adapter(2)]
    staying = [norm(x) for x in xs[1:]]
    rest, _, precision = unmerge(folded(xs, method.name), xs[0], staying, method=method.name)
    measured = difference(roots_summed(xs[1:], method.mean_power), rest)
    assert precision > 20 * unmerge(folded(xs[1:], method.name), xs[1], staying[1:], method=method.name).precision
    assert measured <= precision <= 30 * measured


@AVERAGE
@pytest.mark.parametrize("dtype", list(STORED))
def test_unmerge_leaves_no_trace_in_modules_that_only_the_removed_adapter_had(method: MergeMethod, dtype: str) -> None:
    """Rounding would be all that is left there, and cosine gives every module the same say whatever its norm."""
    gone, stays = in_storage(make_adapter(0), dtype), in_storage(make_adapter(1, projections=("q_proj",)), dtype)
    slot = folded([gone, stays], method.name, dtype)
    rest = unmerge(slot, gone, [norm(stays)], method=method.name).adapter
    for other in (gone, make_adapter(2), make_adapter(3, projections=("q_proj",))):
        expected = similarity([stays], [other])[0, 0]
        assert similarity([rest], [other])[0, 0] == pytest.approx(expected, abs=0.02)


@AVERAGE
@pytest.mark.parametrize("dtype", list(STORED))
def test_unmerge_leaves_an_untrained_rest_untrained(method: MergeMethod, dtype: str) -> None:
    gone, stays = in_storage(make_adapter(0), dtype), in_storage(make_adapter(1), dtype)
    stays = stays.with_factors({p: Factors(f.a, f.b * 0, f.scale) for p, f in stays.modules.items()})
    rest = unmerge(folded([gone, stays], method.name, dtype), gone, [0.0], method=method.name).adapter
    assert similarity([rest], [gone])[0, 0] == pytest.approx(0.0, abs=1e-6)
    assert norm(rest) == 0.0


@EVERY
def test_only_an_average_can_be_taken_apart(method: MergeMethod) -> None:
    xs = alike(0, 2)
    merged = merge(xs, method=method.name)
    if method.mean_power is None:
        with pytest.raises(NotReversible, match="cannot be taken apart"):
            unmerge(merged, xs[0], [norm(xs[1])], method=method.name)
    else:
        assert_same_delta(xs[1], unmerge(merged, xs[0], [norm(xs[1])], method=method.name).adapter, SAME)


# methods in a basis of the adapters, against their equations on dense updates ----------------------------------------


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_knots_is_ties_on_the_parts_of_the_stacked_updates(density: float) -> None:
    xs, weights = mixed(0), [1.0, 0.5, -2.0]
    result = dense(merge(xs, weights, method="knots_ties", rank=16, density=density))
    for path, found in result.items():
        deltas = [w * dense(x)[path].astype(float) for w, x in zip(weights, xs) if path in x.shapes]
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        kept = s > 1e-5 * s[0]
        parts = np.split(vt[kept], len(deltas), axis=1)
        trimmed = [
            np.where(np.abs(v) > np.sort(np.abs(v), None)[::-1][int(density * v.size) - 1] * (1 - 1e-9), v, 0)
            for v in parts
        ]
        sign = np.where(sum(trimmed) >= 0, 1, -1)
        agreeing = [np.where(v * sign > 0, v, 0) for v in trimmed]
        merged = sum(agreeing) / np.maximum(sum((v != 0).astype(int) for v in agreeing), 1)
        expected = (u[:, kept] * s[kept]) @ merged
        np.testing.assert_allclose(found, expected, atol=SAME * np.linalg.norm(expected))


def test_opcm_adds_only_what_lies_off_the_slots_directions_and_keeps_the_mean_norm() -> None:
    """The paper's projection with full bases, on dense updates whose ranks leave no further diagonal."""
    xs = alike(3, 2, rank=8, projections=("v_proj",))
    result = dense(merge(xs, method="opcm", alpha=0.4, rank=16))
    for path, found in result.items():
        first, second = (dense(x)[path].astype(float) for x in xs)
        u, s, vt = np.linalg.svd(first)
        inside = u.T @ second @ vt.T
        leading = int(np.argmax(np.cumsum(s) / s.sum() > 0.4)) + 1
        np.fill_diagonal(inside, 0)
        inside[:leading, :leading] = 0
        assert 1 < leading < len(s)
        expected = first + u @ inside @ vt
        expected *= (np.linalg.norm(first) + np.linalg.norm(second)) / 2 / np.linalg.norm(expected)
        np.testing.assert_allclose(found, expected, atol=SAME * np.linalg.norm(expected))


def test_opcm_folded_one_by_one_keeps_the_mean_norm_of_all_members() -> None:
    xs = alike(0, 4, scale=1.0)
    for path, delta in dense(folded(xs, "opcm")).items():
        sizes = [np.linalg.norm(dense(x)[path]) for x in xs]
        assert 0.5 * np.mean(sizes) < np.linalg.norm(delta) <= np.mean(sizes) * (1 + SAME)  # less what the cut drops
