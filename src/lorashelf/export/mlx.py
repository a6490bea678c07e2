"""The format `mlx`: one folder of mlx-lm per object."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from .. import atomic
from ..errors import Fault, MissingExtra, ModelError
from ..faults import Faults
from ..formats.mlx import read_mlx, write_mlx
from ..lora.adapter import Adapter
from ..lora.alignment import Renamed, respelled
from ..models.base_model import located
from .target import TOLERANCES, Format, Item, Target, Written, dtype_in

Layers = Mapping[str, tuple[int, int]]
"""Module path → (dout, din) of a base's linear layers in mlx-lm."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Mlx(Format):
    """Adapter folders of mlx-lm."""

    name = "mlx"
    summary = "adapter folders of mlx-lm"
    options: ClassVar[Sequence[str]] = ("base", "dtype")

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target; names and sizes of modules are checked against a base that the options name.

        Raises UnknownName for a dtype, ModelError, MissingExtra.
        """
        named = options.get("base")
        return _Folders(dtype_in(options), None if named is None else linear_layers(named))


class _Folders(Target):
    def __init__(self, dtype: str | None, layers: Layers | None) -> None:
        self._dtype, self._layers = dtype, layers

    def faults(self, adapter: Adapter) -> Sequence[Fault]:
        """Return the modules that mlx-lm, or the base if it is known, has no linear layer for."""
        faults = Faults()
        for path, (dout, _, din) in self._spelled(adapter).shapes.items():
            there = (dout, din) if self._layers is None else self._layers.get(path)
            if _EXPERT.search(path):
                cure = "serve it with PEFT: --format peft"
                faults.append(
                    "mlx-lm keeps the experts of a layer in one tensor, without a place for this", cure, at=path
                )
            elif there is None:
                cure = "give the base that it was trained on, in a class that mlx-lm has: --base"
                faults.append("the base has no linear layer of this name in mlx-lm", cure, at=path)
            elif there != (dout, din):
                cure = f"give the base that it was trained on ({adapter.base}): --base"
                faults.append(f"ΔW is {dout}x{din}, the base's layer {there[0]}x{there[1]}", cure, at=path)
        return faults.listed()

    def write(self, item: Item, folder: Path) -> Written:
        adapter = self._spelled(replace(item.adapter, dtype=self._dtype or item.adapter.dtype))
        path = folder / item.name
        atomic.make_folder(path)
        write_mlx(adapter, path)
        atomic.settle(path)
        before = adapter.modules.before if isinstance(adapter.modules, Renamed) else {}
        found = {before.get(name, name): factors for name, factors in read_mlx(path).items()}
        return Written(path, found, TOLERANCES[adapter.dtype])

    def _spelled(self, adapter: Adapter) -> Adapter:
        return adapter if self._layers is None else respelled(adapter, self._layers.keys())


def linear_layers(name: str) -> Layers:
    """Return the linear layers that mlx-lm's model of a base has, without reading its weights.

    Raises MissingExtra, ModelError for a base that is not on this machine or that mlx-lm does not know.
    """
    source, lora = located(name), _package("tuner.lora")
    if source is None or not source.is_dir():
        cure = "give a folder with config.json, or a hub id in the local cache: --base"
        raise ModelError("the base model is not a folder on this machine, which mlx-lm needs", where=name, cure=cure)
    try:
        model, _ = _package("utils").load_model(source, lazy=True, strict=False)
    except Exception as error:  # on a damaged or unknown configuration mlx-lm may raise anything
        what = f"mlx-lm cannot open the base model: {type(error).__name__}: {error}"
        raise ModelError(what, where=str(source), cure="give a base that mlx-lm knows, or omit --base") from error
    found = {}
    for path, layer in model.named_modules():
        if type(layer).__name__ in ("Linear", "QuantizedLinear"):
            like = lora.LoRALinear.from_base(layer, r=1)
            found[path] = (like.lora_b.shape[1], like.lora_a.shape[0])
    return found


def _package(module: str) -> Any:
    try:
        return import_module(f"mlx_lm.{module}")
    except ImportError as error:
        raise MissingExtra("a base of mlx-lm", "mlx-lm", "mlx") from error
