"""Rules on tensors: sparsify each, then combine. Registered on the factors A and B (PEFT's names) and on the dense ΔW
(`…_svd`).

A rule gets the tensors of one module (lower ranks not yet padded), their weights (n,), and `draw(i)`, the generator of
adapter i's mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..lora.arrays import Array32, Float32
from .merge_method import Draw, Tensor, Weights, merge_method
from .parameters import Fraction

PEFT = "PEFT 0.21.2 add_weighted_adapter"
KMERGE = "K-Merge, arXiv 2510.13537, its fold equation read literally"
TIES = "TIES, arXiv 2306.01708"
Signs = Literal["total", "frequency"]
DARE = "DARE, arXiv 2311.03099"


@merge_method("linear", space="factors", cites=f"{PEFT}; K-Merge's released code", mean_power=0.5)
def linear(tensors: Sequence[Tensor], weights: Weights, draw: Draw) -> Tensor:
    """Return Σ wᵢ Xᵢ, on A with w = sgn(w s)√|w s| and on B with √|w s|: n² cross terms, and ΔW keeps about the norm of
    one adapter.
    """
    return _weighted_sum(tensors, weights)


@merge_method("factor_mean", space="factors", cites=KMERGE, weighting="plain", mean_power=1.0, duplicate=True)
def factor_mean(tensors: Sequence[Tensor], weights: Weights, draw: Draw) -> Tensor:
    """Return Σ wᵢ √sᵢ Xᵢ on A and on B: the literal mean of the factors; ΔW shrinks with n."""
    return _weighted_sum(tensors, weights)


@merge_method("magnitude_prune", space="factors", cites=PEFT, weights="unary")
@merge_method("magnitude_prune_svd", space="delta", cites=PEFT, weights="unary", gauge=True)
def magnitude_prune(tensors: Sequence[Tensor], weights: Weights, draw: Draw, *, density: Fraction = 0.5) -> Tensor:
    """Return Σ wᵢ top(Xᵢ): of each tensor the share `density` with the largest magnitudes is kept."""
    return _weighted_sum([keep_largest(x, density) for x in tensors], weights)


@merge_method("dare_linear", space="factors", cites=DARE, weights="unary", random=True)
@merge_method("dare_linear_svd", space="delta", cites=DARE, weights="unary", random=True)
def dare_linear(tensors: Sequence[Tensor], weights: Weights, draw: Draw, *, density: Fraction = 0.5) -> Tensor:
    """Return Σ wᵢ mᵢ ∘ Xᵢ / density, mᵢ a random mask that keeps the share `density` of the entries."""
    return _weighted_sum([keep_random(x, density, draw(i)) for i, x in enumerate(tensors)], weights)


@merge_method("ties", space="factors", cites=TIES, weights="unary", duplicate=False)
@merge_method("ties_svd", space="delta", cites=TIES, weights="unary", gauge=True)
def ties(
    tensors: Sequence[Tensor],
    weights: Weights,
    draw: Draw,
    *,
    density: Fraction = 0.5,
    majority_sign_method: Signs = "total",
) -> Tensor:
    """Trim each tensor to the share `density` with the largest magnitudes, elect a sign per entry, average the wᵢ Xᵢ
    of this sign.
    """
    return agree([keep_largest(x, density) for x in tensors], weights, majority_sign_method)


@merge_method("dare_ties", space="factors", cites=f"{DARE}; {TIES}", weights="unary", random=True)
@merge_method("dare_ties_svd", space="delta", cites=f"{DARE}; {TIES}", weights="unary", random=True)
def dare_ties(
    tensors: Sequence[Tensor],
    weights: Weights,
    draw: Draw,
    *,
    density: Fraction = 0.5,
    majority_sign_method: Signs = "total",
) -> Tensor:
    """Merge like `ties`, with DARE's random mask and rescaling instead of the trim."""
    return agree([keep_random(x, density, draw(i)) for i, x in enumerate(tensors)], weights, majority_sign_method)


def keep_largest(x: Float32[Array32, "rows columns"], density: float) -> Float32[Array32, "rows columns"]:
    """Set all but the int(density · size) largest magnitudes of x to zero; of equal magnitudes the first are kept."""
    count = int(density * x.size)
    if count >= x.size:
        return x
    if count == 0:
        return np.zeros_like(x)
    magnitudes = np.abs(x).ravel()
    cut = np.partition(magnitudes, x.size - count)[x.size - count]
    keep = magnitudes > cut
    level = np.flatnonzero(magnitudes == cut)
    keep[level[: count - int(keep.sum())]] = True
    return np.where(keep.reshape(x.shape), x, np.float32(0))


def keep_random(
    x: Float32[Array32, "rows columns"], density: float, rng: np.random.Generator
) -> Float32[Array32, "rows columns"]:
    """Return x ∘ m / density, m ~ Bernoulli(density) per entry; all zeros at density 0."""
    if density >= 1.0:
        return x
    if density <= 0.0:
        return np.zeros_like(x)
    return np.where(rng.random(x.shape, dtype=np.float32) < density, x / np.float32(density), np.float32(0))


def agree(tensors: Sequence[Tensor], weights: Weights, majority_sign_method: Signs) -> Tensor:
    """Elect per entry the sign of the sum ('total') or of the count of signs ('frequency'), 0 as +; return the mean of
    wᵢ Xᵢ over the tensors whose entry has this sign (and is not zero).
    """
    size = padded_shape(tensors)
    votes = np.zeros(size, dtype=np.float32)
    for x in tensors:
        part = votes[: x.shape[0], : x.shape[1]]
        part += np.sign(x) if majority_sign_method == "frequency" else x
    positive = votes >= 0
    total, count = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
    for x, weight in zip(tensors, weights, strict=True):
        corner = (slice(x.shape[0]), slice(x.shape[1]))
        elected = np.where(positive[corner], x > 0, x < 0)
        total[corner] += np.where(elected, np.float32(weight) * x, np.float32(0))
        count[corner] += elected
    return np.divide(total, np.maximum(count, np.float32(1)), dtype=np.float32)


def padded_shape(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Return the smallest shape that holds every tensor, with lower ranks zero-padded."""
    return max(x.shape[0] for x in tensors), max(x.shape[1] for x in tensors)


def _weighted_sum(tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    total = np.zeros(padded_shape(tensors), dtype=np.float32)
    for x, weight in zip(tensors, weights, strict=True):
        part = total[: x.shape[0], : x.shape[1]]
        part += np.float32(weight) * x
    return total


def roots(products: Sequence[float]) -> Weights:
    """Return sgn(p)√|p| for p = weight × scale, PEFT's factor on A (its magnitude on B)."""
    return np.array([math.copysign(math.sqrt(abs(p)), p) for p in products], dtype=np.float32)
