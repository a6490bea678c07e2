"""The device and number format that a base computes in; on a CPU the faster format is measured where unknown."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .loading import libraries

_logger = logging.getLogger("lorashelf")

TOKENS = 128  # per forward pass in the measurement
LARGEST = 2048  # cap on a layer's sizes in the measurement, which then takes well under a second
ROUNDS, SECONDS = 8, 0.3  # at most
GAIN = 1.3  # speed-up required of bfloat16: it is less precise, and a machine should choose the same each time


def device_of(wanted: str | None) -> str:
    """Return the requested device, else the first available of cuda, mps and cpu. Raises UsageError."""
    torch, _ = libraries()
    there = [name for name, found in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if found.is_available()]
    if wanted is not None and wanted.split(":", 1)[0] not in (*there, "cpu"):
        raise UsageError(f"device {wanted!r} is not available", cure=f"choose from {', '.join([*there, 'cpu'])}")
    return wanted or (there[0] if there else "cpu")


def dtype_of(wanted: str | None, device: str, folder: Path) -> Any:
    """Return the named dtype, else the fastest that is safe: bfloat16 on CUDA and on CPUs where it pays, else float32.

    `folder` is the base's folder or hub id. A warning reports how slow a named bfloat16 is on a CPU without its
    instructions. Raises UsageError.
    """
    torch, _ = libraries()
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    if wanted is not None and wanted not in dtypes:
        raise UsageError(f"dtype {wanted!r} is unknown", cure=f"choose from {', '.join(dtypes)}")
    if wanted == "bf16" and device == "cpu" and (gain := _gain_on_cpu(folder)) < 1 / GAIN:
        _logger.warning("on this CPU, bf16 takes %.1f times as long as f32", 1 / gain)
    native = partial(torch.cuda.is_bf16_supported, including_emulation=False)
    pays = {"cuda": native, "cpu": partial(_pays_on_cpu, folder)}.get(device.partition(":")[0])
    return dtypes[wanted or ("bf16" if pays is not None and pays() else "f32")]


def _pays_on_cpu(folder: Path) -> bool:
    return _gain_on_cpu(folder) >= GAIN


def _gain_on_cpu(folder: Path) -> float:
    """Return the speed-up of bfloat16 in a base's widest layers: unbounded on a CPU with tile units, else measured; 1
    if the configuration has no sizes.
    """
    torch, _ = libraries()
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)  # no public name
    if tiles is not None and tiles():
        return math.inf
    sizes = _sizes(folder)
    return 1.0 if sizes is None else bfloat16_gain(*sizes)


def _sizes(folder: Path) -> tuple[int, int] | None:
    """Return the sizes of a base's widest layers; None if its configuration has none: loading reports why."""
    _, transformers = libraries()
    try:
        config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
        hidden, inner = config.hidden_size, getattr(config, "intermediate_size", None)
    except Exception:  # on a damaged configuration transformers may raise anything; loading reports it
        return None
    if type(hidden) is not int or hidden < 1:
        return None
    return hidden, inner if type(inner) is int and inner > 0 else 4 * hidden


def bfloat16_gain(hidden: int, inner: int) -> float:
    """Return the speed-up of bfloat16 over float32 for TOKENS through a (hidden, inner) linear layer on this CPU."""
    torch, _ = libraries()
    hidden, inner = min(hidden, LARGEST), min(inner, LARGEST)
    dtypes = (torch.float32, torch.bfloat16)
    layers = {
        d: (torch.full((TOKENS, hidden), 0.5, dtype=d), torch.full((inner, hidden), 0.5, dtype=d)) for d in dtypes
    }
    best = dict.fromkeys(dtypes, math.inf)
    deadline = time.perf_counter() + SECONDS
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for dtype, (x, weight) in layers.items():  # alternating: other load slows both alike
                started = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                best[dtype] = min(best[dtype], time.perf_counter() - started)
            if time.perf_counter() > deadline:
                break
    return best[torch.float32] / best[torch.bfloat16]
