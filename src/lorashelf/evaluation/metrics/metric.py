"""A metric: statistics of one example that add up over examples, and the score of their sum."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...registry import Registry
from ...tasks.folders import Example

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric in one language; a corpus's score is `value` of the sum of its examples' `statistics`."""

    label: str
    """The heading of a column of these scores, e.g. 'F0.5 (character edits)'."""
    statistics: Callable[[Example, str], tuple[float, ...]]
    """(example, prediction) → values that add up over examples, for the best of the example's answers."""
    formula: str = "mean"
    """The name in `FORMULAS` of the score of summed statistics; stored statistics need no metric's package."""

    def value(self, sums: Vector) -> float:
        """Return statistics summed over examples → score, 0 to 100."""
        return FORMULAS[self.formula](sums)


FORMULAS: Registry[Callable[[Vector], float]] = Registry("formula of a score")
FORMULAS.add("mean", lambda sums: 100.0 * float(sums[0] / sums[1]))


Maker = Callable[[str], Metric]
TASK_METRICS: Registry[Maker] = Registry("metric")


def measure(name: str) -> Callable[[Maker], Maker]:
    """Register a function of the language ('' if unknown) as metric `name`."""

    def register(make: Maker) -> Maker:
        TASK_METRICS.add(name, make)
        return make

    return register


def metric(name: str, language: str) -> Metric:
    """Return the metric for a language ('zh', 'zh-TW' and 'zh_TW' are one), its packages loaded.

    Raises UnknownName, MissingExtra (`metrics`).
    """
    return TASK_METRICS[name](language.replace("_", "-").partition("-")[0].lower())


def mean_of(label: str, score: Callable[[str, str], float]) -> Metric:
    """Return the metric (1/n) Σ max over answers of score(answer, prediction) in [0, 1]; statistics (score, 1)."""

    def statistics(example: Example, prediction: str) -> tuple[float, ...]:
        cleaned = clean(prediction)
        return max(score(answer, cleaned) for answer in answers(example)), 1.0

    return Metric(label, statistics)


def answers(example: Example) -> list[str]:
    """Return the correct answers: the output and the references, cleaned, each once."""
    return list(dict.fromkeys(clean(text) for text in (example.output, *example.references)))


def clean(text: str) -> str:
    r"""Return Unicode NFC with runs of white space as one space, none at the ends; lone surrogates become '?'.

    >>> clean("  cafe\u0301 au\n lait ")
    'café au lait'
    """
    return " ".join(unicodedata.normalize("NFC", text.encode(errors="replace").decode()).split())
