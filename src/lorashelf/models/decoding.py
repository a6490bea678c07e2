"""The next token's logits, and greedy decoding: one loop for streams and for batches of answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .batching import padded
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


def greedy(
    model: Any,
    queries: Sequence[Sequence[int]],
    counts: Sequence[int],
    ended: Ended,
    pad: int,
    step: Step,
) -> Iterator[list[int | None]]:
    """Yield the likeliest next token of every query; None where an answer has ended, or has as many tokens as `counts`.

    `ended` takes the tokens generated for a query and returns whether the last one ends the answer. Ended rows leave
    the batch if the cache is transformers' own: those of some models cannot drop them. Every forward pass runs inside a
    block of `step`, which is left before the tokens are yielded. Raises ModelError where no logit is finite.
    """
    torch, transformers = libraries()
    read, mask = padded(queries, pad, model.device, left=True)
    rows: list[list[int]] = [[] for _ in queries]
    computed, cache = list(range(len(queries))), None
    unended = set(computed)
    for _ in range(max(counts)):
        logits, cache = next_logits(model, read, mask, cache, step)
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
