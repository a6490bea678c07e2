"""The levels of an object on a shelf: at slopes of one fixed series, whatever the budget and the other objects are.

So the same adapter always has the same levels, a shelf chooses only how many of them it holds, and all tasks at one
level lose the same share of energy per bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...lora.allocation import slope_keeping
from ...lora.quality import energy_for
from .encoder import Encoder

STEP = 2 ** (2 / 3)
"""The slope of a level over that of the next one: a level takes about 1.5 times the bytes of those before it."""
BASE_QUALITY = 0.5
"""What a base level keeps at least, by prediction; coarser ones would serve nobody."""


def ladder(encoder: Encoder, wanted: float) -> Iterator[bytes]:
    """Levels at the slopes STEP^-i, from the first that keeps BASE_QUALITY, then one of the predicted quality `wanted`.
    Raises UsageError where no code is so fine.
    """
    if not encoder.directions.total:  # untrained: a base level that codes nothing
        yield encoder.add(1.0)
        return
    options, energy = encoder.options(), energy_for(wanted)
    base = slope_keeping([options], energy_for(min(BASE_QUALITY, wanted)))
    number = math.ceil(-math.log(base) / math.log(STEP))
    while (found := options.choose(STEP**-number))[2] < energy:
        if found[1]:  # else this slope adds nothing
            yield encoder.add(STEP**-number, options)
            options = encoder.options()
        number += 1
    yield encoder.add_for(wanted)
