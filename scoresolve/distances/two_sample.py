"""How well a classifier tells the two sets apart: 0.5 for equal laws, 1 for disjoint ones.

A quadratic discriminant, which sees means and covariances in any dimension, and nearest neighbours,
which see modes, vote. They are fitted to four fifths of the rows and judged on the rest, five
times. The value is the mean area under the ROC curve, P(score of an x > score of a y).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoresolve.distances.floor import Distance, against_floor, draw_floor
from scoresolve.distances.pairs import LEAST, Pair, Unavailable
from scoresolve.errors import whole_number
from scoresolve.precision import host

__all__ = ["classifier"]

_FOLDS = 5


def classifier(pair: Pair, *, most: int = 1000, draws: int = 19) -> Distance:
    """The classifier two-sample test: cross-validated area under the ROC curve, 0 to 1.

    `detail` has the accuracy. The floor fits the classifier anew in each draw.

    Args:
        pair: of `distances.pair`.
        most: rows to take of either set, at random.
        draws: of the floor, at least 19.

    Raises:
        ScoresolveError: scikit-learn is not installed (extra `fit`).
        ArgumentError: a number is out of range.

    Source:
        Lopez-Paz, Oquab 2017 (1610.06545), with cross-validation.
    """
    try:
        from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold
        from sklearn.neighbors import KNeighborsClassifier
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise Unavailable("classifier needs scikit-learn: pip install 'scoresolve[fit]'") from error
    pair = pair.take(whole_number("most", most, least=LEAST))
    labels = np.repeat([1, 0], pair.sizes)
    models = (
        QuadraticDiscriminantAnalysis(reg_param=0.1),
        KNeighborsClassifier(int(len(labels) ** 0.5)),
    )
    splitter = StratifiedKFold(_FOLDS, shuffle=True, random_state=pair.seed % 2**32)
    folds = list(splitter.split(labels, labels))

    def scores(x: Tensor, y: Tensor) -> tuple[float, float]:
        rows = host(torch.cat([x, y])).numpy()
        areas, hits = [], []
        for fitted, held in folds:
            votes = np.mean(
                [
                    model.fit(rows[fitted], labels[fitted]).predict_proba(rows[held])[:, 1]
                    for model in models
                ],
                axis=0,
            )
            areas.append(roc_auc_score(labels[held], votes))
            hits.append(np.mean((votes > 0.5) == labels[held]))
        return float(np.mean(areas)), float(np.mean(hits))

    with threadpool_limits(1):  # matrices so small that further threads only wait
        value, accuracy = scores(pair.x, pair.y)
        floor = draw_floor(pair, lambda x, y: scores(x, y)[0], draws)
    return against_floor("classifier", value, floor, pair, detail=f"accuracy {accuracy:.3f}")
