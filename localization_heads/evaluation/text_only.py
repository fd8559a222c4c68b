"""A control for claims about presence: the expression alone, without the image.

Where absent expressions differ from others in their words, a classifier that never sees an image does well (0.92 on
GroundingME), and so a method may have learned nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FOLDS = 5


def presence_from_text(
    expressions: Sequence[str],
    present: ArrayLike,
    images: Sequence[str],
    *,
    folds: int = FOLDS,
    seed: int = 42,
) -> NDArray[np.float64] | None:
    """The probability that each expression refers to something, from its words and pairs of words alone.

    Bag of words and logistic regression, each expression judged by a model that was fitted without its image.

    Args:
        present: the truth, bool `[n]`.
        images: the identity of each expression's image.

    Returns:
        float64 `[n]`, or None where there are not enough images or expressions of either kind, or no words.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline

    truth = np.asarray(present, dtype=bool)
    if min(truth.sum(), (~truth).sum(), len(set(images))) < folds:
        return None
    found = np.full(len(truth), float(truth.mean()))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(truth, truth, images)
    for fitted, left in parts:
        if len(set(truth[fitted].tolist())) < 2:
            continue
        words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", binary=True)
        model = make_pipeline(words, LogisticRegression(max_iter=1000))
        model.fit([expressions[i] for i in fitted], truth[fitted])
        found[left] = model.predict_proba([expressions[i] for i in left])[:, 1]
    return found
