"""adapter_config.json: the fields that affect ΔW, and the values they resolve to.

PEFT's scale of a module is alpha / r, or alpha / √r under `use_rslora`, with r and alpha from `rank_pattern` and
`alpha_pattern` where a key matches the module's path (peft.utils.other.get_pattern_key). It is resolved here, once.
Fields that make ΔW anything but s B A are refused by name, and so is an unknown field that is set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import Fault
from ..faults import Faults
from ..lora.adapter import Shape
from ..lora.matching import BAD_PATTERN, FirstMatch, Key, targets
from ..lora.targets import TARGET_FIELDS
from ..names import on_one_line

RESOLVED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "revision")
UNDERSTOOD = (
    *RESOLVED,
    *("peft_type", "bias", "init_lora_weights"),  # refused by their value
    *TARGET_FIELDS,  # which modules have factors
    "fan_in_fan_out",  # the base's layer stores W transposed; the factors are those of ΔW
)
"""Fields whose effect on ΔW is known and taken into account."""
HARMLESS = (
    *("peft_version", "auto_mapping", "task_type", "inference_mode", "runtime_config"),  # how PEFT loads it
    *("lora_dropout", "velora_config", "monteclora_config"),  # affect training only
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # options of an init, which is checked itself
    "qalora_group_size",  # an option of QALoRA, which is refused
    *("megatron_config", "megatron_core"),  # how the base is distributed over machines
    "ensure_weight_tying",  # for embeddings, whose factors are refused
    "merge_weights",  # of PEFT before 0.3: when to merge into the base
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # ms-swift's: dtype and learning rates of training
)
"""Fields on which ΔW does not depend, whatever their value: PEFT's, and those added by other training tools."""
_DEFAULT_RANK = _DEFAULT_ALPHA = 8  # PEFT's defaults

REFUSED: Mapping[str, tuple[str, str]] = {  # field → (what it means, how to train without it)
    "use_dora": ("DoRA magnitudes are not additive", "train it again with use_dora=False"),
    "lora_bias": ("biases of the factors are not part of ΔW = s B A", "train it again with lora_bias=False"),
    "modules_to_save": ("whole modules are stored with the factors", "train it again without modules_to_save"),
    "target_parameters": (
        "factors of bare parameters are not linear modules",
        "train it again with target_modules instead of target_parameters",
    ),
    "trainable_token_indices": (
        "trained token embeddings are stored with the factors",
        "train it again without trainable_token_indices",
    ),
    "layer_replication": ("the base's layers are replicated", "train it again without layer_replication"),
    "alora_invocation_tokens": (
        "an activated LoRA applies to part of the input only",
        "train it again without alora_invocation_tokens",
    ),
    "use_qalora": ("QALoRA pools the input before A", "train it again with use_qalora=False"),
    "use_bdlora": ("block-diagonal factors are stored in another form", "train it again without use_bdlora"),
    "arrow_config": ("Arrow routes between adapters at run time", "give the adapters that it routes between"),
    "kasa_config": ("KaSA changes the base's weights", "train it again without kasa_config"),
}
_ON_WHERE_GIVEN = ("use_bdlora", "arrow_config", "kasa_config")  # PEFT turns an empty map into an object: on
_TRAINING_ONLY: Mapping[str, str] = {"velora_config": "lora_velora_", "monteclora_config": "lora_monteclora_"}
"""Variants that are s B A of the factors once trained: field → prefix of the names of their additional tensors."""
LARGEST = 1e30  # a rank or alpha beyond this is a mistake; float32 factors times such a scale would overflow
_CONVERTED_INITS = ("pissa", "olora", "corda", "lora_ga")
_HARMLESS_INITS = ("gaussian", "orthogonal", "eva", "mica")  # of A and B alone; the base is unchanged
_MEND = "correct adapter_config.json, or copy the one that was saved with the tensors"


def config_faults(config: Mapping[str, Any], *, stored: bool = False) -> Iterator[Fault]:
    """Yield a fault, with reason and cure, for every field that makes ΔW anything but s B A of the factors alone.

    Unknown fields that are set are refused too, except in a `stored` config, which was accepted before.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        cure = "convert it with peft.save_as_lora, if PEFT can, or train a LoRA"
        yield Fault(f"peft_type is {kind!r}, not 'LORA'", cure)
    for name, (reason, cure) in REFUSED.items():
        if _is_on(name, config.get(name)):
            yield Fault(f"{name} is set: {reason}", cure)
    if config.get("bias", "none") != "none":
        yield Fault(
            f"bias is {config['bias']!r}: the base's biases were trained too", "train it again with bias='none'"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        cure = "train it again with init_lora_weights=True"
        if init.lower().startswith(_CONVERTED_INITS):
            cure = "save it again as a plain LoRA: save_pretrained with path_initial_model_for_weight_conversion"
        yield Fault(f"init_lora_weights is {init!r}: ΔW is not s B A against the stock base", cure)
    for name in ("base_model_name_or_path", "revision"):
        value = config.get(name)
        if not isinstance(value, str | None):
            yield Fault(f"{name} is not a string", _MEND)
        elif value and not on_one_line(value):  # it is printed, and a terminal would interpret control characters
            yield Fault(f"{name} is {value!a}, with a control character or a line break", _MEND)

    if not stored:
        yield from _unknown(config)


def encodable(document: object) -> bool:
    """Return whether a JSON document can be written as UTF-8: it has no lone surrogate."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unknown(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for every unknown field that is set; null, false, 0 and empty values are off in any version."""
    for name in sorted(config.keys() - {*UNDERSTOOD, *HARMLESS, *REFUSED}):
        if value := config[name]:
            what = f"the field {name!r} is set to {_shortened(value)}; its effect on ΔW is unknown"
            yield Fault(
                what, f"delete {name!r} from adapter_config.json if ΔW does not depend on it, or train without it"
            )


def _is_on(name: str, value: object) -> bool:
    """Return whether PEFT acts on a field of this value (LoraConfig.__post_init__, LoraLayer.resolve_lora_variant)."""
    if name == "trainable_token_indices":
        return value is not None and value != {}  # even an empty list wraps the embedding
    return value is not None if name in _ON_WHERE_GIVEN else bool(value)


def training_only(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the variants in use that affect training only: field → prefix of the names of their tensors."""
    return {name: begins for name, begins in _TRAINING_ONLY.items() if isinstance(config.get(name), dict)}


def carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields to keep: those that neither follow from the factors nor require tensors that are not kept."""
    return {name: value for name, value in config.items() if name not in (*RESOLVED, *training_only(config))}


def resolved_scales(config: Mapping[str, Any], shapes: Mapping[str, Shape], faults: Faults) -> dict[str, float]:
    """Return module path → s of ΔW = s B A; faults of ranks and alphas are added to `faults`."""
    before = len(faults)
    ranks = _per_module(config, "r", "rank_pattern", _DEFAULT_RANK, shapes, faults)
    alphas = _per_module(config, "lora_alpha", "alpha_pattern", _DEFAULT_ALPHA, shapes, faults)
    rslora = config.get("use_rslora", False)
    if not isinstance(rslora, bool):
        faults.append(f"use_rslora is {rslora!r}, not true or false", _MEND)
    if len(faults) > before:
        return {}
    for path, shape in shapes.items():
        if ranks[path] != shape.rank:
            what = f"the config gives rank {ranks[path]:g}, the tensors have {shape.rank}"
            faults.append(what, "copy the config that was saved with the tensors", at=path)
    return {path: alphas[path] / (math.sqrt(shape.rank) if rslora else shape.rank) for path, shape in shapes.items()}


def _per_module(
    config: Mapping[str, Any], field: str, pattern_field: str, default: float, paths: Iterable[str], faults: Faults
) -> dict[str, float]:
    """Return r or alpha of every module as PEFT resolves it: the first pattern that matches, else the field."""
    value = config.get(field, default)
    patterns = config.get(pattern_field) or {}
    if not isinstance(patterns, dict):
        faults.append(f"{pattern_field} is not a map", _MEND)
        patterns = {}
    for name, given in [(field, value), *((f"{pattern_field}[{key!r}]", item) for key, item in patterns.items())]:
        if type(given) not in (int, float) or not abs(given) < LARGEST or (field == "r" and given <= 0):
            faults.append(f"{name} is {given!r}, not a usable number", _MEND)
    keys = []
    for key, item in patterns.items():
        try:
            keys.append((Key(key), item))
        except BAD_PATTERN as error:
            faults.append(f"{pattern_field}[{key!r}] is not a regular expression: {error}", _MEND)
    first = FirstMatch(keys)
    return {path: first.of(path, value) for path in paths}


def unmatched(config: Mapping[str, Any], paths: Iterable[str], faults: Faults) -> None:
    """Add a fault for every factor that PEFT would drop on loading because the config's targets miss its module."""
    paths, named = list(paths), config.get("target_modules")
    if odd := list(_target_faults(config)):
        faults.extend(odd)
        return
    try:
        matched = targets(config)
        left_out = [path for path in paths if not matched(path)]
    except BAD_PATTERN as error:
        what = "target_modules, exclude_modules or layers_pattern is not a regular expression"
        faults.append(f"{what}: {error}", _MEND)
        return
    cure = "copy the config that was saved with the tensors, or save both again with PEFT's save_pretrained"
    if left_out and len(left_out) == len(paths):
        faults.append(
            f"target_modules {_shortened(named)} matches no module of the file: PEFT would load nothing", cure
        )
        return
    for path in left_out:
        faults.append("not matched by target_modules: PEFT would drop it", cure, at=path)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _target_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    for name in ("target_modules", "exclude_modules"):
        value = config.get(name)
        if not (value is None or isinstance(value, str) or _is_list(value, str)):
            yield Fault(f"{name} is {_shortened(value)}, not a list of names or a pattern", _MEND)
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if not (layers is None or type(layers) is int or _is_list(layers, int)):
        yield Fault(f"layers_to_transform is {_shortened(layers)}, not a number or a list of numbers", _MEND)
    if not (pattern is None or isinstance(pattern, str) or _is_list(pattern, str)):
        yield Fault(f"layers_pattern is {_shortened(pattern)}, not a name or a list of names", _MEND)


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
