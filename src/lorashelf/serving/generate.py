"""Answers: a task's text, read by the base model with the adapter of the slot that serves the task."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UsageError
from ..lora.adapter import Adapter
from ..models.protocol import Answers
from ..shelf.snapshot import Snapshot

MOST_TOKENS = 64  # of an answer, where neither the caller nor the task says another number
_logger = logging.getLogger("lorashelf")


@dataclass(frozen=True, slots=True)
class Service:
    """A task ready to be asked: the slot that serves it and its adapter, the instruction, the most tokens of an answer.

    `bases` are the names of the base model that the shelf belongs to.
    """

    task: str
    slot: int
    adapter: Adapter
    instruction: str
    max_new_tokens: int
    bases: frozenset[str]

    def stream(self, model: Answers, text: str) -> Iterator[str]:
        """The answer to a text in pieces, as they are written.

        Another base model is warned of where its shapes fit. Raises at once as the model's `stream`, and UsageError.
        """
        pieces = model.stream(self.adapter, self.instruction, checked(text), max_new_tokens=self.max_new_tokens)
        if self.bases and model.name not in self.bases:
            shelf = " or ".join(sorted(self.bases))
            _logger.warning("the shelf is for %s; %s fits it in shape and is used", shelf, model.name)
        return pieces


def service(snapshot: Snapshot, task: str, *, prompt: str | None = None, max_new_tokens: int | None = None) -> Service:
    """A task of the shelf, with what is stored with it unless given here.

    Raises UnknownName with the nearest names, UsageError without any prompt, CorruptShelf.
    """
    slot, details = snapshot.located(task)
    instruction = details.get("prompt") if prompt is None else checked(prompt, "prompt")
    if instruction is None:
        cure = "give it: --prompt TEXT; `lorashelf add --task-file` stores it with the task"
        raise UsageError(f"no prompt is stored with {task!r}", where=str(snapshot.path), cure=cure)
    most = details.get("max_new_tokens", MOST_TOKENS) if max_new_tokens is None else max_new_tokens
    if most < 1:
        raise UsageError(f"an answer of at most {most} tokens is none", cure="give 1 or more")
    snapshot.check_bytes(slot)  # before a model is loaded
    base, settings = snapshot.manifest.base, snapshot.settings
    names = {base.name if base else "", settings.base or "", *settings.base_aliases} - {""}
    return Service(task, slot.id, snapshot.adapter(task), instruction, most, frozenset(names))


def stream(
    model: Answers,
    snapshot: Snapshot,
    task: str,
    text: str,
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """The answer of a task's slot to a text, piece by piece; all refusals come before the first.

    `prompt` and `max_new_tokens` stand in for what is stored with the task. Raises as `service` and `Service.stream`.
    """
    return service(snapshot, task, prompt=prompt, max_new_tokens=max_new_tokens).stream(model, text)


def answer(
    model: Answers,
    snapshot: Snapshot,
    task: str,
    text: str,
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> str:
    """The whole answer of a task's slot to a text; as `stream`."""
    return "".join(stream(model, snapshot, task, text, prompt=prompt, max_new_tokens=max_new_tokens))


def checked(text: str, noun: str = "text") -> str:
    """The text. Raises UsageError for an empty one, and for one that is not Unicode."""
    if not text.strip():
        raise UsageError(f"the {noun} is empty", cure=f"give a {noun}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the {noun} is not Unicode: {error.reason}", cure="give it in UTF-8") from error
    return text
