"""Mixtures under a linear process with matrix coefficients: exact p_t, score and flow.

With phi and S of `LinearSDE.kernel`, component k has mean phi (x) mu_k and covariance
phi phi^T (x) Sigma_k + S (x) I. In the eigenvectors of Sigma_k, of value l, that is one matrix
l phi phi^T + S of m rows for each direction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresolve.errors import ArgumentError, ShapeError, UnknownNameError
from scoresolve.models import Model
from scoresolve.sde import LinearSDE
from scoresolve.sde.base import TimeLike, as_time
from scoresolve.targets.model import as_row_times
from scoresolve.targets.rows import last_sum, product, shares

__all__ = ["LinearMixtureModel"]


class LinearMixtureModel(Model):
    """The exact score model of a mixture of Gaussians under a `LinearSDE`.

    Args:
        log_weights: [K].
        means: [K, D].
        covariances: [K, D, D].
        event: shape of an event of the data, of D elements.
        sde: the process.

    Source:
        Dockhorn et al. 2022 (2112.07068), appendix B, for one Gaussian.
    """

    sde: LinearSDE

    def __init__(
        self,
        log_weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        event: tuple[int, ...],
        sde: LinearSDE,
    ) -> None:
        self.log_weights, self.sde, self.event = log_weights.double(), sde, event
        # No result hangs on the signs of the eigenvectors, nor on their choice where values meet.
        self.values, vectors = torch.linalg.eigh(covariances.double())
        self.basis = vectors.mT.contiguous()
        self.centres = (self.basis @ means.double()[..., None])[..., 0]

    def predict(self, prediction: str, x: Tensor, t: TimeLike, **cond: object) -> Tensor:
        """The score or the flow's velocity at `x` [B, m, *event] and `t` [] or [B], shape of `x`.

        Raises:
            UnknownNameError: another prediction.
            ShapeError: `x` or `t` has another shape.
            ArgumentError: there are conditions, or p_t has no density.
        """
        if cond:
            raise ArgumentError(f"a mixture takes no conditions, got {', '.join(cond)}")
        if prediction == "flow":
            return self.sde.probability_flow_drift(x, t, self)
        if prediction != "score":
            raise UnknownNameError("prediction", prediction, ("score", "flow"))
        logits, solved = self._components(x, t)
        pulled = (-shares(logits)[:, None, :, None] * solved).flatten(0, 1).flatten(1)
        score = product(pulled, self.basis.to(x.device).flatten(0, 1))
        return score.reshape(x.shape).to(x.dtype)

    def log_prob(self, x: Tensor, t: TimeLike) -> Tensor:
        """log p_t(u), [B]; arguments and errors as of `predict`."""
        logits, _ = self._components(x, t)
        return logits.logsumexp(1).to(x.dtype)

    def _components(self, x: Tensor, t: TimeLike) -> tuple[Tensor, Tensor]:
        """log pi_k p_k(u), [B, K], and C_k^-1 (u - phi mu_k) in eigenvectors, [B, m, K, D]."""
        if x.shape[1:] != (self.sde.parts, *self.event):
            raise ShapeError(
                f"x of shape {tuple(x.shape)}: states are [B, {self.sde.parts}, "
                f"{', '.join(map(str, self.event))}]"
            )
        time = as_row_times(as_time(t), x).detach().double().cpu()
        phi, rest = (part.to(x.device) for part in self.sde.kernel(time.reshape(-1)))
        basis = self.basis.to(x.device)
        u = product(x.double().flatten(2).flatten(0, 1), basis.flatten(0, 1).mT)
        u = u.reshape(*x.shape[:2], *basis.shape[:2])
        off = u - phi[..., None, None] * self.centres.to(x.device)
        values = self.values.to(x.device)[..., None, None]
        outer = phi[:, :, None] * phi[:, None]
        matrices = values * outer[:, None, None] + rest[:, None, None]  # [B or 1, K, D, m, m]
        factor, info = torch.linalg.cholesky_ex(matrices)
        if bool((info > 0).any()):
            raise ArgumentError(f"p_t has no density at t = {t}: take a later time")
        solved = torch.cholesky_solve(off.movedim(1, 3)[..., None], factor)[..., 0].movedim(3, 1)
        log_det = 2 * last_sum(factor.diagonal(dim1=-2, dim2=-1).log().flatten(-2))
        size = off.shape[1] * off.shape[3]
        quadratic = last_sum((off * solved).movedim(1, 2).flatten(2))
        logits = self.log_weights.to(x.device) - (quadratic + log_det) / 2
        return logits - size / 2 * math.log(2 * math.pi), solved
