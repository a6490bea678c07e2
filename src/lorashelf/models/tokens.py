"""Text to tokens and back: queries and answers as a base reads them, where an answer ends, what fits the context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

from ..errors import ModelError, TooLong
from ..tasks.folders import Example, ExampleSet
from ..tasks.template import Template

Tokens = tuple[list[int], list[int]]
"""The token ids of a query and of its answer."""
_UNDECODED = "\ufffd"  # a decoder's replacement for bytes that are not yet a character


def faulty(examples: ExampleSet, index: int, what: str) -> ModelError:
    """Return the error of an example that has no loss."""
    where = f"{examples.task}, example {index + 1}: {examples.examples[index].input[:60]!r}"
    return ModelError(f"an example {what}", where=where, cure="shorten it or leave it out; check the adapter for NaN")


class Tokenisation:
    """A tokenizer with a template; `ends` are the model's own end-of-text tokens."""

    def __init__(
        self, tokenizer: Any, template: Template, ends: Iterable[int] = (), context: int | None = None
    ) -> None:
        self._tokenizer, self._template, self.context = tokenizer, template, context
        end = self.encoded(template.end.strip())
        self._written_end = template.end if len(end) > 1 else ""
        """An end of turn of several tokens: it is searched for in the text."""
        self.stops = sorted({*(end if len(end) == 1 else ()), *ends, tokenizer.eos_token_id} - {None})

    @property
    def pad(self) -> int:
        """The padding token: any will do, since padding is masked."""
        return self.stops[0] if self.stops else 0

    def encoded(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def raw(self, text: str) -> list[int]:
        """Return the token ids of a text as the tokenizer begins texts: with its special tokens, without a template."""
        ids: list[int] = self._tokenizer(text).input_ids
        return ids

    def query(self, instruction: str, text: str) -> list[int]:
        """Return the token ids of the prompt for an answer to a text."""
        return self.encoded(self._template.query(instruction, text))

    def tokens(self, examples: ExampleSet, example: Example) -> Tokens:
        """Return the token ids of the query and of the answer, tokenised separately, as in generation."""
        query = self.query(examples.instruction, example.input)
        return query, self.encoded(self._template.answer(example.output))

    def fitting(self, examples: ExampleSet, longest: int | None = None) -> tuple[ExampleSet, int]:
        """Return the examples that fit into the context (or `longest` tokens) with their answers; count the others."""
        room = min(self.context or math.inf, longest or math.inf)
        kept = tuple(e for e in examples.examples if sum(map(len, self.tokens(examples, e))) <= room)
        return ExampleSet(examples.task, examples.instruction, kept), len(examples.examples) - len(kept)

    def room(self, query: Sized, count: int) -> int:
        """Return how many of `count` tokens fit into the context after a query; 0 or less if none fits."""
        return count if self.context is None else min(count, self.context - len(query))

    def measurable(self, examples: ExampleSet) -> list[Tokens]:
        """Return the token ids of every query and answer. Raises ModelError if one is longer than the context."""
        tokens = [self.tokens(examples, example) for example in examples.examples]
        for index, (query, answer) in enumerate(tokens):
            if self.room(query, len(answer)) < len(answer):
                raise faulty(examples, index, "is longer than the model's context")
        return tokens

    def answerable(self, instruction: str, text: str, count: int) -> tuple[list[int], int]:
        """Return the token ids of a prompt, and how many of `count` tokens fit after it. Raises TooLong if none."""
        query = self.query(instruction, text)
        room = self.room(query, count)
        if room < 1:
            where = f"{len(query)} tokens with the instruction; the model's context is {self.context} tokens"
            raise TooLong("the text is too long to answer", where=where, cure="shorten it")
        return query, room

    # answers ------------------------------------------------------------------------------------------------------

    def ended(self, row: Sequence[int]) -> bool:
        """Return whether the last of the tokens generated so far ends the answer."""
        return row[-1] in self.stops or bool(self._written_end and self._written_end in self._tokenizer.decode(row))

    def decoded(self, row: Sequence[int], stop: Sequence[str] = (), *, trims: bool = True) -> str:
        """Return the text of the tokens of an answer, up to its end or the first text of `stop`; `trims` strips it."""
        text = self._cut(row, stop)[0]
        return text.strip() if trims else text

    def _cut(self, row: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
        """Return the text up to its end, and whether a written end of turn or a text of `stop` is in it."""
        cut = next((i for i, token in enumerate(row) if token in self.stops), len(row))
        decode = self._tokenizer.decode
        text: str = decode(row[:cut], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        places = [place for end in self.ends(stop) if (place := text.find(end)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def ends(self, stop: Sequence[str]) -> list[str]:
        """Return the texts that end an answer: an end of turn of several tokens, and those of `stop`."""
        return [end for end in (self._written_end, *stop) if end]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield text as it becomes final: incomplete characters, and spaces that may be trailing, wait."""
        text = Pieces(self)
        for token in tokens:
            if piece := text.add(token):
                yield piece
        if piece := text.rest():
            yield piece

    def written(self, token: int) -> str:
        """Return the text of one token, special ones included; an incomplete character is \ufffd."""
        text: str = self._tokenizer.decode([token])
        return text


class Pieces:
    """The text of an answer as its tokens arrive, up to its end or the first text of `stop`.

    Incomplete characters, the beginning of what may become an end, and with `trims` white space around the answer are
    not shown until they are final.
    """

    def __init__(self, text: Tokenisation, stop: Sequence[str] = (), *, trims: bool = True) -> None:
        self._text, self._stop, self._trims = text, stop, trims
        self.tokens: list[int] = []
        self.ended = False
        """Whether the last token ends the answer."""
        self._shown = 0

    def add(self, token: int) -> str:
        """Add a token; return the text that has become final."""
        self.tokens.append(token)
        text, stopped = self._text._cut(self.tokens, self._stop)
        self.ended = stopped or token in self._text.stops
        return self._new(text if self.ended else self._settled(text))

    def rest(self) -> str:
        """Return the text that is still not shown, after the last token."""
        return self._new(self._text._cut(self.tokens, self._stop)[0])

    def _new(self, text: str) -> str:
        final = text.strip() if self._trims else text
        piece, self._shown = final[self._shown :], max(self._shown, len(final))
        return piece

    def _settled(self, text: str) -> str:
        """Return the text so far without what may still become a character or an end."""
        text = text.rstrip(_UNDECODED)
        text = text.rstrip() if self._trims else text
        held = 0
        for end in self._text.ends(self._stop):
            begun = (size for size in range(len(end) - 1, 0, -1) if text.endswith(end[:size]))
            held = max(held, next(begun, 0))
        return text[: len(text) - held]
