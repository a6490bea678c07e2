"""The calibration of predicted quality: points of measured cells, and its error on tasks left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorashelf.bench.calibration import calibration


def result(losses: dict[str, float], energy: dict[str, float] | None = None) -> dict[str, Any]:
    """A result with ten equal examples of one token per task."""
    tasks = {
        task: {"nll": [loss] * 10, "tokens": [1] * 10, **({"energy_kept": energy[task]} if energy else {})}
        for task, loss in losses.items()
    }
    return {"model": {"base": "b"}, "tasks": tasks}


OWN, BASE = result({"a": 1.0, "b": 2.0}), result({"a": 2.0, "b": 4.0})
FINE = result({"a": 1.1, "b": 2.0}, {"a": 0.9, "b": 0.9})
COARSE = result({"a": 1.4, "b": 3.0}, {"a": 0.4, "b": 0.2})


def test_points_are_means_from_the_coarsest_to_the_finest() -> None:
    found = calibration([FINE, COARSE], OWN, BASE)
    assert found.points == ((0.0, 0.0), (0.3, 0.55), (0.9, 0.95), (1.0, 1.0))
    assert found.kept == pytest.approx(np.array([[0.6, 0.5], [0.9, 1.0]]))


def test_a_task_left_out_is_predicted_by_the_others() -> None:
    off = calibration([FINE, COARSE], OWN, BASE).left_out()
    # a at 0.4: between b's points (0.2, 0.5) and (0.9, 1.0); b at 0.2: between (0, 0) and a's (0.4, 0.6)
    assert off == pytest.approx(np.array([[0.5 + 0.5 * 2 / 7 - 0.6, 0.3 - 0.5], [1.0 - 0.9, 0.9 - 1.0]]))
