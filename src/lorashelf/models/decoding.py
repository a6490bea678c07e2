"""The next token's logits, caches of keys and values, and greedy decoding: one loop for streams and for batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
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
    caches can then be joined.
    """
    torch, transformers = libraries()
    cache = transformers.DynamicCache()
    ids = torch.zeros((2, 3), dtype=torch.long, device=model.device)
    try:
        seen = next_logits(model, ids, torch.ones_like(ids), cache, step)[1]
    except Exception:  # a model with another kind of cache may raise anything
        return False
    layers = getattr(seen, "layers", [])
    return bool(layers) and seen is cache and all(_is_plain(layer) for layer in layers)


def joined(caches: Sequence[Any], masks: Sequence[torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Return the rows of plain caches in one, and their mask: shorter rows get padding on the left."""
    if len(caches) == 1:
        return caches[0], masks[0]
    torch, transformers = libraries()
    length = max(mask.shape[1] for mask in masks)
    cache = transformers.DynamicCache()
    for place in range(len(caches[0].layers)):
        keys, values = (
            torch.cat([_lengthened(getattr(each.layers[place], side), length, 2) for each in caches])
            for side in ("keys", "values")
        )
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


def _is_plain(layer: Any) -> bool:
    keys = getattr(layer, "keys", None)
    return type(layer).__name__ == "DynamicLayer" and keys is not None and tuple(keys.shape[::2][:2]) == (2, 3)


def greedy(
    model: Any,
    queries: Sequence[Sequence[int]],
    counts: Sequence[int],
    ended: Ended,
    pad: int,
    step: Step,
    positions: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the likeliest next token of every query; None where an answer has ended, or has as many tokens as `counts`.

    `ended` takes the tokens generated for a query and returns whether the last one ends the answer. Queries are read
    together, or in batches of similar length of at most `positions` (for models with plain caches only), and continued
    together. Ended rows leave the batch if the cache is transformers' own: those of some models cannot drop them. Every
    forward pass runs inside a block of `step`, which is left before the tokens are yielded. Raises ModelError where no
    logit is finite.
    """
    torch, transformers = libraries()
    parts = [list(range(len(queries)))]
    if positions is not None:
        parts = cheapest_batches([len(query) for query in queries], [1] * len(queries), positions, len(queries))
    passes = []
    for part in parts:
        read, mask = padded([queries[i] for i in part], pad, model.device, left=True)
        empty = None if positions is None else transformers.DynamicCache()
        passes.append((mask, *next_logits(model, read, mask, empty, step)))
    computed = [i for part in parts for i in part]
    masks, found_logits, caches = zip(*passes, strict=True)
    logits = torch.cat(found_logits)
    cache, mask = joined(caches, masks)
    rows: list[list[int]] = [[] for _ in queries]
    unended = set(computed)
    while True:
        best, likeliest = logits.max(-1)
        found: list[int | None] = [None] * len(queries)
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
        read = likeliest[:, None]
        mask = torch.cat([mask, torch.ones_like(read)], dim=1)
        if len(unended) < len(computed) and type(cache) is transformers.DynamicCache:
            stay = [place for place, i in enumerate(computed) if i in unended]
            chosen = torch.tensor(stay, device=model.device)
            read, mask, computed = read[chosen], mask[chosen], [computed[place] for place in stay]
            cache.reorder_cache(chosen)
        logits, cache = next_logits(model, read, mask, cache, step)
