"""The gain that the geometry of adapters predicts for a change of blocks, without a model.

    f(B) = Σ_{t ∈ B} cos(ΔW_t, Σ_{u ∈ B} ΔW_u) = Σ_{t,u ∈ B} H_tu / √(Σ_{t,u ∈ B} G_tu)

with G the adapters' inner products and H_tu = G_tu / √G_tt. Both sums are quadratic forms of the block's indicator, so
the effect of every move and swap on Σ_B f(B) follows from G in O(n² K), without merging an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..lora.arrays import Array64, Float64, Int, Positions, Square


class Surrogate:
    """Σ_B f(B) of partitions of n adapters, from their inner products (n, n)."""

    def __init__(self, gram: Square) -> None:
        norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)  # 0 for an untrained adapter
        self._gram, self._cosines = gram, inverse[:, None] * gram

    def gains(self, blocks: Sequence[frozenset[int]]) -> tuple[Float64[Array64, "n k"], Square]:
        """Return the gain of Σ_B f(B) from moving task t to block c, (n, K), and from swapping t and u, (n, n) with
        t < u; −∞ where nothing would change.
        """
        n = len(self._gram)
        inside = np.zeros((n, len(blocks)))
        for place, block in enumerate(blocks):
            inside[sorted(block), place] = 1.0
        own = inside.argmax(axis=1)
        cosines, squares = _Form(self._cosines, inside, own), _Form(self._gram, inside, own)
        fit = _ratio(cosines.now, squares.now)
        left = _ratio(cosines.less, squares.less) - fit[own]
        moves = _ratio(cosines.more, squares.more) - fit + left[:, None]
        moves[np.arange(n), own] = -np.inf
        here = _ratio(cosines.swapped, squares.swapped) - fit[own][:, None]  # of t's block, with u in the place of t
        swaps = here + here.T
        swaps[(own[:, None] == own) | ~np.triu(np.ones((n, n), bool), 1)] = -np.inf
        return moves, swaps


class _Form:
    """xᵀ M x of every block's indicator x: now, and after a task joins, leaves, or replaces another."""

    def __init__(self, matrix: Square, inside: Float64[Array64, "n k"], own: Int[Positions, " n"]) -> None:
        tasks = np.arange(len(matrix))
        both, diagonal = matrix + matrix.T, np.diagonal(matrix)
        linear = both @ inside  # (n, K): ∂/∂x_t
        mine = linear[tasks, own]
        self.now = np.einsum("tk,tk->k", inside, linear) / 2
        self.less = self.now[own] - mine + diagonal
        self.more = self.now + linear + diagonal[:, None]
        self.swapped = self.less[:, None] + linear[:, own].T - both + diagonal


def _ratio(sums: Float64[Array64, "*shape"], squares: Float64[Array64, "*shape"]) -> Float64[Array64, "*shape"]:
    """Return sums / √squares, 0 for a block that is empty or cancels."""
    floor = 1e-12 * max(float(np.abs(squares).max(initial=0.0)), 1e-300)
    return np.divide(sums, np.sqrt(np.maximum(squares, floor)), out=np.zeros_like(sums), where=squares > floor)
