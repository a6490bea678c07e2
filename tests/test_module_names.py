"""One base, two spellings of its modules; names that training tools leave; what adapters have in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from command import Command
from factory import SHAPES, assert_same_delta, make_adapter, module_path, peft_tensors, write_peft
from lorashelf import (
    METHODS,
    METRICS,
    Adapter,
    Clustering,
    Modules,
    Shelf,
    combine,
    gram,
    inner,
    merge,
    new_settings,
    norm,
    partition,
    plan_add,
    plan_cluster,
    plan_remove,
    plan_update,
    read_adapter,
    similarity,
)
from lorashelf.errors import AdapterFormatError, NameMismatch, ShapeMismatch
from lorashelf.lora.module_names import _RENAMED, BASE_PREFIXES, TOWERS, WRAPPERS, _kind, canonical
from lorashelf.merging import unmerge
from lorashelf.report.preview import forecast
from renamed_bases import CLASSES, earlier_name, linear_modules, tiny_model

SPELLINGS = {
    "transformers 5": "model.language_model.layers",
    "transformers 4": "language_model.model.layers",
    "AutoModel": "layers",
    "AutoModel of transformers 5": "language_model.layers",
    "Omni": "thinker.model.layers",
}
UNKNOWN = {
    "nothing known": "net.layers",
    "another model's": "transformer.layers",
    "something before it": "wrapped.model.layers",
}


def under(x: Adapter, head: str) -> Adapter:
    """The adapter's factors under another spelling of `model.layers`."""
    return replace(x, modules=Modules({re.sub(r"^model\.layers", head, path): f for path, f in x.modules.items()}))


def shelf_of(path: Path, *adapters: Adapter, slots: int = 1, **options: Any) -> Shelf:
    shelf = Shelf.create(path, new_settings(slots, policy="kmerge", **options))
    for i, x in enumerate(adapters):
        shelf.commit(plan_add(shelf.snapshot(), x, f"t{i}"))
    return shelf


# the rules, and the libraries they come from ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_a_module_of_a_renamed_base_has_one_canonical_name_before_and_after(kind: str) -> None:
    model = tiny_model(kind)
    before, paths = earlier_name(model), linear_modules(model)
    assert {before(path) for path in paths} != set(paths), "transformers renames nothing here any more"
    assert {path: canonical(before(path)) for path in paths} == {path: canonical(path) for path in paths}
    assert len({canonical(path) for path in paths}) == len(paths), "two modules have one canonical name"


def conversions() -> str:
    return (Path(transformers.__file__).parent / "conversion_mapping.py").read_text()


def test_the_prefixes_are_those_of_the_installed_transformers() -> None:
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    pattern = r"base_model_prefix\s*(?::\s*str\s*)?=\s*[\"']([^\"'.]+)[\"']"
    found = {prefix for path in sources for prefix in re.findall(pattern, path.read_text())}
    apart = {prefix for prefix in found if prefix in WRAPPERS or prefix in TOWERS or _kind((prefix,))}
    assert found - apart == BASE_PREFIXES
    assert "model" in apart


def test_wrappers_and_towers_stand_in_the_table_of_conversions() -> None:
    text = conversions()
    assert [word for word in (*WRAPPERS, *TOWERS) if not re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"),
        ("vit.encoder.layer.0.attention.output.dense", "vit.layers.0.attention.o_proj"),
        ("vit.encoder.layer.0.intermediate.dense", "vit.layers.0.mlp.fc1"),
        ("vit.encoder.layer.0.output.dense", "vit.layers.0.mlp.fc2"),
        ("dinov2.encoder.layer.3.attention.attention.value", "dinov2.encoder.layer.3.attention.v_proj"),
        ("swin.encoder.layers.0.blocks.1.attention.self.key", "swin.encoder.layers.0.blocks.1.attention.k_proj"),
        ("model.decoder.layers.0.fc1", "model.decoder.layers.0.mlp.fc1"),
        ("model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.self_attn.o_proj"),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ("embed_out", "lm_head"),
        ("backbone.layers.0.mixer.in_proj", "model.layers.0.mixer.in_proj"),
    ],
)
def test_modules_that_transformers_renames_inside_a_layer(old: str, new: str) -> None:
    assert canonical(old) == canonical(new)
    (f,) = make_adapter(0, layers=1, projections=("q_proj",)).modules.values()
    x, y = {old: f}, {new: f}
    assert similarity([Adapter(Modules(x)), Adapter(Modules(y))])[0, 1] == pytest.approx(1.0)


def test_every_rule_inside_a_layer_is_one_of_transformers() -> None:
    text = conversions().replace("\\", "")
    words = {word for pattern, _ in _RENAMED for word in re.findall(r"[a-z]\w{3,}", pattern.replace("\\b", " "))}
    assert [word for word in sorted(words) if word not in text] == []


# two spellings, compared and merged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("head", SPELLINGS.values(), ids=list(SPELLINGS))
def test_an_adapter_is_its_own_copy_under_another_spelling(head: str, metric: str) -> None:
    x, other = make_adapter(0), make_adapter(1)
    expected = similarity([x, x, other], metric=metric)
    assert similarity([x, under(x, head), other], metric=metric) == pytest.approx(expected)
    assert similarity([x], [under(x, head), other], metric=metric) == pytest.approx(expected[:1, 1:])


@pytest.mark.parametrize("head", SPELLINGS.values(), ids=list(SPELLINGS))
def test_inner_products_sums_and_blocks_take_both_spellings_as_one(head: str) -> None:
    x, y = make_adapter(0), make_adapter(1)
    z = under(x, head)
    assert inner(x, z) == pytest.approx(norm(x) ** 2)
    assert gram([x, z, y]) == pytest.approx(gram([x, x, y]))
    assert_same_delta(merge([combine([x, z], [0.5, 0.25])], method="cat"), named_as(combine([x, x], [0.5, 0.25]), z, x))
    assert partition([x, y, z], 2, method="kmeans", seed=0) == partition([x, y, x], 2, method="kmeans", seed=0)
    rows = [forecast(dict(zip("abc", xs, strict=True)), [1, 2], new_settings(1).merge) for xs in ([x, y, z], [x, y, x])]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["norm_ratio"] == pytest.approx(theirs["norm_ratio"])
        assert ours["blocks"] == theirs["blocks"]


def named_as(x: Adapter, *several: Adapter) -> Adapter:
    """`x` under whichever of the adapters' spellings the alignment takes."""
    paths = list(combine(several, [1.0] * len(several)).modules)
    return replace(x, modules=Modules(dict(zip(paths, x.modules.values(), strict=True))))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("head", SPELLINGS.values(), ids=list(SPELLINGS))
def test_a_merge_of_two_spellings_is_the_merge_of_one(head: str, method: str) -> None:
    x, y = make_adapter(0), make_adapter(1)
    random = METHODS[method].random  # a mask is drawn by a module's name, so there only the modules are compared
    for pair in ([x, under(y, head)], [under(x, head), y]):
        merged, expected = merge(pair, method=method), merge([x, y], method=method)
        assert len(merged.modules) == len(expected.modules) == 4
        if not random:
            assert_same_delta(named_as(expected, *pair), merged, 1e-5)


def test_the_spelling_kept_is_the_later_one_in_either_order() -> None:
    x = make_adapter(0)
    for earlier in ("language_model.model.layers", "model.layers", "thinker.model.layers"):
        for pair in ([x, 0], [0, x]):
            both = [under(x, "model.language_model.layers" if one else earlier) for one in pair]
            assert {path.rpartition(".layers")[0] for path in merge(both, method="linear").modules} == {
                "model.language_model"
            }


def test_modules_that_only_one_adapter_has_go_with_those_that_are_renamed() -> None:
    x = make_adapter(0, projections=("q_proj",))
    y = under(make_adapter(1, projections=("q_proj", "v_proj")), "layers")
    assert list(merge([x, y], method="linear").modules) == list(make_adapter(1).modules)
    assert list(merge([y, x], method="linear").modules) == list(make_adapter(1).modules)


def test_two_sizes_under_two_spellings_are_refused_as_sizes() -> None:
    x = make_adapter(0, projections=("q_proj",))
    y = Adapter(Modules({path.replace("q_proj", "q_proj"): f for path, f in x.modules.items()}), x.base)
    wide = {path: replace(f, a=np.tile(f.a, 2)) for path, f in y.modules.items()}
    with pytest.raises(ShapeMismatch, match="ΔW is 12x32, elsewhere 12x16"):
        similarity([x, under(replace(y, modules=Modules(wide)), "layers")])


@pytest.mark.parametrize("head", UNKNOWN.values(), ids=list(UNKNOWN))
def test_two_names_of_which_no_rule_says_whether_they_are_one_module_are_refused(head: str, tmp_path: Path) -> None:
    x, y = make_adapter(0), under(make_adapter(1), head)
    sentence = f"{head}.0.self_attn.q_proj and model.layers.0.self_attn.q_proj may be one module, and 3 more"
    for refused in (
        lambda: similarity([x, y]),
        lambda: merge([x, y], method="linear"),
        lambda: plan_add(shelf_of(tmp_path / "s", x).snapshot(), y, "new"),
        lambda: plan_cluster(
            Shelf.create(tmp_path / "c", new_settings(1)).snapshot(),
            {"a": x, "b": y},
            Clustering((("a", "b"),), "by hand"),
        ),
        lambda: forecast({"a": x, "b": y}, [1], new_settings(1).merge),
        lambda: unmerge(x, y, 2, method="linear"),
    ):
        with pytest.raises(NameMismatch) as caught:
            refused()
        assert sentence in caught.value.faults[0]
    shelf_of(tmp_path / "the cure", y)  # a shelf of its own


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("model.layers", "model.vision_tower.layers"),
        ("language_model.model.layers", "vision_tower.vision_model.layers"),
        ("model.encoder.layers", "model.decoder.layers"),
        ("thinker.model.layers", "talker.model.layers"),
        ("image_tower.layers", "video_tower.layers"),
        ("model.layers", "audio_tower.layers"),
    ],
)
def test_parts_of_a_model_that_are_certainly_two_are_merged_side_by_side(left: str, right: str) -> None:
    x, y = under(make_adapter(0), left), under(make_adapter(1), right)
    assert similarity([x, y])[0, 1] == 0.0
    assert len(merge([x, y], method="linear").modules) == 8


def test_an_adapter_with_both_names_shows_that_they_are_two_modules() -> None:
    x, y = make_adapter(0), under(make_adapter(1), "draft.layers")
    both = replace(x, modules=Modules({**x.modules, **y.modules}))
    assert len(merge([both, x, y], method="linear").modules) == 8
    two = replace(x, modules=Modules({**x.modules, **under(x, "layers").modules}))
    assert len(merge([two, make_adapter(1)], method="linear").modules) == 8


# on a shelf ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", SPELLINGS.values(), ids=list(SPELLINGS))
def test_a_shelf_folds_scores_and_takes_out_across_spellings(head: str, tmp_path: Path) -> None:
    x, y, z = make_adapter(0), make_adapter(1), make_adapter(2)
    other = under(y, head)
    shelf = shelf_of(tmp_path / "s", x)
    plan = plan_add(shelf.snapshot(), other, "t1")
    assert plan.report["scores"]["0"] == pytest.approx(similarity([x, y])[0, 1], abs=1e-6)
    assert plan.report["shared"] == {"modules": 4, "of": 4}
    shelf.commit(plan)
    slot = shelf.snapshot().manifest.slots[0]
    assert_same_delta(shelf.snapshot().stored(slot), named_as(merge([x, y], method="linear"), x, other))
    again = plan_add(shelf.snapshot(), other, "t2")
    assert again.report["merged"] is False, "an adapter given again under its own spelling is the same"
    updated = plan_update(shelf.snapshot(), "t1", z, other)
    assert_same_delta(updated.writes[0], named_as(merge([x, z], method="linear"), x, other), 1e-5)
    removed = plan_remove(shelf.snapshot(), "t1", other)
    assert removed.report["removed"] == "average"
    assert_same_delta(removed.writes[0], named_as(x, x, other), 1e-5)
    assert shelf.verify() == []


def test_a_digest_does_not_depend_on_what_lies_beside_the_adapter(tmp_path: Path) -> None:
    x = make_adapter(0)
    shelf = shelf_of(tmp_path / "s", x, under(make_adapter(1), "layers"))
    assert shelf.snapshot().manifest.tasks["t1"]["digest"] == under(make_adapter(1), "layers").digest


def printed(run: Command, *words: object) -> tuple[dict[str, Any], str]:
    """A command's JSON document and what it printed for people."""
    code, document = run(*words)
    assert code == 0, document
    return document, run.stderr


def test_adapters_that_share_no_module_are_merged_over_the_union_with_a_notice(tmp_path: Path, run: Command) -> None:
    attention = write_peft(tmp_path / "attention", make_adapter(0, projections=("q_proj",)))
    mlp = write_peft(tmp_path / "mlp", make_adapter(1, projections=("v_proj",)))
    none, shelf, merged, clustered = {"modules": 0, "of": 2}, tmp_path / "s", tmp_path / "m", tmp_path / "c"
    printed(run, "init", shelf, "--slots", 1, "--policy", "kmerge")
    assert "in common" not in printed(run, "add", shelf, attention)[1]
    for words, found in (
        (["add", shelf, mlp, "--dry-run"], lambda d: d.get("added", [d])[0]["shared"]),
        (["add", shelf, mlp], lambda d: d.get("added", [d])[0]["shared"]),
        (["merge", attention, mlp, "-o", merged, "--method", "linear"], lambda d: d["shared"]),
        (["cluster", attention, mlp, "-o", clustered, "--slots", 1, "--method", "single"], lambda d: d["shared"]["0"]),
    ):
        document, said = printed(run, *words)
        assert "0 of 2 modules in common" in said
        assert found(document) == none
    for command in ("plan", "compare"):
        assert "all of them: 0 of 2 modules in common" in printed(run, command, attention, mlp)[1]
    both = combine([read_adapter(attention), read_adapter(mlp)], [0.5, 0.5])
    assert_same_delta(read_adapter(merged), both, 1e-5)


def test_adapters_of_one_kind_get_no_notice(tmp_path: Path, run: Command) -> None:
    few = write_peft(tmp_path / "few", make_adapter(0, projections=("q_proj",)))
    more = write_peft(tmp_path / "more", make_adapter(1))
    document, said = printed(run, "merge", few, more, "-o", tmp_path / "m", "--method", "cat")
    assert document["shared"] == {"modules": 2, "of": 2}
    assert "in common" not in said
    for command in ("plan", "compare"):
        assert "in common" not in printed(run, command, few, more)[1]


# names that training tools leave ------------------------------------------------------------------------------------

LEFT: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile of the PEFT model": lambda key: f"_orig_mod.{key}",
    "torch.compile of each layer": lambda key: re.sub(r"(layers\.\d+)", r"\1._orig_mod", key),
    "FSDP": lambda key: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", f"_fsdp_wrapped_module.{key}"),
    "activation checkpointing": lambda key: key.replace("self_attn", "self_attn._checkpoint_wrapped_module"),
    "FSDP with checkpointing": lambda key: re.sub(
        r"(layers\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", key
    ),
    "DDP around PEFT": lambda key: f"module.{key}",
    "PEFT around DDP": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "Fabric": lambda key: f"_forward_module.{key}",
    "PEFT twice": lambda key: f"base_model.model.{key}",
    "all at once": lambda key: f"_forward_module.module.base_model.model._orig_mod.{key}",
}


@pytest.mark.parametrize("leave", LEFT.values(), ids=list(LEFT))
def test_what_a_training_tool_leaves_in_a_name_is_taken_out(leave: Callable[[str], str], tmp_path: Path) -> None:
    x = make_adapter(0)
    tensors = {leave(key): value for key, value in peft_tensors(x).items()}
    assert tensors.keys().isdisjoint(peft_tensors(x))
    read = read_adapter(write_peft(tmp_path / "a", x, tensors=tensors))
    assert list(read.modules) == list(x.modules)
    assert read.digest == x.digest


IMPOSSIBLE: dict[str, tuple[Callable[[str], str], str]] = {
    "an adapter below": (lambda path: f"{path}.base_layer", "a layer below another adapter"),
    "an adapter's name": (lambda path: f"{path}.default", "an adapter's name inside a module's name"),
    "a module saved whole": (lambda path: f"{path}.modules_to_save", "a whole module"),
    "a layer inside an adapter": (lambda path: f"{path}.lora_A", "a layer inside an adapter"),
    "an empty part": (lambda path: path.replace(".self_attn.", ".."), "an empty part"),
}


@pytest.mark.parametrize(("spoil", "why"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_a_name_that_no_base_can_have_is_refused(spoil: Callable[[str], str], why: str, tmp_path: Path) -> None:
    x = make_adapter(0)
    tensors = {
        f"base_model.model.{spoil(path)}.lora_{half}.weight": getattr(f, half.lower())
        for path, f in x.modules.items()
        for half in "AB"
    }
    folder = write_peft(tmp_path / "a", x, tensors=tensors, target_modules=r".*")
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder)
    assert {projection for projection in SHAPES if any(projection in fault for fault in caught.value.faults)} == {
        *SHAPES
    }
    assert all(why in reason.what and reason.cure for reason in caught.value.reasons)


def test_one_module_under_two_names_of_a_file_is_refused(tmp_path: Path) -> None:
    x = make_adapter(0)
    tensors = peft_tensors(x)
    first = f"base_model.model.{module_path(0, 'q_proj')}.lora_A.weight"
    folder = write_peft(tmp_path / "a", x, tensors={**tensors, f"module.{first}": tensors[first].copy()})
    with pytest.raises(AdapterFormatError, match="the same factor of the same module"):
        read_adapter(folder)


def test_torch_s_own_wrappers_leave_the_names_that_are_taken_out() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compiled = torch.compile(layer, backend="eager")
    assert next(name for name, _ in compiled.named_parameters()).startswith("_orig_mod.")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
    from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

    assert {FSDP_WRAPPED_MODULE, _CHECKPOINT_PREFIX.rstrip(".")} <= {
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
    assert next(name for name, _ in torch.nn.DataParallel(layer).named_parameters()).startswith("module.")
