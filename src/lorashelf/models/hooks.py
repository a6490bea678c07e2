"""An adapter on a base's linear layers: y + (x Aᵀ)(s Bᵀ) by a hook behind each; the base is never changed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import Fault, OutOfMemory, ShapeMismatch
from ..faults import Faults
from ..lora.adapter import Adapter, BaseId, Factors
from ..lora.alignment import respelled
from .base_model import BaseModel
from .loading import libraries

_PEFT = "serve it with PEFT, which converts it: PeftModel.from_pretrained(base, FOLDER); route prints a task's FOLDER"
_logger = logging.getLogger("lorashelf")


class Attachment:
    """The one place of a base model where an adapter is, or none; a swap replaces small tensors only."""

    def __init__(self, base: BaseModel) -> None:
        self._torch, _ = libraries()
        self._base = base
        self._layers = dict(base.model.named_modules())
        self._linear = frozenset(name for name, layer in self._layers.items() if sizes(layer) is not None)
        self._fused = any(name.endswith(".experts") and _is_fused(layer) for name, layer in self._layers.items())
        self._attached: Adapter | None = None
        self._hooks: list[Any] = []

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter that is not of this base's sizes; warn where only names differ."""
        alike: dict[Fault, list[str]] = {}
        for name, adapter in adapters.items():
            for fault in self._faults(adapter):
                alike.setdefault(fault, []).append(name)
        if alike:
            faults = [fault.at(_first_of(names, "adapters")) for fault, names in alike.items()]
            raise ShapeMismatch(faults, where=f"base {self._base.name}")
        others = sorted({str(x.base) for x in adapters.values() if x.base.contradicts(BaseId(self._base.name))})
        if others:
            _logger.warning("the base is %s; the adapters name %s (the sizes fit)", self._base.name, ", ".join(others))

    def attach(self, adapter: Adapter | None) -> None:
        """Put an adapter's factors behind the base's linear layers, in place of the one before; None is the bare base.

        Raises ShapeMismatch, naming every module that the base lacks or has in another size.
        """
        if adapter is self._attached:
            return
        if adapter is not None and (faults := self._faults(adapter)):
            raise ShapeMismatch(faults, where=f"base {self._base.name}")
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._attached = [], None
        if adapter is None:
            return
        named = respelled(adapter, self._linear)
        added = {path: self._on_device(factors) for path, factors in named.modules.items()}  # all, or none is added
        self._hooks = [self._layers[path].register_forward_hook(_added(a, b)) for path, (a, b) in added.items()]
        self._attached = adapter

    def _on_device(self, f: Factors) -> tuple[Any, Any]:
        """Aᵀ and s Bᵀ where the base is. Raises ModelError where memory ends."""
        kind = {"dtype": self._base.model.dtype, "device": self._base.model.device}
        with within_memory("out of memory for an adapter", self._base.name, "free memory, or give a smaller base"):
            a = self._torch.tensor(f.a).T.to(**kind)
            return a, (self._torch.tensor(f.b).T * f.scale).to(**kind)

    def _faults(self, adapter: Adapter) -> list[Fault]:
        """What does not fit, like modules with one fault together."""
        faults, cure = Faults(), f"give the base model it was trained on ({adapter.base})"
        for path, (dout, _, din) in respelled(adapter, self._linear).shapes.items():
            layer = self._layers.get(path)
            there = None if layer is None else sizes(layer)
            if there is None and self._fused and re.search(r"\.experts\.\d+\.", path):
                faults.append("the base keeps its experts in one tensor, which no linear layer reaches", _PEFT, at=path)
            elif there is None:
                faults.append("the base has no linear layer of this name", cure, at=path)
            elif there != (dout, din):
                faults.append(f"ΔW is {dout}x{din}, the base's layer {there[0]}x{there[1]}", cure, at=path)
        return faults.listed()


def _added(a: Any, b: Any) -> Any:
    """A hook that adds (x a) b to a layer's output, a (din, r), b (r, dout)."""

    def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        x = inputs[0].reshape(-1, a.shape[0])
        return output.view(-1, b.shape[1]).addmm_(x @ a, b).view(output.shape)

    return hook


def _first_of(names: Sequence[str], noun: str) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more {noun}" if len(names) > 1 else "")


def _is_fused(experts: Any) -> bool:
    """Whether experts are parameters of three dimensions, as transformers 5 keeps them."""
    return any(weight.ndim == 3 for weight in experts.parameters(recurse=False))


def sizes(layer: Any) -> tuple[int, int] | None:
    """(dout, din) of a linear layer (torch's, quantised ones, GPT-2's Conv1D), None for any other."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D":
        return layer.weight.shape[1], layer.weight.shape[0]
    return None


@contextmanager
def within_memory(what: str, where: str, cure: str) -> Iterator[None]:
    """Raise OutOfMemory where memory ends in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ended = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
        if not ended and "not enough memory" not in str(error):
            raise
        raise OutOfMemory(what, where=where, cure=cure) from error
