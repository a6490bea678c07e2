"""The scaling and the predicted quality of a coarse code, from the share of ‖ΔW‖² that it keeps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..documents.coded import Summary
from .arrays import Vector

MEASURED = (
    *((0.0, 0.0), (0.163, 0.721), (0.274, 0.872), (0.427, 0.956)),
    *((0.659, 0.98), (0.807, 0.989), (0.952, 0.997), (1.0, 1.0)),
)
"""(share of ‖ΔW‖² kept, share of the gain in loss kept): 40 adapters of SmolLM2-135M, coded, with `restoration`; the
means of suites/frontier.results (docs/generate.py holds them against these).
"""

MOST_QUALITY = 0.997
"""The predicted quality of the finest code; to keep more, half precision is better."""


def quality(kept: float) -> float:
    """Return the predicted share of an adapter's gain in loss that is kept, in [0, 1]: MEASURED, interpolated."""
    shares, qualities = zip(*MEASURED, strict=True)
    return float(np.interp(kept, shares, qualities))


def worth(kept: Vector) -> Vector:
    """Return dq / dkept (n,), the derivative of `quality`: the slope of each piece at its middle, with its logarithm
    interpolated between middles.
    """
    shares, qualities = np.array(MEASURED).T
    slopes = np.minimum.accumulate(np.diff(qualities) / np.diff(shares))
    return np.exp(np.interp(kept, (shares[1:] + shares[:-1]) / 2, np.log(slopes)))


def energy_for(wanted: float) -> float:
    """Return the least share of ‖ΔW‖² at which `quality` predicts `wanted`."""
    shares, qualities = zip(*MEASURED, strict=True)
    return float(np.interp(wanted, qualities, shares))


def summary(qualities: Mapping[str, float]) -> Summary:
    """Return the `mean` and the `least` of the predicted qualities of tasks, and the `task` that has the least."""
    worst = min(qualities, key=lambda task: (qualities[task], task))
    return {"mean": float(np.mean(list(qualities.values()))), "least": qualities[worst], "task": worst}


def restoration(kept: float) -> float:
    """Return the factor that scales up what is kept: kept^(−p/2), p = (0.965 − kept) / 0.5 between 0 and 1.

    1 / √kept would restore the norm lost with the dropped directions. A fine code is not scaled; between 1/64 and 0.465
    of ‖ΔW‖² the full norm is restored. The factor is at most 8.
    """
    power = min(max((0.965 - kept) / 0.5, 0.0), 1.0)
    return float(max(kept, 1 / 64) ** (-power / 2))
