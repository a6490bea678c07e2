"""The format `peft`: one PEFT folder an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import UnknownName
from ..formats.peft import read_adapter, write_adapter
from ..lora.adapter import WIDTHS
from .target import Format, Item, Target, Written

TOLERANCES: Mapping[str, float] = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2}
"""Dtype → the relative error that rounding to it may cause; an object that is stored in it is written unchanged."""


class Peft(Format):
    """PEFT folders, which PEFT, vLLM and the converters of other runtimes load."""

    name = "peft"
    summary = "PEFT folders"
    options = ("dtype",)

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target. Raises UnknownName for a dtype that is none."""
        dtype = options.get("dtype")
        if dtype is not None and dtype not in WIDTHS:
            raise UnknownName("dtype", dtype, [*WIDTHS])
        return _Folders(dtype)


class _Folders(Target):
    def __init__(self, dtype: str | None) -> None:
        self._dtype = dtype

    def write(self, item: Item, folder: Path) -> Written:
        adapter = replace(item.adapter, dtype=self._dtype or item.adapter.dtype)
        write_adapter(adapter, folder / item.name)
        return Written(folder / item.name, read_adapter(folder / item.name).modules, TOLERANCES[adapter.dtype])
