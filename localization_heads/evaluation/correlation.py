"""Rank correlation: whether what is said of the heads and what they do go together (Fig. 6b)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

FEWEST = 3
"""Values below which a rank correlation says nothing."""


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float] | None:
    """Spearman's rho and its two-sided p; None for fewer than three pairs or where either side is constant.

    Args:
        a, b: `[n]`, the values of each pair.

    >>> rho, p = spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    >>> round(rho, 6), round(p, 6)
    (0.5, 0.666667)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    from scipy.stats import spearmanr

    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)
