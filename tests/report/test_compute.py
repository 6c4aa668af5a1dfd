"""Power laws of loss and compute, from points that lie on known ones."""

import numpy as np
import pytest

from nanogpt.report.compute import fit

FLOPS = np.array([1e15, 1e16, 1e17, 1e18, 1e19])


def law(flops, power=0.2):
    return 2.0 + 1.5 * (np.asarray(flops) / 1e17) ** -power


def test_a_power_law_is_found_exactly_and_extrapolates():
    found = fit(FLOPS, law(FLOPS))
    assert found.unit == pytest.approx(1e17)  # their geometric mean
    assert found.values == pytest.approx([2.0, 1.5, 0.2], rel=1e-4)
    assert found.loss(1e21) == pytest.approx(law(1e21), rel=1e-4)
    assert found.error(1e21) < 1e-3


def test_the_errors_are_those_of_repeated_measurements():
    """A hundred times, the losses are measured with noise: the fits spread as their errors say."""
    rng = np.random.default_rng(0)
    flops = np.geomspace(1e15, 1e19, 12)
    found = [fit(flops, law(flops) + rng.normal(0, 0.005, 12)) for _ in range(100)]
    spread = np.std([each.values for each in found], axis=0)
    told = np.sqrt(np.mean([np.diag(each.covariance) for each in found], axis=0))
    assert told == pytest.approx(spread, rel=0.35)
    beyond = np.std([each.loss(1e20) for each in found])
    assert np.mean([each.error(1e20) for each in found]) == pytest.approx(beyond, rel=0.35)


def test_fewer_than_four_sizes_determine_no_curve():
    assert fit(FLOPS[:3], law(FLOPS[:3])) is None
    assert fit([1e15, 1e15, 1e16, 1e17], [4.0, 4.1, 3.5, 3.2]) is None


@pytest.mark.parametrize(
    ("flops", "losses"),
    [
        (FLOPS, law(FLOPS)[::-1]),
        (FLOPS, [3.0, 3.1, 2.9, 3.1, 3.0]),
        ([1e15, 1.001e15, 1.002e15, 1.003e15], [3.2, 3.1, 3.3, 3.1]),
    ],
    ids=["rising", "noise", "one size"],
)
def test_points_without_a_trend_determine_no_curve(flops, losses):
    assert fit(flops, losses) is None
