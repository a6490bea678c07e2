"""The format `onnx`: one file of ONNX Runtime per object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from ..atomic import expanded
from ..errors import Fault, UsageError
from ..faults import Faults
from ..formats.onnx import DTYPES, Input, genai, graph_inputs, olive, package, read_onnx, write_onnx
from ..lora.adapter import Adapter
from .target import TOLERANCES, Format, Item, Target, Written, dtype_in


class Onnx(Format):
    """Adapter files of ONNX Runtime."""

    name = "onnx"
    summary = "adapter files of ONNX Runtime"
    options: ClassVar[Sequence[str]] = ("base", "dtype")

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target for the graph that the options name, else for any graph by Olive.

        Raises UnknownName for a dtype, UsageError, ModelError, MissingExtra.
        """
        dtype, named = dtype_in(options, list(DTYPES.values())), options.get("base")
        if named is None:
            package()
            return _Files(dtype, None)
        return _Files(dtype, graph_inputs(expanded(named)))


class _Files(Target):
    """Writes files for a graph with these inputs; None: not known."""

    def __init__(self, dtype: str | None, graph: Mapping[str, Input] | None) -> None:
        self._graph, self._spelled = graph, genai if any(".MatMul." in name for name in graph or ()) else olive
        types = sorted({each.dtype for name, each in (graph or {}).items() if ".lora_" in name})
        self._dtype = dtype or (types[0] if types else None)
        if types and (types != [self._dtype] or self._dtype not in DTYPES.values()):
            what = f"the graph's LoRA inputs are {' and '.join(types)}" + (f", not {dtype}" if dtype else "")
            raise UsageError(what, cure="omit --dtype, and give a graph with LoRA inputs in f32 or f16")

    def faults(self, adapter: Adapter) -> Sequence[Fault]:
        """Return the modules for which the graph has no input, or one of another size."""
        faults = Faults()
        for path, (dout, rank, din) in adapter.shapes.items():
            for side, shape in (("A", (din, rank)), ("B", (rank, dout))):
                there = self._input(path, side)
                if there is None:
                    cure = f"build the graph with LoRA inputs for it: it lacks {self._spelled(path, side)}"
                    faults.append("the graph has no input for it", cure, at=path)
                elif len(there.shape) != 2 or not all(map(_fits, there.shape, shape, (side == "B", side == "A"))):
                    sizes = "x".join("?" if size is None else str(size) for size in there.shape)
                    what = f"{side} is {shape[0]}x{shape[1]}, the graph's input {sizes}"
                    faults.append(what, "give the graph of the adapter's base, with room for its rank", at=path)
        return faults.listed()

    def write(self, item: Item, folder: Path) -> Written:
        stored = item.adapter.dtype if item.adapter.dtype in DTYPES.values() else "f32"
        adapter, ranks = replace(item.adapter, dtype=self._dtype or stored), {}
        for module in adapter.modules:
            there = self._input(module, "A")
            ranks[module] = (there.shape[1] if there else None) or adapter.rank
        inputs = {module: (self._spelled(module, "A"), self._spelled(module, "B")) for module in adapter.modules}
        path = folder / f"{item.name}.onnx_adapter"
        write_onnx(adapter, inputs, ranks, path)
        return Written(path, read_onnx(path, inputs), TOLERANCES[adapter.dtype])

    def _input(self, path: str, side: str) -> Input | None:
        """Return an input; one that takes any size if the graph is not known."""
        return _ANY if self._graph is None else self._graph.get(self._spelled(path, side))


_ANY = Input("", (None, None))


def _fits(there: int | None, size: int, may_be_padded: bool) -> bool:
    """Return whether a size fits; a rank may be padded."""
    return there is None or there == size or (may_be_padded and there > size)
