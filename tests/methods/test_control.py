"""The rules against the formulas of their sources."""

import math

import pytest

from optim.methods import control


@pytest.mark.parametrize(
    ("rho", "factor"), [(-1, 1.5), (0.2, 1.5), (0.5, 1.0), (0.9, 2 / 3), (math.nan, 1.5)]
)
def test_levenberg_marquardt(rho, factor):
    assert control.levenberg_marquardt_damping(0.3, rho) == pytest.approx(0.3 * factor)


@pytest.mark.parametrize(("rho", "factor"), [(-1, 4.0), (0.2, 4.0), (0.5, 1.0), (0.9, 0.25), (math.nan, 4.0)])
def test_marquardt(rho, factor):
    assert control.marquardt(0.3, rho, 1.0) == pytest.approx(0.3 * factor)


def test_nielsen_on_acceptance():
    assert control.nielsen_damping(1.0, 8.0, 1.0) == (pytest.approx(1 / 3), 2.0)
    assert control.nielsen_damping(1.0, 8.0, 0.5) == (pytest.approx(1.0), 2.0)
    assert control.nielsen_damping(1.0, 8.0, 0.01)[0] == pytest.approx(1 - (2 * 0.01 - 1) ** 3)


def test_nielsen_on_rejections_in_a_row():
    damping, growth, seen = 1.0, 2.0, []
    for rho in (-1.0, math.nan, -math.inf):
        damping, growth = control.nielsen_damping(damping, growth, rho)
        seen.append((damping, growth))
    assert seen == [(2.0, 4.0), (8.0, 8.0), (64.0, 16.0)]


def test_damping_stays_within_bounds():
    damping, growth = 1.0, 2.0
    for _ in range(200):
        damping, growth = control.nielsen_damping(damping, growth, -1.0)
    assert damping == control.MAX_DAMPING
    for _ in range(200):
        damping, growth = control.nielsen_damping(damping, growth, 1.0)
    assert damping == control.MIN_DAMPING


@pytest.mark.parametrize(
    ("rho", "length", "radius"),
    [
        (-1, 1.0, 0.25),
        (0.2, 0.4, 0.1),
        (0.5, 1.0, 1.0),
        (0.9, 0.5, 1.0),
        (0.9, 1.0, 2.5),
        (math.nan, 1.0, 0.25),
    ],
)
def test_trust_radius(rho, length, radius):
    assert control.trust_radius(1.0, rho, length) == pytest.approx(radius)


@pytest.mark.parametrize(
    ("actual", "predicted", "rho"),
    [(1.0, 2.0, 0.5), (1.0, 0.0, -math.inf), (math.nan, 1.0, -math.inf), (-math.inf, 1.0, -math.inf)],
)
def test_reduction_ratio(actual, predicted, rho):
    assert control.reduction_ratio(actual, predicted) == rho


def test_noise():
    eps = 2.0**-52
    noise = control.noise_of(-1.0, eps)
    assert noise == 10 * eps
    assert control.is_noise(0.0, eps, noise)
    assert control.is_noise(-50 * eps, eps, noise)  # cancellation inside the loss
    assert not control.is_noise(0.0, 100 * eps, noise)
    assert not control.is_noise(-1.0, eps, noise)
    assert not control.is_noise(-math.inf, eps, noise)
    assert not control.is_noise(math.nan, eps, noise)
