"""The engine `llamacpp`: a GGUF base in llama.cpp, with adapters as LoRA files."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TypeAlias

import numpy as np

from ..digest import Json
from ..errors import ModelError, UsageError
from ..formats.gguf.base import base_of
from ..formats.gguf.header import Header, read_header
from ..lora.adapter import Adapter
from ..lora.arrays import Array32, Float32
from ..tasks.folders import ExampleSet
from ..tasks.template import Template
from .base_model import gguf_file
from .chat_template import template_of
from .gguf_cache import source_digest
from .gguf_chat import GgufChat
from .llama_adapters import LlamaAdapters
from .llama_library import TOGETHER, LlamaModel, library
from .protocol import Answers, Decoding, Loss, Pair, Question, Row, Scores
from .sampling import Token, no_next_token
from .tokens import Tokenisation, faulty

HELD = 8  # adapters kept in memory
_SPACE = "tokenizer.ggml.add_space_prefix"
_logger = logging.getLogger("lorashelf")
Logits: TypeAlias = Float32[Array32, " vocabulary"]


class LlamaCppBackend(Scores, Answers):
    """A GGUF base that measures and answers texts, with any adapter on it; `adapters` is how many are kept in memory.

    Texts are read one by one, so that a loss depends on its example alone. Threads may share a backend: they take
    turns, one call of llama.cpp at a time.
    """

    def __init__(self, model: LlamaModel, header: Header, template: Template, *, adapters: int = HELD) -> None:
        self._model, self._template = model, template
        tokenizer = LlamaTokenizer(model, header)
        ends = [tokenizer.end_of_turn] if tokenizer.end_of_turn is not None else []
        self.text = Tokenisation(tokenizer, template, ends, model.positions)
        self.adapters = LlamaAdapters(model, base_of(header.path, model.name), adapters)
        self._weights = f"gguf-{source_digest(header.path).removeprefix('b2-')[:16]}"
        self._lock = threading.Lock()
        self._reader: object = None
        """Whose tokens the context holds."""

    @classmethod
    def open(
        cls,
        name: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        template_arguments: Mapping[str, Json] | None = None,
    ) -> LlamaCppBackend:
        """Open a GGUF file; None is SmolLM2-135M-Instruct from its package.

        `device` is cpu, or by default the accelerator that llama.cpp was built for. Raises MissingExtra, UsageError
        for another device and for a dtype, which the file fixes; UnknownName for an architecture; ModelError.
        """
        offloads = bool(library().llama_supports_gpu_offload())
        if dtype is not None:
            what = "the engine llamacpp computes in the types of the GGUF file"
            raise UsageError(what, cure="omit --model-dtype, or give --engine hf")
        if device not in (None, "cpu") and not offloads:
            raise UsageError(f"device {device!r} is not available in this llama.cpp", cure="choose from cpu")
        source, shown = gguf_file(name)
        header = read_header(source)
        model = LlamaModel(source, shown, offload=offloads and device != "cpu")
        if header.fields.get("tokenizer.ggml.model") == "llama" and header.fields.get(_SPACE, True):
            _logger.warning(
                "%s has a SentencePiece vocabulary: llama.cpp puts a space after every special token, transformers "
                "does not; compare its losses with those of llama.cpp only",
                shown,
            )
        return cls(model, header, template_of(LlamaTokenizer(model, header), template_arguments or {}))

    # identity -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name that the base model is known by."""
        return self._model.name

    @property
    def weights(self) -> str:
        """A fingerprint of the file."""
        return self._weights

    @property
    def dtype(self) -> str:
        """The model as llama.cpp describes it, with the type of most weights."""
        return f"llama.cpp {self._model.description}"

    @property
    def template(self) -> Template:
        """The base's template."""
        return self._template

    @property
    def context(self) -> int | None:
        """The number of positions that the base was trained to read."""
        return self.text.context

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter that does not fit the base; warn if only names differ."""
        self.adapters.fits(adapters)

    # losses -------------------------------------------------------------------------------------------------------

    def fitting(self, examples: ExampleSet, longest: int | None = None) -> tuple[ExampleSet, int]:
        """Return the examples that fit into the context (or `longest` tokens) with their answers; count the others."""
        return self.text.fitting(examples, longest)

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """Return −log p(answer | query) in nats and the answer's tokens, end of turn included, per example and pair.

        Raises ShapeMismatch for an adapter of another base, ModelError for an example beyond the context and for a loss
        that is not finite.
        """
        return [self._losses(adapter, examples) for adapter, examples in pairs]

    def _losses(self, adapter: Adapter | None, examples: ExampleSet) -> list[Loss]:
        self.adapters.check(adapter)
        losses = []
        for index, (query, answer) in enumerate(self.text.measurable(examples)):
            with self._lock:
                loss = self._loss(adapter, query, answer)
            if not math.isfinite(loss):
                raise faulty(examples, index, "has a loss that is not finite")
            losses.append(Loss(loss, len(answer)))
        return losses

    def _loss(self, adapter: Adapter | None, query: Sequence[int], answer: Sequence[int]) -> float:
        """Return Σ log Σ exp(logits) − the token's logit over the answer's tokens, summed in float64."""
        read, total = [*query, *answer[:-1]], 0.0
        self._begin(adapter, len(read), None)
        labels = iter(answer)
        for start in range(0, len(read), TOGETHER):
            part = read[start : start + TOGETHER]
            wanted = [start + i >= len(query) - 1 for i in range(len(part))]
            for logits in self._model.read(part, start, wanted):
                top = logits.max()
                total += math.log(np.exp(logits - top).sum(dtype=np.float64)) + float(top - logits[next(labels)])
        return total

    # answers ------------------------------------------------------------------------------------------------------

    def answered(self, adapter: Adapter | None, questions: Sequence[Question]) -> list[str]:
        """Return the greedy answer to each question, up to the end of the turn or of the context."""
        self.adapters.check(adapter)
        answers = []
        for instruction, text, most in questions:
            query = self.text.query(instruction, text)
            room = self.text.room(query, most)
            answers.append(self.text.decoded(list(self._greedy(adapter, query, room))))
        return answers

    def stream(
        self, adapter: Adapter | None, instruction: str, text: str, *, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """Return an iterator over the greedy answer, piece by piece; a character of several tokens is in one piece.

        Raises, before the first piece, ShapeMismatch, and ModelError for a text beyond the context.
        """
        self.adapters.check(adapter)
        query, room = self.text.answerable(instruction, text, max_new_tokens)
        return self.text.pieces(self._greedy(adapter, query, room))

    def decoding(self, most: int) -> OneRow:
        """Return an empty batch of one row, whatever `most` is: llama.cpp has one set of adapters per context."""
        return OneRow(self._next_alone)

    def _next_alone(self, adapter: Adapter | None, tokens: Sequence[int], reader: object) -> Logits:
        with self._lock:
            return self._next(adapter, tokens, len(tokens), reader).copy()

    def _greedy(self, adapter: Adapter | None, query: Sequence[int], count: int) -> Iterator[int]:
        """Yield the likeliest tokens after a query, at most `count`, up to the end of the turn.

        Others may use the model between two tokens: then the text is read again.
        """
        row: list[int] = []
        reader = object()
        while len(row) < count and not (row and self.text.ended(row)):
            with self._lock:
                logits = self._next(adapter, [*query, *row], len(query) + count, reader)
                token = int(logits.argmax())
                if not np.isfinite(logits[token]):
                    raise no_next_token()
            row.append(token)
            yield token

    def _next(self, adapter: Adapter | None, tokens: Sequence[int], positions: int, reader: object) -> Logits:
        """Return the logits after the tokens, of which all but the last are read already if the reader is the same.

        The context is made for so many positions, and made anew for a longer text.
        """
        begun = len(tokens) - 1 if self._reader is reader and len(tokens) <= self._model.length else 0
        if not begun:
            self._begin(adapter, positions, reader)
        last = np.empty(0, np.float32)
        for start in range(begun, len(tokens), TOGETHER):
            part = tokens[start : start + TOGETHER]
            for logits in self._model.read(part, start, [start + i == len(tokens) - 1 for i in range(len(part))]):
                last = logits
        return last

    def _begin(self, adapter: Adapter | None, positions: int, reader: object) -> None:
        self._reader = None
        self._model.begin(self.adapters.loaded(adapter), positions)
        self._reader = reader


class OneRow(Decoding):
    """A text that is continued alone; `read` returns the logits after all its tokens."""

    most = 1

    def __init__(self, read: Callable[[Adapter | None, Sequence[int], object], Logits]) -> None:
        self._read = read
        self.rows: list[Row] = []
        self._tokens: list[int] = []

    def join(self, rows: Sequence[Row]) -> list[Token | ModelError]:
        """Read the prompt of a row; return its first token. Raises ShapeMismatch, CorruptShelf and OutOfMemory."""
        (row,) = rows
        token = self._chosen(row, list(row.prompt))
        self.rows = [row]
        return [token]

    def step(self) -> list[Token | ModelError]:
        """Return the row's next token. Raises OutOfMemory."""
        return [self._chosen(row, self._tokens) for row in self.rows]

    def keep(self, rows: Collection[Row]) -> None:
        """Drop the row unless it is one of these."""
        self.rows = [row for row in self.rows if any(row is each for each in rows)]

    def _chosen(self, row: Row, tokens: list[int]) -> Token | ModelError:
        logits = self._read(row.adapter, tokens, row)
        if not np.isfinite(logits.max()):
            return no_next_token()
        token = Token(int(logits.argmax())) if row.sampler.plain else row.sampler.choose(logits)
        self._tokens = [*tokens, token.id]
        return token


class LlamaTokenizer(GgufChat):
    """What `Tokenisation` and `template_of` ask of a tokenizer, by llama.cpp."""

    def __init__(self, model: LlamaModel, header: Header) -> None:
        super().__init__(header, model.name)
        self._model = model
        numbers = [header.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "eot")]
        self.bos_token_id, self.eos_token_id, self.end_of_turn = numbers

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        """Return the token ids of a text as `input_ids`."""
        return SimpleNamespace(input_ids=self._model.encode(text, add_special_tokens))

    def decode(
        self, tokens: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Return the text of tokens."""
        return self._model.decode(tokens, not skip_special_tokens)
