"""The judge against exact decreases, which the rounding of the value hides or does not."""

import math

import pytest
import torch
import zoo
from function_problems import function_problem

from optim.methods.control import CANCELLATION, noise_of
from optim.methods.judge import Judgement, judge

EPS = torch.finfo(torch.float64).eps


class Seen:
    """A problem of which only what a judge asks for is known.

    Args:
        actual: Decrease of the value.
        noise: Rounding of it.
        rounding: The most that it may be.
        after: Gradient after the step; an error to ask for where it is None.
    """

    def __init__(self, actual, noise, after=None, rounding=0.0):
        self._actual, self._noise, self._after, self._rounding = actual, noise, after, rounding

    def decrease(self, trial):
        return self._actual

    def noise(self, trial):
        return self._noise

    def doubt(self):
        return 0.0

    def rounding(self):
        return self._rounding

    def gradient(self, trial):
        assert self._after is not None, "the value tells"
        return self._after


@pytest.fixture
def tried():
    """A model and a trial: a step of one along a slope of minus one."""
    problem = function_problem(lambda x: x.square().sum() - x[0], torch.zeros(2, dtype=torch.float64))
    return problem.model(), problem.evaluate(torch.tensor([1.0, 0.0], dtype=torch.float64))


def at(offset, distance):
    """A quadratic with an offset, at a distance from its minimum; the Newton step and what it promises."""
    A = zoo.spd_matrix(6, 10.0, 1)
    direction = torch.ones(6, dtype=torch.float64)
    problem = function_problem(lambda x: offset + 0.5 * x @ A @ x, distance * direction)
    predicted = 0.5 * distance**2 * float(direction @ A @ direction)
    return problem, -distance * direction, predicted


@pytest.mark.parametrize("distance", [1e-4, 1e-8, 1e-10, 1e-12])
def test_the_ratio_of_an_exact_model_is_one_in_the_noise_too(distance):
    problem, step, predicted = at(1.0, distance)
    judgement = judge(problem, problem.model(), problem.evaluate(step), predicted)
    assert judgement.rho == pytest.approx(1.0, abs=1e-6)
    assert judgement.is_quiet == (predicted < noise_of(1.0, EPS))
    assert judgement.is_accepted
    assert judgement.is_seen == (1e4 * predicted > noise_of(1.0, EPS))


def test_outside_of_the_noise_gradients_are_not_asked_for(tried):
    model, trial = tried
    assert judge(Seen(0.5, 1e-16), model, trial, 1.0) == Judgement(0.5)
    assert judge(Seen(-0.5, 1e-16), model, trial, 1.0) == Judgement(-0.5)


@pytest.mark.parametrize("actual", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(tried, actual):
    judgement = judge(Seen(actual, 1e-16), *tried, 1.0)
    assert judgement.rho == -math.inf
    assert not judgement.is_accepted
    assert not judgement.is_quiet


def test_in_the_noise_the_trapezoid_decides(tried):
    """``-(g + g_new) . p / 2`` with ``g = (-1, 0)``, ``p = (1, 0)``, whatever the value shows."""
    model, trial = tried
    for slope, trapezoid in ((0.0, 0.5), (-0.5, 0.75), (3.0, -1.0)):
        after = torch.tensor([slope, 7.0], dtype=torch.float64)
        for actual in (-2.0, 0.0, 2.0):
            judgement = judge(Seen(actual, 1.0, after), model, trial, 0.5)
            assert judgement == Judgement(pytest.approx(trapezoid / 0.5), True, True)
            assert judgement.is_accepted == (trapezoid > 0)


def test_a_refusal_that_cancellation_explains_goes_to_the_gradient(tried):
    model, trial = tried
    downhill = torch.tensor([0.0, 0.0], dtype=torch.float64)
    noise = 0.5
    for predicted, actual in ((2 * noise, -CANCELLATION * noise), (1e3 * noise, 0.0)):
        judgement = judge(Seen(actual, noise, downhill), model, trial, predicted)
        assert judgement.is_quiet
        assert judgement.rho == pytest.approx(0.5 / predicted)
    # One that it does not explain stays one.
    assert judge(Seen(-1.01 * CANCELLATION * noise, noise), model, trial, 2 * noise).rho < 0


def test_a_large_step_that_gains_nothing_is_refused_aloud(tried):
    """The value did not change and the gradient points back: a smaller step may gain."""
    model, trial = tried
    uphill = torch.tensor([1.0, 0.0], dtype=torch.float64)
    judgement = judge(Seen(0.0, 1e-16, uphill), model, trial._replace(value=1.0), 0.5)
    assert (judgement.rho, judgement.is_quiet) == (0.0, False)
    # Whatever the value: between a hilltop at zero and a zero beyond it lies a minimum.
    assert not judge(Seen(0.0, 0.0, uphill), model, trial._replace(value=0.0), 0.5).is_quiet


@pytest.mark.parametrize(
    ("judgement", "holds_back", "told"),
    [
        (Judgement(0.9), False, 0.9),
        (Judgement(-1.0), True, -1.0),
        (Judgement(0.9, True), True, 0.9),
        (Judgement(0.9, True), False, 0.5),
        (Judgement(-1.0, True), True, 0.5),
        (Judgement(0.9, True, False), True, 0.5),
    ],
)
def test_in_the_noise_the_control_only_loosens_what_holds_back(judgement, holds_back, told):
    assert judgement.for_control(holds_back) == told


def test_a_loss_that_is_all_rounding_refuses_quietly(tried):
    """A converged cross-entropy, of logits that round to more than the loss: its increase teaches nothing."""
    model, trial = tried
    model = model._replace(value=1e-18)
    refusal = Seen(3e-19 - 1e-18, 1e-32, rounding=1e-15)
    judgement = judge(refusal, model, trial, 1e-18)
    assert judgement == Judgement(pytest.approx(-0.7), True)
    assert not judgement.is_accepted
    assert judgement.for_control(True) == 0.5
    # One that is not, aloud; and a decrease is one.
    assert not judge(refusal, model._replace(value=1e-15), trial, 1e-18).is_quiet
    assert judge(Seen(9e-19, 1e-32, rounding=1e-15), model, trial, 1e-18) == Judgement(pytest.approx(0.9))
