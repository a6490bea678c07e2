"""Hyperparameters: the papers' LoRA, with rank, steps and learning rate scaled to the number of examples.

The papers (arXiv 2510.13537, 2601.17441) train r 32, alpha 128, dropout 0.05 on the attention projections with AdamW
at 5e-5, for one epoch over thousands of examples. With hundreds that is a handful of steps, too few to learn from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from ..lora.adapter import WIDTHS

PAPERS = "r 32, alpha 128, learning rate 5e-5, one epoch over thousands of examples"
MANY = 1000  # examples from which the papers' rank is used
FEW_STEPS, MOST_EPOCHS = 50, 5  # small data is repeated up to this many steps or epochs
VALIDATIONS = 8  # per run


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """A training's options. None means scaled to the data (`Hyperparameters.of`); `alpha` defaults to 4 times the rank.

    `targets` None: the linear layers of the base's attention; `rate`: the peak learning rate; `batch`: examples per
    step; `patience`: validations without a lower loss; `dtype`: that of the stored file. Raises UsageError with all
    faults.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None
    rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch: int | None = None
    warmup: int = 5
    patience: int = 3
    max_length: int | None = None
    validation_limit: int = 24
    seed: int = 0
    dtype: str = "f16"

    def __post_init__(self) -> None:
        lowest = {"rank": 1, "steps": 1, "batch": 1, "max_length": 2, "warmup": 0, "patience": 1}
        lowest |= {"validation_limit": 0, "seed": 0}
        given = {name: getattr(self, name) for name in lowest}
        faults = [
            f"{name} is {v}, at least {lowest[name]} is needed" for name, v in given.items() if _below(v, lowest[name])
        ]
        for name in ("alpha", "rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                faults.append(f"{name} is {value}, not a positive number")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout is {self.dropout}, not in [0, 1)")
        if self.dtype not in WIDTHS:
            faults.append(f"dtype is {self.dtype!r}, not one of {', '.join(WIDTHS)}")
        if self.steps is not None and self.epochs is not None:
            faults.append("steps and epochs are both given: give one")
        if faults:
            raise UsageError("; ".join(faults), where="the training's settings")


def _below(value: int | None, lowest: int) -> bool:
    return value is not None and value < lowest


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """One task's hyperparameters: every number that determines the result besides data and base."""

    task: str
    examples: int
    seed: int
    rank: int
    alpha: float
    dropout: float
    rate: float
    steps: int
    batch: int
    warmup: int
    every: int
    patience: int

    @classmethod
    def of(cls, task: str, examples: int, settings: TrainSettings) -> Hyperparameters:
        """Return the settings, with unset ones scaled to the number of examples.

        Rank 32 from a thousand examples, else 8. One epoch; for small data up to five, until there are 50 steps. The
        rate falls with the root of the steps: 1e-3 at 50 or fewer, 2.2e-4 at a thousand, the papers' 5e-5 at 20,000.
        Batches of 8, smaller if an epoch would have fewer than six.

        >>> few = Hyperparameters.of("mail", 12, TrainSettings())
        >>> few.rank, few.alpha, few.steps, few.batch, few.rate
        (8, 32, 30, 2, 0.001)
        """
        batch = min(settings.batch or min(8, max(1, examples // 6)), examples)
        epoch = math.ceil(examples / batch)
        steps = settings.steps or max(epoch, min(FEW_STEPS, MOST_EPOCHS * epoch))
        if settings.epochs is not None:
            steps = max(1, round(settings.epochs * examples / batch))
        rank = settings.rank or (32 if examples >= MANY else 8)
        return cls(
            task=task,
            examples=examples,
            seed=settings.seed,
            rank=rank,
            alpha=settings.alpha or 4 * rank,
            dropout=settings.dropout,
            rate=settings.rate or 1e-3 * math.sqrt(FEW_STEPS / max(FEW_STEPS, steps)),
            steps=steps,
            batch=batch,
            warmup=min(settings.warmup, steps // 5),
            every=math.ceil(steps / VALIDATIONS),
            patience=settings.patience,
        )

    @property
    def epochs(self) -> float:
        """How many times each example is seen."""
        return self.steps * self.batch / self.examples

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then half a cosine down to 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.rate * (1 + math.cos(math.pi * done)) / 2

    def batch_at(self, step: int) -> list[int]:
        """Return the indices of a step's examples: the next ones of the epochs' shuffles, in order."""
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {epoch: self._order(epoch) for epoch in {place // self.examples for place in places}}
        return [orders[place // self.examples][place % self.examples] for place in places]

    def seed_at(self, step: int) -> int:
        """Return the seed of all that a step draws (dropout), so that a resumed run draws the same."""
        return self._drawn(1, step)

    @property
    def init_seed(self) -> int:
        """The seed of the factors' initial values: by (seed, task), so that no two tasks start alike."""
        return self._drawn(0, 0)

    @property
    def document(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "epochs": round(self.epochs, 3), "init_seed": self.init_seed}

    def _order(self, epoch: int) -> Sequence[int]:
        order: list[int] = np.random.default_rng(self._source(2, epoch)).permutation(self.examples).tolist()
        return order

    def _drawn(self, purpose: int, index: int) -> int:
        return int(self._source(purpose, index).generate_state(1, np.uint64)[0] >> 11)

    def _source(self, purpose: int, index: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, *self.task.encode()], spawn_key=(purpose, index))
