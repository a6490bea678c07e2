"""A task's adapter on a model that the caller has opened with transformers or PEFT."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ..errors import UsageError
from ..lora.adapter import Adapter
from ..models.hooks import AdapterPool
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot

_ATTACHED: WeakSet[Any] = WeakSet()  # models with a task on them: a second one would be added to the first


@dataclass(frozen=True, slots=True)
class _Given:
    """A model as the adapter pool needs it."""

    name: str
    model: Any
    lock: threading.Lock = field(default_factory=threading.Lock)


class Attachment:
    """A task's adapter on a model: y = (W + s B A) x in its linear layers until `detach`, or the end of a block."""

    def __init__(self, model: Any, task: str, adapter: Adapter) -> None:
        self.model, self.task, self.adapter = model, task, adapter
        self._stack = ExitStack()
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        if bare in _ATTACHED:
            what = "the model has a task's adapter already, and two would add up"
            raise UsageError(what, cure="detach the first, or use it in a `with` block")
        pool = AdapterPool(_Given(getattr(bare, "name_or_path", "") or type(bare).__name__, bare), 1)
        pool.fits({task: adapter})
        with ExitStack() as stack:
            stack.enter_context(pool.on_base(adapter))
            if bare is not model:
                stack.enter_context(model.disable_adapter())
            _ATTACHED.add(bare)
            stack.callback(_ATTACHED.discard, bare)
            self._stack = stack.pop_all()

    def detach(self) -> None:
        """Take the adapter off the model, which is then as before; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: Any, shelf: Snapshot | Shelf | str | Path, task: str) -> Attachment:
    """Put the adapter of a task on a transformers model, or on a PeftModel in place of its own adapters.

    The weights are not changed. It stays until `detach()`, or as a context manager for the block; the caller keeps
    other threads from using the model meanwhile. Raises UnknownName, UsageError if the model has one already,
    ShapeMismatch naming every module that the model lacks or has in another size, CorruptShelf, MissingExtra, and
    as `Shelf.snapshot`.
    """

    def found(snapshot: Snapshot) -> tuple[str, Adapter]:
        slot, _ = snapshot.located(task)
        snapshot.check_bytes(slot)
        return task, snapshot.adapter(task)

    if isinstance(shelf, Snapshot):
        return Attachment(model, *found(shelf))
    return (shelf if isinstance(shelf, Shelf) else Shelf(shelf)).read(lambda now: Attachment(model, *found(now)))
