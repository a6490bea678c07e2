"""Gains fitted to examples: one factor per module of an adapter that lowers the loss of a task's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ..lora.adapter import Adapter
from ..lora.algebra import scaled
from ..models.loading import libraries
from ..models.protocol import GainGradients, mean_loss
from ..tasks.folders import ExampleSet

STEPS, RATE = 10, 0.04
LARGEST = 4.0  # the most that a module is scaled up, or down


def fitted_gains(
    model: GainGradients,
    adapter: Adapter,
    examples: ExampleSet,
    held_out: ExampleSet,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    watch: Callable[[range], Iterable[int]] = iter,
) -> dict[str, float]:
    """Return a factor φ per module path, in [1/4, 4], such that the loss is lower with φ ΔW in place of ΔW.

    Up to `steps` steps of Adam on log φ from 0, at the learning rate `rate`, lower the loss of the examples, in nats
    per token. The factors are those of the step with the least loss of the examples `held_out`: all 1 if no step lowers
    it. `watch` wraps the numbers of the steps. Raises what `gain_gradient` and `nll` raise.
    """
    torch, _ = libraries()
    logarithms = torch.zeros(len(adapter.modules), dtype=torch.float64)
    optimizer = torch.optim.Adam([logarithms], lr=rate)
    best = factors = dict.fromkeys(adapter.modules, 1.0)
    least = mean_loss(model.nll([(adapter, held_out)])[0])
    for _ in watch(range(steps)):
        gradient = model.gain_gradient(scaled(adapter, factors), examples)
        logarithms.grad = torch.tensor([gradient[path] for path in factors], dtype=torch.float64)
        optimizer.step()
        logarithms.clamp_(-math.log(LARGEST), math.log(LARGEST))
        factors = dict(zip(factors, logarithms.exp().tolist(), strict=True))
        loss = mean_loss(model.nll([(scaled(adapter, factors), held_out)])[0])
        if loss < least:
            least, best = loss, factors
    return best
