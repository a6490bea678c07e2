"""From the share of ‖ΔW‖² that a coarse code keeps: how it is scaled, and what it is worth."""

from __future__ import annotations

import numpy as np

from .arrays import Vector

MEASURED = (
    *((0.0, 0.0), (0.163, 0.70), (0.276, 0.854), (0.44, 0.954)),
    *((0.667, 0.979), (0.814, 0.993), (0.955, 0.997), (1.0, 1.0)),
)
"""(energy kept, share of the loss kept): 40 adapters of SmolLM2-135M, coded and scaled by `restoration`."""

MOST_QUALITY = 0.997
"""What the finest code keeps of any adapter, by prediction: half precision is better where more is wanted."""


def quality(kept: float) -> float:
    """Predicted share of an adapter's gain in loss that is kept, in [0, 1]: linear between the points measured."""
    energies, qualities = zip(*MEASURED, strict=True)
    return float(np.interp(kept, energies, qualities))


def worth(kept: Vector) -> Vector:
    """Return dq / dE (n,), the predicted quality that a further share of energy adds: the slope of each piece of
    `quality` at its middle, and its logarithm linear between middles.
    """
    energies, qualities = np.array(MEASURED).T
    rises = np.minimum.accumulate(np.diff(qualities) / np.diff(energies))
    return np.exp(np.interp(kept, (energies[1:] + energies[:-1]) / 2, np.log(rises)))


def energy_for(wanted: float) -> float:
    """The least energy kept at which `quality` predicts this much."""
    energies, qualities = zip(*MEASURED, strict=True)
    return float(np.interp(wanted, qualities, energies))


def restoration(kept: float) -> float:
    """The factor by which what is kept is scaled up: kept^(−p/2), p = (0.965 − kept) / 0.5 between 0 and 1.

    1 / √kept would restore the norm that dropped directions take away. Nothing is restored of a fine code, all at half
    the energy and below.
    """
    power = min(max((0.965 - kept) / 0.5, 0.0), 1.0)
    return float(max(kept, 1 / 64) ** (-power / 2))
