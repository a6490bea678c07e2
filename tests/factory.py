"""Small adapters for tests: in memory, and as PEFT folders written with the safetensors library (not with ours)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lorashelf import Adapter, BaseId, Factors, Modules

BASE = "acme/tiny-llama"
SHAPES = {"q_proj": (12, 16), "v_proj": (8, 16)}  # projection → (dout, din)


def module_path(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}"


def make_adapter(
    seed: int = 0,
    *,
    rank: int = 4,
    scale: float = 2.0,
    layers: int = 2,
    projections: tuple[str, ...] = ("q_proj", "v_proj"),
    dtype: str = "f32",
    base: str = BASE,
    ranks: dict[str, int] | None = None,
    scales: dict[str, float] | None = None,
) -> Adapter:
    """A random adapter; `ranks` and `scales` override by projection."""
    rng = np.random.default_rng(seed)
    modules = {}
    for layer in range(layers):
        for projection in projections:
            dout, din = SHAPES[projection]
            r = (ranks or {}).get(projection, rank)
            a = rng.standard_normal((r, din)).astype(np.float32)
            b = rng.standard_normal((dout, r)).astype(np.float32)
            modules[module_path(layer, projection)] = Factors(a, b, (scales or {}).get(projection, scale))
    config = {"target_modules": list(projections), "task_type": "CAUSAL_LM", "lora_dropout": 0.05, "x_unknown": {}}
    return Adapter(Modules(modules), BaseId(base), dtype, config)


def sharing_init(count: int, moved: float = 0.0) -> list[Adapter]:
    """Adapters of one initial A, moved by noise of this size; scales and B are their own."""
    first, rng = make_adapter(0).modules, np.random.default_rng(1)
    found = []
    for i in range(count):
        own = make_adapter(i + 1, scale=1.0 + i)
        drifts = {p: moved * rng.standard_normal(f.a.shape).astype(np.float32) for p, f in own.modules.items()}
        factors = {p: Factors(first[p].a + drifts[p], f.b, f.scale) for p, f in own.modules.items()}
        found.append(own.with_factors(factors))
    return found


def peft_config(adapter: Adapter, **changes: Any) -> dict[str, Any]:
    """The adapter_config.json PEFT would write for an adapter of one rank and scale."""
    rank = adapter.rank
    scale = next(iter(adapter.modules.scales.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base.name,
        "revision": None,
        "r": rank,
        "lora_alpha": scale * rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        **adapter.config,
    }
    return {**config, **changes}


def peft_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors under PEFT's keys, float32."""
    tensors = {}
    for path, factors in adapter.modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(factors.a)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(factors.b)
    return tensors


def write_peft(
    folder: Path,
    adapter: Adapter | None = None,
    *,
    tensors: dict[str, np.ndarray] | None = None,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A PEFT folder by the safetensors library; `changes` go into the config, `tensors` / `config` replace it whole."""
    from safetensors.numpy import save_file

    adapter = adapter or make_adapter()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(adapter) if tensors is None else tensors, folder / "adapter_model.safetensors")
    written = peft_config(adapter, **changes) if config is None else config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    """ΔW of every module in float64: the reference everything is held against."""
    return {p: f.b.astype(np.float64) @ f.a.astype(np.float64) * f.scale for p, f in adapter.modules.items()}


def assert_same_delta(x: Adapter, y: Adapter, tolerance: float = 1e-6) -> None:
    """ΔW of two adapters equal, relative to the norm of the whole, over the union of their modules."""
    left, right = dense(x), dense(y)
    total = np.sqrt(sum(np.sum(d**2) for d in left.values())) + 1e-30
    for path in left.keys() | right.keys():
        difference = left.get(path, 0.0) - right.get(path, np.zeros(()))
        error = np.linalg.norm(np.atleast_1d(difference)) / total
        assert error <= tolerance, f"{path}: relative difference {error:.2e} > {tolerance:.0e}"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes: to assert that nothing changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
