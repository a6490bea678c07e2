"""The format `peft`: one PEFT folder per object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..formats.peft import read_adapter, write_adapter
from .target import TOLERANCES, Format, Item, Target, Written, dtype_in


class Peft(Format):
    """PEFT folders, which PEFT, vLLM and the converters of other runtimes load."""

    name = "peft"
    summary = "PEFT folders"
    options = ("dtype",)

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target. Raises UnknownName for a dtype that is none."""
        return _Folders(dtype_in(options))


class _Folders(Target):
    def __init__(self, dtype: str | None) -> None:
        self._dtype = dtype

    def write(self, item: Item, folder: Path) -> Written:
        adapter = replace(item.adapter, dtype=self._dtype or item.adapter.dtype)
        write_adapter(adapter, folder / item.name)
        return Written(folder / item.name, read_adapter(folder / item.name).modules, TOLERANCES[adapter.dtype])
