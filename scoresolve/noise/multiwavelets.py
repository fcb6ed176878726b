"""White noise in an orthonormal basis of functions that are linear on halves of halves.

Each interval of each level has a pair of functions that are orthogonal to 1 and to t. What they add
to W, and to the integral of W, therefore ends where their interval ends: to know both at a time
takes one interval a level. With h the length of the interval, p and q those of its halves,
r^2 = (p^3 + q^3)/h^3 and u the distance from the middle of the half, the pair is

    psi_0 =  2 sqrt(3) (q/(h p))^(3/2) u/r                 on the first half,
            -2 sqrt(3) (p/(h q))^(3/2) u/r                 on the second;
    psi_1 =  sqrt(q/(h p)) r + 6 sqrt(p q/h^5) u/r         on the first,
            -sqrt(p/(h q)) r + 6 sqrt(p q/h^5) u/r         on the second.

Source: Alpert 1993 (SIAM J. Math. Anal. 24), the basis of order 2, here for unequal halves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Step", "lines", "pairs", "rest"]


class Step(NamedTuple):
    """The interval from `low` to `high`, [n] each, and what is read over it.

    The integral of f(u) dW, for the increment, or if `area`, of (middle - u)/(high - low) f(u) dW.
    """

    low: Tensor
    high: Tensor
    area: bool

    def moments(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The integrals of 1 and of u - middle on [start, end], of 0 elsewhere."""
        first, last = start.clamp(self.low, self.high), end.clamp(self.low, self.high)
        size = last - first
        # differences of neighbours are exact, sums of four times are not
        offset = ((first - start) + (last - end)) / 2
        if not self.area:
            return size, size * offset
        lever = ((first - self.low) + (last - self.high)) / 2
        size = size / (self.low - self.high)
        return size * lever, size * (offset * lever + (last - first).square() / 12)


def lines(step: Step, start: Tensor, end: Tensor) -> Tensor:
    """Integrals over the step, [2, n], of the Legendre polynomials of degree 0 and 1."""
    h = end - start
    mean, tilt = step.moments(start, end)
    return torch.stack((mean / h.sqrt(), math.sqrt(12) * tilt / h**1.5))


def pairs(step: Step, a: Tensor, m: Tensor, b: Tensor) -> Tensor:
    """Integrals over the step, [2, ...], of the pair on [a, b] halved at m."""
    p, q, h = m - a, b - m, b - a
    r = ((p / h) ** 3 + (q / h) ** 3).sqrt()
    left, right = (q / (h * p)).sqrt(), (p / (h * q)).sqrt()
    (mean_p, tilt_p), (mean_q, tilt_q) = step.moments(a, m), step.moments(m, b)
    kink = math.sqrt(12) * (left**3 * tilt_p - right**3 * tilt_q) / r
    jump = (left * mean_p - right * mean_q) * r
    jump = jump + 6 * (p * q / h).sqrt() / (r * h * h) * (tilt_p + tilt_q)
    whole = (step.low <= a) & (b <= step.high)  # to the last digit, so that it costs no draw
    return torch.stack((kink, jump)).masked_fill(whole, 0.0)


def rest(step: Step, a: Tensor, b: Tensor, edge: float = 0.0) -> Tensor:
    """What the functions on parts of [a, b] add at each end of the step, [2, 2 (low, high), n].

    With x in [0, 1] on [a, b] and y = x (1 - x), they add to the integral of W

        (h y)^(3/2)/sqrt(3) (z_0 cos(v) + z_1 sin(v)),        v = sqrt(3)/2 log(x/(1 - x)),

    and to W its derivative. The two have, at each x, the law of W and its integral given what
    coarser functions say: variances h y (1 - 3 y) and (h y)^3/3, covariance (h y)^2 (1 - 2 x)/2.
    A W of that law turns without end towards the ends of [a, b]. Within a share `edge` of them the
    integral is therefore the cubic through its value and slope there and zeros at the end: W is
    then a smooth function of x, whose variance lacks at most 0.09 `edge` h.

    Args:
        step: the step.
        a, b: the intervals [2, n] that hold its two ends.
        edge: the share, at most 1/2.
    """
    ends, h = torch.stack((step.low, step.high)), b - a
    x = ((ends - a) / h).clamp(0, 1)
    inner = x.clamp(edge, 1 - edge)
    y = inner * (1 - inner)
    angle = math.sqrt(3) / 2 * inner.logit(1e-16)
    turn = torch.stack((angle.cos(), angle.sin()))
    across = torch.stack((-turn[1], turn[0]))
    w = (h * y).sqrt() * (math.sqrt(3) / 2 * (1 - 2 * inner) * turn + across / 2)
    total = (h * y) ** 1.5 / math.sqrt(3) * turn
    if edge:
        width = edge * h
        r = (torch.minimum(x, 1 - x) / edge).clamp(max=1)
        inward = (0.5 - x).sign()
        bent = r * (3 * r - 2) * w + 6 * r * (1 - r) / width * inward * total
        total = r * r * (3 - 2 * r) * total - r * r * (1 - r) * width * inward * w
        w = bent
    if not step.area:
        return w * w.new_tensor([-1.0, 1.0])[:, None]
    return total / torch.stack((step.low - step.high, step.high - step.low)) - w / 2
