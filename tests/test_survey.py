"""Second derivatives of about two hundred operations against fourth-order finite differences.

None is wrong in silence: each product is right, or a clear error.
"""

import oracles
import pytest
import survey
import torch

from secondorder import functional

# No second derivative in torch and no decomposition here: the error names the operation.
ERRORS = {
    "ctc": "_ctc_loss_backward has no second derivative in torch",
    "reentrant_checkpoint": "use_reentrant",
}
if torch.__version__ < (2, 12):
    ERRORS["aminmax"] = "aminmax has no second derivative in torch"
    ERRORS["grid_sample"] = "grid_sampler_2d_backward has no second derivative in torch"


# torch 2.11 and 2.12 say so also where checks are asked for.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("name", [name for name in survey.OPERATIONS if name not in ERRORS])
def test_product_is_right(name):
    function, x = survey.OPERATIONS[name]
    scalar, v = survey.objective(function), survey.make(*x.shape, seed=5)
    got = functional.hvp(scalar, x, v)[1]

    def slope(point):
        return functional.vjp(scalar, point)[1].mul(v).sum()

    expected = oracles.central_gradient(slope, x, h=1e-3)
    # Differences of fourth order: h^4 = 1e-12 times a fifth derivative, and rounding over h.
    assert float((got - expected).norm()) <= 1e-6 * max(float(expected.norm()), 1.0)
    gradient = functional.vjp(scalar, x)[1]
    difference = oracles.central_gradient(lambda point: scalar(point).detach(), x, h=1e-3)
    assert float((gradient - difference).norm()) <= 1e-6 * max(float(difference.norm()), 1.0)


def test_how_many_are_surveyed():
    assert len(survey.OPERATIONS) - len(ERRORS) >= 200


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_clear(name):
    function, x = survey.OPERATIONS[name]
    with pytest.raises(RuntimeError, match=ERRORS[name]):
        functional.hvp(survey.objective(function), x, torch.ones_like(x))
