"""Rank correlation: whether what is said of the heads and what they do go together (Fig. 6b)."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 3
"""Values below which a rank correlation says nothing."""
FEW = 8
"""Up to so many values p is counted over all orders: Student's t, which stands for it beyond, is too sure of few."""


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float] | None:
    """Spearman's rho and its two-sided p; None for fewer than three pairs or where either side is constant.

    Args:
        a, b: `[n]`, the values of each pair.

    >>> rho, p = spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    >>> round(rho, 6), round(p, 6)  # of the six orders of three values, every one has a rho of 0.5 or more, or -0.5
    (0.5, 1.0)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    from scipy.stats import rankdata, spearmanr

    found = spearmanr(x, y)
    p = _exact(rankdata(x), rankdata(y)) if len(x) <= FEW else float(found.pvalue)
    return float(found.statistic), p


def _exact(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The share of the orders of `y` that go with `x`, or against it, at least as much as the one at hand."""
    orders = np.array(list(permutations(y - y.mean())))
    agreement = np.abs(orders @ (x - x.mean()))  # rho up to a factor; the first order is the one at hand
    return float((agreement >= agreement[0] - 1e-9).mean())
