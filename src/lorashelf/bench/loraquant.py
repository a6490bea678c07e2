"""LoRAQuant's quantisers, as its authors' released code has them: of large directions, of small ones, and the descent
that improves the large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..lora.arrays import Array32, Float32

DESCENT, RATE = 300, 1e-2
"""Steps and rate of the gradient descent."""
LEAST_SPREAD = np.float32(1e-5)
"""The smallest difference of a group's ends from which it takes a step."""
Vectors = Float32[Array32, "n d"]


def leading(sides: tuple[Vectors, Vectors], ratio: float) -> int:
    """Return h, the number of LoRAQuant's directions of high precision."""
    energy = np.cumsum((sides[0].astype(np.float64) ** 2).sum(axis=1) ** 2)  # ‖√σ u‖⁴ = σ²
    return max(1, int(np.argmax(energy >= ratio * energy[-1])))


def ranged(
    x: Float32[Array32, "... group"], bits: int
) -> tuple[Float32[Array32, "... group"], Float32[Array32, "... 1"]]:
    """Return integers k and steps s of groups whose values become k s: 2^bits values from the minimum to the maximum,
    shifted by a whole number of steps so that 0 is among them if it is between both.
    """
    return _within_ends(x, np.max(x, axis=-1, keepdims=True), np.min(x, axis=-1, keepdims=True), bits)


def _within_ends(
    x: Float32[Array32, "... group"], high: Float32[Array32, "... 1"], low: Float32[Array32, "... 1"], bits: int
) -> tuple[Float32[Array32, "... group"], Float32[Array32, "... 1"]]:
    most = 2**bits - 1
    step = np.maximum(high - low, LEAST_SPREAD) / np.float32(most)
    zero = np.clip(-np.rint(low / step), 0, most)
    index = x / step
    return np.clip(np.rint(index, out=index), -zero, most - zero, out=index), step


def rounded(x: Vectors, bits: int, group: int) -> Vectors:
    """Return vectors quantised by `ranged`, in groups of all values in a row."""
    index, step = ranged(x.reshape(-1, group), bits)
    return (index * step).reshape(x.shape)


def signs(x: Vectors, group: int) -> Vectors:
    """Return sign(x) · mean|x| per group of all values in a row; the last group is filled with zeros, which count."""
    padded = np.pad(x.reshape(-1), (0, -x.size % group)).reshape(-1, group)
    found = np.sign(padded) * np.abs(padded).mean(axis=1, keepdims=True)
    return np.asarray(found.reshape(-1)[: x.size].reshape(x.shape))


def descended(
    pairs: Mapping[str, tuple[Vectors, Vectors]], bits: int, group: int
) -> dict[str, tuple[Vectors, Vectors]]:
    """Return LoRAQuant's b and a, path → (h, dout) and (h, din), after gradient descent on ‖b aᵀ − q(b) q(a)ᵀ‖ of each
    direction; those of modules of one shape are computed together.
    """
    by_shape: dict[tuple[int, int], list[str]] = {}
    for path, (b, a) in pairs.items():
        by_shape.setdefault((b.shape[1], a.shape[1]), []).append(path)
    found: dict[str, tuple[Vectors, Vectors]] = {}
    for paths in by_shape.values():
        ends = np.cumsum([len(pairs[path][0]) for path in paths])[:-1]
        sides = [np.concatenate([pairs[path][side] for path in paths]) for side in (0, 1)]
        moved = [np.split(side, ends) for side in _descended(sides, bits, group)]
        found |= {path: (b, a) for path, b, a in zip(paths, *moved, strict=True)}
    return found


def _descended(sides: Sequence[Vectors], bits: int, group: int) -> list[Vectors]:
    """Descend for n directions, b (n, dout) and a (n, din).

    With q = k s per group, ‖b aᵀ − q(b) q(a)ᵀ‖² = ‖b‖²‖a‖² − 2 ⟨b, q(b)⟩⟨a, q(a)⟩ + ‖q(b)‖²‖q(a)‖². Rounding has no
    gradient, so the error changes with the steps only, and only the largest and smallest value of a group move: ∂s/∂max
    = −∂s/∂min = 1/(2^bits − 1), or 0 where both are closer than LEAST_SPREAD.
    """
    target = [side.reshape(len(side), -1, group) for side in sides]
    x = [side.copy() for side in target]
    whole = np.float32(1)
    for side in target:
        whole = whole * np.einsum("ngd,ngd->n", side, side)
    for _ in range(DESCENT):
        steps, squares, products, ends = [], [], [], []
        for side, original in zip(x, target, strict=True):
            places = [end(side, axis=-1, keepdims=True) for end in (np.argmax, np.argmin)]
            high, low = (np.take_along_axis(side, place, axis=-1) for place in places)
            index, step = _within_ends(side, high, low, bits)
            ends.append((*places, high, low))
            steps.append(step[..., 0])
            squares.append(np.einsum("ngd,ngd->ng", index, index))
            products.append(np.einsum("ngd,ngd->ng", index, original))
        cross = [(s * p).sum(axis=1) for s, p in zip(steps, products, strict=True)]
        size = [(s**2 * k).sum(axis=1) for s, k in zip(steps, squares, strict=True)]
        error = np.sqrt(np.maximum(whole - 2 * cross[0] * cross[1] + size[0] * size[1], 0))
        for this, other in ((0, 1), (1, 0)):
            slope = size[other][:, None] * steps[this] * squares[this] - cross[other][:, None] * products[this]
            slope = np.divide(slope, error[:, None], out=np.zeros_like(slope), where=error[:, None] > 0)
            largest, smallest, high, low = ends[this]
            way = np.float32(RATE / (2**bits - 1)) * slope[..., None] * (high - low > LEAST_SPREAD)
            np.put_along_axis(x[this], largest, high - way, axis=-1)
            np.put_along_axis(x[this], smallest, low + way, axis=-1)
    return [side.reshape(len(side), -1) for side in x]
