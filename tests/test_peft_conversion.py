"""What PEFT loads from an adapter it loads from its slot: under names of another version, and beside any module."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from factory import dense, make_adapter, write_peft
from lorashelf import (
    Adapter,
    Factors,
    Modules,
    Shelf,
    merge,
    new_settings,
    plan_add,
    plan_remove,
    read_adapter,
    write_adapter,
)
from lorashelf.lora.targets import joined, targets_of
from renamed_bases import CLASSES, earlier_name, tiny_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # PEFT warns of the modules that have no tensors, here on purpose
]
Base = Callable[[], torch.nn.Module]
TARGETS = {"fuyu": ["query_key_value", "dense"]}
OTHERS = {"fuyu": ["dense", "dense_h_to_4h"]}


def trained(base: torch.nn.Module, folder: Path, seed: int = 1, **options: Any) -> Path:
    """An adapter of the base as PEFT saves it, all its parameters random."""
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def renamed(folder: Path, name: Callable[[str], str], output: Path) -> Path:
    """The adapter with its modules under other names."""
    output.mkdir(parents=True)
    tensors = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        path, half = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB]\.weight)", key).groups()
        tensors[f"base_model.model.{name(path)}.{half}"] = value
    save_file(tensors, output / "adapter_model.safetensors")
    (output / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return output


def loaded(base: torch.nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, folder).eval()


def applied(model: PeftModel) -> dict[str, np.ndarray]:
    """Module path → ΔW of all the modules that PEFT put an adapter on."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            delta = layer.get_delta_weight("default").detach().double().numpy()
            found[path.removeprefix("base_model.model.")] = delta
    return found


def assert_alike(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, rtol=1e-5, atol=1e-5, err_msg=path)


def moving(deltas: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the modules that PEFT found no tensors for."""
    return {path: delta for path, delta in deltas.items() if delta.any()}


def slot_of(shelf: Path, *folders: Path) -> Path:
    """One slot with the adapters folded into it, by way of the disk."""
    made = Shelf.create(shelf, new_settings(1, policy="kmerge"))
    for i, folder in enumerate(folders):
        made.commit(plan_add(made.snapshot(), read_adapter(folder), f"t{i}"))
    snapshot = made.snapshot()
    return snapshot.slot_path(snapshot.manifest.slots[0])


def logits(model: torch.nn.Module) -> torch.Tensor | None:
    """What a text of the model's tokens gives, None where the class takes no text alone."""
    try:
        with torch.no_grad():
            return model(input_ids=torch.arange(8, 20)[None], attention_mask=torch.ones(1, 12).long()).logits
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return None


# bases that transformers renames ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(CLASSES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A class, an adapter of it under the names of before, and another one under those of now."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    first = trained(tiny_model(kind), folder / "first", target_modules=TARGETS.get(kind, ["q_proj", "v_proj"]))
    second = trained(tiny_model(kind), folder / "second", 2, target_modules=OTHERS.get(kind, ["k_proj", "v_proj"]))
    return kind, renamed(first, earlier_name(tiny_model(kind)), folder / "before"), second


def test_what_peft_loads_under_earlier_names_it_loads_from_the_slot(
    family: tuple[str, Path, Path], tmp_path: Path
) -> None:
    kind, before, _ = family
    slot = slot_of(tmp_path / "s", before)
    original, stored = loaded(tiny_model(kind), before), loaded(tiny_model(kind), slot)
    assert_alike(applied(original), applied(stored))
    expected = logits(original)
    if expected is not None:
        torch.testing.assert_close(logits(stored), expected)
        if moving(applied(original)):
            assert not torch.allclose(logits(tiny_model(kind)), expected)


def test_a_slot_of_both_spellings_is_in_peft_what_it_is_of_one(family: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, before, second = family
    both = loaded(tiny_model(kind), slot_of(tmp_path / "s", before, second))
    now = {**dict.fromkeys(applied(loaded(tiny_model(kind), second)))}
    names = dict(zip(map(earlier_name(tiny_model(kind)), now), now, strict=True))
    x, y = read_adapter(before), read_adapter(second)
    late = Adapter(Modules({names.get(path, path): f for path, f in x.modules.items()}), x.base)
    expected = dense(merge([late, y], method="linear"))
    found = applied(both)
    for path in y.modules:  # the names of now, which PEFT finds whatever it does with others
        np.testing.assert_allclose(found[path], expected[path], atol=1e-5, err_msg=path)


# any other base -----------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A layer with attention and an MLP, and experts that bear numbers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q_proj", "v_proj")})
        experts = (torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 8)}) for _ in range(3))
        self.mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 8), "experts": torch.nn.ModuleList(experts)})


class Tower(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))


class Crowded(torch.nn.Module):
    """A base of which every module's path is the ending of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.layers = Tower(), Tower().layers
        self.vision = torch.nn.ModuleDict({"model": Tower(), "layers": Tower().layers})
        self.lm_head = torch.nn.Linear(8, 8)


def crowded() -> torch.nn.Module:
    torch.manual_seed(0)
    return Crowded()


WANTED: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj"]},
    "other names": {"target_modules": ["v_proj", "lm_head"]},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "a pattern": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    "another pattern": {"target_modules": r"(?i)vision\..*Q_proj|lm_head"},
    "a layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers by a name": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "experts by a name": {
        "target_modules": ["up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["experts", "layers"],
    },
    "a path whatever the layer": {
        "target_modules": ["layers.2.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [0],
    },
    "all but a name": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all but a pattern": {"target_modules": r".*_proj", "exclude_modules": r"vision\..*|.*experts.*"},
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=list(WANTED))
def test_peft_adapts_from_a_slot_the_very_modules_of_the_original(wanted: dict[str, Any], tmp_path: Path) -> None:
    original = trained(crowded(), tmp_path / "a", **wanted)
    expected = applied(loaded(crowded(), original))
    assert_alike(expected, applied(loaded(crowded(), slot_of(tmp_path / "s", original))))
    assert 0 < len(expected) < 64


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(WANTED, 2)), ids=str)
def test_peft_adapts_from_a_shared_slot_the_modules_of_either_original(first: str, second: str, tmp_path: Path) -> None:
    folders = [trained(crowded(), tmp_path / name, **WANTED[name]) for name in (first, second)]
    either = set().union(*(applied(loaded(crowded(), folder)) for folder in folders))
    found = applied(loaded(crowded(), slot_of(tmp_path / "s", *folders)))
    merged = dense(merge([read_adapter(folder) for folder in folders], method="linear"))
    assert_alike(merged, found)
    assert found.keys() == either


def test_forty_adapters_of_one_pattern_have_that_pattern(tmp_path: Path) -> None:
    sources = [trained(crowded(), tmp_path / name, **WANTED[name]) for name in ("a pattern", "a layer")]
    x, y = (read_adapter(folder) for folder in sources)
    once = merge([x, y], method="linear")
    again = once
    for each in (x, y) * 20:
        again = merge([again, each], method="linear")
    assert again.config["target_modules"] == once.config["target_modules"]


def test_targets_that_are_gone_with_an_adapter_are_not_written(tmp_path: Path) -> None:
    sources = [trained(crowded(), tmp_path / name, **WANTED[name]) for name in ("names", "other names")]
    slot_of(tmp_path / "s", *sources)
    shelf = Shelf(tmp_path / "s")
    shelf.commit(plan_remove(shelf.snapshot(), "t1", read_adapter(sources[1])))
    slot = shelf.snapshot().slot_path(shelf.snapshot().manifest.slots[0])
    assert json.loads((slot / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    assert_alike(applied(loaded(crowded(), sources[0])), applied(loaded(crowded(), slot)))


@pytest.mark.parametrize("wanted", [None, [], ["nothing"]], ids=str)
def test_an_adapter_without_targets_of_its_own_gets_the_paths_of_its_modules(wanted: Any) -> None:
    x = make_adapter(0)
    assert targets_of({"target_modules": wanted}, list(x.modules))["target_modules"] == list(x.modules)


def test_targets_that_cannot_stand_in_one_pattern_become_paths() -> None:
    paths = ["m.0.q_proj", "m.1.q_proj"]
    several = [({"target_modules": rf"(?P<twice>m)\.{i}\.q_proj"}, [paths[i]]) for i in range(2)]
    assert joined(several)["target_modules"] == paths


def test_every_linear_layer_is_kept_as_such_and_joined_as_names() -> None:
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    everything = ({"target_modules": "all-linear"}, paths)
    assert joined([everything, everything])["target_modules"] == "all-linear"
    assert joined([everything, ({"target_modules": ["q_proj"]}, paths[:1])])["target_modules"] == ["q_proj", "up_proj"]


# ranks and scales that differ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "gemma3", "mllama", "video_llava", "paligemma"])
@pytest.mark.parametrize("differ", ["by projection", "by layer", "by part", "each"])
def test_ranks_and_scales_reach_their_modules_under_either_name(kind: str, differ: str, tmp_path: Path) -> None:
    now = read_adapter(trained(tiny_model(kind), tmp_path / "now", target_modules=["q_proj", "v_proj"]))
    before = earlier_name(tiny_model(kind))
    rng = np.random.default_rng(0)
    made: dict[str, dict[str, Factors]] = {"now": {}, "before": {}}
    for i, (path, f) in enumerate(now.modules.items()):
        layer = int(next(part for part in path.split(".") if part.isdecimal()))
        group = {"by projection": "q_proj" in path, "by layer": layer, "by part": "language" in path, "each": i}[differ]
        rank, scale = 2 + int(group), 0.5 + int(group)
        a, b = rng.standard_normal((rank, f.shape.din)), rng.standard_normal((f.shape.dout, rank))
        factors = Factors(a.astype(np.float32), b.astype(np.float32), scale)
        made["now"][path], made["before"][before(path)] = factors, factors
    expected = dense(Adapter(Modules(made["now"])))
    for spelling, modules in made.items():
        adapter = Adapter(Modules(modules), now.base, "f32", now.config)
        write_adapter(adapter, tmp_path / spelling / differ)
        found = moving(applied(loaded(tiny_model(kind), tmp_path / spelling / differ)))
        assert_alike({path: delta for path, delta in expected.items() if path in found or spelling == "now"}, found)
        assert any("language" in path for path in found), "PEFT finds the language model under either name"


# modules that are renamed, or fused, inside a layer -----------------------------------------------------------------


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).eval()


def detr() -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 4}
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, **sizes, **layers)
    config.backbone_config = backbone
    return DetrForObjectDetection(config).eval()


@pytest.mark.parametrize(
    ("base", "targets"),
    [(vit, r".*\.attention\.(query|value|[qv]_proj)"), (detr, ["fc1", "fc2"]), (detr, ["q_proj", "fc1"])],
    ids=["vit", "detr", "detr attention"],
)
def test_a_module_renamed_inside_its_layer_is_found_by_the_name_that_it_kept(
    base: Base, targets: list[str] | str, tmp_path: Path
) -> None:
    now = trained(base(), tmp_path / "now", target_modules=targets)
    original = renamed(now, earlier_name(base()), tmp_path / "before")
    expected = applied(loaded(base(), original))
    assert_alike(expected, applied(loaded(base(), slot_of(tmp_path / "s", original))))


EXPERTS: dict[str, tuple[Base, str, list[str]]] = {}
"""Model type → a base, how an expert's layer was called before the experts were fused, and the targets of then."""


def moe(kind: Any, config: Any, **options: Any) -> Base:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 1}

    def made() -> torch.nn.Module:
        torch.manual_seed(0)
        return kind(config(**sizes, **heads, **options)).eval()

    return made


EXPERTS["mixtral"] = (
    moe(MixtralForCausalLM, MixtralConfig, num_local_experts=2),
    "model.layers.0.block_sparse_moe.experts.{}.{}",
    ["w1", "w2", "w3"],
)
EXPERTS["qwen3_moe"] = (
    moe(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=2, moe_intermediate_size=24, decoder_sparse_step=1, head_dim=8
    ),
    "model.layers.0.mlp.experts.{}.{}",
    ["gate_proj", "down_proj", "up_proj"],
)


@pytest.mark.parametrize("kind", list(EXPERTS))
def test_an_adapter_of_single_experts_is_fused_from_the_slot_as_from_the_original(kind: str, tmp_path: Path) -> None:
    base, spelled, targets = EXPERTS[kind]
    rng = np.random.default_rng(0)

    def factor(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {}
    for expert, name in itertools.product(range(2), targets):
        dout, din = (16, 24) if name in ("w2", "down_proj") else (24, 16)
        key = f"base_model.model.{spelled.format(expert, name)}.lora_"
        tensors |= {f"{key}A.weight": factor(4, din), f"{key}B.weight": factor(dout, 4)}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors |= {f"{key}A.weight": factor(4, 16), f"{key}B.weight": factor(16, 4)}
    original = write_peft(
        tmp_path / "a", tensors=tensors, r=4, lora_alpha=8, target_modules=[*targets, "q_proj"], lora_dropout=0.0
    )
    first, stored = (loaded(base(), folder) for folder in (original, slot_of(tmp_path / "s", original)))
    expected = {name: value for name, value in first.state_dict().items() if "lora_" in name}
    found = {name: value for name, value in stored.state_dict().items() if "lora_" in name}
    assert found.keys() == expected.keys()
    assert sum(bool(value.any()) for name, value in expected.items() if "lora_B" in name) == 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(logits(stored), logits(first))
