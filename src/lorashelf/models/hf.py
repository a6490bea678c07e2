"""Losses and answers of a transformers model with an adapter's factors on its linear layers; the base is not copied."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from ..errors import ModelError, OutOfMemory
from ..lora.adapter import Adapter, Matrix
from ..tasks.folders import Example, ExampleSet
from .base_model import BaseModel, open_base
from .hooks import Attachment, within_memory
from .loading import fingerprint, libraries
from .protocol import Loss, Pair

LOGIT_BYTES = 2**28  # a batch's logits at its labels stay below this, in float32
MOST_PADDING = 0.1  # share of a batch's positions
_ANSWERED = 4  # times as many positions as `batch` in a batch of answers, whose logits are at one position a row
_CALL = 24  # positions that one forward pass costs beside its own, in balance with padding
DEPTH = 2 / 3  # of the layers, where representations tell tasks apart best: docs/results.md
_UNDECODED = "\ufffd"  # what a decoder shows for bytes that are no letter
_logger = logging.getLogger("lorashelf")
Tokens = tuple[list[int], list[int]]
T = TypeVar("T")
R = TypeVar("R")


class HFBackend:
    """A base model that measures and answers with any adapter; `batch` is the most positions of one forward pass."""

    def __init__(self, base: BaseModel, *, batch: int | None = None) -> None:
        self._torch, transformers = libraries()
        self.base = base
        own = getattr(base.model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)  # its penalties would be added to ours, its stops are the model's
        base.model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
        self.batch = batch or (2048 if base.model.device.type == "cpu" else 16384)
        self.positions = {"tokens": 0, "padding": 0}
        """What the forward passes of `nll` saw so far: tokens, and padding beside them."""
        self._context = getattr(base.model.config, "max_position_embeddings", None) or math.inf
        end = self._encoded(base.template.end.strip())
        self._written_end = base.template.end if len(end) > 1 else ""
        """The end of a turn that is no token: it is looked for in the text."""
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        self._stops = sorted({*(end if len(end) == 1 else ()), *ends, base.tokenizer.eos_token_id} - {None})
        self.weights = fingerprint(base.model)
        """Identifies the base's weights: two files may bear one name."""
        self._attachment = Attachment(base)

    @classmethod
    def open(
        cls,
        name: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> HFBackend:
        """Open a base model by hub id, folder or GGUF file. Raises as `open_base`."""
        return cls(open_base(name, device=device, dtype=dtype, template_arguments=template_arguments))

    @property
    def id(self) -> str:
        """Base, its weights, dtype and prompt rendering: what a loss depends on beside adapter and examples."""
        dtype = str(self.base.model.dtype).removeprefix("torch.")
        return f"{self.base.name} {self.weights} {dtype} {self.base.template.id}"

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter that is not of this base's sizes; warn where only names differ."""
        self._attachment.fits(adapters)

    def attach(self, adapter: Adapter | None) -> None:
        """Put an adapter in place of the one before; None is the bare base. Raises ShapeMismatch, ModelError."""
        self._attachment.attach(adapter)

    def fitting(self, examples: ExampleSet, longest: int | None = None) -> tuple[ExampleSet, int]:
        """The examples that fit with their answers into the context, or `longest` tokens, and how many do not."""
        room = min(self._context, longest or math.inf)
        kept = tuple(e for e in examples.examples if sum(map(len, self.tokens(examples, e))) <= room)
        return ExampleSet(examples.task, examples.instruction, kept), len(examples.examples) - len(kept)

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """−log p(answer | query) of every example of every pair, in nats, and the answer's tokens with the end of turn.

        Batches hold examples of one pair, sorted by length, and depend on nothing else. Raises ShapeMismatch for an
        adapter of another base, ModelError for an example beyond the context and for a loss that is not finite.
        """
        results = []
        for adapter, examples in pairs:
            self.attach(adapter)
            tokens = [self.tokens(examples, example) for example in examples.examples]
            losses = [Loss(math.nan, 0)] * len(tokens)
            for index, (query, answer) in enumerate(tokens):
                if len(query) + len(answer) > self._context:
                    raise self._faulty(examples, index, "is longer than the model's context")
            for members in self.batches(tokens):
                sums = self._sparing(self._forward, [tokens[i] for i in members])
                for index, loss in zip(members, sums, strict=True):
                    if not math.isfinite(loss):
                        raise self._faulty(examples, index, "has a loss that is not finite")
                    losses[index] = Loss(loss, len(tokens[index][1]))
            results.append(losses)
        return results

    def answers(
        self, adapter: Adapter | None, instruction: str, texts: Sequence[str], *, max_new_tokens: int = 64
    ) -> list[str]:
        """The greedy answers to texts under one instruction, without the end of the turn; the context ends them too."""
        self.attach(adapter)
        queries = [self._encoded(self.base.template.query(instruction, text)) for text in texts]
        room = [int(min(max_new_tokens, self._context - len(query))) for query in queries]
        alone = [[i] for i in range(len(texts)) if 0 < room[i] < max_new_tokens]
        answers = [""] * len(texts)
        for members in [*self._together(queries, room, max_new_tokens), *alone]:
            greedy = partial(self._greedy, count=room[members[0]])
            rows = self._sparing(greedy, [queries[i] for i in members])
            for index, row in zip(members, rows, strict=True):
                answers[index] = self.decoded(row)
        return answers

    def _greedy(self, queries: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The tokens that follow each query, by transformers."""
        ids, mask = self._padded(queries, left=True)
        with self._torch.inference_mode():
            written = self.base.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=self.generation(count)
            )
        rows: list[list[int]] = written[:, ids.shape[1] :].tolist()
        return rows

    def _together(self, queries: Sequence[list[int]], room: Sequence[int], count: int) -> list[list[int]]:
        """Indices of the queries with room for `count` tokens, in batches by length as large as memory lets them be: a
        step reads every weight, however many answers it is for.
        """
        batches: list[list[int]] = []
        for i in sorted((i for i in range(len(queries)) if room[i] == count), key=lambda i: len(queries[i])):
            positions = len(queries[i]) + count
            if not batches or (len(batches[-1]) + 1) * positions > _ANSWERED * self.batch:
                batches.append([])
            batches[-1].append(i)
        return batches

    def generation(self, max_new_tokens: int) -> Any:
        """Transformers' settings of greedy answering: stops at the end of the turn or of the text."""
        _, transformers = libraries()
        return transformers.GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=self._stops or None, pad_token_id=self._pad
        )

    def decoded(self, row: Sequence[int]) -> str:
        """The text of generated token ids, up to the first stop."""
        cut = next((i for i, token in enumerate(row) if token in self._stops), len(row))
        decode = self.base.tokenizer.decode
        text: str = decode(row[:cut], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return (text.partition(self._written_end)[0] if self._written_end else text).strip()

    @property
    def _pad(self) -> int:
        """Any token will do: what it fills is masked."""
        return self._stops[0] if self._stops else 0

    @property
    def base_name(self) -> str:
        """The name the base model is known by."""
        return self.base.name

    def stream(
        self, adapter: Adapter | None, instruction: str, text: str, *, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """The greedy answer in pieces, as they are written; a letter of several tokens is in one piece.

        Raises at once ShapeMismatch, and ModelError for a text beyond the context.
        """
        self.attach(adapter)
        query = self._encoded(self.base.template.query(instruction, text))
        room = self._context - len(query)
        if room < 1:
            where = f"{len(query)} tokens with the instruction; the model's context is {self._context}"
            raise ModelError("the text is too long to be answered", where=where, cure="shorten it")
        return self._pieces(self._written(adapter, query, int(min(max_new_tokens, room))))

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens as it settles: bytes that are no letter yet, and spaces that may be the last, wait."""
        row: list[int] = []
        shown = 0
        for token in tokens:
            row.append(token)
            settled = self._settled(row)
            if len(settled) > shown:
                yield settled[shown:]
                shown = len(settled)
            if self._written_end and self._written_end in self.base.tokenizer.decode(row):
                break
        if rest := self.decoded(row)[shown:]:
            yield rest

    def _settled(self, row: Sequence[int]) -> str:
        """The text so far without what may still become a letter, or the end of the turn."""
        text = self.decoded(row).rstrip(_UNDECODED).rstrip()
        begun = (size for size in range(len(self._written_end) - 1, 0, -1) if text.endswith(self._written_end[:size]))
        return text[: -next(begun, 0) or None].rstrip()

    def _written(self, adapter: Adapter | None, query: list[int], count: int) -> Iterator[int]:
        """At most `count` tokens, each the likeliest, up to the first stop. Raises ModelError where memory ends."""
        model, make = self.base.model, self._torch.tensor
        read, cache = query, None
        for _ in range(count):
            self.attach(adapter)  # whoever reads the stream may have asked for another meanwhile
            with (
                within_memory("out of memory", self.base.name, "shorten the text"),
                self._torch.inference_mode(),
                _head_at(model, [0], [-1]),
            ):
                seen = model(input_ids=make([read], device=model.device), past_key_values=cache, use_cache=True)
            token = int(seen.logits[0, -1].argmax())
            if token in self._stops:
                return
            yield token
            read, cache = [token], seen.past_key_values

    # representations --------------------------------------------------------------------------------------------

    @property
    def embedding_id(self) -> str:
        """What `embed` depends on beside the texts."""
        return f"{self.id} text at {DEPTH:.3f}"

    def embed(self, texts: Sequence[str], depth: float = DEPTH) -> Matrix:
        """(n, d) float32: each text's mean hidden state after that share of the bare base's layers.

        The text stands in a user turn without an instruction; the mean is over its own tokens, as many as the context
        holds.
        """
        self.attach(None)
        before = self._encoded(self.base.template.before)
        rows = [[*before, *self._encoded(text)][: int(min(self._context, 2**31))] for text in texts]
        layer = round(depth * self.base.model.config.get_text_config().num_hidden_layers)
        means = np.empty((len(texts), self.base.model.get_output_embeddings().weight.shape[1]), np.float32)

        def mean_states(some: Sequence[Sequence[int]]) -> list[Any]:
            ids, mask = self._padded(some)
            with self._torch.inference_mode():
                seen = self.base.model.base_model(
                    input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
                ).hidden_states[layer]
            pairs = zip(some, seen, strict=True)
            return [states[len(before) : len(row)].float().mean(dim=0).cpu().numpy() for row, states in pairs]

        for members in self.batches([(row, []) for row in rows]):
            means[members] = self._sparing(mean_states, [rows[i] for i in members])
        return means

    # batches ----------------------------------------------------------------------------------------------------

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.base.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def tokens(self, examples: ExampleSet, example: Example) -> Tokens:
        """The token ids of query and answer, apart: as they are read and written in generation."""
        template = self.base.template
        query = self._encoded(template.query(examples.instruction, example.input))
        return query, self._encoded(template.answer(example.output))

    def batches(self, tokens: Sequence[Tokens]) -> list[list[int]]:
        """Indices in batches of similar length: the cheapest cut of the sorted examples, at most a tenth padding."""
        lengths = [len(query) + len(answer) for query, answer in tokens]
        order = sorted(range(len(tokens)), key=lambda i: (lengths[i], i))
        label_limit = max(1, LOGIT_BYTES // (4 * self.base.model.config.get_text_config().vocab_size))
        best = [0.0, *[math.inf] * len(order)]
        start = [0] * (len(order) + 1)
        for stop in range(1, len(order) + 1):
            longest, real, labels = lengths[order[stop - 1]], 0, 0
            for first in range(stop - 1, -1, -1):
                real += lengths[order[first]]
                labels += len(tokens[order[first]][1])
                positions = longest * (stop - first)
                alone = first == stop - 1
                if not alone and (positions > self.batch or labels > label_limit):
                    break
                if positions - real <= MOST_PADDING * positions and best[first] + positions + _CALL < best[stop]:
                    best[stop], start[stop] = best[first] + positions + _CALL, first
        cuts = [len(order)]
        while cuts[-1]:
            cuts.append(start[cuts[-1]])
        return [order[first:stop] for stop, first in pairwise(cuts)]

    def _padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Any, Any]:
        """(n, longest) token ids and the mask of what is no padding; the pad token may be any, it is masked."""
        longest = max(map(len, rows))
        filled = [[self._pad] * (longest - len(row)) for row in rows]
        ids = [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, filled, strict=True)]
        real = [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for r, f in zip(rows, filled)]
        make = self._torch.tensor
        return make(ids, device=self.base.model.device), make(real, device=self.base.model.device)

    def _sparing(self, work: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T]) -> list[R]:
        """What the work gives for a batch; where memory ends, once more one by one. Raises ModelError."""
        what, cure = "out of memory, also with one example at a time", "free memory, or give a smaller base"
        limit = partial(within_memory, what, self.base.name, f"{cure} or shorter examples")
        try:
            with limit():
                return list(work(batch))
        except OutOfMemory:
            _logger.warning("out of memory with %d examples in a batch; trying one at a time", len(batch))
        with limit():
            return [found for one in batch for found in work([one])]

    def _forward(self, batch: Sequence[Tokens]) -> list[float]:
        with self._torch.inference_mode():
            row, losses = self.token_losses(batch)
        return self.sums(row, losses, len(batch))

    def token_losses(self, batch: Sequence[Tokens]) -> tuple[Any, Any]:
        """For every answer token of a batch, in order: which example it is of, and its −log p in float32.

        The model's head sees these positions only. Outside inference mode the losses can be differentiated.
        """
        torch, model = self._torch, self.base.model
        ids, mask = self._padded([query + answer for query, answer in batch])
        real = int(mask.sum())
        self.positions["tokens"] += real
        self.positions["padding"] += mask.numel() - real
        rows = [(i, len(q) + j) for i, (q, a) in enumerate(batch) for j in range(len(a))]
        row, column = torch.tensor(rows, device=ids.device).T
        with _head_at(model, row, column - 1):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        return row, torch.nn.functional.cross_entropy(logits.float(), ids[row, column], reduction="none")

    def sums(self, row: Any, losses: Any, count: int) -> list[float]:
        """Token losses summed by example, in float64."""
        sums = self._torch.zeros(count, dtype=self._torch.float64, device="cpu")
        return [float(x) for x in sums.index_add_(0, row.cpu(), losses.detach().cpu().double())]

    def _faulty(self, examples: ExampleSet, index: int, what: str) -> ModelError:
        shown = examples.examples[index].input[:60]
        where = f"{examples.task}, example {index + 1}: {shown!r}"
        return ModelError(
            f"an example {what}", where=where, cure="shorten it or leave it out; check the adapter for NaN"
        )


@contextmanager
def _head_at(model: Any, row: Any, column: Any) -> Iterator[None]:
    """The head sees only the positions (row, column): logits become (1, n, vocabulary), whatever the model does."""

    def gather(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][row, column].unsqueeze(0), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()
