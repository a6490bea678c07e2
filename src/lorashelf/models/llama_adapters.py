"""Adapters in llama.cpp: as LoRA files in the cache folder, and the latest ones in memory."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import atomic
from ..cache_folder import cache_folder, keep_latest
from ..digest import canonical_json, digest
from ..errors import Fault, ShapeMismatch
from ..formats.gguf.base import GgufBase
from ..formats.gguf.lora import write_lora
from ..formats.objects import object_digest
from ..lora.adapter import Adapter
from .fitting import check_all
from .llama_library import LlamaModel

FILES = 32  # LoRA files in the cache
TYPE = "f32"  # as exact as the adapter; llama.cpp would round what it multiplies with f16


class LlamaAdapters:
    """The most recently used adapters in llama.cpp's memory: at most `most`, one per digest."""

    def __init__(self, model: LlamaModel, base: GgufBase, most: int) -> None:
        self._model, self._base, self._most = model, base, most
        self._held: OrderedDict[str, Any] = OrderedDict()
        self.loads = 0
        """How many times an adapter was loaded."""

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter that does not fit the base; warn if only names differ."""
        check_all(self._base.name, adapters, self._faults)

    def check(self, adapter: Adapter | None) -> None:
        """Raise ShapeMismatch naming every module that the base lacks or has in another size."""
        if adapter is not None and adapter.digest not in self._held and (faults := self._faults(adapter)):
            raise ShapeMismatch(faults, where=f"base {self._base.name}")

    def loaded(self, adapter: Adapter | None) -> Any:
        """Return an adapter in llama.cpp, from memory, from the cache folder, or written there; None for the bare base.

        Raises ShapeMismatch, ModelError, DiskError.
        """
        if adapter is None:
            return None
        if adapter.digest not in self._held:
            self.check(adapter)
            while len(self._held) >= self._most:
                self._model.free_adapter(self._held.popitem(last=False)[1])
            self._held[adapter.digest] = self._model.load_adapter(self._file(adapter))
            self.loads += 1
        self._held.move_to_end(adapter.digest)
        return self._held[adapter.digest]

    def _faults(self, adapter: Adapter) -> Sequence[Fault]:
        return self._base.tensors(adapter)[1]

    def _file(self, adapter: Adapter) -> Path:
        """Return the adapter's LoRA file in the cache: written once, checked before each use, the latest FILES kept."""
        base = self._base
        key = [adapter.digest, base.architecture, base.heads, base.kv_heads, TYPE]
        folder, name = cache_folder() / "gguf", digest([canonical_json(key)]).removeprefix("b2-")[:32]
        for file in folder.glob(f"{name}.*"):
            with contextlib.suppress(FileNotFoundError):  # another process deletes old ones
                if object_digest([file]) == file.suffix.removeprefix("."):
                    os.utime(file)
                    return file
            atomic.remove(file)
        atomic.make_parents(folder / name)
        atomic.sweep_staging(folder)
        with atomic.staging(folder) as staged:
            write_lora(adapter, base.tensors(adapter)[0], base.architecture, staged / name, TYPE)
            file = folder / f"{name}.{object_digest([staged / name])}"
            atomic.move(staged / name, file)  # not synced: what a crash leaves is checked before it is used
            atomic.remove(staged)
        keep_latest(folder, FILES)
        return file
