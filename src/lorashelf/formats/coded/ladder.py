"""The levels of an object on a shelf: at slopes of one fixed series, independent of the budget and other objects.

The same adapter therefore always has the same levels, a shelf chooses only how many of them to store, and all tasks at
one level lose the same share of ‖ΔW‖² per bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...lora.allocation import SLOPES, slope_keeping
from ...lora.quality import energy_for
from .encoder import Encoder

STEP = 2 ** (2 / 3)
"""The slope of a level divided by the next one's: trained adapters get seven or eight levels up to 0.997."""
BASE_QUALITY = 0.5
"""The least predicted quality of a base level; coarser ones would be useless."""


def ladder(encoder: Encoder, wanted: float) -> Iterator[bytes]:
    """Yield levels at the slopes STEP^-i, from the first that keeps BASE_QUALITY, then one with the predicted quality
    `wanted`. Raises UsageError if no level is that fine.
    """
    if not encoder.directions.total:  # untrained: a base level that codes nothing
        yield encoder.add(1.0)
        return
    options, share = encoder.options(), energy_for(wanted)
    base = slope_keeping([options], energy_for(min(BASE_QUALITY, wanted)))
    number = math.ceil(-math.log(base) / math.log(STEP))
    while STEP**-number > SLOPES[0] and (found := options.choose(STEP**-number))[2] < share:
        if found[1]:  # else this slope adds nothing
            yield encoder.add(STEP**-number, options)
            if encoder.kept >= share:  # the estimate was too low
                return
            options = encoder.options()
        number += 1
    yield encoder.add_for(wanted)
