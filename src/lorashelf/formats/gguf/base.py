"""A base as llama.cpp has it: its architecture, and which of its tensors is a module of transformers.

llama.cpp's converter changes some weights, and with them ΔW: for the architecture `llama` it reorders the rows of q and
k, since llama.cpp rotates neighbouring values of a head where transformers rotates its two halves. In heads of size d,
row (half, i) becomes row (i, half). The other architectures here keep q and k; fused projections (phi3) stay fused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import atomic
from ...errors import Fault, MissingExtra, ModelError, UnknownName, UsageError, numbered
from ...faults import Faults
from ...lora.adapter import Adapter
from ...lora.arrays import Array32, Float32
from ...lora.module_names import split
from .header import read_header

ROTATED_BY_HALVES = {"attn_q": "heads", "attn_k": "kv_heads"}
ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": ROTATED_BY_HALVES,
    **{name: {} for name in ("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "stablelm", "phi3")},
}
"""Architecture → the tensors whose rows are reordered, each with the number of heads that they are in."""
_MODEL_TYPES = {"mistral": "llama", "gemma3_text": "gemma3"}  # whose name transformers spells otherwise
_TIED = ("gemma", "gemma2", "gemma3")  # whose head is the embedding unless the config has another value
_MOST_BLOCKS = 1000  # of a base that is not known
_PEFT = "use it with PEFT: --format peft, --engine hf"


class Tensor(NamedTuple):
    """A tensor of the base, and the number of heads in which its rows are reordered; 0: not at all."""

    name: str
    heads: int

    def ordered(self, b: Float32[Array32, "dout rank"]) -> Float32[Array32, "dout rank"]:
        """Return B (dout, r) with its rows in llama.cpp's order."""
        return self._moved(b, (self.heads, 2, -1)) if self.heads else b

    def restored(self, b: Float32[Array32, "dout rank"]) -> Float32[Array32, "dout rank"]:
        """Return B (dout, r) with its rows in transformers' order."""
        return self._moved(b, (self.heads, -1, 2)) if self.heads else b

    @staticmethod
    def _moved(b: Float32[Array32, "dout rank"], parts: Sequence[int]) -> Float32[Array32, "dout rank"]:
        dout, rank = b.shape
        return np.ascontiguousarray(b.reshape(*parts, rank).swapaxes(1, 2).reshape(dout, rank))


@dataclass(frozen=True)
class GgufBase:
    """What a LoRA for llama.cpp depends on. `shapes`: tensor → (dout, din); None if only a configuration is known."""

    name: str
    architecture: str
    source: Path | None = None
    blocks: int | None = None
    heads: int = 0
    kv_heads: int = 0
    shapes: Mapping[str, tuple[int, ...]] | None = None
    tied: bool = False
    """Whether the head is the embedding, so that it has no tensor of its own."""

    def tensors(self, adapter: Adapter) -> tuple[dict[str, Tensor], list[Fault]]:
        """Return module path → tensor, and a fault for every module that a LoRA on this base cannot have.
        Raises MissingExtra.
        """
        faults, found, blocks = Faults(), {}, self.blocks or _MOST_BLOCKS
        known = _names(self.architecture, min(blocks, 1 + max(map(_layer, adapter.shapes))))
        cure = f"give the base it was trained on: {adapter.base}"
        for path, (dout, _, din) in adapter.shapes.items():
            if _layer(path) >= blocks:
                faults.append(f"the base {self.name} has {numbered(blocks, 'block')}", cure, at=path)
                continue
            part, place = split(path)
            name = None if part else known.get_name(f"model.{place}") or known.get_name(place)
            if name is None or (name == "output" and self.tied):
                faults.append(f"llama.cpp's {self.architecture} has no tensor for a LoRA on it", _PEFT, at=path)
                continue
            there, reordered = self._shape(name), ARCHITECTURES[self.architecture].get(name.rpartition(".")[2])
            heads = getattr(self, reordered) if reordered else 0
            if there == ():
                faults.append(f"the base {self.name} has no tensor {name}.weight", cure, at=path)
            elif there is not None and there != (dout, din):
                rows = "x".join(map(str, there))
                faults.append(f"ΔW is {dout}x{din}, {name}.weight of the base {self.name} is {rows}", cure, at=path)
            elif heads and dout % (2 * heads):
                faults.append(f"{dout} rows are not {heads} heads of the base {self.name}", cure, at=path)
            else:
                found[path] = Tensor(f"{name}.weight", heads)
        return found, faults.listed()

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape, () for an unknown tensor, None if the shapes are not known."""
        return None if self.shapes is None else self.shapes.get(f"{name}.weight", ())


def base_of(source: Path, name: str) -> GgufBase:
    """Return the base of a GGUF file, or of a folder with transformers' config.json. Raises ModelError, UnknownName."""
    return _of_folder(source, name) if source.is_dir() else _of_file(source, name)


def without_base(architecture: str) -> GgufBase:
    """Return a base of which only the architecture is known. Raises UnknownName, UsageError if heads must be known."""
    if reordered := _checked(architecture):
        what = f"{architecture} has the rows of {' and '.join(reordered)} in another order, by the base's heads"
        raise UsageError(what, cure="give the base, a GGUF file or a folder with config.json: --base")
    return GgufBase(architecture, architecture)


def _of_file(file: Path, name: str) -> GgufBase:
    header = read_header(file)
    fields, kind = header.fields, header.fields.get("general.type", "model")
    if kind != "model":
        cure = "give the base's own GGUF file"
        raise ModelError(f"the GGUF file is of a {kind}, not of a model", where=str(file), cure=cure)
    architecture = str(fields.get("general.architecture"))
    _checked(architecture, str(file))
    heads, kv_heads = (header.number(f"{architecture}.attention.head_count{of}") for of in ("", "_kv"))
    blocks = header.number(f"{architecture}.block_count")
    if not heads or not blocks:
        what = "the GGUF file has no number of heads or blocks"
        raise ModelError(what, where=str(file), cure="download or convert it again")
    shapes = {name: place.shape for name, place in header.tensors.items()}
    return GgufBase(name, architecture, file, blocks, heads, kv_heads or heads, shapes)


def _of_folder(folder: Path, name: str) -> GgufBase:
    file = folder / "config.json"
    try:
        config = json.loads(atomic.read_file(file))
        config = config | (config.get("text_config") or {})
        kind, heads, blocks = config["model_type"], int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"config.json cannot be used: {type(error).__name__}: {error}"
        raise ModelError(what, where=str(file), cure="give a GGUF file, or a folder saved by transformers") from error
    architecture = _MODEL_TYPES.get(kind, kind)
    _checked(architecture, str(file))
    tied = config.get("tie_word_embeddings", architecture in _TIED)
    return GgufBase(name, architecture, folder, blocks, heads, kv_heads, tied=bool(tied))


def _checked(architecture: str, where: str | None = None) -> Mapping[str, str]:
    """Return the reordered tensors of an architecture. Raises UnknownName."""
    if architecture not in ARCHITECTURES:
        raise UnknownName("architecture", architecture, sorted(ARCHITECTURES), where=where)
    return ARCHITECTURES[architecture]


@cache
def _names(architecture: str, blocks: int) -> Any:
    """Return llama.cpp's map from modules of transformers to tensors. Raises MissingExtra."""
    gguf = package()
    (number,) = (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)


def package() -> Any:
    """Return the module gguf. Raises MissingExtra."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("an adapter for llama.cpp", "gguf", "gguf") from error
    return gguf


def _layer(path: str) -> int:
    """Return the number of a module's layer; 0 outside of the layers."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number[1]) if number else 0
