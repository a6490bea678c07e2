"""Text to tokens and back: queries and answers as a base reads them, where an answer ends, what fits the context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..tasks.folders import Example, ExampleSet
from ..tasks.template import Template

Tokens = tuple[list[int], list[int]]
"""The token ids of a query and of its answer."""
_UNDECODED = "\ufffd"  # a decoder's replacement for bytes that are not yet a character


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

    def room(self, query: Sequence[int], count: int) -> int:
        """Return how many of `count` tokens fit into the context after a query; 0 or less if none fits."""
        return count if self.context is None else min(count, self.context - len(query))

    # answers ------------------------------------------------------------------------------------------------------

    def ended(self, row: Sequence[int]) -> bool:
        """Return whether the last of the tokens generated so far ends the answer."""
        return row[-1] in self.stops or bool(self._written_end and self._written_end in self._tokenizer.decode(row))

    def decoded(self, row: Sequence[int]) -> str:
        """Return the text of the tokens of an answer, up to its end."""
        cut = next((i for i, token in enumerate(row) if token in self.stops), len(row))
        decode = self._tokenizer.decode
        text: str = decode(row[:cut], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return (text.partition(self._written_end)[0] if self._written_end else text).strip()

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield text as it becomes final: incomplete characters, and spaces that may be trailing, wait."""
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
        """Return the text so far without what may still become a character or the end of the turn."""
        text = self.decoded(row).rstrip(_UNDECODED).rstrip()
        begun = (size for size in range(len(self._written_end) - 1, 0, -1) if text.endswith(self._written_end[:size]))
        return text[: -next(begun, 0) or None].rstrip()
