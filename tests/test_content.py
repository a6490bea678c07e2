"""What a slot holds: opening, folding, blocks, taking out, norm restoration, and the record kept of all that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import assert_same_delta, dense, make_adapter
from lorashelf import (
    METHODS,
    Adapter,
    BaseId,
    Factors,
    Modules,
    combine,
    compress,
    merge,
    norm,
    read_adapter,
    write_adapter,
)
from lorashelf.errors import NotReversible
from lorashelf.formats.peft import rounded
from lorashelf.lora.adapter import WIDTHS
from lorashelf.lora.algebra import scaled, trained
from lorashelf.merging.average import Average, History, Source, alone, block, fold, one_base, source, without
from lorashelf.merging.average import _restored as restored
from lorashelf.merging.spec import MergeSpec
from lorashelf.shelf.slot import PENDING, Slot

AVERAGES = [name for name, method in METHODS.items() if method.mean_power is not None]
LINEAR = MergeSpec(method="linear")
SUM = MergeSpec(method="magnitude_prune_svd", parameters={"density": 1.0}, rank=12)  # exactly w ΔW + w' ΔW'
CAT = MergeSpec(method="cat")


def record(x: Adapter) -> Source:
    return source("qa-de", "qa", x)


def opened(x: Adapter, recipe: MergeSpec = LINEAR) -> Average:
    return alone(x, record(x), recipe)


def folded(xs: Sequence[Adapter], recipe: MergeSpec = LINEAR, average: Any = "mean") -> Average:
    content = opened(xs[0], recipe)
    for x in xs[1:]:
        content = fold([content], x, record(x), recipe, average)
    return content


def family(count: int, **options: Any) -> list[Adapter]:
    return [make_adapter(i, **options) for i in range(count)]


# opening ------------------------------------------------------------------------------------------------------------


def test_an_opened_slot_holds_the_adapter_as_it_is() -> None:
    x = rounded(make_adapter(0, dtype="f16"))
    content = opened(x)
    assert content.adapter.digest == x.digest
    assert (content.adapter.dtype, content.history.error, content.history.restored, content.history.method) == (
        "f16",
        0.0,
        1.0,
        None,
    )
    assert content.history.merged == (
        Source("qa-de", "qa", x.digest, 1.0, 4, x.parameters, "f16", pytest.approx(norm(x), rel=1e-7)),
    )
    assert content.history.faithful == "*"


def test_the_recipe_s_dtype_and_rank_shape_what_is_opened() -> None:
    x = make_adapter(0)
    content = opened(x, replace(LINEAR, dtype="bf16", rank=2))
    small, error = compress(x, 2)
    assert (content.adapter.dtype, content.adapter.rank) == ("bf16", 2)
    assert content.history.error == error > 0
    assert_same_delta(rounded(replace(small, dtype="bf16")), content.adapter)
    assert content.history.faithful is None
    assert opened(x, replace(LINEAR, rank=4)).history.faithful == "*"


def test_the_manifest_entry_says_what_will_be_written(tmp_path: Any) -> None:
    content = folded(family(3, dtype="f16"))
    slot = Slot.planned(5, content, ["qa-de", "gec-fr"])
    write_adapter(content.adapter, tmp_path / "a")
    assert slot.object.bytes == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert (slot.id, slot.object.id, slot.object.rank, slot.object.dtype) == (5, PENDING, 4, "f16")
    assert (slot.history, slot.members) == (content.history, ("qa-de", "gec-fr"))
    assert slot.history.method == "linear"
    assert slot.history.digests == {x.digest for x in family(3, dtype="f16")}


# folding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", AVERAGES)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_folds_one_by_one_equal_the_block_of_all(method: str, count: int) -> None:
    recipe, xs = MergeSpec(method=method), family(count, rank=3)
    online = folded(xs, recipe)
    offline = block(xs, [record(x) for x in xs], recipe)
    assert_same_delta(offline.adapter, online.adapter, 1e-5)
    assert_same_delta(merge(xs, method=method), online.adapter, 1e-5)
    assert online.history.method == offline.history.method == method
    assert [m.weight for m in online.history.merged] == pytest.approx([1 / count] * count)
    assert (
        [m.digest for m in online.history.merged]
        == [m.digest for m in offline.history.merged]
        == [x.digest for x in xs]
    )
    with pytest.raises(AssertionError):
        assert_same_delta(offline.adapter, folded(xs[:-1], recipe).adapter, 1e-5)


def test_a_half_fold_lets_early_adapters_fade() -> None:
    xs = family(3)
    content = folded(xs, CAT, "half")
    assert [m.weight for m in content.history.merged] == [0.25, 0.25, 0.5]
    assert_same_delta(combine(xs, [0.25, 0.25, 0.5]), content.adapter, 1e-6)


@pytest.mark.parametrize(
    "steps",
    [
        [(CAT, "mean"), (CAT, "mean"), (CAT, "mean")],
        [(CAT, "half"), (CAT, "half"), (CAT, "half")],
        [(SUM, "mean"), (SUM, "mean")],
        [(CAT, "mean"), (CAT, "half")],
        [(CAT, "half"), (CAT, "half"), (CAT, "mean")],
        [(SUM, "mean"), (CAT, "mean")],
        [(CAT, "mean"), (SUM, "mean")],
    ],
    ids=lambda steps: " ".join(f"{recipe.method.split('_')[0]}-{average}" for recipe, average in steps),
)
def test_the_recorded_weights_rebuild_what_the_slot_holds(steps: list[tuple[MergeSpec, Any]]) -> None:
    """With exact sums, whatever the order in which a shelf's recipe and policy changed."""
    xs = family(len(steps) + 1, rank=2)
    content = opened(xs[0], CAT)
    for x, (recipe, average) in zip(xs[1:], steps, strict=True):
        content = fold([content], x, record(x), recipe, average)
    weights = [m.weight for m in content.history.merged]
    assert_same_delta(combine(xs, weights), content.adapter, 1e-5)
    with pytest.raises(AssertionError):
        assert_same_delta(combine(xs, [weights[0] * 1.1, *weights[1:]]), content.adapter, 1e-5)


def test_several_sources_weigh_as_much_as_they_have_averaged() -> None:
    xs = family(6)
    sources = [folded(xs[:3]), opened(xs[3]), opened(xs[4])]
    content = fold(sources, xs[5], record(xs[5]), LINEAR)
    assert_same_delta(merge(xs, method="linear"), content.adapter, 1e-5)
    assert (content.history.method, len(content.history.merged)) == ("linear", 6)
    assert [m.weight for m in content.history.merged] == pytest.approx([1 / 6] * 6)


@pytest.mark.parametrize(
    ("source", "recipe", "average", "expected"),
    [
        ("one", LINEAR, "mean", "linear"),
        ("one", MergeSpec(method="factor_mean"), "mean", "factor_mean"),
        ("one", MergeSpec(method="svd"), "mean", None),
        ("one", CAT, "mean", None),
        ("one", MergeSpec(method="ties"), "mean", None),
        ("one", LINEAR, "half", None),
        ("one", replace(LINEAR, rank=2), "mean", None),
        ("one, cut", LINEAR, "mean", None),
        ("linear", LINEAR, "mean", "linear"),
        ("linear", replace(LINEAR, rank=4), "mean", "linear"),
        ("linear", MergeSpec(method="factor_mean"), "mean", None),
        ("half", LINEAR, "mean", None),
        ("svd", LINEAR, "mean", None),
    ],
)
def test_content_stays_an_average_only_while_one_method_averages_uncut(
    source: str, recipe: MergeSpec, average: Any, expected: str | None
) -> None:
    x, y, z = family(3)
    sources = {
        "one": opened(x),
        "one, cut": opened(x, replace(LINEAR, rank=2)),
        "linear": folded([x, y]),
        "half": folded([x, y], average="half"),
        "svd": folded([x, y], MergeSpec(method="svd")),
    }
    content = fold([sources[source]], z, record(z), recipe, average)
    assert content.history.method == expected
    assert content.history.faithful == expected


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_fold_takes_the_weights_that_its_method_declares(method: str) -> None:
    xs = family(3)
    content = folded(xs, MergeSpec(method=method, seed=3))
    unary = METHODS[method].weights == "unary"
    weights = [1.0, 1.0] if unary else [2 / 3, 1 / 3]
    before = folded(xs[:2], MergeSpec(method=method, seed=3))
    assert_same_delta(merge([before.adapter, xs[2]], weights, method=method, seed=3), content.adapter, 1e-6)
    assert [m.weight for m in content.history.merged] == pytest.approx([1.0 if unary else 1 / 3] * 3)


@pytest.mark.parametrize(
    ("dtypes", "wanted", "expected"),
    [("f16 f16", None, "f16"), ("f16 bf16", None, "f32"), ("bf16 f32", None, "f32"), ("f32 f32", "bf16", "bf16")],
)
def test_a_fold_is_stored_in_the_wider_dtype_or_the_recipe_s(dtypes: str, wanted: str | None, expected: str) -> None:
    x, y = (make_adapter(i, dtype=dtype) for i, dtype in enumerate(dtypes.split()))
    recipe = replace(LINEAR, dtype=wanted)
    assert fold([opened(x)], y, record(y), recipe).adapter.dtype == expected
    assert block([x, y], [record(x), record(y)], recipe).adapter.dtype == expected


def test_a_capped_fold_reports_what_the_cut_cost() -> None:
    xs = family(2)
    content = folded(xs, MergeSpec(method="cat", rank=8))
    assert content.history.error == 0.0
    cut = fold([opened(xs[0])], xs[1], record(xs[1]), MergeSpec(method="cat", rank=5))
    small, error = compress(combine(xs, [0.5, 0.5]), 5)
    assert cut.history.error == pytest.approx(error)
    assert cut.adapter.rank == 5
    assert_same_delta(small, cut.adapter, 1e-5)


# blocks -------------------------------------------------------------------------------------------------------------


def test_a_block_of_one_is_that_adapter() -> None:
    x = make_adapter(0)
    for method in METHODS:
        content = block([x], [record(x)], MergeSpec(method=method))
        assert content.adapter.digest == x.digest
        assert content == replace(opened(x), adapter=content.adapter)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_block_is_the_merge_with_default_weights(method: str) -> None:
    xs = family(3)
    content = block(xs, [record(x) for x in xs], MergeSpec(method=method, rank=3))
    assert content.adapter.digest == merge(xs, method=method, rank=3).digest
    assert content.history.method is None
    assert {m.weight for m in content.history.merged} == {1.0 if METHODS[method].weights == "unary" else 1 / 3}
    assert content.history.error > 0


# taking out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_precision_counts_the_take_outs_before(dtype: str) -> None:
    recipe, xs = replace(LINEAR, dtype=dtype), family(4)
    content = folded(xs[:2], recipe)
    for i in range(40):
        x, y = xs[1 + i % 3], xs[1 + (i + 1) % 3]
        rest, said = without(content, x.digest, x, recipe)
        missed = norm(combine([rest.adapter, xs[0]], [1.0, -1.0])) / norm(xs[0])
        assert missed <= said, i
        content = fold([rest], y, record(y), recipe)
    assert block(xs[:2], [record(x) for x in xs[:2]], recipe).noise is opened(xs[0], recipe).noise is None


def test_what_a_large_adapter_left_behind_is_counted_after_it_was_taken_out() -> None:
    recipe, (x, y) = replace(LINEAR, dtype="f16"), family(2)
    large = make_adapter(9, scale=200.0)
    content, _ = without(folded([large, x, y], recipe), large.digest, large, recipe)
    rest, precision = without(content, y.digest, y, recipe)
    missed = norm(combine([rest.adapter, x], [1.0, -1.0])) / norm(x)
    assert (
        without(replace(content, history=replace(content.history, noise=())), y.digest, y, recipe)[1]
        < missed
        <= precision
    )


SIDES = {"q_proj": (12, 16), "v_proj": (8, 16), "o_proj": (24, 6)}  # module → (dout, din)


def odd_adapter(rng: np.random.Generator, dtype: str) -> Adapter:
    """Some modules, each of a rank of its own and weak ranks among them; ‖ΔW‖ from 1e-9 to 1e3, on either side."""
    modules, scale = {}, 10 ** rng.uniform(-9, 3)
    for path in [name for name in SIDES if rng.random() < 0.75] or ["q_proj"]:
        (dout, din), rank = SIDES[path], int(rng.integers(1, 6))
        side = 10 ** rng.uniform(-4, 1) if rng.random() < 0.5 else 1.0
        uneven = 10 ** rng.uniform(-3, 3) if rng.random() < 0.3 else 1.0
        a, b = rng.standard_normal((rank, din)), rng.standard_normal((dout, rank)) * side
        b[:, 0] *= 1e-4 if rng.random() < 0.2 else 1.0
        modules[path] = Factors(a.astype("f4"), b.astype("f4"), scale * uneven / side)
    return rounded(Adapter(Modules(modules), BaseId("acme/odd"), dtype))


def true_average(xs: Sequence[Adapter], method: str) -> dict[str, Any]:
    """ΔW of the equal average of the originals, in float64; untrained modules take no part."""
    power, modules = METHODS[method].mean_power, {}
    for path in {path for x in xs for path, f in x.modules.items() if trained(f)}:
        fs = [x.modules[path] for x in xs if path in x.modules and trained(x.modules[path])]
        rank = max(f.shape.rank for f in fs)
        a, b = np.zeros((rank, fs[0].shape.din)), np.zeros((fs[0].shape.dout, rank))
        for f in fs:
            a[: f.shape.rank] += math.sqrt(f.scale) * f.a
            b[:, : f.shape.rank] += math.sqrt(f.scale) * f.b
        modules[path] = b @ a * len(xs) ** (-2 * power)
    return modules


def missed_by(held: Adapter, xs: Sequence[Adapter], method: str) -> float:
    """‖ΔW − the true average's‖ / ‖the true average's‖."""
    found, true = dense(held), true_average(xs, method)
    errors = [np.linalg.norm(np.atleast_1d(found.get(p, 0.0) - true.get(p, 0.0))) for p in found.keys() | true.keys()]
    return float(np.linalg.norm(errors) / np.linalg.norm([np.linalg.norm(delta) for delta in true.values()]))


@pytest.mark.parametrize("method", AVERAGES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "as it comes", "changing"])
def test_the_rest_is_right_to_the_precision_reported_or_refused(method: str, dtype: str) -> None:
    """Folds and take-outs in any order, of adapters of any size, some the opposite of others on one side or on both."""
    reported = refused = 0
    for seed in range(30):
        rng = np.random.default_rng([seed, len(dtype)])
        fixed = dtype if dtype in WIDTHS else None
        recipe = MergeSpec(method=method, dtype=fixed, restore_norm=bool(rng.random() < 0.2))
        xs = [odd_adapter(rng, fixed or str(rng.choice(list(WIDTHS)))) for _ in range(6)]
        if rng.random() < 0.3:
            sides = {path: Factors(-f.a, f.b * (1 if rng.random() < 0.5 else -1)) for path, f in xs[0].modules.items()}
            xs[1] = xs[0].with_factors({p: replace(f, scale=xs[0].modules[p].scale) for p, f in sides.items()})
        held, content = [0], opened(xs[0], recipe)
        for _ in range(12):
            if dtype == "changing":
                recipe = replace(recipe, dtype=str(rng.choice(list(WIDTHS))))
            others = [i for i in range(6) if i not in held]
            if len(held) < 2 or (others and rng.random() < 0.55):
                i = int(rng.choice(others))
                content = fold([content.plain], xs[i], record(xs[i]), recipe)
                held.append(i)
                continue
            i = int(rng.choice(held))
            try:
                content, precision = without(content.plain, xs[i].digest, xs[i], recipe)
            except NotReversible:
                refused += 1
                continue
            held.remove(i)
            reported += 1
            assert missed_by(content.plain.adapter, [xs[k] for k in held], method) <= precision <= 0.1, seed
    assert reported > refused > 0


@pytest.mark.parametrize("method", AVERAGES)
@pytest.mark.parametrize(
    ("dtype", "small"), [("f16", 1e-4), ("f16", 1e-8), ("bf16", 1e-3), ("f32", 1e-8), ("f32", 1e-12)]
)
def test_a_small_adapter_is_not_taken_for_rounding(method: str, dtype: str, small: float) -> None:
    """As after one step of training: A is random, B tiny, and its neighbour is trained."""
    recipe, large = MergeSpec(method=method, dtype=dtype), make_adapter(0)
    x = make_adapter(1)
    x = x.with_factors({path: replace(f, b=f.b * np.float32(small)) for path, f in x.modules.items()})
    content = folded([large, x], recipe)
    with pytest.raises(NotReversible, match="so small compared with this adapter that rounding would leave"):
        without(content, large.digest, large, recipe)
    rest, precision = without(content, x.digest, x, recipe)
    assert missed_by(rest.adapter, [large], method) <= precision < 0.05


@pytest.mark.parametrize("method", AVERAGES)
def test_the_ranks_of_the_rest_keep_their_places(method: str) -> None:
    """A fold adds rank by rank: after a weak first rank is cleared the second must not move there."""
    recipe, (large, x, late) = MergeSpec(method=method, dtype="f16"), family(3)
    weak = np.array([1e-6, 1, 1, 1], np.float32)
    x = x.with_factors({p: Factors(f.a * weak[:, None], f.b * weak, f.scale) for p, f in x.modules.items()})
    rest, _ = without(folded([large, x], recipe), large.digest, large, recipe)
    assert missed_by(fold([rest], late, record(late), recipe).adapter, [x, late], method) < 0.01


@pytest.mark.parametrize("method", AVERAGES)
def test_what_a_narrow_dtype_lost_is_counted_after_the_slot_was_widened(method: str) -> None:
    xs = family(3)
    content = folded(xs[:2], MergeSpec(method=method, dtype="bf16"))
    wide = MergeSpec(method=method, dtype="f32")
    rest, precision = without(fold([content], xs[2], record(xs[2]), wide), xs[2].digest, xs[2], wide)
    assert 1e-4 < missed_by(rest.adapter, xs[:2], method) <= precision < 0.05


@pytest.mark.parametrize("method", AVERAGES)
def test_taking_an_adapter_out_leaves_the_average_of_the_others(method: str) -> None:
    recipe, xs = MergeSpec(method=method), family(4, rank=3)
    content = folded(xs, recipe)
    for x in xs:
        others = [y for y in xs if y is not x]
        rest, precision = without(content, x.digest, x, recipe)
        assert_same_delta(merge(others, method=method), rest.adapter, 1e-5)
        assert 0 < precision < 1e-5
        assert [(m.digest, m.weight) for m in rest.history.merged] == [(y.digest, 1 / 3) for y in others]
        assert (rest.history.method, rest.history.error) == (method, 0.0)
        again = fold([rest], x, record(x), recipe)
        assert_same_delta(content.adapter, again.adapter, 1e-5)
        with pytest.raises(AssertionError):
            assert_same_delta(content.adapter, rest.adapter, 1e-5)


def test_taking_out_down_to_one_gives_that_one_and_then_there_is_nothing_to_take_out() -> None:
    x, y = family(2)
    rest, _ = without(folded([x, y]), y.digest, y, LINEAR)
    assert_same_delta(x, rest.adapter, 1e-6)
    assert [m.weight for m in rest.history.merged] == [1.0]
    assert rest.history.faithful == "*"
    with pytest.raises(NotReversible, match="only one adapter"):
        without(rest, x.digest, x, LINEAR)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([(MergeSpec(method="svd"), "mean")], "merged by svd"),
        ([(CAT, "mean")], "merged by cat"),
        ([(MergeSpec(method="ties"), "mean"), (LINEAR, "mean")], "merged by ties"),
        ([(replace(LINEAR, rank=2), "mean")], "cut to rank 2"),
        ([(replace(LINEAR, rank=2), "mean"), (LINEAR, "mean")], "cut to rank 2"),
        ([(LINEAR, "half"), (LINEAR, "mean")], "folded with half weights"),
        ([(LINEAR, "mean"), (MergeSpec(method="factor_mean"), "mean")], "merged by factor_mean after linear"),
    ],
)
def test_what_is_no_average_cannot_be_taken_apart_and_says_why(steps: list[tuple[MergeSpec, Any]], reason: str) -> None:
    xs = family(len(steps) + 1)
    content = opened(xs[0])
    for x, (recipe, average) in zip(xs[1:], steps, strict=True):
        content = fold([content], x, record(x), recipe, average)
    with pytest.raises(NotReversible, match=f"cannot be taken apart: {reason}"):
        without(content, xs[1].digest, xs[1], LINEAR)
    cut = fold([opened(xs[0], replace(LINEAR, rank=2))], xs[1], record(xs[1]), LINEAR)
    assert (cut.history.method, cut.history.fixed) == (None, "cut to rank 2")


# norm restoration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "factor_mean", "svd", "cat", "ties"])
def test_a_restored_merge_has_the_mean_norm_of_its_members(method: str) -> None:
    xs = [make_adapter(0), make_adapter(1, scale=5.0), make_adapter(2, scale=0.5)]
    plain, recipe = MergeSpec(method=method), MergeSpec(method=method, restore_norm=True)
    mean = np.mean([norm(x) for x in xs])
    content = block(xs, [record(x) for x in xs], recipe)
    before = block(xs, [record(x) for x in xs], plain)
    assert norm(content.adapter) == pytest.approx(mean, rel=1e-6)
    assert norm(before.adapter) != pytest.approx(mean, rel=1e-3)
    assert content.history.restored == pytest.approx(mean / norm(before.adapter))
    assert (before.history.restored, content.history.method) == (1.0, before.history.method)
    for path, f in content.adapter.modules.items():
        np.testing.assert_array_equal(f.a, before.adapter.modules[path].a)
        assert f.scale == pytest.approx(content.history.restored)


def test_restoration_is_divided_out_before_the_next_fold() -> None:
    recipe, xs = replace(LINEAR, restore_norm=True), family(4)
    content = opened(xs[0], recipe)
    assert content.history.restored == 1.0
    for n in (1, 2, 3):
        plain = content.plain
        assert_same_delta(folded(xs[:n]).adapter, plain.adapter, 1e-5)
        content = fold([plain], xs[n], record(xs[n]), recipe)
        assert norm(content.adapter) == pytest.approx(np.mean([norm(x) for x in xs[: n + 1]]), rel=1e-6)
    plain = content.plain
    rest, _ = without(plain, xs[3].digest, xs[3], recipe)
    assert norm(rest.adapter) == pytest.approx(np.mean([norm(x) for x in xs[:3]]), rel=1e-5)
    assert_same_delta(folded(xs[:3]).adapter, scaled(rest.adapter, 1 / rest.history.restored), 1e-5)


def test_a_merge_that_cancels_out_is_not_restored() -> None:
    x = make_adapter(0)
    opposite = scaled(x, -1.0)
    content = block([x, opposite], [record(x), record(opposite)], MergeSpec(method="factor_mean", restore_norm=True))
    zero = x.with_factors({p: Factors(f.a, f.b * 0, f.scale) for p, f in x.modules.items()})
    silent = block([zero, zero], [record(zero), record(zero)], replace(LINEAR, restore_norm=True))
    assert silent.history.restored == 1.0
    assert norm(silent.adapter) == 0.0
    assert all(np.isfinite(delta).all() for c in (content, silent) for delta in dense(c.adapter).values())


def test_what_has_no_norm_restores_none() -> None:
    """Earlier writers mixed B = 0 of one adapter with A = 0 of another: cross terms, of two that had no norm."""
    x = make_adapter(0)
    nothing = replace(record(x), norm=0.0)
    content = Average(x, History((nothing, nothing), method="linear"))
    assert restored(content, replace(LINEAR, restore_norm=True)) is content
    larger = Average(x, History((record(scaled(x, 3.0)),) * 2, method="linear"))
    assert restored(larger, replace(LINEAR, restore_norm=True)).history.restored == pytest.approx(3.0)


@pytest.mark.parametrize(("side", "other"), [(1e-12, 1e-12), (1e-2, 1e-22)])
def test_tiny_adapters_have_a_norm(side: float, other: float) -> None:
    f = Factors(np.full((4, 16), side, np.float32), np.full((12, 4), other, np.float32))
    x = Adapter(Modules({"m.0": f}), BaseId("acme/tiny"))
    assert record(x).norm == pytest.approx(norm(x), rel=1e-5)
    assert folded([x, x], replace(LINEAR, restore_norm=True)).history.restored == pytest.approx(0.5, rel=1e-5)


def test_copies_in_a_block_count_once() -> None:
    x, y = make_adapter(0), make_adapter(1)
    content = block([x, y, x], [record(x), record(y), record(x)], LINEAR)
    assert [entry.digest for entry in content.history.merged] == [x.digest, y.digest]
    assert_same_delta(content.adapter, block([x, y], [record(x), record(y)], LINEAR).adapter)
    alone = block([x, x], [record(x)] * 2, LINEAR)
    assert (alone.adapter.digest, len(alone.history.merged)) == (x.digest, 1)


def test_scales_are_those_that_an_alpha_gives_back(tmp_path: Path) -> None:
    """rsLoRA with a rank that is no power of two: no alpha / 20 is 8 / sqrt(20) to the last bit."""
    x = make_adapter(0, rank=20, scale=8 / math.sqrt(20))
    write_adapter(rounded(x), tmp_path / "x")
    assert read_adapter(tmp_path / "x").digest == rounded(x).digest != x.digest
    y = make_adapter(0, rank=16, scale=8 / math.sqrt(16))
    assert rounded(y) is y


# small parts --------------------------------------------------------------------------------------------------------


def test_scaled_multiplies_every_update_and_keeps_the_factors() -> None:
    x = make_adapter(0, scales={"q_proj": 0.5})
    y = scaled(x, -3.0)
    for path, delta in dense(x).items():
        np.testing.assert_allclose(dense(y)[path], -3.0 * delta)
        assert y.modules[path].a is x.modules[path].a
    with pytest.raises(AssertionError):
        assert_same_delta(x, y)


def test_declared_bases_are_brought_under_the_first_known_name() -> None:
    xs = [make_adapter(0, base=""), make_adapter(1, base="acme/a"), make_adapter(2, base="acme/a-4bit")]
    assert [x.base for x in one_base(xs)] == [BaseId("acme/a")] * 3
    assert one_base(xs[:1])[0].base == BaseId("")
    assert folded(xs).adapter.base == BaseId("acme/a")
