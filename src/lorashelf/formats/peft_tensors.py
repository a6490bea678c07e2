"""An adapter's tensors under PEFT's keys: paired into modules, with shapes and values checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from ..faults import Faults, alike, together
from ..lora.adapter import Shape
from ..lora.module_names import cleaned, impossible
from .safetensors import STORED, TensorFile

LARGEST_VALUE = 1e9
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])\.weight")
_PREFIX = "save it again with PEFT's save_pretrained"
_FOREIGN_KEYS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (re.compile(r"lora_magnitude_vector"), "a DoRA magnitude", "train it again with use_dora=False"),
    (
        re.compile(r"lora_embedding_[AB]"),
        "a factor of an embedding (v1 reads linear modules)",
        "train it again without the embedding among its target_modules",
    ),
    (re.compile(r"lora_[AB]\.bias$"), "a bias of a factor", "train it again with lora_bias=False"),
    (re.compile(r"modules_to_save"), "a whole module", "train it again without modules_to_save"),
    (
        re.compile(r"(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)(\.base_layer)?\.(weight|bias)$"),
        "a whole embedding or head, which PEFT saves with a LoRA on one, or with a larger vocabulary",
        "if the vocabulary is the base's, save it again with save_embedding_layers=False; "
        "else train without new tokens",
    ),
    (
        re.compile(r"\.base_layer\."),
        "a weight of the base under the adapter",
        "save it again with save_pretrained of the PeftModel, which leaves the base out",
    ),
    (
        re.compile(r"lora_(up|down)\.|^lora_(unet|te)"),
        "a key in kohya's style",
        "load it into its model, and save that with PEFT's save_pretrained",
    ),
    (
        re.compile(r"lora_[ab]$"),
        "a key in the style of MLX or GGUF",
        "convert it to PEFT's files: docs/adapters.md, 'From MLX'",
    ),
    (
        re.compile(r"lora_[AB]\.[^.]+\.weight$"),
        "a key with an adapter's name in it",
        _PREFIX,
    ),
    (re.compile(r"lora_[AB]\.weight$"), "lacks PEFT's prefix 'base_model.model.'", _PREFIX),
)
_CAST = "cast it to float32, float16 or bfloat16: docs/adapters.md, 'Other dtypes'"
_GATHER = (
    "save it gathered: stage3_gather_16bit_weights_on_model_save = true in DeepSpeed's config, or its zero_to_fp32.py; "
    "with FSDP a full state dict"
)


def paired(
    tensors: TensorFile, passed_over: tuple[str, ...], faults: Faults, *, given: bool
) -> dict[str, dict[str, str]]:
    """Return module path → half → tensor name; tensors with `passed_over` in their names are for training only.

    Names are cleaned if the adapter is `given` by the user; those of a stored object are used as they are.
    """
    halves: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _KEY.fullmatch(cleaned(name) if given else name)
        if not name.isprintable():
            faults.append(f"{name!r}: not a printable name", "save it again with PEFT's save_pretrained")
        elif match and match["half"] in halves.get(match["path"], {}):
            what = f"the same factor of the same module as {halves[match['path']][match['half']]}"
            faults.append(what, "save the adapter again from one copy of the model", at=name)
        elif match:
            halves.setdefault(match["path"], {})[match["half"]] = name
        elif not any(f".{part}" in name for part in passed_over):
            faults.append(*_foreign(name), at=name)
    for path, pair in halves.items():
        for what, cure in impossible(path) if given else ():
            faults.append(what, cure, at=path)
        for half in "AB":
            if half not in pair:
                faults.append(f"lora_{half} is missing", "download or save it again", at=path)
    if not halves and not faults:
        faults.append("no LoRA factors in the file", "give the folder of a trained adapter")
    return {path: pair for path, pair in halves.items() if len(pair) == 2}


def _foreign(name: str) -> tuple[str, str]:
    """Return the meaning of a tensor whose key is not PEFT's, and the cure."""
    for pattern, meaning, cure in _FOREIGN_KEYS:
        if pattern.search(name):
            return meaning, cure
    return "unknown tensor", "save it again with PEFT's save_pretrained, as a plain LoRA"


def factor_shapes(tensors: TensorFile, halves: Mapping[str, Mapping[str, str]], faults: Faults) -> dict[str, Shape]:
    """Return module path → (dout, r, din) of the pairs that form a linear module."""
    shapes: dict[str, Shape] = {}
    for path, pair in halves.items():
        before = len(faults)
        sides = [tensors[pair[half]] for half in "AB"]
        for half, side in zip("AB", sides, strict=True):
            at = f"{path}.lora_{half}"
            if side.dtype not in STORED:
                faults.append(f"dtype {side.dtype} (supported: {', '.join(STORED)})", _CAST, at=at)
            if len(side.shape) < 2 or 0 in side.shape:
                what = f"shape {side.shape} is not that of a linear module's factor: not gathered from its shards"
                faults.append(what, _GATHER, at=at)
            elif len(side.shape) > 2:
                what = f"shape {side.shape} is not that of a linear module's factor"
                faults.append(what, "train it again with linear target_modules only", at=at)
        if len(faults) == before and sides[0].shape[0] != sides[1].shape[1]:
            what = f"lora_A has rank {sides[0].shape[0]}, lora_B has rank {sides[1].shape[1]}"
            faults.append(what, "save or download it again: the factors come from two adapters", at=path)
        if len(faults) == before:
            shapes[path] = Shape(sides[1].shape[0], sides[0].shape[0], sides[0].shape[1])
    return shapes


def value_faults(tensors: TensorFile, halves: Mapping[str, Mapping[str, str]], faults: Faults) -> None:
    """Read every value; NaN, infinity and values beyond LARGEST_VALUE are faults."""
    not_finite: dict[str, dict[str, tuple[int, int]]] = {}
    too_large: dict[str, float] = {}
    for name in (name for pair in halves.values() for name in pair.values()):
        if tensors[name].dtype not in STORED or 0 in tensors[name].shape:
            continue
        values = tensors.array(name)
        with np.errstate(invalid="ignore"):
            low, high = float(values.min()), float(values.max())  # NaN if any value is
        if not math.isfinite(low - high):
            kind = "NaN" if np.isnan(values).any() else "infinity"
            not_finite.setdefault(kind, {})[name] = values.size - int(np.isfinite(values).sum()), values.size
        elif (largest := max(-low, high)) > LARGEST_VALUE:
            too_large[name] = largest
    cure = "its training diverged, or the file is damaged: give an earlier checkpoint, or download it again"
    for kind, counts in not_finite.items():
        for names in alike(counts):
            bad, size = (sum(counts[name][i] for name in names) for i in (0, 1))
            faults.append(f"{together(names)}: {bad} of {size} values are {kind}", cure)
    for names in alike(too_large):
        largest = max(too_large[name] for name in names)
        faults.append(f"{together(names)}: a value of {largest:.0e}; no trained factor has one", cure)
