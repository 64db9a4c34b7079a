"""``least_squares`` at its default tolerances on the sets of NIST, from both starts."""

import math

import nist
import pytest
import torch
from scipy import optimize

import optim

# Digits of a parameter that count as solved, and of a standard deviation (NIST's log relative error).
SIX_DIGITS, FOUR_DIGITS = 1e-6, 1e-4
# MINPACK, too, has nine digits of them.
WELL_CONDITIONED = ["Misra1a", "Misra1b", "Misra1c", "Misra1d", "DanWood", "Rat42", "MGH10", "Bennett5"]
# Its residuals are 1e-14 of the data: the rounding of float64 is seen in their third digit.
NEARLY_EXACT, THREE_DIGITS = "Lanczos1", 1e-2


@pytest.fixture(params=list(nist.MODELS))
def dataset(request):
    return nist.dataset(request.param)


@pytest.mark.parametrize("start", [0, 1])
def test_default_tolerances(dataset, start):
    result = optim.least_squares(dataset.residual, dataset.starts[start])
    certified, deviations = dataset.same_fit(result.x)
    torch.testing.assert_close(result.x, certified, rtol=SIX_DIGITS, atol=0)
    assert result.success, result
    if dataset.name == NEARLY_EXACT:
        torch.testing.assert_close(result.standard_errors(), deviations, rtol=THREE_DIGITS, atol=0)
        return
    torch.testing.assert_close(result.standard_errors(), deviations, rtol=FOUR_DIGITS, atol=0)
    assert 2 * result.cost == pytest.approx(dataset.sum_of_squares, rel=1e-9)


@pytest.mark.parametrize("name", ["Misra1a", "Chwirut2", "Kirby2", "Rat43", "Nelson"])
def test_the_units_of_the_parameters_do_not_matter(name):
    """With Moré's scale the iterates are the same but for rounding, so the steps are counted."""
    data = nist.dataset(name)
    units = torch.logspace(-6, 6, len(data.certified), dtype=torch.float64)
    plain = optim.least_squares(data.residual, data.starts[1])
    scaled = optim.least_squares(lambda b: data.residual(b / units), data.starts[1] * units)
    torch.testing.assert_close(scaled.x / units, plain.x, rtol=1e-7, atol=0)
    assert abs(scaled.nit - plain.nit) <= 2
    torch.testing.assert_close(scaled.standard_errors() / units, plain.standard_errors(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WELL_CONDITIONED)
@pytest.mark.parametrize("side", [0.9, 1.1])
def test_an_active_bound(name, side):
    """Each parameter in turn is kept from its certified value; MINPACK solves for the rest, from near by."""
    data = nist.dataset(name)
    certified = data.certified
    for k in range(len(certified)):
        bound = float(certified[k]) * side
        is_above = bound > float(certified[k])
        lower, upper = torch.full_like(certified, -math.inf), torch.full_like(certified, math.inf)
        (lower if is_above else upper)[k] = bound
        result = optim.least_squares(data.residual, data.starts[1], bounds=(lower, upper))
        others = torch.arange(len(certified)) != k

        def residual(z, k=k, bound=bound, others=others):
            x = torch.full_like(certified, bound).masked_scatter(others, torch.as_tensor(z))
            return data.residual(x)

        peer = optimize.least_squares(
            lambda z, residual=residual: residual(z).numpy(),
            result.x[others].numpy() * 1.001,
            jac=lambda z, residual=residual: torch.autograd.functional.jacobian(
                residual, torch.tensor(z)
            ).numpy(),
            method="lm",
            x_scale="jac",
            **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15),
        )
        assert result.success
        assert float(result.x[k]) == bound
        assert result.active_mask.tolist() == [
            (-1 if is_above else 1) if i == k else 0 for i in range(len(certified))
        ]
        torch.testing.assert_close(result.x[others], torch.from_numpy(peer.x), rtol=1e-8, atol=0)
        assert result.cost == pytest.approx(peer.cost, rel=1e-10)
