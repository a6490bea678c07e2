"""What adapters would add to the outputs of a base's linear layers, summed over forward passes of the bare base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..lora.arrays import Square
from .hooks import Placed
from .loading import libraries

if TYPE_CHECKING:
    import torch


class EffectSums:
    """Σ_x ⟨ΔW_u x, ΔW_v x⟩ and Σ_x ‖y‖² of every adapted module, from its inputs x and outputs y.

    In factors: with the adapters' A stacked, one R x R matrix A (Σ x xᵀ) Aᵀ per module, R the sum of their ranks.
    """

    def __init__(self, placed: Sequence[Placed]) -> None:
        self._count = len(placed)
        self._modules = {path: _Module(path, placed) for path in sorted(set().union(*placed))}

    def at(self, row: torch.Tensor, column: torch.Tensor) -> Mapping[str, Callable[[torch.Tensor, torch.Tensor], None]]:
        """Return what adds a batch's inputs and outputs at (row, column) to the sums, by module; of an expert, which
        does not see rows, those at all positions.
        """
        return {path: partial(module.add, row, column) for path, module in self._modules.items()}

    def gram(self) -> Square:
        """Return G_uv = Σ_m Σ_x ⟨ΔW_u x, ΔW_v x⟩ / Σ_x ‖y‖², (n, n), and set the sums to 0; modules that computed
        nothing are left out.
        """
        total = np.zeros((self._count, self._count))
        for module in self._modules.values():
            total += module.taken(self._count)
        return total


class _Module:
    def __init__(self, path: str, placed: Sequence[Placed]) -> None:
        torch, _ = libraries()
        there = [(i, *one[path]) for i, one in enumerate(placed) if path in one]
        self._a = torch.cat([a for _, a, _ in there], dim=1)
        b = torch.cat([b for _, _, b in there]).float()
        self._inner = b @ b.T
        self._owner = torch.tensor([i for i, a, _ in there for _ in range(a.shape[1])], device=self._a.device)
        self._products, self._output = torch.zeros_like(self._inner), torch.zeros((), device=self._a.device)

    def add(self, row: torch.Tensor, column: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch."""
        x, y = (x[row, column], y[row, column]) if x.ndim == 3 else (x, y)
        seen = (x @ self._a).float()
        self._products += seen.T @ seen
        self._output += y.float().square().sum()

    def taken(self, count: int) -> Square:
        """Return this module's term, and set the sums to 0."""
        products, output = (self._products * self._inner).cpu().double().numpy(), float(self._output)
        self._products.zero_()
        self._output.zero_()
        members = (np.arange(count)[:, None] == self._owner.cpu().numpy()).astype(np.float64)
        return members @ products @ members.T / output if output else np.zeros((count, count))
