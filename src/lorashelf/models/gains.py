"""Gains fitted to examples: one factor per module of an adapter that lowers the loss of a task's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import ModelError
from ..lora.adapter import Adapter
from ..tasks.folders import ExampleSet
from .base_model import BaseModel
from .hooks import AdapterPool
from .loading import libraries
from .memory import within_memory
from .tokens import Tokenisation, Tokens

if TYPE_CHECKING:
    import torch

LARGEST = 4.0  # the most that a module is scaled up, or down


class Differentiable(Protocol):
    """A base in memory whose losses can be differentiated; see `HFBackend`."""

    base: BaseModel
    adapters: AdapterPool

    @property
    def name(self) -> str:
        """The name that the base model is known by."""
        ...

    @property
    def text(self) -> Tokenisation:
        """Text to tokens and back."""
        ...

    def batches(self, tokens: Sequence[Tokens]) -> list[list[int]]:
        """Return indices in batches of similar length."""
        ...

    def token_losses(self, batch: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for every answer token of a batch, its example's index and its −log p."""
        ...


def fitted_gains(
    backend: Differentiable,
    adapter: Adapter,
    examples: ExampleSet,
    held_out: ExampleSet,
    *,
    steps: int,
    rate: float,
    watch: Callable[[range], Iterable[int]],
) -> dict[str, float]:
    """Return the factors of `FitsGains.fitted_gains`."""
    torch, _ = libraries()
    tokens, others = backend.text.measurable(examples), backend.text.measurable(held_out)
    device = backend.base.model.device
    logarithms = {path: torch.zeros((), device=device, requires_grad=True) for path in adapter.modules}
    optimizer = torch.optim.Adam(logarithms.values(), lr=rate)
    least, best = _loss(backend, adapter, logarithms, others), dict.fromkeys(logarithms, 1.0)
    for _ in watch(range(steps)):
        optimizer.zero_grad()
        _loss(backend, adapter, logarithms, tokens, learn=True)
        optimizer.step()
        with torch.no_grad():
            for each in logarithms.values():
                each.clamp_(-math.log(LARGEST), math.log(LARGEST))
        if (loss := _loss(backend, adapter, logarithms, others)) < least:
            least, best = loss, {path: math.exp(each.item()) for path, each in logarithms.items()}
    return best


def _loss(
    backend: Differentiable,
    adapter: Adapter,
    logarithms: Mapping[str, torch.Tensor],
    tokens: Sequence[Tokens],
    learn: bool = False,
) -> float:
    """Return the loss; with `learn`, add its gradient to the logarithms. A batch at a time."""
    torch, _ = libraries()
    total, count = 0.0, sum(len(answer) for _, answer in tokens)
    parameters, cure = list(logarithms.values()), "give fewer examples, free memory, or take a smaller base"
    for members in backend.batches(tokens):
        with torch.set_grad_enabled(learn), within_memory("out of memory", backend.name, cure):
            factors = {path: torch.exp(each) for path, each in logarithms.items()}
            with backend.adapters.scaled(adapter, factors):
                loss = backend.token_losses([tokens[i] for i in members])[1].sum() / count
                gradients = torch.autograd.grad(loss, parameters) if learn else ()
        for each, gradient in zip(parameters, gradients, strict=False):
            each.grad = gradient if each.grad is None else each.grad + gradient
        total += loss.item()
    if not math.isfinite(total):
        raise ModelError(f"the loss of {backend.name} is not finite", cure="give --model-dtype f32")
    return total
