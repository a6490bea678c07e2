"""The engine `hf`: a base model in transformers, with an adapter's factors on its linear layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..digest import Json
from ..lora.adapter import Adapter
from ..lora.arrays import Array32, Float32, Square
from ..tasks.folders import Example, ExampleSet
from ..tasks.template import Template
from .base_model import BaseModel, open_base
from .batching import cheapest_batches, largest_batches, padded
from .decoding import Read, greedy, grows_plainly, layers_of
from .effects import EffectSums
from .hooks import AdapterPool, head_at
from .loading import fingerprint, libraries
from .memory import sparing, within_memory
from .protocol import Continues, Effects, GainGradients, LanguageModel, Loss, Pair, Question, ReadsOnce
from .rows import Rows
from .tokens import Tokenisation, Tokens, faulty

if TYPE_CHECKING:
    import torch

LOGIT_BYTES = 2**28  # a batch's logits at its labels stay below this, in float32
_ANSWERED = 8  # a batch of answers has this many times `batch` positions: it needs logits at one position per row only
_MOST_ANSWERED = 2**16  # and no more: the keys and values of all its positions are in memory
DEPTH = 2 / 3  # of the layers: representations there separate tasks best (docs/results.md)
HELD = 8  # adapters kept on the device
_Asked = tuple[Sequence[int] | Read, int]
"""A query, its tokens or as it was read, and the most tokens that its answer may have."""


class HFBackend(LanguageModel, ReadsOnce, Continues, Effects, GainGradients):
    """A base model that measures, answers and represents texts, with any adapter on it.

    `batch` is the most positions in one forward pass, `adapters` how many are kept on the base's device. Threads may
    share a backend: they take turns, one forward pass at a time.
    """

    def __init__(self, base: BaseModel, *, batch: int | None = None, adapters: int = HELD) -> None:
        self._torch, _ = libraries()
        self.base = base
        self.batch = batch or (2048 if base.model.device.type == "cpu" else 16384)
        self.positions = {"tokens": 0, "padding": 0}
        """Positions in the forward passes of `nll` so far: tokens, and padding."""
        ends = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        context = getattr(base.model.config, "max_position_embeddings", None)
        self._text = Tokenisation(base.tokenizer, base.template, ends, context)
        self.adapters = AdapterPool(base, adapters)
        self._weights = fingerprint(base.model)

    @classmethod
    def open(
        cls,
        name: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        template_arguments: Mapping[str, Json] | None = None,
    ) -> HFBackend:
        """Open a base model by hub id, folder or GGUF file. Raises as `open_base`."""
        return cls(open_base(name, device=device, dtype=dtype, template_arguments=template_arguments))

    # identity -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name that the base model is known by."""
        return self.base.name

    @property
    def weights(self) -> str:
        """A fingerprint of the base's weights: two files may share a name."""
        return self._weights

    @property
    def dtype(self) -> str:
        """The number format that the base computes in, as torch names it."""
        return str(self.base.model.dtype).removeprefix("torch.")

    @property
    def template(self) -> Template:
        """The base's template."""
        return self.base.template

    @property
    def context(self) -> int | None:
        """The number of positions of the base; None if the base sets no limit."""
        return self.text.context

    @property
    def text(self) -> Tokenisation:
        """Text to tokens and back."""
        return self._text

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Raise ShapeMismatch naming every adapter whose sizes differ from the base's; warn if only names differ."""
        self.adapters.fits(adapters)

    # losses -------------------------------------------------------------------------------------------------------

    def fitting(self, examples: ExampleSet, longest: int | None = None) -> tuple[ExampleSet, int]:
        """Return the examples that fit into the context (or `longest` tokens) with their answers; count the others."""
        return self.text.fitting(examples, longest)

    def tokens(self, examples: ExampleSet, example: Example) -> Tokens:
        """Return the token ids of the query and of the answer, tokenised separately, as in generation."""
        return self.text.tokens(examples, example)

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """Return −log p(answer | query) in nats and the answer's tokens, end of turn included, per example and pair.

        A batch holds examples of one pair, sorted by length, and depends on nothing else. Raises ShapeMismatch for an
        adapter of another base, ModelError for an example beyond the context and for a loss that is not finite.
        """
        return [self._losses(adapter, examples) for adapter, examples in pairs]

    def _losses(self, adapter: Adapter | None, examples: ExampleSet) -> list[Loss]:
        self.adapters.check(adapter)
        tokens = self.text.measurable(examples)
        losses = [Loss(math.nan, 0)] * len(tokens)
        for members in self.batches(tokens):
            batch = [tokens[i] for i in members]
            sums = sparing(partial(self._forward, adapter), batch, self.name)
            for index, loss in zip(members, sums, strict=True):
                losses[index] = self._loss(examples, index, loss, len(tokens[index][1]))
        return losses

    def _loss(self, examples: ExampleSet, index: int, loss: float, tokens: int) -> Loss:
        if not math.isfinite(loss):
            raise faulty(examples, index, "has a loss that is not finite")
        return Loss(loss, tokens)

    def batches(self, tokens: Sequence[Tokens]) -> list[list[int]]:
        """Return indices in batches of similar length whose logits at the answers stay below LOGIT_BYTES."""
        lengths = [len(query) + len(answer) for query, answer in tokens]
        labels = max(1, LOGIT_BYTES // (4 * self.base.model.config.get_text_config().vocab_size))
        return cheapest_batches(lengths, [len(answer) for _, answer in tokens], self.batch, labels)

    def _forward(self, adapter: Adapter | None, batch: Sequence[Tokens]) -> list[float]:
        with self.adapters.on_base(adapter), self._torch.inference_mode():
            row, losses = self.token_losses(batch)
        return self.sums(row, losses, len(batch))

    def token_losses(self, batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for every answer token of a batch in order, its example's index and its −log p in float32.

        The model's head computes these positions only. Outside inference mode the losses can be differentiated.
        """
        row, losses, _ = self._read_through(batch)
        return row, losses

    def _read_through(
        self, batch: Sequence[Tokens], cache: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `token_losses`, and the logits (answer tokens, vocabulary); keys and values go into an empty cache."""
        model = self.base.model
        ids, mask = padded([query + answer for query, answer in batch], self.text.pad, model.device)
        real = int(mask.sum())
        self.positions["tokens"] += real
        self.positions["padding"] += mask.numel() - real
        row, column = _answered(batch, ids.device)
        kept = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        with head_at(model, row, column - 1):
            logits = model(input_ids=ids, attention_mask=mask, **kept).logits[0]
        return row, self._torch.nn.functional.cross_entropy(logits.float(), ids[row, column], reduction="none"), logits

    def sums(self, row: torch.Tensor, losses: torch.Tensor, count: int) -> list[float]:
        """Return token losses summed by example, in float64."""
        sums = self._torch.zeros(count, dtype=self._torch.float64, device="cpu")
        return [float(x) for x in sums.index_add_(0, row.cpu(), losses.detach().cpu().double())]

    # effects ------------------------------------------------------------------------------------------------------

    def effects(self, adapters: Sequence[Adapter], sets: Sequence[ExampleSet]) -> Iterator[Square]:
        """Yield G_uv = Σ_m Σ_x ⟨ΔW_u x, ΔW_v x⟩ / Σ_x ‖y‖² per example set, (n, n): one forward pass of the bare base.

        Raises ShapeMismatch, ModelError for an example beyond the context, OutOfMemory.
        """
        sums = EffectSums([self.adapters.placed(x) for x in adapters])
        for examples in sets:
            tokens = self.text.measurable(examples)
            with within_memory("out of memory", self.name, "free memory, or give fewer or shorter examples"):
                for members in self.batches(tokens):
                    self._observe(sums, [tokens[i] for i in members])
                yield sums.gram()

    def _observe(self, sums: EffectSums, batch: Sequence[Tokens]) -> None:
        ids, mask = padded([query + answer for query, answer in batch], self.text.pad, self.base.model.device)
        row, column = _answered(batch, ids.device)
        with self.adapters.watched(sums.at(row, column - 1)), self._torch.inference_mode():
            self.base.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    def gain_gradient(self, adapter: Adapter, examples: ExampleSet) -> dict[str, float]:
        """Return ∂ loss / ∂ log φ at φ = 1 by module path, with φ ΔW in place of ΔW, a batch at a time.

        Raises ShapeMismatch, OutOfMemory, and ModelError for an example beyond the context.
        """
        self.adapters.check(adapter)
        tokens = self.text.measurable(examples)
        count = sum(len(answer) for _, answer in tokens)
        ones = self._torch.ones(len(adapter.modules), device=self.base.model.device, requires_grad=True)
        total = self._torch.zeros(len(ones), dtype=self._torch.float64)
        for members in self.batches(tokens):
            with (
                within_memory("out of memory", self.name, "give fewer or shorter examples, or free memory"),
                self.adapters.scaled(adapter, dict(zip(adapter.modules, ones, strict=True))),
            ):
                loss = self.token_losses([tokens[i] for i in members])[1].sum() / count
                total += self._torch.autograd.grad(loss, ones)[0].cpu()
        return dict(zip(adapter.modules, total.tolist(), strict=True))

    # answers ------------------------------------------------------------------------------------------------------

    @property
    def together(self) -> int:
        """A step over a few rows takes as long as the weights take to be read: 128 questions share it."""
        return 128

    def answered(self, adapter: Adapter | None, questions: Sequence[Question]) -> list[str]:
        """Return the greedy answer to each question, up to the end of the turn or of the context.

        Questions are answered in batches of similar length. Raises ShapeMismatch, OutOfMemory, ModelError.
        """
        self.adapters.check(adapter)
        queries = [self.text.query(instruction, text) for instruction, text, _ in questions]
        return self._texts(adapter, [(query, asked[2]) for query, asked in zip(queries, questions, strict=True)])

    def _texts(self, adapter: Adapter | None, asked: Sequence[_Asked]) -> list[str]:
        """Return the answers to queries, in batches of similar length."""
        rooms = [self.text.room(query, most) for query, most in asked]
        longest = max((most for _, most in asked), default=0)  # a batch may go on for as long
        whole = [i for i, (query, _) in enumerate(asked) if rooms[i] and self.text.room(query, longest) == longest]
        lengths = [len(asked[i][0]) + longest for i in whole]
        together = [[whole[j] for j in batch] for batch in largest_batches(lengths, self._kept)]
        alone = [[i] for i in sorted({i for i, room in enumerate(rooms) if room} - set(whole))]
        answers = [""] * len(asked)
        for members in [*together, *alone]:
            rows = sparing(partial(self._written, adapter), [(asked[i][0], rooms[i]) for i in members], self.name)
            for index, row in zip(members, rows, strict=True):
                answers[index] = self.text.decoded(row)
        return answers

    @property
    def _kept(self) -> int:
        """The most positions whose keys and values are in memory for answers."""
        return min(_ANSWERED * self.batch, _MOST_ANSWERED)

    def losses_and_answers(
        self, adapter: Adapter | None, asked: Sequence[tuple[ExampleSet, int]]
    ) -> list[tuple[list[Loss], list[str]]]:
        """Return the losses of `nll`, and the answers of `answered` of at most so many tokens, per set of examples.

        A query is read once: the answer continues from its keys and values in the forward pass of its loss. Raises as
        `nll` and `answered`.
        """
        if not self._joins_rows:
            return super().losses_and_answers(adapter, asked)
        self.adapters.check(adapter)
        found = [([Loss(math.nan, 0)] * len(some.examples), [""] * len(some.examples)) for some, _ in asked]
        waiting: list[tuple[int, int, Read]] = []

        def answer() -> None:
            texts = self._texts(adapter, [(read, asked[of][1]) for of, _, read in waiting])
            for (of, index, _), text in zip(waiting, texts, strict=True):
                found[of][1][index] = text
            waiting.clear()

        for of, (examples, _) in enumerate(asked):
            tokens = self.text.measurable(examples)
            for members in self.batches(tokens):
                batch = [tokens[i] for i in members]
                reads = sparing(partial(self._read, adapter), batch, self.name)
                for index, (loss, read) in zip(members, reads, strict=True):
                    found[of][0][index] = self._loss(examples, index, loss, len(tokens[index][1]))
                    waiting.append((of, index, read))
                if sum(len(read) + asked[its][1] for its, _, read in waiting) >= self._kept:
                    answer()
        answer()
        return found

    def _read(self, adapter: Adapter | None, batch: Sequence[Tokens]) -> list[tuple[float, Read]]:
        """Return each example's loss and its query, to be continued."""
        _, transformers = libraries()
        cache = transformers.DynamicCache()
        with self.adapters.on_base(adapter), self._torch.inference_mode():
            row, losses, logits = self._read_through(batch, cache)
            layers, reads, first = layers_of(cache), [], 0
            for i, (query, answer) in enumerate(batch):
                own = slice(i, i + 1), slice(None), slice(len(query))
                reads.append(Read([(keys[own], values[own]) for keys, values in layers], logits[first].clone()))
                first += len(answer)
        return list(zip(self.sums(row, losses, len(batch)), reads, strict=True))

    def stream(
        self, adapter: Adapter | None, instruction: str, text: str, *, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """Return an iterator over the greedy answer, piece by piece; a character of several tokens is in one piece.

        Raises, before the first piece, ShapeMismatch, and ModelError for a text beyond the context.
        """
        self.adapters.check(adapter)
        query, room = self.text.answerable(instruction, text, max_new_tokens)
        return self.text.pieces(self._one_by_one(adapter, room, query))

    def _one_by_one(self, adapter: Adapter | None, count: int, query: Sequence[int]) -> Iterator[int]:
        """Yield the tokens of one answer as they are generated. Raises OutOfMemory."""
        with within_memory("out of memory", self.name, "shorten the text"):
            for (token,) in self._steps(adapter, [(query, count)]):
                if token is not None:
                    yield token

    def _written(self, adapter: Adapter | None, batch: Sequence[_Asked]) -> list[list[int]]:
        """Return the tokens of each query's answer."""
        rows: list[list[int]] = [[] for _ in batch]
        for step in self._steps(adapter, batch):
            for row, token in zip(rows, step, strict=True):
                row.extend([] if token is None else [token])
        return rows

    def _steps(self, adapter: Adapter | None, batch: Sequence[_Asked]) -> Iterator[list[int | None]]:
        texts, counts = zip(*batch, strict=True)
        on_base = partial(self.adapters.on_base, adapter)
        positions = self.batch if len(texts) > 1 and self._joins_rows else None
        return greedy(self.base.model, texts, counts, self.text.ended, self.text.pad, on_base, positions)

    @cached_property
    def _joins_rows(self) -> bool:
        """Whether rows that were read apart can be continued together. Raises OutOfMemory."""
        with within_memory("out of memory", self.name, "free memory, or give a smaller base"):
            return grows_plainly(self.base.model, partial(self.adapters.on_base, None))

    def decoding(self, most: int) -> Rows:
        """Return an empty batch of at most `most` rows, each with an adapter of its own; one row if the base keeps
        another state than keys and values, or has experts in linear layers.
        """
        self.adapters.hold(most)
        apart = self.adapters.separable and self._joins_rows
        return Rows(self.base.model, self.adapters, self.text.pad, most if apart else 1)

    # representations ----------------------------------------------------------------------------------------------

    @property
    def embedding_id(self) -> str:
        """Identifies all that `embed` depends on besides the texts."""
        return f"{self.id} text at {DEPTH:.3f}"

    def embed(self, texts: Sequence[str], depth: float = DEPTH) -> Float32[Array32, "texts width"]:
        """Return (n, d) float32: each text's mean hidden state after `depth`, a share of the bare base's layers.

        The text is a user turn without an instruction; the mean is over the text's own tokens, as many as fit into
        the context.
        """
        before = self.text.encoded(self.template.before)
        rows = [[*before, *self.text.encoded(text)][: self.context] for text in texts]
        layer = round(depth * self.base.model.config.get_text_config().num_hidden_layers)
        means = np.empty((len(texts), self.base.model.get_output_embeddings().weight.shape[1]), np.float32)

        def mean_states(some: Sequence[Sequence[int]]) -> list[Array32]:
            ids, mask = padded(some, self.text.pad, self.base.model.device)
            with self.adapters.on_base(None), self._torch.inference_mode():
                seen = self.base.model.base_model(
                    input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
                ).hidden_states[layer]
            pairs = zip(some, seen, strict=True)
            return [states[len(before) : len(row)].float().mean(dim=0).cpu().numpy() for row, states in pairs]

        for members in self.batches([(row, []) for row in rows]):
            means[members] = sparing(mean_states, [rows[i] for i in members], self.name)
        return means


def _answered(batch: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of every answer token of a batch, in order."""
    places = [(i, len(query) + j) for i, (query, answer) in enumerate(batch) for j in range(len(answer))]
    torch, _ = libraries()
    row, column = torch.tensor(places, device=device).T
    return row, column
