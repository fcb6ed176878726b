"""The change of log pi between two points where only the score is known.

    log pi(y) - log pi(x) = int_0^1 <score(x + u d), d> du,    d = y - x,

by the Gauss-Legendre rule of n nodes, exact for a polynomial of degree 2n - 1 in u. The scores at
both ends are at hand, so a rule on the ends and the inner nodes estimates its error for nothing.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from scoresolve.kernels.target import Point, Target, inner

__all__ = ["line_integral", "line_rules"]

_Weights = tuple[float, ...]


@lru_cache
def line_rules(nodes: int) -> tuple[_Weights, _Weights, _Weights]:
    """Nodes on (0, 1), their Gauss weights, and the weights of the embedded rule.

    The embedded rule stands on 0, the nodes but the first and the last, and 1, in this order.
    """
    roots, weights = np.polynomial.legendre.leggauss(nodes)
    places = np.array([-1.0, *roots[1:-1], 1.0])
    moments = np.zeros(len(places))
    moments[0] = 2.0
    embedded = np.linalg.solve(np.polynomial.legendre.legvander(places, len(places) - 1).T, moments)
    return tuple((roots + 1) / 2), tuple(weights / 2), tuple(embedded / 2)


def line_integral(target: Target, old: Point, new: Point) -> tuple[Tensor, Tensor]:
    """log pi(y) - log pi(x) [B] and an estimate of its error, [B].

    The estimate is the distance to a rule of lower degree and so errs on the safe side. It does
    not see that a score which is no gradient has integrals that depend on the path.

    Args:
        target: pi; its `nodes` are evaluated.
        old, new: x and y with their scores.
    """
    places, weights, embedded = line_rules(target.nodes)
    step = new.x - old.x
    slopes = [inner(target(torch.add(old.x, step, alpha=u)).score, step) for u in places]
    ends = inner(old.score, step), inner(new.score, step)
    gauss = sum((w * g for w, g in zip(weights, slopes, strict=True)), torch.zeros_like(ends[0]))
    other = [ends[0], *slopes[1:-1], ends[1]]
    rough = sum((w * g for w, g in zip(embedded, other, strict=True)), torch.zeros_like(ends[0]))
    return gauss, (gauss - rough).abs()
