"""The next token's logits, caches of keys and values, and greedy decoding: one loop for streams and for batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .batching import cheapest_batches, padded
from .hooks import head_at
from .loading import libraries
from .sampling import no_next_token

if TYPE_CHECKING:
    import torch

Ended = Callable[[Sequence[int]], bool]
Step = Callable[[], AbstractContextManager[None]]
Layers = Sequence[tuple["torch.Tensor", "torch.Tensor"]]
"""Keys and values of every layer: (rows, heads, positions, size) each."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A text that a model has read, to be continued: its keys and values, in one row, and the next token's logits."""

    layers: Layers
    logits: torch.Tensor

    def __len__(self) -> int:
        return int(self.layers[0][0].shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """Texts that a model has read side by side: next logits (rows, vocabulary), cache, mask, and the rows' numbers."""

    logits: torch.Tensor
    cache: Any
    mask: torch.Tensor
    order: Sequence[int]


def next_logits(model: Any, read: torch.Tensor, mask: torch.Tensor, cache: Any, step: Step) -> tuple[torch.Tensor, Any]:
    """Return (rows, vocabulary) logits after the last column of `read`, and the cache with `read` added.

    `mask` covers what is in the cache, too; rows are padded on the left. The forward pass runs inside a block of
    `step`. Raises ModelError for a model that returns no keys and values.
    """
    torch, _ = libraries()
    rows = len(read)
    placed = "position_ids" in inspect.signature(model.forward).parameters
    places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -read.shape[1] :]} if placed else {}
    with step(), torch.inference_mode(), head_at(model, list(range(rows)), [-1] * rows):
        seen = model(input_ids=read, attention_mask=mask, past_key_values=cache, use_cache=True, **places)
    if "past_key_values" not in seen:
        what = "the base returns no keys and values, so its answers cannot be continued token by token"
        raise ModelError(what, where=model.name_or_path, cure="measure losses only, or choose a base with attention")
    return seen.logits[0], seen.past_key_values


def grows_plainly(model: Any, step: Step) -> bool:
    """Return whether a model keeps keys and values of (rows, heads, positions, size) and nothing else: rows of several
    caches can then be joined, in a cache that keeps all positions.
    """
    torch, transformers = libraries()
    ids = torch.zeros((2, 3), dtype=torch.long, device=model.device)
    try:
        cache = next_logits(model, ids, torch.ones_like(ids), None, step)[1]
    except ModelError:  # no keys and values
        return False
    plain = transformers.cache_utils.DynamicLayer, transformers.cache_utils.DynamicSlidingWindowLayer
    return type(cache) is transformers.DynamicCache and all(
        type(layer) in plain and tuple(layer.keys.shape[::2][:2]) == (2, 3) for layer in cache.layers
    )


def layers_of(cache: Any) -> Layers:
    """Return the keys and values of a plain cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def joined(parts: Sequence[Layers], masks: Sequence[torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Return the rows of plain caches in one, and their mask: shorter rows get padding on the left."""
    torch, transformers = libraries()
    length = max(mask.shape[1] for mask in masks)
    cache = transformers.DynamicCache()
    for place, layer in enumerate(zip(*parts, strict=True)):
        keys, values = (torch.cat([_lengthened(each, length, 2) for each in side]) for side in zip(*layer, strict=True))
        cache.update(keys, values, place)
    return cache, torch.cat([_lengthened(mask, length, 1) for mask in masks])


def _lengthened(values: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Return the values with zeros before them in a dimension."""
    size = values.shape[dim]
    if size == length:
        return values
    longer = values.new_zeros([*values.shape[:dim], length, *values.shape[dim + 1 :]])
    longer.narrow(dim, length - size, size).copy_(values)
    return longer


def greedy(
    model: Any,
    texts: Sequence[Sequence[int]] | Sequence[Read],
    counts: Sequence[int],
    ended: Ended,
    pad: int,
    step: Step,
    positions: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the likeliest next token of every text; None where an answer has ended, or has as many tokens as `counts`.

    `ended` takes the tokens generated for a text and returns whether the last one ends the answer. Texts are tokens,
    read together or, for a model with a plain cache, in batches of similar length of at most `positions`; or they have
    been read. All are continued together. Ended rows leave the batch if the cache is transformers' own: those of some
    models cannot drop them. Every forward pass runs inside a block of `step`, which is left before the tokens are
    yielded. Raises ModelError where no logit is finite.
    """
    torch, transformers = libraries()
    read = [text for text in texts if isinstance(text, Read)]
    tokens = [text for text in texts if not isinstance(text, Read)]
    begun = _begun(read) if read else _read(model, tokens, pad, step, positions)
    logits, cache, mask, computed = begun.logits, begun.cache, begun.mask, list(begun.order)
    rows: list[list[int]] = [[] for _ in texts]
    unended = set(computed)
    while True:
        best, likeliest = logits.max(-1)
        found: list[int | None] = [None] * len(texts)
        for i, token, finite in zip(computed, likeliest.tolist(), torch.isfinite(best).tolist(), strict=True):
            if i in unended:
                if not finite:
                    raise no_next_token()
                found[i] = token
                rows[i].append(token)
        yield found
        unended = {i for i in unended if len(rows[i]) < counts[i] and not ended(rows[i])}
        if not unended:
            return
        last = likeliest[:, None]
        mask = torch.cat([mask, torch.ones_like(last)], dim=1)
        if len(unended) < len(computed) and type(cache) is transformers.DynamicCache:
            stay = [place for place, i in enumerate(computed) if i in unended]
            chosen = torch.tensor(stay, device=model.device)
            last, mask, computed = last[chosen], mask[chosen], [computed[place] for place in stay]
            cache.reorder_cache(chosen)
        logits, cache = next_logits(model, last, mask, cache, step)


def _read(model: Any, texts: Sequence[Sequence[int]], pad: int, step: Step, positions: int | None) -> _Reading:
    """Read texts together, or in batches of at most so many positions."""
    torch, transformers = libraries()
    count = len(texts)
    if positions is None:
        tokens, mask = padded(texts, pad, model.device, left=True)
        logits, cache = next_logits(model, tokens, mask, None, step)
        return _Reading(logits, cache, mask, range(count))
    parts = cheapest_batches([len(text) for text in texts], [1] * count, positions, count)
    found, caches, masks = [], [], []
    for part in parts:
        tokens, mask = padded([texts[i] for i in part], pad, model.device, left=True)
        logits, cache = next_logits(model, tokens, mask, transformers.DynamicCache(), step)
        found.append(logits)
        caches.append(layers_of(cache))
        masks.append(mask)
    return _Reading(torch.cat(found), *joined(caches, masks), [i for part in parts for i in part])


def _begun(texts: Sequence[Read]) -> _Reading:
    """Put texts that have been read side by side."""
    torch, _ = libraries()
    masks = [torch.ones((1, len(text)), dtype=torch.long, device=text.logits.device) for text in texts]
    logits = torch.stack([text.logits for text in texts])
    return _Reading(logits, *joined([text.layers for text in texts], masks), range(len(texts)))
