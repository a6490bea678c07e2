"""Texts of different tasks, continued side by side: one forward pass for all, each row with its own adapter.

Rows join and leave between two forward passes. The batch is padded on the left; a row's key-value cache moves with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .batching import padded
from .decoding import joined, layers_of, next_logits
from .hooks import AdapterPool, Placed
from .loading import libraries
from .memory import within_memory
from .protocol import Row
from .sampling import Token, no_next_token

if TYPE_CHECKING:
    import torch


class Rows:
    """Rows of one base; at most `most` side by side: 1 for a base that cannot keep rows apart."""

    def __init__(self, model: Any, adapters: AdapterPool, pad: int, most: int) -> None:
        self._torch, _ = libraries()
        self._model, self._adapters, self._pad, self.most = model, adapters, pad, most
        self.rows: list[Row] = []
        self._placed: list[Placed] = []
        self._cache: Any = None
        self._mask: Any = None
        self._read: Any = None

    def join(self, rows: Sequence[Row]) -> list[Token | ModelError]:
        """Read the prompts of new rows in one forward pass; return the first token of each.

        Raises ShapeMismatch, CorruptShelf and OutOfMemory, and then none of them has joined.
        """
        placed = [self._adapters.placed(row.adapter) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: id(placed[i]))
        read, mask = padded([rows[i].prompt for i in order], self._pad, self._model.device, left=True)
        logits, cache = self._passed(read, mask, self._new_cache(), [placed[i] for i in order])
        tokens = self._chosen(logits, [rows[i] for i in order])
        self._merge([rows[i] for i in order], [placed[i] for i in order], cache, mask, _ids(tokens))
        return [tokens[order.index(i)] for i in range(len(rows))]

    def step(self) -> list[Token | ModelError]:
        """Return the next token of every row, in the order of `rows`. Raises OutOfMemory."""
        self._mask = self._torch.cat([self._mask, self._torch.ones_like(self._read)], dim=1)
        logits, self._cache = self._passed(self._read, self._mask, self._cache, self._placed)
        tokens = self._chosen(logits, self.rows)
        self._read = self._column(_ids(tokens))
        return tokens

    def keep(self, rows: Collection[Row]) -> None:
        """Drop all rows but these."""
        stay = [i for i, row in enumerate(self.rows) if any(row is each for each in rows)]
        if len(stay) == len(self.rows):
            return
        if not stay:
            self.rows, self._placed, self._cache, self._mask, self._read = [], [], None, None, None
            return
        self._select(stay)

    def _passed(
        self, read: torch.Tensor, mask: torch.Tensor, cache: Any, placed: Sequence[Placed]
    ) -> tuple[torch.Tensor, Any]:
        with within_memory("out of memory", self._model.name_or_path, "free memory, or continue fewer texts at a time"):
            return next_logits(self._model, read, mask, cache, lambda: self._adapters.on_rows(placed))

    def _chosen(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Token | ModelError]:
        best, likeliest = logits.max(-1)
        finite, ids = self._torch.isfinite(best).tolist(), likeliest.tolist()
        chosen: list[Token | ModelError] = []
        for i, row in enumerate(rows):
            if not finite[i]:
                chosen.append(no_next_token())
            elif row.sampler.plain:
                chosen.append(Token(ids[i]))
            else:
                chosen.append(row.sampler.choose(logits[i].float().cpu().numpy()))
        return chosen

    # the cache ----------------------------------------------------------------------------------------------------

    def _new_cache(self) -> Any:
        """Return an empty cache. One that keeps all keys, also of a layer with a sliding window: rows can be merged."""
        _, transformers = libraries()
        return transformers.DynamicCache() if self.most > 1 else None

    def _merge(self, rows: list[Row], placed: list[Placed], cache: Any, mask: torch.Tensor, ids: Sequence[int]) -> None:
        """Add rows to the batch, rows of one adapter side by side."""
        read = self._column(ids)
        if not self.rows:
            self.rows, self._placed, self._mask, self._read, self._cache = rows, placed, mask, read, cache
            return
        self._cache, self._mask = joined([layers_of(self._cache), layers_of(cache)], [self._mask, mask])
        self._read = self._torch.cat([self._read, read])
        self.rows, self._placed = [*self.rows, *rows], [*self._placed, *placed]
        self._select(sorted(range(len(self.rows)), key=lambda i: id(self._placed[i])))

    def _select(self, indices: list[int]) -> None:
        """Keep these rows, in this order, without the positions that are padding in all of them."""
        chosen = self._torch.tensor(indices, device=self._mask.device)
        mask = self._mask[chosen]
        first = int(mask.any(dim=0).int().argmax())
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen, :, first:]
            layer.values = layer.values[chosen, :, first:]
        self._mask, self._read = mask[:, first:], self._read[chosen]
        self.rows = [self.rows[i] for i in indices]
        self._placed = [self._placed[i] for i in indices]

    def _column(self, ids: Sequence[int]) -> torch.Tensor:
        column: torch.Tensor = self._torch.tensor(ids, device=self._model.device)[:, None]
        return column


def _ids(tokens: Sequence[Token | ModelError]) -> list[int]:
    """Return the ids; 0 for a row that is about to leave."""
    return [token.id if isinstance(token, Token) else 0 for token in tokens]
