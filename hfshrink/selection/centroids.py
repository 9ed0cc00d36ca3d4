"""K-means on embeddings: centroids from a sample by scikit-learn or faiss, then one pass that assigns every row."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import require
from hfshrink.selection.blockwise import Floats, Rows, nearest

SAMPLE_PER_CENTROID = 64  # rows that one centroid is fitted to; more than that moves it little
LEAST_SAMPLE = 20_000
LLOYD_PAIRS = 2 * 10**7  # row-centroid pairs of one full iteration; above that mini-batches are the cheaper way


@dataclass(frozen=True, eq=False)
class Clusters:
    """Where the rows lie.

    Attributes:
        centroids: (k, d) float32, in the coordinates of the rows as given (after normalising where that was asked).
        index: (m,) number of each row's nearest centroid.
        squared: (m,) squared distance to it.
    """

    centroids: Floats
    index: NDArray[np.int64]
    squared: Floats

    @property
    def counts(self) -> NDArray[np.int64]:
        """(k,) rows of each cluster; some may be empty where rows repeat."""
        return np.bincount(self.index, minlength=len(self.centroids))


def find_clusters(rows: Rows, k: int, seed: int = 0) -> Clusters:
    """K-means, min Σ ‖x − c(x)‖² (Lloyd; mini-batches: Sculley, WWW 2010), in memory that does not grow with the rows.

    The centroids are fitted to a random sample of at most max(20,000, 64·k) rows; then every row is assigned. The
    sample is clustered by scikit-learn, to convergence while that is cheap, else in mini-batches (or by faiss, if it
    is installed). One seed gives one answer whatever the number of threads.

    Args:
        rows: m rows.
        k: Number of centroids, from 1 to m.
        seed: Of the sample and the first centroids.

    Raises:
        SettingError: A number is NaN or infinite.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> points = np.array([[0.0], [1.0], [10.0], [11.0]], dtype=np.float32)
        >>> sorted(find_clusters(Rows(points), 2).centroids[:, 0].tolist())
        [0.5, 10.5]
    """
    centred = rows.centred()
    if k == 1:
        centroids = np.zeros((1, rows.embeddings.shape[1]), dtype=np.float32)
    else:
        size = min(len(rows), max(LEAST_SAMPLE, SAMPLE_PER_CENTROID * k))
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False, shuffle=False))
        centroids = _fit(centred.take(chosen), k, seed)
    index, squared = nearest(centred, centroids, "clusters")
    return Clusters(centroids + centred.shift, index, squared)


def _fit(sample: Floats, k: int, seed: int) -> Floats:
    """(k, d) centroids of a sample in memory."""
    large = len(sample) * k > LLOYD_PAIRS
    if large and importlib.util.find_spec("faiss") is not None:
        return _fit_by_faiss(sample, k, seed)
    cluster, limits = require("sklearn.cluster", "select"), require("threadpoolctl", "select").threadpool_limits
    if large:  # a fixed number of steps: stopping early looks at sums whose last digits depend on threads
        batch = max(1024, 2 * k)
        model: Any = cluster.MiniBatchKMeans(
            k, batch_size=batch, max_iter=5, max_no_improvement=None, compute_labels=False, n_init=1, random_state=seed
        )
        return model.fit(sample).cluster_centers_
    with limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", require("sklearn.exceptions", "select").ConvergenceWarning)  # repeated rows
        return cluster.KMeans(k, n_init=1, max_iter=50, random_state=seed).fit(sample).cluster_centers_


def _fit_by_faiss(sample: Floats, k: int, seed: int) -> Floats:
    faiss = require("faiss", "select")
    model = faiss.Kmeans(
        sample.shape[1], k, niter=20, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(sample)
    )
    model.train(sample)
    return np.asarray(model.centroids, dtype=np.float32).reshape(k, -1)
