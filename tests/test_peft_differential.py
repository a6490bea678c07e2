"""Against PEFT itself: what it saves we read, what we write it loads, what it merges we merge alike, or say why not."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from factory import SHAPES, dense, make_adapter
from lorashelf import METHODS, Adapter, Factors, Modules, combine, compress, merge, norm, read_adapter, write_adapter
from lorashelf.errors import AdapterFormatError, UsageError
from lorashelf.formats.peft_config import HARMLESS, REFUSED, UNDERSTOOD
from lorashelf.formats.written_config import written_config
from lorashelf.lora.adapter import WIDTHS, numpy_dtype
from lorashelf.lora.targets import TARGET_FIELDS
from lorashelf.merging import unmerge
from lorashelf.merging.driver import _masks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = 1e-5
PAIR = ("first", "second")
DENSITY = 0.5
Deltas = dict[str, np.ndarray]


def llama() -> torch.nn.Module:
    """Two layers of width 32, random; q_proj is 32 × 32, k_proj and v_proj 16 × 32, the MLP 48 wide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()


def gpt2() -> torch.nn.Module:
    """Its linear layers are Conv1D, whose weight is the transpose of a Linear's."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def lora(targets: Sequence[str] | str = ("q_proj", "v_proj"), **options: Any) -> LoraConfig:
    chosen = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": chosen, "task_type": "CAUSAL_LM", **options})


def trained(configs: dict[str, LoraConfig], base: Callable[[], torch.nn.Module] = llama) -> PeftModel:
    """A PEFT model with these adapters, all their parameters random."""
    names = list(configs)
    model = get_peft_model(base(), configs[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.data = parameter.data.abs() + 0.5
    return model


def saved(model: PeftModel, folder: Path, name: str = "default") -> Path:
    model.save_pretrained(folder, selected_adapters=[name])
    return folder if name == "default" else folder / name


def read_all(model: PeftModel, folder: Path, names: Sequence[str]) -> list[Adapter]:
    return [read_adapter(saved(model, folder, name)) for name in names]


def adapted_layers(model: PeftModel, name: str) -> Iterator[tuple[str, Any]]:
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            yield path.removeprefix("base_model.model."), layer


def peft_deltas(model: PeftModel, name: str = "default") -> Deltas:
    """PEFT's own get_delta_weight of every module, as (dout, din)."""
    deltas = {}
    for path, layer in adapted_layers(model, name):
        delta = layer.get_delta_weight(name).detach().double().numpy()
        deltas[path] = delta.T if layer.fan_in_fan_out else delta
    return deltas


def assert_deltas(expected: Deltas, found: Deltas, tolerance: float = TOLERANCE) -> None:
    """The same modules, and every ΔW equal relative to the norm of the whole."""
    assert found.keys() == expected.keys()
    total = math.sqrt(sum(float(np.sum(d**2)) for d in expected.values())) + 1e-30
    for path, delta in expected.items():
        assert found[path].shape == delta.shape
        error = np.linalg.norm(found[path] - delta) / total
        assert error <= tolerance, f"{path}: relative difference {error:.2e}"


def times(deltas: Deltas, factor: float) -> Deltas:
    return {path: factor * delta for path, delta in deltas.items()}


# what PEFT saves, read ----------------------------------------------------------------------------------------------

CONFIGS: dict[str, LoraConfig] = {
    "plain": lora(),
    "one projection": lora(["o_proj"], lora_alpha=1),
    "mlp too": lora(["q_proj", "k_proj", "gate_proj", "down_proj"], r=3, lora_alpha=5),
    "a pattern of targets": lora(r"model\.layers\.1\.self_attn\.(q|o)_proj"),
    "all linear": lora("all-linear", r=2),
    "one layer": lora(layers_to_transform=[1]),
    "one layer, by a pattern with a group": lora(layers_to_transform=[1], layers_pattern="(layers|h)"),
    "one layer, whatever it is called": lora(layers_to_transform=[1], layers_pattern=""),
    "a module left out": lora(exclude_modules=["model.layers.0.self_attn.q_proj"]),
    "ranks": lora(rank_pattern={"q_proj": 2, "model.layers.1.self_attn.v_proj": 6}),
    "alphas": lora(alpha_pattern={"v_proj": 1, "layers.0.self_attn.q_proj": 64}),
    "ranks and alphas": lora(rank_pattern={r".*\.0\..*": 6}, alpha_pattern={"self_attn.q_proj": 3}),
    "the first key that fits": lora(
        rank_pattern={"layers.0.self_attn.q_proj": 6, "self_attn.q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 5, "q_proj": 11},
    ),
    "rslora": lora(use_rslora=True),
    "rslora of ranks and alphas": lora(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"v_proj": 3}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_an_adapter_that_peft_saves_reads_as_the_same_update(config: LoraConfig, tmp_path: Path) -> None:
    model = trained({"default": config})
    adapter = read_adapter(saved(model, tmp_path))
    expected = peft_deltas(model)
    assert_deltas(expected, dense(adapter), 1e-6)
    assert {path: layer.scaling["default"] for path, layer in adapted_layers(model, "default")} == pytest.approx(
        dict(adapter.modules.scales)
    )
    with pytest.raises(AssertionError):
        assert_deltas(times(expected, 1.001), dense(adapter), 1e-6)


@pytest.mark.parametrize(
    "config",
    [
        lora(["c_attn"], fan_in_fan_out=True),
        lora(["c_attn", "c_proj"], fan_in_fan_out=True, use_rslora=True, rank_pattern={"attn.c_proj": 2}),
    ],
    ids=["attention", "patterns"],
)
def test_an_adapter_of_transposed_layers_reads_writes_and_loads_as_the_same_update(
    config: LoraConfig, tmp_path: Path
) -> None:
    model = trained({"default": config}, gpt2)
    adapter = read_adapter(saved(model, tmp_path / "saved"))
    assert_deltas(peft_deltas(model), dense(adapter), 1e-6)
    write_adapter(adapter, tmp_path / "written")
    assert_deltas(peft_deltas(model), peft_deltas(loaded(tmp_path / "written", gpt2)), 1e-6)
    layer = dict(adapted_layers(model, "default"))["transformer.h.0.attn.c_attn"]
    assert layer.get_delta_weight("default").shape == (32, 96)
    assert adapter.shapes["transformer.h.0.attn.c_attn"][::2] == (96, 32)


@pytest.mark.parametrize(("kind", "dtype"), [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_an_adapter_that_peft_saves_in_half_precision_reads_value_by_value(
    kind: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    model = trained({"default": lora(r=3)})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(kind)
    adapter = read_adapter(saved(model, tmp_path))
    assert adapter.dtype == dtype
    for path, layer in adapted_layers(model, "default"):
        f = adapter.modules[path]
        np.testing.assert_array_equal(f.a, layer.lora_A["default"].weight.detach().float().numpy())
        np.testing.assert_array_equal(f.b, layer.lora_B["default"].weight.detach().float().numpy())


# what we write, loaded by PEFT --------------------------------------------------------------------------------------


def loaded(folder: Path, base: Callable[[], torch.nn.Module] = llama) -> PeftModel:
    """PEFT's model of a folder; a warning about missing keys is an error, and so is a key of the file left over."""
    model = PeftModel.from_pretrained(base(), folder)
    result = model.load_adapter(folder, "again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


def tiny(seed: int, **options: Any) -> Adapter:
    """An adapter for `llama`, not made by PEFT."""
    plain = make_adapter(seed, base="", **options)
    rng = np.random.default_rng(seed)
    sizes = {"q_proj": (32, 32), "v_proj": (16, 32)}
    assert sizes.keys() == SHAPES.keys()
    modules = {}
    for path, f in plain.modules.items():
        dout, din = sizes[path.rpartition(".")[2]]
        a = rng.standard_normal((f.shape.rank, din)).astype(np.float32)
        modules[path] = Factors(a, rng.standard_normal((dout, f.shape.rank)).astype(np.float32), f.scale)
    return replace(plain, modules=Modules(modules), config={"task_type": "CAUSAL_LM"})


def rounded(x: Adapter, dtype: str) -> Deltas:
    """ΔW of the factors rounded to a dtype."""

    def stored(side: np.ndarray) -> np.ndarray:
        return side.astype(numpy_dtype(dtype)).astype(np.float32)

    return dense(x.with_factors({p: Factors(stored(f.a), stored(f.b), f.scale) for p, f in x.modules.items()}))


WRITTEN: dict[str, Adapter] = {
    "one rank and scale": tiny(0),
    "ranks and scales by projection": tiny(1, ranks={"q_proj": 2}, scales={"v_proj": 0.3}),
    "an odd scale": tiny(2, rank=3, scale=math.pi),
    "a single module": tiny(3, layers=1, projections=("v_proj",)),
    "a negative scale": merge([tiny(4)], [-0.5], method="linear"),
    "ranks of several": combine([tiny(5, rank=3), tiny(6, layers=1, projections=("q_proj",))], [0.5, -0.25]),
}


@pytest.mark.parametrize("dtype", list(WIDTHS))
@pytest.mark.parametrize("adapter", WRITTEN.values(), ids=list(WRITTEN))
def test_an_adapter_that_we_write_loads_in_peft_as_the_same_update(
    adapter: Adapter, dtype: str, tmp_path: Path
) -> None:
    write_adapter(replace(adapter, dtype=dtype), tmp_path / "a")
    model = loaded(tmp_path / "a")
    for name in ("default", "again"):
        assert_deltas(rounded(adapter, dtype), peft_deltas(model, name), 1e-6)
    with pytest.raises(AssertionError):
        assert_deltas(rounded(adapter, "bf16" if dtype != "bf16" else "f16"), peft_deltas(model), 1e-6)


SEGMENTS = st.lists(st.sampled_from(["a", "b", "a_b", "0", "1", "model", "vision_model"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.dictionaries(SEGMENTS, st.tuples(st.integers(1, 4), st.sampled_from([1.0, 2.0, 0.3, -1.0])), min_size=1))
@example({"model.model": (1, 2.0), "model.model.model": (1, 1.0)})
@example({"a.model.a": (1, 2.0), "a.model.model.a": (1, 1.0)})
def test_written_patterns_resolve_in_peft_to_every_module_s_own_rank_and_scale(
    modules: dict[str, tuple[int, float]],
) -> None:
    """Also where PEFT's patterns match more than one path: the end of another, or a dot that stands for any letter."""
    factors = {
        path: Factors(np.ones((r, 3), np.float32), np.ones((2, r), np.float32), s) for path, (r, s) in modules.items()
    }
    config = written_config(Adapter(Modules(factors)))
    for path, (rank, scale) in modules.items():
        r, alpha = (
            config[pattern].get(get_pattern_key(config[pattern], path), config[field])
            for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
        )
        assert (r, alpha / r) == (rank, pytest.approx(scale, rel=1e-15))


def test_a_key_that_peft_misses_or_does_not_know_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "a"
    write_adapter(tiny(0), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    first, *rest = sorted(tensors)
    save_file({name: tensors[name] for name in rest}, folder / "adapter_model.safetensors")
    with pytest.raises(UserWarning, match="missing adapter keys"):
        loaded(folder)
    stray = {first.replace("layers.0", "layers.7"): tensors[first].clone()}
    save_file({**tensors, **stray}, folder / "adapter_model.safetensors")
    with pytest.raises(AssertionError):
        loaded(folder)


def test_the_fields_of_a_config_that_do_not_concern_ranks_and_scales_come_back(tmp_path: Path) -> None:
    config = lora(lora_dropout=0.25, rank_pattern={"q_proj": 2}, use_rslora=True, exclude_modules=["k_proj"])
    before = saved(trained({"default": config}), tmp_path / "before")
    document = json.loads((before / "adapter_config.json").read_text()) | {"of_a_later_peft": {}}
    (before / "adapter_config.json").write_text(json.dumps(document))
    write_adapter(read_adapter(before), tmp_path / "after")
    after = json.loads((tmp_path / "after" / "adapter_config.json").read_text())
    resolved = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", *TARGET_FIELDS}
    assert {k: v for k, v in after.items() if k not in resolved} == {
        k: v for k, v in document.items() if k not in resolved
    }
    with pytest.warns(UserWarning, match="of_a_later_peft"):
        model = PeftModel.from_pretrained(llama(), tmp_path / "after")
    assert_deltas(dense(read_adapter(before)), peft_deltas(model), 1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_merge_of_different_modules_and_ranks_loads_with_exactly_those_modules(method: str, tmp_path: Path) -> None:
    names = {
        "first": lora(["q_proj"], r=2),
        "second": lora(["v_proj", "o_proj"], r=5),
        "third": lora(layers_to_transform=[0]),
    }
    xs = read_all(trained(names), tmp_path / "saved", list(names))
    merged = merge(xs, method=method)
    write_adapter(merged, tmp_path / "merged")
    model = loaded(tmp_path / "merged")
    assert peft_deltas(model).keys() == set().union(*(x.shapes for x in xs))
    assert_deltas(dense(merged), peft_deltas(model), 1e-6)


def test_what_is_left_after_one_is_taken_out_loads_with_the_modules_of_the_others(tmp_path: Path) -> None:
    xs = read_all(trained({"first": lora(), "second": lora(["q_proj"])}), tmp_path / "saved", PAIR)
    rest = unmerge(merge(xs, method="linear"), xs[0], [norm(xs[1])], method="linear")
    write_adapter(rest.adapter, tmp_path / "rest")
    assert_deltas(dense(xs[1]), peft_deltas(loaded(tmp_path / "rest")))


def one_alpha_deltas(folder: Path) -> Deltas:
    """Every ΔW for a reader of `lora_alpha` and the tensors alone, as llama.cpp's converter is."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    modules = read_adapter(folder).modules.items()
    return {path: alpha / len(f.a) * (f.b.astype(np.float64) @ f.a) for path, f in modules}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_merged_has_one_alpha_for_all_ranks(method: str, tmp_path: Path) -> None:
    configs = {
        "first": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        "second": lora(rank_pattern={"q_proj": 3}, use_rslora=True),
        "third": lora(["q_proj", "o_proj"], r=1),
    }
    xs = read_all(trained(configs), tmp_path / "saved", list(configs))
    held = {"merged": merge(xs, method=method)}
    if METHODS[method].mean_power is not None:
        held["rest"] = unmerge(held["merged"], xs[2], [norm(x) for x in xs[:2]], method=method).adapter
        assert len({shape.rank for shape in held["rest"].shapes.values()}) > 1
    for name, adapter in held.items():
        write_adapter(adapter, tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["alpha_pattern"] == {}
        assert_deltas(dense(adapter), one_alpha_deltas(tmp_path / name))
        assert_deltas(dense(adapter), peft_deltas(loaded(tmp_path / name)))


def test_an_adapter_merged_with_itself_gets_one_alpha(tmp_path: Path) -> None:
    x = read_adapter(saved(trained({"default": CONFIGS["rslora of ranks and alphas"]}), tmp_path / "saved"))
    write_adapter(x, tmp_path / "alone")
    with pytest.raises(AssertionError):
        assert_deltas(dense(x), one_alpha_deltas(tmp_path / "alone"))
    write_adapter(merge([x, x], method="factor_mean"), tmp_path / "twice")
    assert_deltas(dense(x), one_alpha_deltas(tmp_path / "twice"))


def test_an_init_that_refuses_some_ranks_is_not_written_back(tmp_path: Path) -> None:
    x = read_adapter(saved(trained({"default": lora(init_lora_weights="orthogonal")}), tmp_path / "saved"))
    small, _ = compress(x, 3)
    write_adapter(small, tmp_path / "small")
    assert_deltas(dense(small), peft_deltas(loaded(tmp_path / "small")))


# what PEFT merges, merged -------------------------------------------------------------------------------------------

WEIGHTS = [(0.7, 0.3), (1, 1), (1, -0.5)]
SIGNED = {name: ("total", "frequency") for name, m in METHODS.items() if "majority_sign_method" in m.parameters}
THEIRS = [
    (name, {"density": DENSITY} | ({"majority_sign_method": sign} if sign else {}))
    if "density" in method.parameters
    else (name, {})
    for name, method in METHODS.items()
    if name != "factor_mean"
    and method.space not in ("joint", "subspace")  # PEFT has neither these nor K-Merge's equation
    for sign in SIGNED.get(name, (None,))
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, list[Adapter]]:
    """Adapters a and b of one rank, of different alphas and modules, in PEFT and read by us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = trained({"first": lora(["q_proj", "v_proj"]), "second": lora(["q_proj", "o_proj"], lora_alpha=2)})
        return model, read_all(model, tmp_path_factory.mktemp("pair"), PAIR)


@pytest.fixture
def our_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes PEFT's torch.bernoulli return, in PEFT's order of calls, the masks that we draw."""

    def feed(model: PeftModel, xs: list[Adapter], method: str, seed: int = 0) -> None:
        sides = "W" if METHODS[method].space == "delta" else "AB"
        draws = []
        for path in dict.fromkeys(path for name in PAIR for path, _ in adapted_layers(model, name)):
            present = [i for i, x in enumerate(xs) if path in x.shapes]
            masks = _masks(xs, present, path, seed)
            draws += [((path, side, i), masks[side](i)) for side in sides for i in range(len(present))]
        order = {p: k for k, p in enumerate(p.removeprefix("base_model.model.") for p, _ in model.named_modules())}
        draws.sort(key=lambda draw: order[draw[0][0]])
        queue = iter([generator for _, generator in draws])

        def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
            drawn = next(queue).random(tuple(probabilities.shape), dtype=np.float32)
            return torch.from_numpy(drawn) < probabilities

        monkeypatch.setattr(torch, "bernoulli", bernoulli)

    return feed


def merged_by_peft(
    model: PeftModel, names: Sequence[str], weights: Sequence[float], method: str, **params: Any
) -> Deltas:
    """ΔW of PEFT's own merge; the adapter is taken off the model again."""
    model.add_weighted_adapter(list(names), list(weights), "merged", method, **params)
    try:
        return peft_deltas(model, "merged")
    finally:
        model.delete_adapter("merged")


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("method", "params"), THEIRS, ids=[f"{n}-{p.get('majority_sign_method', '')}" for n, p in THEIRS]
)
def test_a_merge_equals_peft_s(
    method: str,
    params: dict[str, Any],
    weights: tuple[float, float],
    pair: tuple[PeftModel, list[Adapter]],
    our_masks: Callable[..., None],
) -> None:
    model, xs = pair
    if METHODS[method].random:
        our_masks(model, xs, method)
    expected = merged_by_peft(model, PAIR, weights, method, **params)
    assert_deltas(expected, dense(merge(xs, weights, method=method, **params)))
    with pytest.raises(AssertionError):
        assert_deltas(expected, dense(merge(xs, [weights[0], weights[1] + 0.01], method=method, **params)))


@pytest.mark.parametrize("method", ["svd", "cat", "ties_svd", "magnitude_prune_svd"])
def test_a_merge_of_unequal_ranks_equals_peft_s_where_peft_can(method: str, tmp_path: Path) -> None:
    model = trained({"first": lora(r=2), "second": lora(r=6, rank_pattern={"v_proj": 3})})
    xs = read_all(model, tmp_path, PAIR)
    params = {"density": DENSITY} if "density" in METHODS[method].parameters else {}
    expected = merged_by_peft(
        model, PAIR, (0.7, -0.3), method, **({"svd_rank": 6} if method != "cat" else {}), **params
    )
    # PEFT takes one rank for all modules, we each module's own unless a rank is given
    assert_deltas(expected, dense(merge(xs, (0.7, -0.3), method=method, rank=6 if method != "cat" else None, **params)))


@pytest.mark.parametrize("method", ["linear", "svd", "cat", "ties", "ties_svd", "magnitude_prune_svd"])
def test_a_merge_of_transposed_layers_equals_peft_s(method: str, tmp_path: Path) -> None:
    config = {"fan_in_fan_out": True}
    model = trained(
        {"first": lora(["c_attn"], **config), "second": lora(["c_attn", "c_proj"], lora_alpha=3, **config)}, gpt2
    )
    xs = read_all(model, tmp_path, PAIR)
    params = {"density": DENSITY} if "density" in METHODS[method].parameters else {}
    expected = merged_by_peft(model, PAIR, (0.7, -0.3), method, **params)
    assert_deltas(expected, dense(merge(xs, (0.7, -0.3), method=method, **params)))


def test_another_mask_is_seen(pair: tuple[PeftModel, list[Adapter]], our_masks: Callable[..., None]) -> None:
    model, xs = pair
    our_masks(model, xs, "dare_linear", seed=1)
    expected = merged_by_peft(model, PAIR, (1, 1), "dare_linear", density=DENSITY)
    assert_deltas(expected, dense(merge(xs, method="dare_linear", seed=1)))
    with pytest.raises(AssertionError):
        assert_deltas(expected, dense(merge(xs, method="dare_linear", seed=0)))


# known disagreements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)], ids=str)
def test_peft_s_merge_of_rslora_adapters_is_too_strong(method: str, flags: tuple[bool, bool], tmp_path: Path) -> None:
    """PEFT writes r = lora_alpha = R into a copy of the first adapter's config, and so `use_rslora` stays what it was
    there: the merged ΔW is multiplied by R / √R = √R, depending on which adapter came first. We resolve every scale and
    write `use_rslora: false`.
    """
    model = trained({name: lora(use_rslora=flag) for name, flag in zip(PAIR, flags, strict=True)})
    xs = read_all(model, tmp_path, PAIR)
    ours = dense(merge(xs, (0.7, 0.3), method=method))
    rank = 8 if method == "cat" else 4
    assert_deltas(times(ours, math.sqrt(rank) if flags[0] else 1.0), merged_by_peft(model, PAIR, (0.7, 0.3), method))
    if method == "cat":
        exact = {path: 0.7 * dense(xs[0])[path] + 0.3 * dense(xs[1])[path] for path in ours}
        assert_deltas(exact, ours)


def test_peft_refuses_unequal_ranks_in_linear_where_we_pad(tmp_path: Path) -> None:
    """PEFT stacks the factors, so ranks must be equal; a missing row of A and column of B is zero, so we pad."""
    model = trained({"first": lora(r=2), "second": lora(r=5)})
    with pytest.raises(ValueError, match="same r value"):
        merged_by_peft(model, PAIR, (0.5, 0.5), "linear")
    xs = read_all(model, tmp_path, PAIR)
    padded = []
    for x in xs:
        pads = {p: 5 - f.shape.rank for p, f in x.modules.items()}
        padded.append(
            x.with_factors(
                {p: Factors(np.pad(f.a, ((0, pads[p]), (0, 0))), np.pad(f.b, ((0, 0), (0, pads[p]))), f.scale)
                 for p, f in x.modules.items()}
            )
        )  # fmt: skip
    for folder, x in zip(PAIR, padded, strict=True):
        write_adapter(x, tmp_path / "padded" / folder)
    of_one_rank = loaded(tmp_path / "padded" / "first")
    of_one_rank.load_adapter(tmp_path / "padded" / "second", "second")
    expected = merged_by_peft(of_one_rank, ["default", "second"], (0.5, 0.5), "linear")
    assert_deltas(expected, dense(merge(xs, method="linear")))


def test_peft_cannot_reload_what_it_merged_under_a_rank_pattern(tmp_path: Path) -> None:
    """PEFT merges adapters of the same rank_pattern and writes `rank_pattern: {}` beside tensors of other ranks
    (also where ΔW is right in memory); we write the pattern that the tensors have.
    """
    config = {"rank_pattern": {"v_proj": 2}}
    model = trained({"first": lora(**config), "second": lora(lora_alpha=3, **config)})
    xs = read_all(model, tmp_path, PAIR)
    model.add_weighted_adapter(list(PAIR), [0.5, 0.5], "merged", "linear")
    in_memory = peft_deltas(model, "merged")
    theirs = saved(model, tmp_path, "merged")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), theirs)
    with pytest.raises(AdapterFormatError, match="the config gives rank 4, the tensors have 2"):
        read_adapter(theirs)
    write_adapter(merge(xs, method="linear"), tmp_path / "ours")
    assert_deltas(in_memory, peft_deltas(loaded(tmp_path / "ours")))


def test_peft_drops_dora_magnitudes_silently_where_we_refuse(tmp_path: Path) -> None:
    """DoRA's ΔW is not s B A. PEFT's merge of one DoRA adapter with weight 1 is another function, without a word."""
    model = trained({"first": lora(use_dora=True)})
    tokens = torch.arange(8)[None]
    model.set_adapter("first")
    alone = model(tokens).logits
    model.add_weighted_adapter(["first"], [1.0], "merged", "linear")
    model.set_adapter("merged")
    assert (model(tokens).logits - alone).norm() > 0.05 * alone.norm()
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(saved(model, tmp_path, "first"))
    assert any("use_dora is set" in fault for fault in caught.value.faults)
    magnitudes = [fault for fault in caught.value.faults if "a DoRA magnitude" in fault]
    assert len(magnitudes) == 2
    assert all("layers 0-1" in fault for fault in magnitudes)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"lora_bias": True, "init_lora_weights": True}, "lora_bias is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights is 'pissa_niter_2'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "a factor of an embedding"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie_word_embeddings", "ignore:.*bias")
def test_what_is_more_than_s_b_a_is_refused_as_peft_saves_it(
    options: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    model = trained({"default": lora(**{"target_modules": ["q_proj"], **options})})
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(saved(model, tmp_path))
    assert any(fault in each for each in caught.value.faults), caught.value.faults


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_peft_gives_nan_at_density_0_where_we_give_zeros(method: str, pair: tuple[PeftModel, list[Adapter]]) -> None:
    """PEFT divides what is left by the density."""
    model, xs = pair
    theirs = merged_by_peft(model, PAIR, (1, 1), method, density=0.0)
    assert all(np.isnan(delta).all() for delta in theirs.values())
    assert not any(delta.any() for delta in dense(merge(xs, method=method, density=0.0)).values())


def test_peft_drops_adapters_that_have_no_weight_where_we_refuse(tmp_path: Path) -> None:
    """PEFT zips adapters and weights, so the longer of the two loses its end."""
    model = trained({"first": lora(), "second": lora()})
    xs = read_all(model, tmp_path, PAIR)
    assert_deltas(dense(xs[0]), merged_by_peft(model, PAIR, (1.0,), "linear"))
    with pytest.raises(UsageError, match="1 weight for 2 adapters"):
        merge(xs, (1.0,), method="linear")


def test_patterns_whose_order_peft_s_own_file_loses_are_read_as_peft_reads_them_again(tmp_path: Path) -> None:
    """The first pattern that fits a module counts, but PEFT writes its JSON with sorted keys. What was trained under
    another order comes back with other alphas; with other ranks it comes back as an error, here as there.
    """
    keys = ("self_attn.q_proj", "layers.0.self_attn.q_proj")
    model = trained({"default": lora(alpha_pattern=dict.fromkeys(keys, 5) | {keys[0]: 50})})
    adapter = read_adapter(saved(model, tmp_path / "alphas"))
    assert_deltas(peft_deltas(loaded(tmp_path / "alphas")), dense(adapter))
    with pytest.raises(AssertionError):
        assert_deltas(peft_deltas(model), dense(adapter))
    saved(trained({"default": lora(rank_pattern={keys[0]: 2, keys[1]: 6})}), tmp_path / "ranks")
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded(tmp_path / "ranks")
    with pytest.raises(AdapterFormatError, match="the config gives rank 6, the tensors have 2"):
        read_adapter(tmp_path / "ranks")


# fields by which PEFT makes another function of an adapter -----------------------------------------------------------

FIELDS = list(REFUSED)
EMPTY: list[Any] = [None, False, [], {}]


def test_every_field_of_peft_is_understood_or_harmless_or_refused() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    classes = (set(UNDERSTOOD), set(HARMLESS), set(REFUSED))
    assert fields - set().union(*classes) == set()
    assert sum(map(len, classes)) == len(set().union(*classes))
    assert len(fields) >= 42


HARMLESS_VALUES: dict[str, Any] = {
    "peft_version": "99.0",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "task_type": "CAUSAL_LM",
    "inference_mode": False,
    "lora_dropout": 0.3,
    "loftq_config": {"loftq_bits": 4},
    "qalora_group_size": 32,
    "megatron_core": "megatron.other",
    "ensure_weight_tying": True,
    "merge_weights": True,
    "lora_dtype": "float16",
    "lorap_lr_ratio": 16.0,
    "lorap_emb_lr": 1e-6,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT names what it ignores
@pytest.mark.parametrize("field", HARMLESS_VALUES)
def test_a_harmless_field_changes_nothing_in_peft(field: str, tmp_path: Path) -> None:
    trained({"default": lora()}).save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    plain = peft_deltas(loaded(tmp_path / "x"))
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({**config, field: HARMLESS_VALUES[field]}))
    assert field in HARMLESS
    assert_deltas(peft_deltas(loaded(tmp_path / "x")), plain)
    assert_deltas(plain, dense(read_adapter(tmp_path / "x")))


@pytest.mark.parametrize("value", EMPTY, ids=str)
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_off_here_where_it_is_off_in_peft(field: str, value: Any, tmp_path: Path) -> None:
    model = trained({"default": lora()})
    model.save_pretrained(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    try:
        peft = loaded(tmp_path / "x")
        modules = list(peft.modules())
        variants = [module.lora_variant for module in modules if isinstance(module, LoraLayer)]
        plain = not any(variants) and not any(isinstance(module, AuxiliaryTrainingWrapper) for module in modules)
    except (TypeError, ValueError, AttributeError, KeyError, UserWarning):  # such a file PEFT does not load
        plain = False
    if plain:
        assert_deltas(peft_deltas(peft), dense(read_adapter(tmp_path / "x")))
    else:
        with pytest.raises(AdapterFormatError, match=f"{field} is set"):
            read_adapter(tmp_path / "x")


@pytest.mark.parametrize(
    "options",
    [
        {"velora_config": {"num_groups": 4}},
        {"velora_config": {}},
        {"monteclora_config": {"num_samples": 2}},
        {"init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_a_variant_of_training_is_read_as_peft_evaluates_it(options: dict[str, Any], tmp_path: Path) -> None:
    model = trained({"default": lora(**options)}).eval()
    model.save_pretrained(tmp_path / "x")
    read = read_adapter(tmp_path / "x")
    write_adapter(replace(read, dtype="f32"), tmp_path / "y")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, bare = model(ids).logits, llama()(ids).logits
        found = loaded(tmp_path / "y").eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-2)
    variant = next(iter(options))
    kept_for_training = [notice for notice in read.notices if notice.startswith(variant)]
    assert len(kept_for_training) == (variant != "init_lora_weights")
