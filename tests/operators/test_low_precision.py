"""Networks that compute in bfloat16 under autocast, with parameters and vectors in single precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optim import GaussNewton, HessianFree, Newton
from secondorder import GaussNewton as Matrix
from secondorder import block_cg, cg, lsmr, minres

# Of a product: some units of rounding of bfloat16, which has eight bits.
ROUNDING = 4 * torch.finfo(torch.bfloat16).eps


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.randn(64, 10), torch.randint(3, (64,))


def matrix(model, x, y, enabled=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        outputs = model(x)
    return Matrix(F.cross_entropy(outputs.float(), y), outputs, list(model.parameters()))


def test_products_are_in_single_precision_and_as_exact_as_the_network(case):
    low, high = matrix(*case), matrix(*case, enabled=False)
    v = torch.randn(low.shape[1])
    product, expected = low @ v, high @ v
    assert product.dtype == torch.float32
    assert float((product - expected).norm()) <= ROUNDING * float(expected.norm())


@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("solve", [cg, minres, block_cg, lsmr], ids=lambda solve: solve.__name__)
def test_a_residual_that_the_products_cannot_have_is_not_claimed(case, solve, check_every):
    """The solver stops where products are rounding, far below its limit, and says what the residual is."""
    A = matrix(*case) + 1e-2
    b = torch.randn(A.shape[1])
    B = b[:, None] if solve is block_cg else b
    result = solve(A, B, rtol=1e-7, check_every=check_every)
    true = float((A @ result.x - B).norm())
    assert result.status != "converged"
    assert result.iterations < 5 * len(b)
    assert result.residual_norm == pytest.approx(true, rel=1e-3)
    assert result.residual_norm <= 0.5 * float(b.norm())


@pytest.mark.parametrize("solver", ["auto", "cg"])
@pytest.mark.parametrize("kind", [Newton, HessianFree, GaussNewton])
def test_steps(case, kind, solver):
    model, x, y = case

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y)

    first = float(closure().detach())
    optimizer = kind(model.parameters(), solver=solver)
    for _ in range(8):
        optimizer.step(closure)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert float(closure().detach()) < 0.7 * first
