"""A synthetic model whose best adapter is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..lora.adapter import Adapter
from ..lora.algebra import inner
from ..tasks.folders import ExampleSet
from ..tasks.template import Template
from .protocol import Loss, Pair, Scores


class QuadraticBackend(Scores):
    """NLL = ½ Σ_m ‖ΔW_m − T_m‖²_F over modules m, T the task's target update; the optimum is ΔW = T."""

    name = id = "quadratic"
    weights, dtype, context, template = "none", "float64", None, Template("", "\n", "")

    def __init__(self, targets: Mapping[str, Adapter]) -> None:
        self._targets = targets

    def fits(self, adapters: Mapping[str, Adapter]) -> None:
        """Accept any adapter."""

    def fitting(self, examples: ExampleSet) -> tuple[ExampleSet, int]:
        """Return all examples: the context has no limit."""
        return examples, 0

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """Return ½‖ΔW − T‖² for each example of a pair, counted as one token each."""
        return [
            [Loss(self._half_square(adapter, examples.task), 1) for _ in examples.examples]
            for adapter, examples in pairs
        ]

    def _half_square(self, adapter: Adapter | None, task: str) -> float:
        target = self._targets[task]
        own = inner(target, target)
        return own / 2 if adapter is None else (inner(adapter, adapter) - 2 * inner(adapter, target) + own) / 2
