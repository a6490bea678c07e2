"""Answers: the base model, with the adapter of the task's slot, answers a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ModelError, UsageError
from ..lora.adapter import Adapter
from ..models.protocol import Answers, Continues, Row
from ..models.sampling import Sampler, Sampling
from ..models.tokens import Pieces
from ..shelf.snapshot import Snapshot

MOST_TOKENS = 64  # of an answer, unless the caller or the task sets another limit
_logger = logging.getLogger("lorashelf")


@dataclass(frozen=True, slots=True)
class Service:
    """A task ready to answer: its slot and adapter, the instruction, and the most tokens of an answer. Without slot and
    adapter the bare base answers.

    `bases` are the names of the shelf's base model.
    """

    task: str
    slot: int | None
    adapter: Adapter | None
    instruction: str
    max_new_tokens: int
    bases: frozenset[str]

    def stream(self, model: Answers, text: str) -> Iterator[str]:
        """Return an iterator over the answer to a text, piece by piece.

        Warns about another base model whose shapes fit. Raises, before the first piece, as the model's `stream`, and
        UsageError.
        """
        pieces = model.stream(self.adapter, self.instruction, checked(text), max_new_tokens=self.max_new_tokens)
        self.note_base(model.name)
        return pieces

    def continued(self, model: Continues, text: str, sampling: Sampling) -> Iterator[str]:
        """Return as `stream`, with every token chosen by `sampling`. Raises TooLong and UsageError before the first
        piece, ShapeMismatch, ModelError and OutOfMemory with it.
        """
        query, room = model.text.answerable(self.instruction, checked(text), self.max_new_tokens)
        self.note_base(model.name)
        return _pieces(model, Row(query, self.adapter, Sampler(sampling)), room)

    def note_base(self, name: str) -> None:
        """Warn if the shelf is for another base model than that of this name."""
        if self.bases and name not in self.bases:
            shelf = " or ".join(sorted(self.bases))
            _logger.warning("the shelf is for %s; %s has matching shapes and is used", shelf, name)


def _pieces(model: Continues, row: Row, most: int) -> Iterator[str]:
    """Yield the text of at most so many tokens after a row's prompt, as it becomes final."""
    text, batch = Pieces(model.text), model.decoding(1)
    try:
        (token,) = batch.join([row])
        while True:
            if isinstance(token, ModelError):
                raise token
            if piece := text.add(token.id):
                yield piece
            if text.ended or len(text.tokens) == most:
                break
            (token,) = batch.step()
    finally:
        batch.keep([])
    if not text.ended and (piece := text.rest()):
        yield piece


def service(
    snapshot: Snapshot,
    task: str,
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    prompted: bool = True,
) -> Service:
    """Return the service of a task; `prompt` and `max_new_tokens` default to those stored with the task.

    Unless `prompted`, a task without any prompt has an empty instruction. Raises UnknownName with the closest names,
    UsageError without any prompt, CorruptShelf.
    """
    slot, details = snapshot.located(task)
    instruction = details.get("prompt", None if prompted else "") if prompt is None else checked(prompt, "prompt")
    if instruction is None:
        cure = "give one: --prompt TEXT; `lorashelf add --task-file` stores a prompt with the task"
        raise UsageError(f"no prompt is stored with {task!r}", where=str(snapshot.path), cure=cure)
    most = details.get("max_new_tokens", MOST_TOKENS) if max_new_tokens is None else max_new_tokens
    if most < 1:
        raise UsageError(f"max_new_tokens is {most}", cure="give 1 or more")
    snapshot.check_bytes(slot)  # before a model is loaded
    return Service(task, slot.id, snapshot.adapter(task), instruction, most, snapshot.base_names)


def stream(
    model: Answers,
    snapshot: Snapshot,
    task: str,
    text: str,
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """Return an iterator over the answer of a task's slot to a text, piece by piece; errors precede the first piece.

    `prompt` and `max_new_tokens` override those stored with the task. Raises as `service` and `Service.stream`.
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
    """Return the whole answer of a task's slot to a text; arguments and errors are those of `stream`."""
    return "".join(stream(model, snapshot, task, text, prompt=prompt, max_new_tokens=max_new_tokens))


def checked(text: str, noun: str = "text") -> str:
    """Return the text. Raises UsageError if the text is empty or not Unicode."""
    if not text.strip():
        raise UsageError(f"the {noun} is empty", cure=f"give a {noun}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the {noun} is not Unicode: {error.reason}", cure="give it in UTF-8") from error
    return text
