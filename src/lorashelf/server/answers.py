"""Answers as OpenAI's clients read them: whole documents, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models.sampling import Token
from ..models.tokens import Tokenisation


@dataclass(frozen=True, slots=True)
class Answer:
    """What all documents of one answer share. `about` says which task, slot and state of the shelf gave it."""

    text: Tokenisation
    chat: bool
    model: str
    prompt_tokens: int
    logprobs: bool
    about: Mapping[str, Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, tokens: Sequence[Token], reason: str, count: int) -> dict[str, Any]:
        """Return the document of a finished answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens, "")}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {
            **self._head("chat.completion" if self.chat else "text_completion", [choice]),
            "usage": self._usage(count),
        }

    def begun(self) -> dict[str, Any] | None:
        """Return the first chunk of a stream, before any text; text completions have none."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self.chat else None

    def piece(self, text: str, tokens: Sequence[Token], before: str) -> dict[str, Any]:
        """Return the chunk of a piece of text after the text `before`."""
        return self._chunk({"content": text} if self.chat else text, self._logprobs(tokens, before), None)

    def ended(self, reason: str) -> dict[str, Any]:
        """Return the chunk that ends the answer."""
        return self._chunk({} if self.chat else "", None, reason)

    def counted(self, count: int) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return {**self._head(self._chunks, []), "usage": self._usage(count)}

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, content: Any, logprobs: Any, reason: str | None) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        return self._head(self._chunks, [{"index": 0, name: content, "logprobs": logprobs, "finish_reason": reason}])

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        identity = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        head = {"id": identity, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, "lorashelf": dict(self.about)}

    def _usage(self, count: int) -> dict[str, int]:
        total = self.prompt_tokens + count
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": count, "total_tokens": total}

    def _logprobs(self, tokens: Sequence[Token], before: str) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._with_alternatives(token) for token in tokens], "refusal": None}
        written = [self.text.written(token.id) for token in tokens]
        offsets = [len(before) + sum(map(len, written[:i])) for i in range(len(written))]
        alternatives = [{self.text.written(i): p for i, p in token.alternatives} for token in tokens]
        return {
            "tokens": written,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": alternatives,
            "text_offset": offsets,
        }

    def _with_alternatives(self, token: Token) -> dict[str, Any]:
        alternatives = [self._probable(i, p) for i, p in token.alternatives]
        return {**self._probable(token.id, token.logprob), "top_logprobs": alternatives}

    def _probable(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.text.written(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
