"""Text to tokens and back: how a base reads queries and answers, where an answer ends, what fits into the context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..tasks.folders import Example, ExampleSet
from ..tasks.template import Template

Tokens = tuple[list[int], list[int]]
"""The token ids of a query and of its answer."""
_UNDECODED = "\ufffd"  # what a decoder shows for bytes that are no letter


class Tokenisation:
    """A tokenizer under a template; `ends` are the tokens that the model itself ends a text with."""

    def __init__(
        self, tokenizer: Any, template: Template, ends: Iterable[int] = (), context: int | None = None
    ) -> None:
        self._tokenizer, self._template, self.context = tokenizer, template, context
        end = self.encoded(template.end.strip())
        self._written_end = template.end if len(end) > 1 else ""
        """The end of a turn that is not one token: it is looked for in the text."""
        self.stops = sorted({*(end if len(end) == 1 else ()), *ends, tokenizer.eos_token_id} - {None})

    @property
    def pad(self) -> int:
        """Any token will do: what it fills is masked."""
        return self.stops[0] if self.stops else 0

    def encoded(self, text: str) -> list[int]:
        """The token ids of a text, without any that the tokenizer would add."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def query(self, instruction: str, text: str) -> list[int]:
        """The token ids that a model reads which is to answer a text."""
        return self.encoded(self._template.query(instruction, text))

    def tokens(self, examples: ExampleSet, example: Example) -> Tokens:
        """The token ids of query and answer, apart: as they are read and written in generation."""
        query = self.query(examples.instruction, example.input)
        return query, self.encoded(self._template.answer(example.output))

    def fitting(self, examples: ExampleSet, longest: int | None = None) -> tuple[ExampleSet, int]:
        """The examples that fit with their answers into the context, or `longest` tokens, and how many do not."""
        room = min(self.context or math.inf, longest or math.inf)
        kept = tuple(e for e in examples.examples if sum(map(len, self.tokens(examples, e))) <= room)
        return ExampleSet(examples.task, examples.instruction, kept), len(examples.examples) - len(kept)

    def room(self, query: Sequence[int], count: int) -> int:
        """How many of `count` tokens fit into the context behind a query; 0 or less where not even one does."""
        return count if self.context is None else min(count, self.context - len(query))

    # answers ------------------------------------------------------------------------------------------------------

    def ended(self, row: Sequence[int]) -> bool:
        """Whether the last of the tokens written so far ends the answer."""
        return row[-1] in self.stops or bool(self._written_end and self._written_end in self._tokenizer.decode(row))

    def decoded(self, row: Sequence[int]) -> str:
        """The text of the tokens of an answer, up to its end."""
        cut = next((i for i, token in enumerate(row) if token in self.stops), len(row))
        decode = self._tokenizer.decode
        text: str = decode(row[:cut], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return (text.partition(self._written_end)[0] if self._written_end else text).strip()

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as it settles: bytes that are no letter yet, and spaces that may be the last, wait."""
        row: list[int] = []
        shown = 0
        for token in tokens:
            row.append(token)
            settled = self._settled(row)
            if len(settled) > shown:
                yield settled[shown:]
                shown = len(settled)
        if rest := self.decoded(row)[shown:]:
            yield rest

    def _settled(self, row: Sequence[int]) -> str:
        """The text so far without what may still become a letter, or the end of the turn."""
        text = self.decoded(row).rstrip(_UNDECODED).rstrip()
        begun = (size for size in range(len(self._written_end) - 1, 0, -1) if text.endswith(self._written_end[:size]))
        return text[: -next(begun, 0) or None].rstrip()
