"""The order of a heat map's rows, and its clusters. Importing this module loads SciPy and scikit-learn."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score

from ..lora.arrays import Square

ROUNDING = 1e-9


def arranged(matrix: Square) -> tuple[list[int], list[int]]:
    """Return an order with similar items side by side, and the positions where a new cluster begins.

    Average linkage on 1 − similarity with optimal leaf order, cut where the mean silhouette is highest.
    Items without clusters, such as fewer than four or all equally similar, have no borders.
    """
    n = len(matrix)
    if n < 3:
        return list(range(n)), []
    distances = np.maximum(1.0 - (matrix + matrix.T) / 2, 0.0)
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances), "average", optimal_ordering=True)
    order = leaves_list(tree)
    best, borders = ROUNDING, np.empty(0, dtype=int)
    for count in range(2, n // 2 + 1):
        clusters = fcluster(tree, count, "maxclust")
        if clusters.max() == count and (worth := silhouette_score(distances, clusters, metric="precomputed")) > best:
            best, borders = worth, np.flatnonzero(np.diff(clusters[order])) + 1
    return order.tolist(), borders.tolist()
