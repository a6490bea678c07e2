"""The score of a set of predictions, with a percentile bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UsageError
from ...tasks.folders import Example
from .metric import Metric


@dataclass(frozen=True, slots=True)
class Score:
    """A score from 0 to 100 over n examples, with its 95 % interval low … high."""

    value: float
    low: float
    high: float
    n: int
    label: str


def scored(
    metric: Metric, examples: Sequence[Example], predictions: Sequence[str], *, seed: int = 0, draws: int = 1000
) -> Score:
    """Score all examples; low and high are the 2.5 and 97.5 percentiles of the score over `draws` resamples
    of n examples with replacement (Efron's percentile bootstrap). Raises UsageError.
    """
    n = len(examples)
    if n == 0:
        raise UsageError("there are no examples to score", cure="give a split that has examples")
    if len(predictions) != n:
        raise UsageError(f"{len(predictions)} predictions for {n} examples", cure="give one prediction per example")
    if draws < 1:
        raise UsageError(f"draws is {draws}", cure="give at least 1, and 1000 for a stable interval")
    table = np.array([metric.statistics(e, p) for e, p in zip(examples, predictions, strict=True)])  # (n, statistics)
    rng = np.random.default_rng(seed)
    sums = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ table for _ in range(draws)])
    low, high = np.percentile([metric.value(drawn) for drawn in sums], [2.5, 97.5])
    return Score(metric.value(table.sum(axis=0)), float(low), float(high), n, metric.label)
