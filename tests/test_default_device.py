"""With another default device than that of the inputs: whatever is made without a device fails at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secondorder as so
from optim import GaussNewton, HessianFree, Newton, curve_fit, least_squares, minimize, root
from secondorder.functional.check import check_derivatives
from secondorder.functional.sparse import sparse_hessian, sparse_jacobian

META = torch.device("meta")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.randn(20, 4), torch.randint(3, (20,))


OPTIMIZERS = {
    "Newton": (Newton, {}),
    "Newton, formed": (Newton, {"solver": "direct"}),
    "Newton with CG": (Newton, {"solver": "cg"}),
    "Newton, cubic": (Newton, {"bound": "cubic"}),
    "HessianFree": (HessianFree, {}),
    "HessianFree with Nyström": (HessianFree, {"solver": "cg", "preconditioner": "nystrom"}),
    "HessianFree on a part": (HessianFree, {"curvature_batch": 10}),
    "GaussNewton": (GaussNewton, {}),
    "GaussNewton with CG": (GaussNewton, {"solver": "cg"}),
    "GaussNewton, scaled": (GaussNewton, {"scaling": "more"}),
    "GaussNewton with a spring": (GaussNewton, {"spring": 0.9}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    model, x, y = network()
    kind, options = OPTIMIZERS[name]
    target = F.one_hot(y, 3).float()
    with META:
        optimizer = kind(model.parameters(), **options)
        for _ in range(3):
            optimizer.step(lambda: F.mse_loss(model(x), target))
    assert optimizer.report.new_loss < optimizer.report.loss


def test_groups_with_their_own_scales_and_rates():
    model, x, y = network()
    groups = [
        {"params": model[0].parameters(), "damping_scale": 3.0, "weight_decay": 1e-2},
        {"params": model[2].parameters(), "lr": 0.5},
    ]
    with META:
        optimizer = HessianFree(groups)
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert optimizer.report.new_loss < optimizer.report.loss


def test_a_closure_that_returns_a_number():
    model, x, y = network()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return float(loss.detach())

    with META:
        optimizer = HessianFree(model.parameters())
        loss = optimizer.step(closure)
    assert loss.device.type == "cpu"
    assert float(loss) == pytest.approx(optimizer.report.loss)


def test_a_step_without_a_closure():
    model, x, y = network()
    with META:
        optimizer = HessianFree(model.parameters(), model=model)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.report.accepted


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def residuals(x):
    return torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])


START = torch.tensor([-1.2, 1.0], dtype=torch.float64)
FUNCTIONS = {
    "minimize": lambda: minimize(rosenbrock, START),
    "minimize of an array": lambda: minimize(rosenbrock, np.array([-1.2, 1.0])),
    "minimize within bounds": lambda: minimize(rosenbrock, START, bounds=[(-2.0, 0.5), (None, 2.0)]),
    "minimize with a hess": lambda: minimize(
        lambda x: ((x - 1) ** 2).sum(), START, jac=lambda x: 2 * (x - 1), hess=lambda x: 2 * np.eye(2)
    ),
    "least_squares": lambda: least_squares(residuals, START),
    "least_squares with weights": lambda: least_squares(residuals, START, weights=[1.0, 2.0]),
    "least_squares, robust": lambda: least_squares(residuals, START, loss="soft_l1"),
    "least_squares by products": lambda: least_squares(residuals, START, method="lsmr"),
    "root": lambda: root(lambda x: torch.stack([x[0] ** 2 - 1, x[0] * x[1] - 2]), START),
    "curve_fit": lambda: curve_fit(
        lambda t, a, b: a * torch.exp(-b * t), np.linspace(0, 1, 9), 2 * np.exp(-np.linspace(0, 1, 9))
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    with META:
        result = FUNCTIONS[name]()
    x = result[0] if isinstance(result, tuple) and not hasattr(result, "x") else result.x
    assert bool(torch.as_tensor(x, device="cpu").isfinite().all())


def test_products_and_operators():
    model, x, y = network()
    parameters = list(model.parameters())
    v = torch.ones(sum(p.numel() for p in parameters))
    with META:
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        G, H = so.GaussNewton(loss, outputs, parameters), so.Hessian(loss, parameters)
        products = [G @ v, H @ v, (H + 0.1) @ v, so.Fisher(model(x), parameters) @ v]
        products += [H.diagonal(), H.dense()[0]]
        solved = (G + 0.1).solve(v)
    assert all(product.isfinite().all() for product in products)
    assert solved.x.device.type == "cpu"


def test_functional():
    x = torch.linspace(0.1, 1.0, 5, dtype=torch.float64)
    with META:
        found = so.hvp(lambda t: t.sin().sum(), x, torch.ones_like(x))[1]
        J = so.jacobian(lambda t: t.sin(), x)
        S = sparse_jacobian(lambda t: t.sin(), x)
        K = sparse_hessian(lambda t: t.sin().sum(), x)
        check_derivatives(lambda t: t.sin().sum(), x)
    torch.testing.assert_close(found, -x.sin())
    torch.testing.assert_close(S.to_dense(), torch.diag(x.cos()))
    torch.testing.assert_close(K.to_dense(), torch.diag(-x.sin()))
    torch.testing.assert_close(J, torch.diag(x.cos()))


@pytest.mark.parametrize("solver", ["dense", "block_cg"])
def test_influence(solver):
    model, x, y = network()
    with META:
        objective = so.Objective(model, F.cross_entropy, (x, y), l2=1e-2)
        result = so.Influence(objective, solver=solver, damping=1.0).scores((x[:2], y[:2]), order=1)
    assert result.scores.isfinite().all()
    assert result.scores.device.type == "cpu"


@pytest.mark.parametrize("solver", ["cg", "minres", "lsmr", "steihaug", "gltr", "cholesky", "direct"])
def test_solvers(solver):
    A = torch.diag(torch.linspace(1.0, 3.0, 6, dtype=torch.float64))
    b = torch.ones(6, dtype=torch.float64)
    with META:
        radius = {"radius": 100.0} if solver in ("steihaug", "gltr") else {}
        result = getattr(so, solver)(A, b, **radius)
    torch.testing.assert_close(result.x, b / A.diagonal(), rtol=1e-4, atol=0.0)


def test_eigenvalues_traces_and_preconditioners():
    A = torch.diag(torch.linspace(1.0, 3.0, 40, dtype=torch.float64))
    with META:
        generator = torch.Generator("cpu").manual_seed(0)
        values = so.eigsh(so.MatrixOperator(A), 2, generator=generator).values
        found = so.trace(so.MatrixOperator(A), generator=generator)
        M = so.nystrom(A, 5, damping=0.1, generator=generator)
        so.logdet(so.MatrixOperator(A), generator=generator)
        so.diagonal(so.MatrixOperator(A), generator=generator)
        so.spectral_density(so.MatrixOperator(A), generator=generator)
        X = so.block_cg(A, A[:, :3], M=M).x
    torch.testing.assert_close(values, A.diagonal()[-2:], rtol=1e-6, atol=0.0)
    assert float(found.estimate) == pytest.approx(80.0, rel=0.1)
    torch.testing.assert_close(X, torch.eye(40, dtype=torch.float64)[:, :3], rtol=0.0, atol=1e-4)
