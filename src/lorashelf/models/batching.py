"""Batches of texts of similar length, and their token ids as one padded tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .loading import libraries

if TYPE_CHECKING:
    import torch

MOST_PADDING = 0.1  # of a batch's positions
_CALL = 24  # fixed cost of a forward pass, in positions: weighed against padding


def cheapest_batches(
    lengths: Sequence[int], labels: Sequence[int], positions: int, most_labels: int
) -> list[list[int]]:
    """Return indices of texts in batches of similar length: the cheapest cut of the sorted texts, ≤ 10 % padding.

    A batch has at most `positions` positions, padding included, and `most_labels` labels, unless it holds one text.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    best = [0.0, *[math.inf] * len(order)]
    start = [0] * (len(order) + 1)
    for stop in range(1, len(order) + 1):
        longest, real, labelled = lengths[order[stop - 1]], 0, 0
        for first in range(stop - 1, -1, -1):
            real += lengths[order[first]]
            labelled += labels[order[first]]
            size = longest * (stop - first)
            if first < stop - 1 and (size > positions or labelled > most_labels):
                break
            if size - real <= MOST_PADDING * size and best[first] + size + _CALL < best[stop]:
                best[stop], start[stop] = best[first] + size + _CALL, first
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(start[cuts[-1]])
    return [order[first:stop] for stop, first in pairwise(cuts)]


def largest_batches(lengths: Sequence[int], positions: int) -> list[list[int]]:
    """Return indices of texts in batches by length, each as large as `positions` allows."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > positions:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n, longest) token ids and the mask of what is not padding; any token can pad, since it is masked."""
    torch, _ = libraries()
    longest = max(map(len, rows))
    gaps = [longest - len(row) for row in rows]
    ids = [[*[pad] * gap, *row] if left else [*row, *[pad] * gap] for row, gap in zip(rows, gaps, strict=True)]
    real = [
        [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)
