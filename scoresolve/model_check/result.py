"""What `verify_model` found, as data, a table and JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from scoresolve.json_text import json_text

__all__ = ["Estimate", "Finding", "ModelVerification", "NoiseLevel"]


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error over the data points.

    Attributes:
        value: the estimate.
        standard_error: how far chance moves it.
        rooted: whether it is the root of what was averaged; the error is then that of the square,
            as it moves the root upwards.
    """

    value: float
    standard_error: float
    rooted: bool = False

    def bounds(self, errors: float = 3.0) -> tuple[float, float]:
        """The value less and plus so many standard errors; a root is not below 0."""
        value, error = self.value, self.standard_error
        if not self.rooted:
            return value - errors * error, value + errors * error
        off = errors * error * (2 * value + error)
        return math.sqrt(max(value**2 - off, 0.0)), math.sqrt(value**2 + off)

    def __str__(self) -> str:
        value, error = self.value, self.standard_error
        if not math.isfinite(error) or error <= 1e-9 * abs(value):
            return f"{value:.3g}"
        if not 1e-4 < error < 1e3:
            return f"{value:.2g} +- {error:.0e}"
        places = max(0, math.ceil(-math.log10(error)))
        return f"{value:.{places}f} +- {error:.{places}f}"


@dataclass(frozen=True)
class NoiseLevel:
    """What was measured at one noise level; what was not asked for is None.

    With x0_hat and eps_hat the model's predictions and Cov its posterior covariance
    (sigma^2/alpha) d x0_hat/dx:

    Attributes:
        log_snr: log(alpha^2/sigma^2).
        t: time of the process.
        linear: E|x0_hat - x0|^2 over that of the best linear filter of the data.
        exact: E|x0_hat - x0|^2 over that of the exact posterior mean, 1 for a perfect model; None
            if the law of the data is not known.
        correlation: of x0_hat - x0 with eps_hat; 0 for a posterior mean. Its square is the part of
            the error that a constant factor on eps_hat would remove.
        fokker_planck: RMS of the residual of the Fokker-Planck equation, in x0_hat per e-fold of
            sigma/alpha, over the RMS of x0_hat - x0; 0 for a score.
        curl: |J - J^T| / |J|, J the Jacobian of x0_hat; 0 for a gradient field, at most 2.
        calibration: E (v.(x0_hat - x0))^2 / (v^T Cov v) along random directions v; 1 for the score
            of the data, more where the model is too sure of itself.
        negative: fraction of directions in which v^T Cov v is negative; 0 for a score.
    """

    log_snr: float
    t: float
    linear: Estimate | None = None
    exact: Estimate | None = None
    correlation: Estimate | None = None
    fokker_planck: Estimate | None = None
    curl: Estimate | None = None
    calibration: Estimate | None = None
    negative: Estimate | None = None


@dataclass(frozen=True)
class Finding:
    """The verdict on one of the four quantities.

    Attributes:
        quantity: its name, one of `QUANTITIES`.
        ok: whether no level is beyond its limit by more than three standard errors.
        log_snr: the level that is worst, measured by what it is off over what it may be.
        excess: that ratio; more than 1 is beyond the limit, and means nothing within the errors.
        verdict: one sentence.
    """

    quantity: str
    ok: bool
    log_snr: float
    excess: float
    verdict: str


@dataclass(frozen=True)
class ModelVerification:
    """What `verify_model` returns.

    Attributes:
        process: the process, as it prints.
        points: data points.
        derivative_points: those of them at which the Jacobian and its derivative were measured.
        probes: products with random vectors per point and level; None if all D basis vectors
            were taken, so that divergence and Jacobian are exact.
        levels: what was measured, from little noise to much.
        findings: one verdict for each quantity that was asked for.
        evaluations: network evaluations, counted in data points.
        products: products with the Jacobian or its derivative, counted likewise.
    """

    process: str
    points: int
    derivative_points: int
    probes: int | None
    levels: tuple[NoiseLevel, ...]
    findings: tuple[Finding, ...]
    evaluations: int
    products: int

    @property
    def ok(self) -> bool:
        """Whether every finding is."""
        return all(finding.ok for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The finding furthest beyond its limit; among those within, the nearest to it."""
        return max(self.findings, key=lambda finding: (not finding.ok, finding.excess))

    def of(self, quantity: str) -> Finding | None:
        """The finding of that name, None if it was not asked for."""
        return next((f for f in self.findings if f.quantity == quantity), None)

    def to_json(self) -> str:
        """Everything as JSON, see `json_text`."""
        return json_text({"ok": self.ok, **asdict(self)})

    def __str__(self) -> str:
        shown = [name for name in _COLUMNS if any(getattr(row, name) for row in self.levels)]
        table = [["log-SNR", *(_COLUMNS[name] for name in shown)]]
        for row in self.levels:
            values = (getattr(row, name) for name in shown)
            table.append([f"{row.log_snr:.2f}", *("-" if v is None else str(v) for v in values)])
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        how = "exact" if self.probes is None else f"{self.probes} probes"
        lines = [
            f"{self.process}: {'OK' if self.ok else 'FAILED'}",
            f"  {self.points} points, derivatives at {self.derivative_points} ({how}); "
            f"{self.evaluations} evaluations, {self.products} products",
        ]
        lines += [
            "  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table
        ]
        lines += [f"  [{'ok' if f.ok else 'FAILED'}] {f.verdict}" for f in self.findings]
        return "\n".join(lines)


_COLUMNS = {
    "linear": "error/linear",
    "exact": "error/exact",
    "correlation": "correlation",
    "fokker_planck": "Fokker-Planck",
    "curl": "curl",
    "calibration": "calibration",
    "negative": "negative",
}
