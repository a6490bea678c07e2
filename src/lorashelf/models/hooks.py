"""Adapters on a base's linear layers: a forward hook on each adds (x Aᵀ)(s Bᵀ); the base is never changed."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import Fault, OutOfMemory, ShapeMismatch
from ..faults import Faults
from ..lora.adapter import Adapter
from ..lora.alignment import respelled, spelling
from .fitting import check_all
from .loading import libraries
from .memory import within_memory

if TYPE_CHECKING:
    import torch

_PEFT = "serve it with PEFT, which converts it: PeftModel.from_pretrained(base, FOLDER); route prints a task's FOLDER"
_Hook = Callable[["torch.nn.Module", tuple["torch.Tensor", ...], "torch.Tensor"], "torch.Tensor | None"]
Placed = Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]
"""An adapter on the base's device: module path → Aᵀ (din, r) and s Bᵀ (r, dout)."""
_BARE: Placed = MappingProxyType({})


class Loaded(Protocol):
    """A model in memory: its name, and the lock of the thread that computes with it."""

    @property
    def name(self) -> str:
        """The name to show for it."""
        ...

    @property
    def model(self) -> Any:
        """The model of transformers."""
        ...

    @property
    def lock(self) -> threading.Lock:
        """Held while a thread computes with the model: hooks on the model would affect every thread."""
        ...


class AdapterPool:
    """The most recently used adapters as tensors on the base's device: at most `most`, one per digest.

    The base computes with one of them inside a block of `on_base`, or with one per row inside `on_rows`, for one thread
    at a time. Between blocks no hook is left on the base. Using an adapter that is in the pool copies nothing.
    """

    def __init__(self, base: Loaded, most: int) -> None:
        self._torch, _ = libraries()
        self._base, self._most = base, most
        self._layers = dict(base.model.named_modules())
        self._linear = frozenset(name for name, layer in self._layers.items() if sizes(layer) is not None)
        self._fused = any(name.endswith(".experts") and _is_fused(layer) for name, layer in self._layers.items())
        self._held: OrderedDict[str, Placed] = OrderedDict()
        self.uploads = 0
        """How many times an adapter was copied to the base's device."""

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter whose sizes differ from the base's; warn if only names differ."""
        check_all(self._base.name, adapters, self._faults)

    def check(self, adapter: Adapter | None) -> None:
        """Raise ShapeMismatch naming every module that the base lacks or has in another size."""
        if adapter is not None and adapter.digest not in self._held and (faults := self._faults(adapter)):
            raise ShapeMismatch(faults, where=f"base {self._base.name}")

    @contextmanager
    def on_base(self, adapter: Adapter | None) -> Iterator[None]:
        """Put an adapter on the base's linear layers for the block; None is the bare base.

        Other threads that use the same base wait. Raises ShapeMismatch, OutOfMemory.
        """
        with self._base.lock:
            placed = self._found(adapter)
            with self._hooked({path: _added(*factors) for path, factors in placed.items()}):
                yield

    @contextmanager
    def scaled(self, adapter: Adapter, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put an adapter on the base for the block, the ΔW of each module times its factor, by the adapter's own paths:
        outputs can be differentiated with respect to the factors.

        Other threads that use the same base wait. Raises ShapeMismatch, OutOfMemory.
        """
        names = spelling(adapter, self._linear)
        with self._base.lock:
            placed = self._found(adapter)
            paths = {path: names.get(path, path) for path in factors}
            with self._hooked({paths[own]: _added_times(*placed[paths[own]], x) for own, x in factors.items()}):
                yield

    @contextmanager
    def on_rows(self, rows: Sequence[Placed]) -> Iterator[None]:
        """Put the i-th of these adapters on the i-th row of the batches in the block; each row sees its own alone.

        Equal neighbours share a product. Other threads that use the same base wait.
        """
        parts: dict[str, list[_Part]] = {}
        start = 0
        for _, group in groupby(rows, key=id):
            same = list(group)
            for path, factors in same[0].items():
                parts.setdefault(path, []).append((slice(start, start + len(same)), *factors))
            start += len(same)
        with self._base.lock, self._hooked({path: _added_by_row(part, start) for path, part in parts.items()}):
            yield

    @contextmanager
    def watched(self, seen: Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]]) -> Iterator[None]:
        """Call the function of a module's path with its input and output whenever the bare base computes in the block.

        Other threads that use the same base wait.
        """
        with self._base.lock, self._hooked({path: _seen(see) for path, see in seen.items()}):
            yield

    @contextmanager
    def _hooked(self, hooks: Mapping[str, _Hook]) -> Iterator[None]:
        handles = []
        try:
            for path, hook in hooks.items():
                handles.append(self._layers[path].register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def separable(self) -> bool:
        """Whether the linear layers see the rows of a batch in order. Experts do not: they see chosen positions."""
        return not any(".experts." in name for name in self._linear)

    def placed(self, adapter: Adapter | None) -> Placed:
        """Return an adapter on the base's device, from the pool or added to it; None is the bare base.

        Whoever holds it keeps it, whatever the pool drops. Raises ShapeMismatch, OutOfMemory.
        """
        with self._base.lock:
            return self._found(adapter)

    def hold(self, most: int) -> None:
        """Make the pool keep at least this many adapters."""
        self._most = max(self._most, most)

    def _found(self, adapter: Adapter | None) -> Placed:
        """Return an adapter of the pool, or add it; if memory runs out, the pool is emptied first."""
        if adapter is None:
            return _BARE
        if adapter.digest not in self._held:
            self.check(adapter)
            while len(self._held) >= self._most:
                self._held.popitem(last=False)
            try:
                self._held[adapter.digest] = self._uploaded(adapter)
            except OutOfMemory:
                if not self._held:
                    raise
                self._held.clear()
                self._held[adapter.digest] = self._uploaded(adapter)
        self._held.move_to_end(adapter.digest)
        return self._held[adapter.digest]

    def _uploaded(self, adapter: Adapter) -> Placed:
        """Return Aᵀ and s Bᵀ of every module on the base's device. Raises OutOfMemory."""
        kind = {"dtype": self._base.model.dtype, "device": self._base.model.device}
        make, placed = self._torch.tensor, {}
        with within_memory("out of memory for an adapter", self._base.name, "free memory, or give a smaller base"):
            for path, f in respelled(adapter, self._linear).modules.items():
                placed[path] = make(f.a).T.to(**kind), (make(f.b).T * f.scale).to(**kind)
        self.uploads += 1
        return placed

    def _faults(self, adapter: Adapter) -> list[Fault]:
        """Return what does not fit; modules with the same fault are listed together."""
        faults, cure = Faults(), f"give the base model it was trained on ({adapter.base})"
        for path, (dout, _, din) in respelled(adapter, self._linear).shapes.items():
            layer = self._layers.get(path)
            there = None if layer is None else sizes(layer)
            if there is None and self._fused and re.search(r"\.experts\.\d+\.", path):
                faults.append("the base keeps its experts in one tensor, not in linear layers", _PEFT, at=path)
            elif there is None:
                faults.append("the base has no linear layer of this name", cure, at=path)
            elif there != (dout, din):
                faults.append(f"ΔW is {dout}x{din}, the base's layer {there[0]}x{there[1]}", cure, at=path)
        return faults.listed()


def _added(a: torch.Tensor, b: torch.Tensor) -> _Hook:
    """Return a hook that adds (x a) b to a layer's output: a (din, r), b (r, dout)."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].reshape(-1, a.shape[0])
        return output.view(-1, b.shape[1]).addmm_(x @ a, b).view(output.shape)

    return hook


def _seen(see: Callable[[torch.Tensor, torch.Tensor], None]) -> _Hook:
    """Return a hook that passes a layer's input and output on, and changes nothing."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        see(inputs[0], output)

    return hook


def _added_times(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> _Hook:
    """Return a hook that adds (x a) b times a factor to a layer's output, in new memory."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + inputs[0] @ a @ b * factor.to(output.dtype)

    return hook


_Part = tuple[slice, "torch.Tensor", "torch.Tensor"]
"""Rows, and the factors that are added to their outputs."""


def _added_by_row(parts: Sequence[_Part], rows: int) -> _Hook:
    """Return a hook that adds (x a) b to the outputs of each part's rows; the first dimension is `rows`, or a multiple
    of it if the layer sees the positions of all rows in one dimension.
    """

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x, y = inputs[0].reshape(rows, -1, inputs[0].shape[-1]), output.view(rows, -1, output.shape[-1])
        for chosen, a, b in parts:
            y[chosen].view(-1, b.shape[1]).addmm_(x[chosen].reshape(-1, a.shape[0]) @ a, b)
        return output

    return hook


def _is_fused(experts: torch.nn.Module) -> bool:
    """Return whether experts are three-dimensional parameters, as in transformers 5."""
    return any(weight.ndim == 3 for weight in experts.parameters(recurse=False))


def sizes(layer: Any) -> tuple[int, int] | None:
    """Return (dout, din) of a linear layer (torch's, a quantised one, GPT-2's Conv1D); None for any other layer."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D":
        return layer.weight.shape[1], layer.weight.shape[0]
    return None


@contextmanager
def head_at(model: Any, row: torch.Tensor | Sequence[int], column: torch.Tensor | Sequence[int]) -> Iterator[None]:
    """Restrict the head to the positions (row, column) in the block: logits become (1, n, vocabulary)."""

    def gather(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][row, column].unsqueeze(0), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()
