"""How much of the tasks' own adapters a merge keeps, guarded against tasks whose own adapter gains nothing."""

from __future__ import annotations

from collections.abc import Mapping

LEAST_SCORE = 1.0
LEAST_GAIN = 0.02


def normalised(scores: Mapping[str, float], own: Mapping[str, float]) -> tuple[float | None, list[str]]:
    """Return S = mean over tasks of score / own score, where the own score is ≥ 1.0 of 100 (K-Merge, arXiv 2510.13537;
    the guard is ours), and the excluded tasks, sorted; tasks without an own score are excluded.

    >>> normalised({"qa": 40.0, "sum": 5.0, "gec": 3.0}, {"qa": 50.0, "sum": 10.0, "gec": 0.2})
    (0.65, ['gec'])
    """
    return _mean({t: scores[t] / own[t] if own.get(t, 0.0) >= LEAST_SCORE else None for t in scores})


def loss_kept(
    loss: Mapping[str, float], own: Mapping[str, float], zero: Mapping[str, float]
) -> tuple[float | None, list[str]]:
    """Return the mean over tasks of (zero-shot − loss) / (zero-shot − own), where own gains ≥ 0.02 nats per token,
    and the excluded tasks, sorted; tasks without an own or a zero-shot loss are excluded.

    >>> loss_kept({"qa": 1.5, "sum": 2.0}, {"qa": 1.0, "sum": 1.99}, {"qa": 2.0, "sum": 2.0})
    (0.5, ['sum'])
    """
    gains = {t: zero[t] - own[t] if t in zero and t in own else 0.0 for t in loss}
    return _mean({t: (zero[t] - loss[t]) / gain if gain >= LEAST_GAIN else None for t, gain in gains.items()})


def _mean(ratios: Mapping[str, float | None]) -> tuple[float | None, list[str]]:
    kept = [ratio for ratio in ratios.values() if ratio is not None]
    left_out = sorted(task for task, ratio in ratios.items() if ratio is None)
    return sum(kept) / len(kept) if kept else None, left_out
