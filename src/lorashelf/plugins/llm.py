"""A plugin for llm: a model `shelf/TASK` for every task of the shelves in LORASHELF_SHELVES.

The base is that of LORASHELF_BASE (hub id, folder, GGUF file), else the shelf's; LORASHELF_ENGINE is the engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llm
from pydantic import Field

from ..errors import LorashelfError
from ..models.engines import open_model
from ..models.protocol import Continues
from ..models.sampling import Sampling
from ..serving.generate import service
from ..shelf.shelf import Shelf
from .shelves import shelves

BASE, ENGINE = "LORASHELF_BASE", "LORASHELF_ENGINE"
_logger = logging.getLogger("lorashelf")


class TaskModel(llm.Model):
    """A task as a model: the prompt is the text to answer, the system prompt replaces the task's stored instruction."""

    can_stream = True
    supports_conversation = False

    class Options(llm.Options):
        """How an answer is written."""

        temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default, is greedy")
        top_p: float | None = Field(
            default=None, gt=0, le=1, description="The share of the likeliest tokens drawn from"
        )
        seed: int | None = Field(default=None, description="Fixes the draws")
        max_tokens: int | None = Field(
            default=None, ge=1, description="Default: the number stored with the task, else 64"
        )

    def __init__(self, shelf: Path, task: str) -> None:
        self.model_id, self._shelf, self._task = f"shelf/{task}", shelf, task

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[str]:
        """Yield the answer piece by piece. Raises as `service`, `Service.continued` and `open_model`."""
        chosen = prompt.options
        found = Shelf(self._shelf).read(
            lambda now: (
                service(
                    now, self._task, prompt=prompt.system or None, max_new_tokens=chosen.max_tokens, prompted=False
                ),
                now.manifest.base,
            )
        )
        asked, base = found
        model = _opened(os.environ.get(BASE) or (base.name if base else "") or None, os.environ.get(ENGINE) or "hf")
        sampling = Sampling(chosen.temperature or 0.0, 1.0 if chosen.top_p is None else chosen.top_p, chosen.seed)
        yield from asked.continued(model, prompt.prompt, sampling)


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Register every task of the shelves; of two tasks of one name, the first shelf's. Logs a warning for a shelf that
    cannot be read.
    """
    found: dict[str, TaskModel] = {}
    for shelf in shelves():
        try:
            tasks = sorted(Shelf(shelf).snapshot().manifest.tasks)
        except LorashelfError as error:
            _logger.warning("%s", error)
            continue
        for task in tasks:
            found.setdefault(task, TaskModel(shelf, task))
    for model in found.values():
        register(model)


@cache
def _opened(base: str | None, engine: str) -> Continues:
    return open_model(base, engine, capability=Continues)
