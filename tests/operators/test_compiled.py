"""Models that the user compiled: what needs a second derivative runs them eagerly, or says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secondorder as so
from optim import GaussNewton, HessianFree, Newton, least_squares, minimize
from secondorder.autodiff.ladder import MissingDerivativeError
from secondorder.decompose import decompose

# Dynamo warns of what it does not look into, and is stopped by warnings that are errors.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    return model, torch.compile(model, backend="aot_eager"), x, y


def parameters_and_vector(model):
    parameters = list(model.parameters())
    return parameters, torch.ones(sum(p.numel() for p in parameters))


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_an_objective(case, matrix):
    model, compiled, x, y = case
    _, v = parameters_and_vector(model)
    products = [
        getattr(so.Objective(each, F.cross_entropy, (x, y)), matrix)() @ v for each in (model, compiled)
    ]
    torch.testing.assert_close(products[1], products[0])


def test_influence(case):
    model, compiled, x, y = case
    scores = [
        so.Influence(so.Objective(each, F.cross_entropy, (x, y), l2=0.1), damping=1.0)
        .scores((x[:2], y[:2]), order=1)
        .scores
        for each in (model, compiled)
    ]
    torch.testing.assert_close(scores[1], scores[0])


def test_an_operator_of_a_graph_that_was_compiled(case):
    model, compiled, x, y = case
    parameters, v = parameters_and_vector(model)
    with pytest.raises(MissingDerivativeError, match="torch.compile has no second derivative .* compute it"):
        so.Hessian(F.cross_entropy(compiled(x), y), parameters) @ v
    with decompose():
        product = so.Hessian(F.cross_entropy(compiled(x), y), parameters) @ v
    torch.testing.assert_close(product, so.Hessian(F.cross_entropy(model(x), y), parameters) @ v)


@pytest.mark.parametrize("product", ["hvp", "vhp", "ggnvp", "jvp", "vjp", "hessian", "jacobian"])
def test_products(product):
    def func(w):
        return (w.sin() ** 2).sum() if product in ("hvp", "vhp", "hessian") else w.sin() ** 2

    def taken(func):
        w = torch.linspace(0.1, 1.0, 3)
        if product == "ggnvp":
            return so.ggnvp(func, lambda z: z.square().sum(), w, w)
        return getattr(so, product)(func, w, *[w] * (product not in ("hessian", "jacobian")))

    for one, other in zip(taken(torch.compile(func, backend="aot_eager")), taken(func), strict=True):
        torch.testing.assert_close(one, other)


def test_functions():
    start = torch.tensor([0.5, 0.7], dtype=torch.float64)
    compiled = torch.compile(lambda w: ((w - 1) ** 2 + (w - 1) ** 4).sum(), backend="aot_eager")
    assert minimize(compiled, start).success
    assert least_squares(torch.compile(lambda w: w.sin(), backend="aot_eager"), start).success


@pytest.mark.parametrize("kind", [Newton, HessianFree, GaussNewton])
def test_optimizers(case, kind):
    _, compiled, x, y = case
    optimizer = kind(compiled.parameters())
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(compiled(x), y))
    assert optimizer.report.accepted
