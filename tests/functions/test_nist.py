"""``least_squares`` at its default tolerances on the sets of NIST, from both starts."""

import nist
import pytest
import torch

import optim

# Digits of a parameter that count as solved, and of a standard deviation (NIST's log relative error).
SIX_DIGITS, FOUR_DIGITS = 1e-6, 1e-4
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
