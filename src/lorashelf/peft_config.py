"""adapter_config.json: which fields change what ΔW is, what they resolve to, and what is written back.

PEFT's scale of a module is alpha / r, or alpha / √r under `use_rslora`, with r and alpha from `rank_pattern` and
`alpha_pattern` where a key matches the module's path (peft.utils.other.get_pattern_key). It is resolved here, once;
fields under which ΔW is anything but s B A are refused by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .adapter import Adapter, Shape

TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
RESOLVED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision")
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # PEFT's, for fields that a config leaves out

_REFUSED_FIELDS: Mapping[str, str] = {
    "use_dora": "DoRA magnitudes are not additive",
    "lora_bias": "biases of the factors are not part of ΔW = s B A",
    "modules_to_save": "whole modules are stored beside the factors",
    "target_parameters": "factors of bare parameters are not linear modules",
    "trainable_token_indices": "trained token embeddings are stored beside the factors",
    "layer_replication": "the base's layers are replicated",
    "alora_invocation_tokens": "an activated LoRA applies to a part of the input only",
    "use_qalora": "QALoRA pools the input before A",
    "use_bdlora": "block-diagonal factors are stored otherwise",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base's weights",
}
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


def shared_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The PEFT fields of an adapter made from several: the first one's, with targets that match exactly the union of
    modules.
    """
    first = adapters[0]
    config = dict(first.config)
    alike = all(
        set(other.shapes) == set(first.shapes)
        and all(other.config.get(name) == config.get(name) for name in TARGET_FIELDS)
        for other in adapters[1:]
    )
    if not alike:
        config.update(dict.fromkeys(TARGET_FIELDS))
        config["target_modules"] = sorted(set().union(*(other.shapes for other in adapters)))
    return config


def config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Every field under which ΔW is not s B A of the factors alone, with the reason."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        yield f"peft_type is {kind!r}, not 'LORA'"
    for name, reason in _REFUSED_FIELDS.items():
        if config.get(name):
            yield f"{name} is set: {reason}"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}: the base's biases were trained too"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REFUSED_INITS):
        yield f"init_lora_weights is {init!r}: ΔW is not s B A against the stock base; convert it with PEFT first"
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(name), str | None):
            yield f"{name} is not a string"


def resolved_scales(config: Mapping[str, Any], shapes: Mapping[str, Shape], faults: list[str]) -> dict[str, float]:
    """Module path → s of ΔW = s B A; what is wrong with ranks and alphas goes to `faults`."""
    before = len(faults)
    ranks = _per_module(config, "r", "rank_pattern", _DEFAULT_RANK, shapes, faults)
    alphas = _per_module(config, "lora_alpha", "alpha_pattern", _DEFAULT_ALPHA, shapes, faults)
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        faults.append(f"use_rslora is {rslora!r}, not true or false")
    if len(faults) > before:
        return {}
    for path, shape in shapes.items():
        if ranks[path] != shape.rank:
            faults.append(f"{path}: the config says rank {ranks[path]:g}, the tensors have {shape.rank}")
    return {path: alphas[path] / (math.sqrt(shape.rank) if rslora else shape.rank) for path, shape in shapes.items()}


def _per_module(
    config: Mapping[str, Any], field: str, pattern_field: str, default: float, paths: Iterable[str], faults: list[str]
) -> dict[str, float]:
    """PEFT's value of r or alpha for every module: the first pattern that matches, else the field."""
    value = config.get(field, default)
    patterns = config.get(pattern_field) or {}
    if not isinstance(patterns, dict):
        faults.append(f"{pattern_field} is not a map")
        patterns = {}
    for name, given in [(field, value), *((f"{pattern_field}[{key!r}]", item) for key, item in patterns.items())]:
        if type(given) not in (int, float) or not math.isfinite(given) or (field == "r" and given <= 0):
            faults.append(f"{name} is {given!r}, not a usable number")
    compiled = []
    for key, item in patterns.items():
        try:
            compiled.append((re.compile(rf"(.*\.)?({key})$"), item))
        except re.error as error:
            faults.append(f"{pattern_field}[{key!r}] is not a regular expression: {error}")
    return {path: next((item for rule, item in compiled if rule.match(path)), value) for path in paths}


def unmatched(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Faults for factors that PEFT would drop on loading because `target_modules` does not name their module."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return []
    if isinstance(targets, str):
        try:
            rule = re.compile(targets)
        except re.error as error:
            return [f"target_modules {targets!r} is not a regular expression: {error}"]
        left_out = [path for path in paths if not rule.fullmatch(path)]
    elif isinstance(targets, list) and all(isinstance(item, str) for item in targets):
        left_out = [path for path in paths if not any(path == item or path.endswith(f".{item}") for item in targets)]
    else:
        return [f"target_modules is {targets!r}, neither a list of names nor a pattern"]
    if left_out and len(left_out) == len(list(paths)):
        return [f"target_modules {targets!r} matches no module of the file: PEFT would load nothing"]
    return [f"{path}: not matched by target_modules, PEFT would drop it" for path in left_out]


def written_config(adapter: Adapter) -> dict[str, Any]:
    """The config to store: the fields the adapter carries, and ranks and scales such that PEFT resolves the same s."""
    ranks: dict[str, float] = {path: shape.rank for path, shape in adapter.shapes.items()}
    alphas = {path: _whole(scale * ranks[path]) for path, scale in adapter.modules.scales.items()}
    rank, rank_pattern = _as_pattern(ranks)
    alpha, alpha_pattern = _as_pattern(alphas)
    config = {"peft_type": "LORA", "task_type": None, "target_modules": sorted(ranks)} | dict(adapter.config)
    config |= {
        "base_model_name_or_path": adapter.base.name or None,
        "revision": adapter.base.revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
        "inference_mode": True,
    }
    return dict(sorted(config.items()))


def _whole(value: float) -> float:
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-15) else value


def _as_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and full paths for the others such that PEFT's matching (a suffix is enough) gives every
    module its own.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    named = {path for path, value in values.items() if value != common}
    shadowed = {path for path in values if any(path.endswith(f".{other}") for other in named)}
    ordered = sorted(named | shadowed, key=lambda path: (-len(path), path))
    return common, {path: values[path] for path in ordered}
