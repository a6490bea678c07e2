"""What measures an adapter: the protocol that searches and evaluations ask, and one whose optimum is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from ..lora.adapter import Adapter
from ..lora.algebra import inner
from ..tasks.folders import ExampleSet

Pair = tuple[Adapter | None, ExampleSet]


class Loss(NamedTuple):
    """The negative log-likelihood of one answer, in nats, summed over its tokens, and how many they are."""

    nll: float
    tokens: int


class LossBackend(Protocol):
    """Anything that tells how likely answers are under a base model with an adapter on it (None: the bare base)."""

    @property
    def id(self) -> str:
        """Identifies all that a loss depends on beside adapter and examples: base, dtype, prompt rendering."""
        ...

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """The loss of every example of every pair, in order."""
        ...


class AnswerBackend(Protocol):
    """Anything that answers a text under an instruction, with an adapter on its base model."""

    @property
    def base_name(self) -> str:
        """The name its base model is known by."""
        ...

    def stream(
        self, adapter: Adapter | None, instruction: str, text: str, *, max_new_tokens: int = 64
    ) -> Iterator[str]:
        """The greedy answer in pieces as they are written; what can be refused is refused before the first."""
        ...


def mean_loss(losses: Sequence[Loss]) -> float:
    """Σ NLL / Σ tokens over examples: the loss of a task, in nats a token (arXiv 2601.17441)."""
    return sum(loss.nll for loss in losses) / sum(loss.tokens for loss in losses)


class QuadraticBackend:
    """A model without a model: NLL = ½ Σ_m ‖ΔW_m − T_m‖²_F, T the task's target update; the optimum is ΔW = T."""

    id = "quadratic"

    def __init__(self, targets: Mapping[str, Adapter]) -> None:
        self._targets = targets

    def nll(self, pairs: Sequence[Pair]) -> list[list[Loss]]:
        """½‖ΔW − T‖² for each example of a pair, as one token each."""
        return [
            [Loss(self._half_square(adapter, examples.task), 1) for _ in examples.examples]
            for adapter, examples in pairs
        ]

    def _half_square(self, adapter: Adapter | None, task: str) -> float:
        target = self._targets[task]
        own = inner(target, target)
        return own / 2 if adapter is None else (inner(adapter, adapter) - 2 * inner(adapter, target) + own) / 2
