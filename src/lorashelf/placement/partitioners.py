"""Offline rules: N adapters into at most K blocks. Pure functions of the adapters and their similarities, seeded.

single         one block
random         balanced blocks, drawn
agglomerative  average linkage on 1 − cosine
kmeans         K-Means on the flattened factors A, B as stored (from their Gram matrix: the same distances)
kmeans_svd     K-Means on the rows of the cosine matrix of SVD features (MBC, arXiv 2405.11157)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import MissingExtra, UsageError, numbered
from ..lora.adapter import Adapter
from ..lora.algebra import Square, trained
from ..lora.given import as_adapters
from ..lora.similarity import principal_coordinates, raw_gram, similarity
from ..registry import Registry

Partition = list[list[int]]
Partitioner = Callable[[Sequence[Adapter], int, int], Sequence[int]]
PARTITIONERS: Registry[Partitioner] = Registry("partition method")
STARTS = 10
COPIES = 1e-3  # points nearer than this share of the largest norm are copies, apart by rounding only


def partition(xs: Sequence[Adapter], k: int, *, method: str, seed: int = 0) -> Partition:
    """Indices of the adapters in at most k non-empty blocks, each sorted, blocks by their smallest index.

    With n ≤ k every adapter is its own block. Raises UsageError for k < 1 or no adapters, UnknownName, MissingExtra
    (`cluster`).
    """
    partitioner, xs = PARTITIONERS[method], as_adapters(xs)
    if k < 1 or not xs:
        what = f"{numbered(len(xs), 'adapter')} into {numbered(k, 'slot')}"
        raise UsageError(what, cure="give at least one adapter and one slot")
    room = 0 if method == "single" else k  # `single` is asked however much room there is
    return blocks([trained(x) for x in xs], room, lambda chosen: partitioner([xs[i] for i in chosen], k, seed))


def blocks(effective: Sequence[bool], k: int, label: Callable[[list[int]], Sequence[int]]) -> Partition:
    """The blocks of what `label` labels, asked only where there are more than k; untrained adapters, which are like no
    other, go to the first block rather than take one.
    """
    if len(effective) <= k:
        return [[i] for i in range(len(effective))]
    chosen = [i for i, yes in enumerate(effective) if yes] or list(range(len(effective)))
    found: dict[int, list[int]] = {}
    for index, name in zip(chosen, label(chosen) if len(chosen) > k else chosen, strict=True):
        found.setdefault(int(name), []).append(index)
    first, *others = sorted(found.values())
    return sorted([sorted({*first, *range(len(effective))} - {i for block in others for i in block}), *others])


def partitioner(name: str) -> Callable[[Partitioner], Partitioner]:
    """Register a function of (adapters, k, seed) → label per adapter as partition method `name`."""

    def register(function: Partitioner) -> Partitioner:
        PARTITIONERS.add(name, function)
        return function

    return register


@partitioner("single")
def single(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """All in one block."""
    return [0] * len(xs)


@partitioner("random")
def random(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """A random balanced partition: block sizes differ by at most one."""
    return balanced(len(xs), k, seed)


@partitioner("agglomerative")
def agglomerative(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Average linkage on 1 − cosine similarity of ΔW; deterministic."""
    return average_linkage(1.0 - similarity(xs), k)


@partitioner("kmeans")
def kmeans(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """K-Means on the flattened raw factors; coordinates from their Gram matrix have the same distances."""
    return _kmeans(principal_coordinates(raw_gram(xs)), k, seed)


@partitioner("kmeans_svd")
def kmeans_svd(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """K-Means on the rows of the cosine matrix of SVD features (MBC)."""
    return _kmeans(similarity(xs, metric="svd_features"), k, seed)


def balanced(n: int, k: int, seed: int) -> list[int]:
    """Labels of a random partition of n into k blocks whose sizes differ by at most one."""
    return [int(label) for label in np.random.default_rng(seed).permutation(np.arange(n) % k)]


def average_linkage(distances: Square, k: int) -> list[int]:
    """Labels of k clusters by average linkage on an (n, n) matrix of distances."""
    cluster = _sklearn()
    model = cluster.AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="average")
    return [int(label) for label in model.fit_predict(np.maximum(distances, 0.0))]


def _kmeans(points: Square, k: int, seed: int) -> list[int]:
    cluster = _sklearn()
    apart = np.stack([np.linalg.norm(points - point, axis=1) for point in points])
    first = (apart <= COPIES * np.linalg.norm(points, axis=1).max()).argmax(axis=1)  # copies count as one point
    model = cluster.KMeans(n_clusters=min(k, len(np.unique(first))), n_init=STARTS, random_state=seed)
    return [int(label) for label in model.fit_predict(points[first])]


def _sklearn() -> Any:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise MissingExtra("this partition method", "scikit-learn", "cluster") from error
    return sklearn.cluster
