"""A resolver for vLLM: a request's model is the name of a task on a shelf; the tasks of a slot share one adapter.

vLLM calls `register` in each of its processes, by the entry point `lorashelf` of the group vllm.general_plugins.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import remove
from ..errors import LorashelfError
from ..formats.peft import write_adapter
from ..lora.adapter import BaseId
from ..lora.folding import uniform
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from .shelves import SHELVES, shelves

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NAME = "lorashelf"
_BITS = 30  # of an id: vLLM keeps ids in 32-bit integers
_logger = logging.getLogger("lorashelf")


class ShelfResolver:
    """Resolves the names of tasks on shelves, with the method of vLLM's LoRAResolver.

    Adapters are written to a temporary folder, which lives as long as the resolver: vLLM reads an adapter again after
    it made room for others, and a shelf's own folder is deleted some commits later.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._shelves = [Shelf(path) for path in paths]
        self._folder = Path(tempfile.mkdtemp(prefix="lorashelf-vllm-"))
        weakref.finalize(self, remove, self._folder)  # also when the process ends

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for a task's adapter, whose number all tasks of its object share; None if no shelf of this
        base has the task. A warning is logged for an unreadable shelf and for another base.
        """
        for shelf in self._shelves:
            try:
                found = shelf.read(lambda snapshot: self._resolved(snapshot, base_model_name, lora_name))
            except LorashelfError as error:
                _logger.warning("%s", error)
                continue
            if found is not None:
                return found
        return None

    def _resolved(self, snapshot: Snapshot, base: str, task: str) -> LoRARequest | None:
        slot = snapshot.manifest.slot_of(task)
        if slot is None:
            return None
        if snapshot.base_names and base not in snapshot.base_names:
            names = " or ".join(sorted(snapshot.base_names))
            cure = f"if they are one model: lorashelf set {snapshot.path} --base-alias {base}"
            _logger.warning("%s: %s is for %s, vLLM serves %s; %s", snapshot.path, task, names, base, cure)
            return None
        path = self._folder / slot.object.id
        if not path.exists():
            snapshot.check_bytes(slot)
            write_adapter(uniform(replace(snapshot.adapter(task), base=BaseId(base))), path)
        return _request_class()(task, number(slot.object.id), str(path))


def number(identity: str) -> int:
    """Return the integer by which vLLM knows an object: 2³⁰ and above, where vLLM's own numbers do not reach."""
    return (1 << _BITS) + int(identity.rpartition("-")[2][:16], 16) % (1 << _BITS)


def register() -> None:
    """Register the resolver with vLLM if LORASHELF_SHELVES names shelves. Raises ShelfNotFound."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if paths := shelves():
        LoRAResolver.register(ShelfResolver)
        LoRAResolverRegistry.register_resolver(NAME, ShelfResolver(paths))
    else:
        _logger.info("%s names no shelf: vLLM's requests are not resolved by lorashelf", SHELVES)


@cache
def _request_class() -> Any:
    """Return vLLM's LoRARequest with a number that vLLM cannot replace: it numbers whatever a resolver returns anew, so
    that each task of a slot would take room of its own.
    """
    from vllm.lora.request import LoRARequest

    def keep_number(self: Any, name: str, value: Any) -> None:
        if name != "lora_int_id":
            LoRARequest.__setattr__(self, name, value)

    def equal(self: Any, other: object) -> bool:  # as vLLM compares, by names, also with its own class
        return isinstance(other, LoRARequest) and bool(self.lora_name == other.lora_name)

    def as_own(self: Any) -> tuple[Any, ...]:  # to other processes it goes as vLLM's own
        return LoRARequest, (self.lora_name, self.lora_int_id, self.lora_path)

    methods = {"__setattr__": keep_number, "__eq__": equal, "__hash__": LoRARequest.__hash__, "__reduce__": as_own}
    return type("NumberedRequest", (LoRARequest,), methods)
