"""The models and the reading of the files, against what the files certify."""

import math
import re

import nist
import pytest
import torch

# The sums of squares are certified to 11 digits.
CERTIFIED_DIGITS = 1e-9
# Residuals of 1e-14 belong to parameters that are known beyond the 11 digits which are printed.
NEARLY_EXACT = "Lanczos1"


@pytest.fixture(params=list(nist.MODELS))
def dataset(request):
    return nist.dataset(request.param)


def rounding(values):
    """Half a unit of the eleventh digit, with which NIST prints them."""
    return 0.5 * 10 ** (values.abs().log10().floor() - 10)


def test_files_are_read_whole():
    sets = [nist.dataset(name) for name in nist.MODELS]
    levels = [one.level for one in sets]
    assert [levels.count(level) for level in ("Lower", "Average", "Higher")] == [8, 11, 8]
    for one in sets:
        text = (nist.FOLDER / f"{one.name}.dat").read_text(encoding="ascii")
        assert len(one.y) == int(re.search(r"(\d+) +Observations", text)[1])
        assert len(one.certified) == int(re.search(r"(\d+) +Parameters", text)[1])


def test_numbers_read_from_one_file():
    rat43 = nist.dataset("Rat43")
    assert rat43.starts[0].tolist() == [100.0, 10.0, 1.0, 1.0]
    assert rat43.starts[1].tolist() == [700.0, 5.0, 0.75, 1.3]
    assert float(rat43.certified[3]) == 1.2792483859
    assert float(rat43.deviations[0]) == 16.302297817
    assert (float(rat43.x[-1]), float(rat43.y[-1])) == (15.0, 717.41)


def test_certified_parameters_give_the_certified_sum_of_squares(dataset):
    r = dataset.residual(dataset.certified)
    if dataset.name != NEARLY_EXACT:
        assert float(r @ r) == pytest.approx(dataset.sum_of_squares, rel=CERTIFIED_DIGITS)
    J = torch.autograd.functional.jacobian(dataset.residual, dataset.certified)
    unknown = float((J.abs() @ rounding(dataset.certified)).norm())
    assert float(r.norm()) <= math.sqrt(dataset.sum_of_squares) * (1 + CERTIFIED_DIGITS) + unknown


def test_gradient_vanishes_there_to_the_printed_digits(dataset):
    r = dataset.residual(dataset.certified)
    J = torch.autograd.functional.jacobian(dataset.residual, dataset.certified)
    # What half a unit of the last digit of each parameter changes in J'r, as J'J has it.
    unknown = (J.T @ J).abs() @ rounding(dataset.certified)
    assert bool(((J.T @ r).abs() <= 1.1 * unknown).all())


def test_certified_deviations_are_those_of_the_jacobian(dataset):
    if dataset.name == NEARLY_EXACT:
        pytest.skip("the residuals at the printed parameters are those of their rounding")
    J = torch.autograd.functional.jacobian(dataset.residual, dataset.certified)
    variance = dataset.sum_of_squares / (len(dataset.y) - len(dataset.certified))
    # Through QR: inverting J'J would square a condition of 1e8 (Bennett5).
    inverse = torch.linalg.inv(torch.linalg.qr(J)[1])
    deviations = inverse.norm(dim=1) * math.sqrt(variance)
    torch.testing.assert_close(deviations, dataset.deviations, rtol=1e-7, atol=0)


def test_other_orders_and_signs_are_the_same_fit(dataset):
    value = float(dataset.residual(dataset.certified).norm())
    for order in nist.ORDERS.get(dataset.name, []):
        other = dataset.certified[list(order)]
        assert float(dataset.residual(other).norm()) == pytest.approx(value, rel=1e-9)
        assert torch.equal(dataset.same_fit(other)[0], other)
        assert torch.equal(dataset.same_fit(other)[1], dataset.deviations[list(order)])
    for group in nist.SIGNS.get(dataset.name, []):
        other = dataset.certified.clone()
        other[list(group)] *= -1
        assert float(dataset.residual(other).norm()) == pytest.approx(value, rel=1e-9)
        assert torch.equal(dataset.same_fit(other)[0], other)
