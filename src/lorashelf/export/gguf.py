"""The format `gguf`: one LoRA of llama.cpp an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from .. import atomic
from ..errors import AdapterFormatError, Fault, ModelError, UnknownName, UsageError
from ..formats.gguf.base import GgufBase, base_of, without_base
from ..formats.gguf.lora import TOLERANCES, read_lora, write_lora
from ..lora.adapter import Adapter
from ..lora.algebra import relative_error
from ..models.base_model import located
from .target import Format, Item, Target, Written

AUTO = "auto"
"""f16 if all values fit and the error is within its tolerance, else f32."""


class Gguf(Format):
    """LoRA files for llama.cpp and all that is built on it."""

    name = "gguf"
    summary = "LoRA files of llama.cpp"
    options: ClassVar[Sequence[str]] = ("base", "arch", "outtype")

    def target(self, options: Mapping[str, str], base: str | None) -> Target:
        """Return the target on the base that the options name, else on the shelf's own if it is on this machine.

        Raises UnknownName, UsageError without a base, ModelError.
        """
        return GgufFiles(*self.settings(options, base))

    @staticmethod
    def settings(options: Mapping[str, str], base: str | None) -> tuple[str, GgufBase]:
        """Return the type of the tensors and the base. Raises as `target`."""
        return _outtype(options), _base(options, base)


class GgufFiles(Target):
    """Writes LoRA files for a base."""

    def __init__(self, outtype: str, base: GgufBase) -> None:
        self.base, self._outtype = base, outtype

    def faults(self, adapter: Adapter) -> Sequence[Fault]:
        """Return the modules for which the base has no tensor of the right size."""
        return self.base.tensors(adapter)[1]

    def write(self, item: Item, folder: Path) -> Written:
        """Write one file, named after the object."""
        if self._outtype != AUTO:
            return self._written(item, folder, self._outtype)
        try:
            written = self._written(item, folder, "f16")
            if relative_error(item.adapter, written.factors) <= written.tolerance:
                return written
            atomic.remove(written.path)
        except AdapterFormatError:  # a value is beyond f16: nothing is written
            pass
        return self._written(item, folder, "f32")

    def _written(self, item: Item, folder: Path, outtype: str) -> Written:
        path, (tensors, _) = folder / f"{item.name}.gguf", self.base.tensors(item.adapter)
        write_lora(item.adapter, tensors, self.base.architecture, path, outtype)
        atomic.settle_file(path)
        return Written(path, read_lora(path, tensors), TOLERANCES[outtype])


def _outtype(options: Mapping[str, str]) -> str:
    outtype = options.get("outtype", AUTO)
    if outtype not in (AUTO, *TOLERANCES):
        raise UnknownName("outtype", outtype, [AUTO, *TOLERANCES])
    return outtype


def _base(options: Mapping[str, str], shelf: str | None) -> GgufBase:
    named, architecture = options.get("base"), options.get("arch")
    name = named or (None if architecture else shelf)
    source = located(name) if name else None
    if source is None and named is None and architecture is not None:
        return without_base(architecture)
    if source is None:
        cure = "give a GGUF file of it, or a folder with its config.json: --base"
        if named is None:
            what = f"the shelf's base {shelf} is not on this machine" if shelf else "the shelf names no base"
            raise UsageError(what, cure=cure)
        raise ModelError("the base model does not exist", where=named, cure=cure)
    base = base_of(source, str(name))
    if architecture not in (None, base.architecture):
        what = f"--arch is {architecture}, the base's architecture is {base.architecture}"
        raise UsageError(what, where=str(source), cure="omit --arch, or give another base")
    return base
