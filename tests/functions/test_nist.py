"""NIST's certified fits, from both published starts, at default tolerances."""

import nist
import pytest
import torch

import optim

REGRESSIONS = {regression.name: regression for regression in nist.REGRESSIONS}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_certified_fit_is_one(name):
    """Of the record: its sum of squares, and a gradient that vanishes to the certified digits."""
    regression = REGRESSIONS[name]
    r = regression.residual(regression.parameters)
    # Lanczos1 was made by the model: its sum is rounding of the data.
    torch.testing.assert_close(float(r.square().sum()), regression.squares, rtol=1e-9, atol=1e-20)
    J = torch.autograd.functional.jacobian(regression.residual, regression.parameters)
    J = J * regression.parameters
    step = torch.linalg.lstsq(J, r.unsqueeze(1), driver="gelsd").solution
    assert float(step.abs().max()) < 1e-7


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_every_fit_is_found(name, start):
    regression = REGRESSIONS[name]
    result = optim.least_squares(regression.residual, regression.starts[start])
    assert result.success, result
    assert nist.digits(regression, result.x) >= 6
    if name == "Lanczos1":
        return
    torch.testing.assert_close(2 * result.cost, regression.squares, rtol=1e-8, atol=0.0)
    deviations, expected = result.standard_errors().sort().values, regression.deviations.sort().values
    torch.testing.assert_close(deviations, expected, rtol=1e-4, atol=0.0)
