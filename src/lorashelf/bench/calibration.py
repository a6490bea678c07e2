"""The predicted quality of coded adapters, from measured cells: `lora/quality.py` holds the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .results import Vector, sampled, shares_kept

Point = tuple[float, float]
"""The share of ‖ΔW‖² kept, and the share of the gain in loss kept."""


def calibration(coded: Sequence[Mapping[str, Any]], own: Mapping[str, Any], base: Mapping[str, Any]) -> Calibration:
    """Return the calibration by results of coded cells, of the adapters themselves and of the bare base. Raises
    UsageError unless all were measured with one model.
    """
    ends = sampled([own]).losses, sampled([base]).losses
    kept = [shares_kept(sampled([result]).losses, *ends) for result in coded]
    tasks = sorted(set.intersection(*map(set, kept)))
    energy = np.array([[result["tasks"][task]["energy_kept"] for task in tasks] for result in coded])
    return Calibration(tasks, energy, np.array([[each[task][0] for task in tasks] for each in kept]))


class Calibration:
    """What codes keep: `energy` (rates, tasks), the share of ‖ΔW‖²; `kept` (rates, tasks), that of the gain in loss."""

    def __init__(self, tasks: Sequence[str], energy: Vector, kept: Vector) -> None:
        order = np.argsort(energy.mean(axis=1))
        self.tasks, self.energy, self.kept = tasks, energy[order], kept[order]

    @property
    def points(self) -> tuple[Point, ...]:
        """The mean of each rate, to three digits, between (0, 0) and (1, 1)."""
        means = zip(self.energy.mean(axis=1).tolist(), self.kept.mean(axis=1).tolist(), strict=True)
        return ((0.0, 0.0), *((round(energy, 3), round(kept, 3)) for energy, kept in means), (1.0, 1.0))

    def left_out(self) -> Vector:
        """Return (rates, tasks), predicted minus measured, each task predicted by the points of the other tasks."""
        found = np.empty_like(self.kept)
        for task in range(len(self.tasks)):
            others = np.arange(len(self.tasks)) != task
            x = np.array([0.0, *self.energy[:, others].mean(axis=1), 1.0])
            y = np.array([0.0, *self.kept[:, others].mean(axis=1), 1.0])
            found[:, task] = np.interp(self.energy[:, task], x, y) - self.kept[:, task]
        return found
