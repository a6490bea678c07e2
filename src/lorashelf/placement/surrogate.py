"""The gain that a change of blocks promises, without measuring a loss.

    f(B) = Σ_{t ∈ B} cos_t(ΔW_t, Σ_{u ∈ B} ΔW_u) = Σ_{t ∈ B} Σ_{u ∈ B} G^t_tu / √(G^t_tt Σ_{u,v ∈ B} G^t_uv)

with G^t the inner products of the adapters' updates as task t weighs them: by what they add to outputs on its examples
(models/protocol.py, Effects), or for every task by the weights, ⟨ΔW_u, ΔW_v⟩. Both sums follow from G for every move
and swap, without merging an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..lora.arrays import Array64, Cube, Float64, Int, Positions, Square


class Surrogate:
    """Σ_B f(B) of partitions of n adapters, from G (task, adapter, adapter)."""

    def __init__(self, grams: Cube) -> None:
        self._grams = grams
        self._every = np.arange(len(grams))
        self._squares = np.diagonal(grams, axis1=1, axis2=2)  # (task, adapter)
        self._own = self._squares[self._every, self._every]

    def gains(self, blocks: Sequence[frozenset[int]]) -> tuple[Float64[Array64, "n k"], Square]:
        """Return the gain of Σ_B f(B) from moving task t to block c, (n, K), and from swapping t and u, (n, n) with
        t < u; −∞ where nothing would change. Time O(n³).
        """
        n = len(self._own)
        moves, swaps = np.zeros((n, len(blocks))), np.zeros((n, n))
        for place, block in enumerate(blocks):
            members, outside = np.array(sorted(block), dtype=np.intp), np.array([t not in block for t in range(n)])
            rows = self._grams[:, members].sum(axis=1)  # (task, adapter): Σ_{v ∈ B} G^t_v·
            squares = rows[:, members].sum(axis=1)
            now = self._agreement(members, rows, squares)
            moves[outside, place] += self._joined(members, rows, squares)[outside] - now
            for t in members.tolist():
                rest = members[members != t]
                less = rows - self._grams[:, t]
                fewer = squares - 2 * rows[:, t] + self._squares[:, t]
                moves[t] += self._agreement(rest, less, fewer) - now
                moves[t, place] = -np.inf
                swaps[t] += self._joined(rest, less, fewer) - now
                swaps[t, ~outside] = -np.inf
        swaps = swaps + swaps.T
        swaps[~np.triu(np.ones((n, n), bool), 1)] = -np.inf
        return moves, swaps

    def _agreement(self, members: Int[Positions, " m"], rows: Square, squares: Float64[Array64, " n"]) -> float:
        """Return f of a block."""
        return float(_ratio(rows[members, members], squares[members] * self._own[members]).sum())

    def _joined(
        self, members: Int[Positions, " m"], rows: Square, squares: Float64[Array64, " n"]
    ) -> Float64[Array64, " n"]:
        """Return f of a block with each adapter added, (n,)."""
        more = squares[:, None] + 2 * rows + self._squares  # (task, added)
        terms = rows[members, members][:, None] + self._grams[members, members]
        others: Float64[Array64, " n"] = _ratio(terms, more[members] * self._own[members, None]).sum(axis=0)
        every = self._every
        return others + _ratio(rows[every, every] + self._own, more[every, every] * self._own)


def _ratio(sums: Float64[Array64, "*shape"], products: Float64[Array64, "*shape"]) -> Float64[Array64, "*shape"]:
    """Return sums / √products, 0 for an untrained adapter and a block that is empty or cancels."""
    floor = 1e-12 * max(float(np.abs(products).max(initial=0.0)), 1e-300)
    return np.divide(sums, np.sqrt(np.maximum(products, floor)), out=np.zeros_like(sums), where=products > floor)
