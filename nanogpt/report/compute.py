"""Loss against compute: a power law through the final losses of several runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

FEWEST = 4  # different FLOPs: with three, the curve goes through all points, whatever they are


@dataclass(frozen=True)
class PowerLaw:
    """loss = E + A * (FLOPs / unit)^-a (Kaplan et al., arXiv:2001.08361; with the irreducible loss
    E, Henighan et al., arXiv:2010.14701)."""

    unit: float
    """The geometric mean of the FLOPs."""
    values: Float64[np.ndarray, "3"]
    """E and A in nats per token, and a."""
    covariance: Float64[np.ndarray, "3 3"]
    """Covariance of these, estimated from the residuals of the fit."""

    def loss(self, flops: float | Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "*n"]:
        """Return the loss on the curve, in nats per token."""
        return _curve(np.asarray(flops) / self.unit, *self.values)

    def error(self, flops: float) -> float:
        """Return the standard error of the loss on the curve, to first order."""
        x, (_, scale, power) = flops / self.unit, self.values
        slope = np.array([1.0, x**-power, -scale * x**-power * np.log(x)])
        return float(np.sqrt(slope @ self.covariance @ slope))

    def __str__(self) -> str:
        (E, A, a), errors = self.values, np.sqrt(np.diag(self.covariance))
        return (
            f"({E:.3f} ± {errors[0]:.3f}) + ({A:.3f} ± {errors[1]:.3f}) * "
            f"(FLOPs / {self.unit:.2e})^-({a:.3f} ± {errors[2]:.3f})"
        )


def fit(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Fit the power law by least squares; None if these points do not determine its exponent."""
    from scipy.optimize import curve_fit  # type: ignore

    if len(set(flops)) < FEWEST:
        return None
    unit = float(np.exp(np.mean(np.log(flops))))
    x, y = np.array(flops) / unit, np.array(losses)
    start = [y.min() / 2, y.mean() - y.min() / 2, 0.1]
    try:
        values, covariance = curve_fit(_curve, x, y, start, bounds=([0, 0, 0], [np.inf] * 3))
    except RuntimeError:
        return None
    determined = np.isfinite(covariance).all() and covariance[2, 2] < values[2] ** 2
    return PowerLaw(unit, values, covariance) if determined else None


def _curve(x: Float64[np.ndarray, "*n"], E: float, A: float, a: float) -> Float64[np.ndarray, "*n"]:
    return E + A * x**-a
