"""Offline rules: N adapters into at most K blocks; pure functions of the adapters, a seed and, for some, of losses.

single         one block
random         balanced blocks, drawn
agglomerative  average linkage on 1 − cosine
kmeans         K-Means on the flattened factors A, B as stored (from their Gram matrix: the same distances)
kmeans_svd     K-Means on the rows of the cosine matrix of SVD features (MBC, arXiv 2405.11157)
d2c            a search by the losses of blocks (arXiv 2601.17441; placement/d2c.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import MissingExtra
from ..lora.adapter import Adapter
from ..lora.arrays import Array64, Float64, Square
from ..lora.similarity import principal_coordinates, raw_gram, similarity
from .d2c import d2c
from .partition_methods import PARTITIONERS, Partition, balanced, partition, partitioned, partitioner

__all__ = ["PARTITIONERS", "Partition", "balanced", "d2c", "partition", "partitioned", "partitioner"]
STARTS = 10
COPIES = 1e-3  # points closer than this share of the largest norm are copies that differ by rounding only


@partitioner("single", spread=False)
def single(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Put all into one block."""
    return [0] * len(xs)


@partitioner("random")
def random(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Draw a balanced partition: block sizes differ by at most one."""
    return balanced(len(xs), k, seed)


@partitioner("agglomerative")
def agglomerative(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Cluster by average linkage on 1 − cosine similarity of ΔW; deterministic."""
    return average_linkage(1.0 - similarity(xs), k)


@partitioner("kmeans")
def kmeans(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Cluster by K-Means on the flattened raw factors; coordinates from their Gram matrix have the same distances."""
    return _kmeans(principal_coordinates(raw_gram(xs)), k, seed)


@partitioner("kmeans_svd")
def kmeans_svd(xs: Sequence[Adapter], k: int, seed: int) -> Sequence[int]:
    """Cluster by K-Means on the rows of the cosine matrix of SVD features (MBC)."""
    return _kmeans(similarity(xs, metric="svd_features"), k, seed)


def average_linkage(distances: Square, k: int) -> list[int]:
    """Return labels of k clusters by average linkage on an (n, n) matrix of distances."""
    cluster = _sklearn()
    model = cluster.AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="average")
    return [int(label) for label in model.fit_predict(np.maximum(distances, 0.0))]


def _kmeans(points: Float64[Array64, "n m"], k: int, seed: int) -> list[int]:
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
