"""The format mlx: one rank and one scale, factors transposed, and mlx-lm computing what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factory import make_adapter
from llama_model import tiny
from lorashelf import (
    Adapter,
    BaseId,
    Factors,
    Modules,
    Shelf,
    attach,
    base_folder,
    export_shelf,
    plan_add,
    read_adapter,
)
from lorashelf.errors import ModelError, NotExportable
from lorashelf.lora.algebra import relative_error
from lorashelf.lora.folding import folded, uniform

needs_mlx = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
)  # mlx-lm 0.32.2 misreads what transformers 5 saves of others
ZOO = Path(__file__).parent.parent / "examples" / "zoo"
NewShelf = Callable[..., Shelf]


def alone(shelf: Shelf, adapter: Adapter) -> Shelf:
    shelf.commit(plan_add(shelf.snapshot(), adapter, "task"))
    return shelf


def on(model: Any, *, mixed: bool = True) -> Adapter:
    """A random adapter of every linear layer of a model, with ranks and scales that differ if `mixed`."""
    import torch

    rng, modules = np.random.default_rng(1), {}
    for i, (path, layer) in enumerate(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and not (path == "lm_head" and model.config.tie_word_embeddings):
            rank, scale = (2 + i % 3, 1.0 + i % 4) if mixed else (4, 1.7)
            a = 0.15 * rng.standard_normal((rank, layer.in_features), dtype=np.float32)
            b = 0.15 * rng.standard_normal((layer.out_features, rank), dtype=np.float32)
            modules[path] = Factors(a, b, scale)
    return Adapter(Modules(modules), BaseId("acme/tiny"))


def logits(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([ids])).logits[0].numpy())


def mlx_logits(folder: Path, ids: list[int], adapter: Path | None = None) -> np.ndarray:
    """What mlx-lm's own loader makes of a base's folder and an adapter's, in float32."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    saved = json.loads((folder / "config.json").read_text())
    rope = saved.get("rope_parameters", {})  # where transformers 5 has rope_theta; mlx-lm 0.32.2 looks beside it
    model, _ = load_model(folder, model_config={name: rope[name] for name in ("rope_theta",) if name in rope})
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array([ids]))[0])


@needs_mlx
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "one scale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlx_computes_what_transformers_computes(
    tmp_path: Path, new_shelf: NewShelf, one_thread: None, architecture: str, mixed: bool
) -> None:
    import torch

    model = tiny(architecture)
    adapter, base = on(model, mixed=mixed), tmp_path / "base"
    model.save_pretrained(base)
    shelf = alone(new_shelf(1), adapter)
    export_shelf(shelf.snapshot(), tmp_path / "out", "mlx", {"base": str(base)})
    ids = [int(i) for i in np.random.default_rng(3).integers(5, 260, 40)]
    bare, apart = logits(model, ids), np.abs(mlx_logits(base, ids) - logits(model, ids)).max()
    with torch.inference_mode():
        for path, f in adapter.modules.items():
            model.get_submodule(path).weight += torch.from_numpy(f.delta())
    wanted, found = logits(model, ids), mlx_logits(base, ids, tmp_path / "out" / "slot-0")
    assert np.abs(wanted - bare).max() > 1  # the adapter matters
    assert apart < 2e-5
    assert np.abs(found - wanted).max() < 3 * apart + 1e-5


@needs_mlx
def test_a_wrong_scale_is_noticed(
    tmp_path: Path, new_shelf: NewShelf, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above fails if the scales are not folded."""
    monkeypatch.setattr("lorashelf.lora.folding.folded", lambda f, scale: Factors(f.a, f.b, scale))
    with pytest.raises(NotExportable, match="ΔW as read back differs"):
        test_mlx_computes_what_transformers_computes(tmp_path, new_shelf, one_thread, "llama", True)


@needs_mlx
def test_a_base_is_checked_before_anything_is_written(tmp_path: Path, new_shelf: NewShelf) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    fits = on(model)
    a, b = np.ones((1, 64), "f4"), np.ones((64, 1), "f4")
    odd = {"model.layers.0.self_attn.qkv_proj": Factors(a, b), "model.layers.0.mlp.up_proj": Factors(a, b)}
    shelf = alone(new_shelf(1), Adapter(Modules({**fits.modules, **odd}), BaseId("acme/tiny")))
    with pytest.raises(NotExportable) as refused:
        export_shelf(shelf.snapshot(), tmp_path / "out", "mlx", {"base": str(tmp_path / "base")})
    shown = "\n".join(refused.value.faults)
    assert "self_attn.qkv_proj: the base has no linear layer of this name" in shown
    assert "mlp.up_proj: ΔW is 64x64, the base's layer 96x64" in shown
    assert not (tmp_path / "out").exists()


@needs_mlx
def test_other_spellings_of_a_module_are_the_base_s(tmp_path: Path, new_shelf: NewShelf) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    old = {path.replace("model.layers", "model.language_model.layers"): f for path, f in on(model).modules.items()}
    shelf = alone(new_shelf(1), Adapter(Modules(old), BaseId("acme/tiny")))
    document = export_shelf(shelf.snapshot(), tmp_path / "out", "mlx", {"base": str(tmp_path / "base")})
    assert document["objects"][0]["error"] < 1e-6
    mlx_logits(tmp_path / "base", [5, 6, 7], tmp_path / "out" / "slot-0")  # which refuses unknown names


@needs_mlx
def test_a_base_that_mlx_does_not_know_is_refused(tmp_path: Path, new_shelf: NewShelf) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "frobnicator"}')
    shelf = alone(new_shelf(1), make_adapter())
    for base, what in ((tmp_path / "base", "frobnicator"), (tmp_path / "nothing", "not a folder on this machine")):
        with pytest.raises(ModelError, match=what):
            export_shelf(shelf.snapshot(), tmp_path / "out", "mlx", {"base": str(base)})


def test_a_folder_is_what_safetensors_reads(tmp_path: Path, new_shelf: NewShelf) -> None:
    from safetensors.numpy import load_file

    adapter = make_adapter(ranks={"v_proj": 2}, scales={"v_proj": 0.3})
    export_shelf(alone(new_shelf(1), adapter).snapshot(), tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "slot-0" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert (config["model"], config["num_layers"]) == (adapter.base.name, 2)
    lora = config["lora_parameters"]
    assert (lora["rank"], lora["scale"], lora["dropout"], lora["keys"]) == (4, 1.0, 0.0, list(adapter.modules))
    tensors = load_file(tmp_path / "out" / "slot-0" / "adapters.safetensors")
    for path, f in adapter.modules.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        assert (a.shape, b.shape) == ((f.shape.din, 4), (4, f.shape.dout))
        np.testing.assert_allclose((a @ b).T, f.delta(), atol=1e-5)


def test_one_scale_is_kept_so_that_nothing_is_rounded(tmp_path: Path, new_shelf: NewShelf) -> None:
    adapter = replace(make_adapter(scale=1.7, ranks={"v_proj": 3}), dtype="f16")
    shelf = alone(new_shelf(1), adapter)
    stored = shelf.snapshot().adapter("task")
    (document,) = export_shelf(shelf.snapshot(), tmp_path / "out", "mlx")["objects"]
    assert document["error"] == 0
    assert document["tolerance"] == 1e-3
    config = json.loads((tmp_path / "out" / "slot-0" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == next(iter(stored.modules.scales.values()))


def test_experts_have_no_place(tmp_path: Path, new_shelf: NewShelf) -> None:
    path = "model.layers.0.mlp.experts.3.up_proj"
    shelf = alone(new_shelf(1), Adapter(Modules({path: Factors(np.ones((1, 4), "f4"), np.ones((4, 1), "f4"))})))
    with pytest.raises(NotExportable, match="experts of a layer in one tensor"):
        export_shelf(shelf.snapshot(), tmp_path / "out", "mlx")


def test_uniform_factors_are_the_same_update() -> None:
    adapter = make_adapter(ranks={"v_proj": 7}, scales={"v_proj": -0.3, "q_proj": 5.0})
    found = uniform(adapter)
    assert {shape.rank for shape in found.shapes.values()} == {7}
    assert set(found.modules.scales.values()) == {1.0}
    assert relative_error(adapter, found.modules) < 1e-7
    f = Factors(np.full((1, 2), 1e4, "f4"), np.full((3, 1), 1e-4, "f4"), 2.0)
    even = folded(f, 4.0)
    np.testing.assert_allclose(even.delta(), f.delta(), rtol=1e-6)
    assert 0.5 <= np.abs(even.a).max() / np.abs(even.b).max() <= 2


@needs_mlx
@pytest.mark.long
def test_a_real_base_agrees_with_the_exported_adapter_as_it_does_without(
    tmp_path: Path, new_shelf: NewShelf, one_thread: None, smollm2: Any
) -> None:
    """SmolLM2's dequantised weights in float32 in both, an adapter of the example zoo, stored in f16."""
    adapter, base = read_adapter(ZOO / "gec-de"), base_folder()
    shelf = alone(new_shelf(1), adapter)
    export_shelf(shelf.snapshot(), tmp_path / "out", "mlx", {"base": str(base)})
    ids = smollm2.text.query("Correct the grammar of the text.", "Er gehen gestern in die Schule und lernt viel.")
    bare = logits(smollm2.base.model, ids)
    with attach(smollm2.base.model, shelf, "task"):
        wanted = logits(smollm2.base.model, ids)
    apart = np.abs(mlx_logits(base, ids) - bare).max()
    found = np.abs(mlx_logits(base, ids, tmp_path / "out" / "slot-0") - wanted).max()
    assert np.abs(wanted - bare).max() > 1
    assert apart < 1e-3
    assert found < 3 * apart + 1e-4
