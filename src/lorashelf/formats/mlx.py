"""An adapter as mlx-lm has it: `adapter_config.json` and `adapters.safetensors`.

    PATH.lora_a (din, r), PATH.lora_b (r, dout) for every module PATH;  mlx-lm: y += scale · (x lora_a) lora_b

mlx-lm has one rank and one scale for all modules: see `uniform`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .. import atomic
from ..errors import AdapterFormatError
from ..lora.adapter import Adapter, Factors
from ..lora.folding import uniform
from .objects import CONFIG_FILE
from .safetensors import SPELLED, TensorFile, encode_header, stored_values

TENSOR_FILE = "adapters.safetensors"


def write_mlx(adapter: Adapter, folder: Path) -> None:
    """Write an adapter, rounded to its dtype, into an existing folder, synced.

    Raises AdapterFormatError for a value beyond the dtype, DiskError.
    """
    plain = uniform(adapter)
    layers = [int(found[1]) for path in plain.shapes if (found := re.search(r"\.(\d+)\.", path))]
    config = {
        "fine_tune_type": "lora",
        "model": adapter.base.name,
        "num_layers": 1 + max(layers, default=-1),
        "lora_parameters": {
            "rank": plain.rank,
            "scale": next(iter(plain.modules.scales.values())),
            "dropout": 0.0,
            "keys": list(plain.modules),
        },
    }
    described = []
    for path, (dout, rank, din) in plain.shapes.items():
        described.append((f"{path}.lora_a", SPELLED[adapter.dtype], (din, rank)))
        described.append((f"{path}.lora_b", SPELLED[adapter.dtype], (rank, dout)))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    atomic.write_file(folder / CONFIG_FILE, [text.encode()])
    atomic.write_file(folder / TENSOR_FILE, _chunks(plain, encode_header(described)))


def _chunks(adapter: Adapter, header: bytes) -> Iterator[bytes | memoryview]:
    yield header
    for path, f in adapter.modules.items():
        for name, values in (("lora_a", f.a.T), ("lora_b", f.b.T)):
            yield stored_values(values, adapter.dtype, f"{path}.{name}").reshape(-1).view(np.uint8).data


def read_mlx(folder: Path) -> dict[str, Factors]:
    """Return module → Factors of a folder of `write_mlx`. Raises AdapterFormatError."""
    try:
        lora = json.loads(atomic.read_file(folder / CONFIG_FILE))["lora_parameters"]
        keys, scale = list(lora["keys"]), float(lora["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFormatError([f"{CONFIG_FILE} cannot be read: {error}"], where=str(folder)) from error
    tensors = TensorFile(folder / TENSOR_FILE)
    if tensors.keys() != {f"{path}.lora_{side}" for path in keys for side in "ab"}:
        raise AdapterFormatError(["the tensors are not those of the keys"], where=str(folder))
    sides = {name: np.ascontiguousarray(tensors.array(name).T, "<f4") for name in tensors}
    return {path: Factors(sides[f"{path}.lora_a"], sides[f"{path}.lora_b"], scale) for path in keys}
