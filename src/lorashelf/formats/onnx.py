"""An adapter as ONNX Runtime has it: an `.onnx_adapter` file, which maps inputs of a graph to tensors.

    NAME of A (din, r), NAME of B (r, dout), the scale folded into B;  the graph: y += (x A) B

The file has no rank and no scale. A graph may have one name for the rank of all modules, so smaller ranks
are padded with zeros. Names are those of the graph: Olive's, PATH.lora_A.weight, or those of ONNX
Runtime GenAI's model builder, PATH.lora_A.MatMul.weight with `attn` for `self_attn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import atomic
from ..errors import AdapterFormatError, DiskError, MissingExtra, ModelError
from ..lora.adapter import Adapter, Factors
from ..lora.folding import folded, padded
from .safetensors import stored_values

DTYPES: Mapping[str, str] = {"tensor(float)": "f32", "tensor(float16)": "f16"}
"""ONNX Runtime's types → dtypes."""


class Input(NamedTuple):
    """An input of a graph: its dtype or else ONNX Runtime's type, and its shape; None is a size that a run chooses."""

    dtype: str
    shape: tuple[int | None, ...]


def olive(path: str, side: str) -> str:
    """Return the name of an input in a graph by Olive."""
    return f"{path}.lora_{side}.weight"


def genai(path: str, side: str) -> str:
    """Return the name of an input in a graph by ONNX Runtime GenAI's model builder."""
    place = path.replace(".self_attn.", ".attn.")
    return f"{place}.lora_{side}.MatMul.weight"


def write_onnx(adapter: Adapter, inputs: Mapping[str, tuple[str, str]], ranks: Mapping[str, int], path: Path) -> None:
    """Write an adapter, rounded to its dtype, to a new file, synced; `inputs` maps modules to the names of A and B,
    `ranks` to the ranks in the file, which are padded with zeros.

    Raises AdapterFormatError for a value beyond the dtype, MissingExtra, DiskError.
    """
    runtime = package()
    values = {}
    for module, f in adapter.modules.items():
        same = padded(f if f.scale == 1 else folded(f), ranks[module])
        for name, side in zip(inputs[module], (same.a, same.b), strict=True):
            stored = stored_values(side.T, adapter.dtype, name)
            values[name] = runtime.OrtValue.ortvalue_from_numpy(stored)
    file = runtime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    try:
        file.export_adapter(str(path))
    except RuntimeError as error:
        raise DiskError(f"the file cannot be written: {error}", where=str(path)) from error
    atomic.settle_file(path)


def read_onnx(path: Path, inputs: Mapping[str, tuple[str, str]]) -> dict[str, Factors]:
    """Return module → Factors of a file of `write_onnx`. Raises AdapterFormatError unless it has exactly these inputs,
    MissingExtra.
    """
    try:
        found = package().AdapterFormat.read_adapter(str(path)).get_parameters()
    except RuntimeError as error:
        raise AdapterFormatError([f"not a file of ONNX Runtime: {error}"], where=str(path)) from error
    if found.keys() != {name for names in inputs.values() for name in names}:
        raise AdapterFormatError(["the inputs are not those of the adapter"], where=str(path))
    sides = {name: np.ascontiguousarray(value.numpy().T, "<f4") for name, value in found.items()}
    return {module: Factors(sides[a], sides[b]) for module, (a, b) in inputs.items()}


def graph_inputs(model: Path) -> dict[str, Input]:
    """Return the inputs of a graph that an adapter can set, by name. Raises MissingExtra, ModelError."""
    runtime = package()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of every input with a default
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common one
        what = f"ONNX Runtime cannot open the base model: {error}"
        raise ModelError(what, where=str(model), cure="give the graph with inputs for a LoRA, a .onnx file") from error
    nodes = [*session.get_inputs(), *session.get_overridable_initializers()]
    return {
        node.name: Input(
            DTYPES.get(node.type, node.type),
            tuple(size if isinstance(size, int) and size > 0 else None for size in node.shape),
        )
        for node in nodes
    }


def package() -> Any:
    """Return the module onnxruntime. Raises MissingExtra."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("an adapter for ONNX Runtime", "onnxruntime", "onnx") from error
    return onnxruntime
