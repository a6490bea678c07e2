"""A LoRA as a GGUF file: written with the package `gguf`, and read back as llama.cpp reads it.

    general.type = adapter, adapter.type = lora, general.architecture = the base's, adapter.lora.alpha = α
    NAME.lora_a (r, din), NAME.lora_b (dout, r) for every tensor NAME of the base;  llama.cpp: ΔW = α / r · B A

α is the largest rank, and each module's scale is folded into B, so that α / r is 1 where the ranks are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ... import atomic
from ...errors import AdapterFormatError, Fault, UnknownName
from ...lora.adapter import Adapter, Factors
from ...lora.arrays import SideA, SideB
from ...lora.folding import folded
from .base import Tensor, package
from .header import BLOCK, read_header

TOLERANCES: Mapping[str, float] = {"f32": 1e-6, "f16": 1e-3, "q8_0": 2e-2}
"""Type → the relative error ‖ΔW − ΔŴ‖ / ‖ΔW‖ that rounding may cause."""
_ALPHA = "adapter.lora.alpha"


def write_lora(adapter: Adapter, tensors: Mapping[str, Tensor], architecture: str, path: Path, kind: str) -> None:
    """Write an adapter, whose modules are `tensors` of a base, to a new file of one of TOLERANCES' types.

    q8_0 needs rows of 32 values: B is f16 unless the rank is a multiple of 32, and so is A for other din. Raises
    UnknownName for another type, AdapterFormatError naming every value beyond it, MissingExtra, DiskError.
    """
    if kind not in TOLERANCES:
        raise UnknownName("outtype", kind, [*TOLERANCES])
    gguf, faults = package(), []
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(_ALPHA, float(adapter.rank))
    writer.add_string("general.base_model.0.name", adapter.base.name or "unknown")
    for module, factors in adapter.modules.items():
        tensor, same = tensors[module], folded(factors, adapter.rank / factors.shape.rank)
        for side, values in (("a", same.a), ("b", same.b)):
            data, raw = _stored(gguf, tensor.ordered(values) if side == "b" else values, kind)
            if data is None:
                faults.append(Fault(f"{module}: a value is beyond what {kind} can hold", "choose f32"))
            else:
                writer.add_tensor(f"{tensor.name}.lora_{side}", data, raw_dtype=raw)
    if faults:
        raise AdapterFormatError(faults)
    with atomic.refusals(path):
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_lora(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return module → Factors of a file of `write_lora`, with transformers' order of rows, and llama.cpp's scale.

    Raises AdapterFormatError unless the file has exactly these tensors; ModelError if it is not a whole GGUF file.
    """
    header, found = read_header(path), {}
    expected = {f"{tensor.name}.lora_{side}" for tensor in tensors.values() for side in "ab"}
    alpha = header.fields.get(_ALPHA, 0.0)
    if header.tensors.keys() != expected or header.fields.get("general.type") != "adapter":
        raise AdapterFormatError(["the tensors are not those of the adapter"], where=str(path))
    for module, tensor in tensors.items():
        a, b = (header.array(f"{tensor.name}.lora_{side}") for side in "ab")
        found[module] = Factors(a, tensor.restored(b), alpha / len(a) if alpha else 1.0)
    return found


def _stored(gguf: Any, values: SideA | SideB, kind: str) -> tuple[Any, Any]:
    """Return the values in a type, None if one is beyond it, and the writer's type if the array has none."""
    if kind == "f32":
        return (np.ascontiguousarray(values, "<f4") if np.isfinite(values).all() else None), None
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(values, "<f2")
    if not np.isfinite(half).all():
        return None, None
    if kind == "q8_0" and values.shape[1] % BLOCK == 0:
        raw = gguf.GGMLQuantizationType.Q8_0
        return gguf.quants.quantize(np.ascontiguousarray(values, np.float32), raw), raw
    return half, None
