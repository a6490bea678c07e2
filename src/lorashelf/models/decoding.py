"""Greedy decoding: one loop for streams and for batches of answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from .batching import padded
from .hooks import head_at
from .loading import libraries

Ended = Callable[[Sequence[int]], bool]


def greedy(
    model: Any,
    queries: Sequence[Sequence[int]],
    count: int,
    ended: Ended,
    pad: int,
    step: Callable[[], AbstractContextManager[None]],
) -> Iterator[list[int | None]]:
    """Yield the likeliest next token of every query, at most `count` times; None where an answer has ended.

    `ended` takes the tokens generated for a query and returns whether the last one ends the answer. Every forward pass
    runs inside a block of `step`, which is left before the tokens are yielded.
    """
    torch, _ = libraries()
    read, mask = padded(queries, pad, model.device, left=True)
    placed = "position_ids" in inspect.signature(model.forward).parameters
    rows: list[list[int]] = [[] for _ in queries]
    unended, everyone, cache = set(range(len(queries))), list(range(len(queries))), None
    for _ in range(count):
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -read.shape[1] :]} if placed else {}
        with step(), torch.inference_mode(), head_at(model, everyone, [-1] * len(everyone)):
            seen = model(input_ids=read, attention_mask=mask, past_key_values=cache, use_cache=True, **places)
            likeliest = seen.logits[0].argmax(-1)
        cache, tokens = seen.past_key_values, likeliest.tolist()
        for i in unended:
            rows[i].append(tokens[i])
        yield [tokens[i] if i in unended else None for i in everyone]
        unended = {i for i in unended if not ended(rows[i])}
        if not unended:
            return
        read = likeliest[:, None]
        mask = torch.cat([mask, torch.ones_like(read)], dim=1)
