"""Products, operators, functions and influence on a device: the numbers of the CPU, and no waits."""

from __future__ import annotations

import pytest
import simulated
import torch
from networks import Case

import secondorder as so
from optim import Newton, least_squares, minimize, root
from secondorder.autodiff.guard import RandomState


def gauss_newton(case):
    outputs = case.model(case.x)
    return so.GaussNewton(case.loss_of(outputs, case.y), outputs, case.parameters)


OPERATORS = {
    "hessian": lambda case: so.Hessian(case.loss(), case.parameters),
    "gauss_newton": gauss_newton,
    "fisher": lambda case: so.Fisher(case.model(case.x), case.parameters),
}


def direction(case, seed=1):
    generator = torch.Generator("cpu").manual_seed(seed)
    n = sum(p.numel() for p in case.parameters)
    return torch.randn(n, generator=generator).to(case.parameters[0])


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(device, same, name, model):
    here, there = Case(model), Case(model, device)
    for case in (here, there):
        case.product = OPERATORS[name](case) @ direction(case)
    same(there.product, here.product)


@pytest.mark.parametrize("model", ["mlp", "cnn", "gru"])
@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_products_do_not_wait(device, name, model):
    case = Case(model, device)
    B, v = OPERATORS[name](case), direction(case)
    B @ v
    with simulated.no_transfers(device):
        shifted = B + 0.1 * torch.ones((), device=device)
        (shifted @ v, 2.0 * B @ v)


@pytest.mark.parametrize("product", ["hvp", "vhp", "jvp", "vjp", "ggnvp"])
def test_functional_products_do_not_wait(device, product):
    case = Case("mlp", device)
    names = [name for name, _ in case.model.named_parameters()]

    def outputs(*parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(case.model, values, (case.x,))

    def loss(*parameters):
        return case.loss_of(outputs(*parameters), case.y)

    vectors = tuple(torch.ones_like(p) for p in case.parameters)
    inputs = tuple(p.detach() for p in case.parameters)
    with simulated.no_transfers(device):
        if product in ("hvp", "vhp"):
            getattr(so, product)(loss, inputs, vectors)
        elif product == "jvp":
            so.jvp(outputs, inputs, vectors)
        elif product == "vjp":
            so.vjp(outputs, inputs, torch.ones_like(case.model(case.x)))
        else:
            so.ggnvp(outputs, lambda z: case.loss_of(z, case.y), inputs, vectors)


def objective(case, **options):
    batches = [(case.x[:10], case.y[:10]), (case.x[10:], case.y[10:])]
    return so.Objective(case.model, case.loss_of, batches, **options)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_an_objective(device, same, matrix):
    here, there = Case("mlp"), Case("mlp", device)
    for case in (here, there):
        case.product = getattr(objective(case), matrix)() @ direction(case)
    same(there.product, here.product)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_products_of_an_objective_do_not_wait(device, matrix):
    case = Case("mlp", device)
    B, v = getattr(objective(case), matrix)(), direction(case)
    B @ v
    with simulated.no_transfers(device):
        B @ v


def rosenbrock(x):
    return ((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2).sum()


def residuals(x):
    return torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)])


@pytest.mark.parametrize("solve", [lambda x: minimize(rosenbrock, x), lambda x: least_squares(residuals, x)])
def test_functions(device, same, solve):
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    here, there = solve(start), solve(start.to(device))
    assert there.status == here.status
    assert there.x.device.type == device.type
    same(there.x, here.x)


def many(x, rate):
    t = torch.linspace(0.0, 1.0, 12, dtype=x.dtype, device=x.device)
    return x[:, :1] * torch.exp(-x[:, 1:] * t) - torch.exp(-rate[:, None] * t)


def batched_least_squares(device):
    rates = torch.linspace(0.5, 2.0, 5, dtype=torch.float64).to(device)
    starts = torch.ones(5, 2, dtype=torch.float64).to(device)
    return least_squares(many, starts, (rates,), batched=True)


def batched_minimize(device):
    starts = torch.tensor([[-1.2, 1.0], [0.5, 0.5], [2.0, -1.0]], dtype=torch.float64).to(device)
    return minimize(lambda x: (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2, starts, batched=True)


def roots(device):
    start = torch.tensor([1.5, 1.0], dtype=torch.float64).to(device)
    return root(lambda x: torch.stack([x[0] ** 2 - 1, x[0] * x[1] - 2]), start)


@pytest.mark.parametrize("solve", [batched_least_squares, batched_minimize, roots])
def test_many_problems_and_roots(device, solve):
    here, there = solve(torch.device("cpu")), solve(device)
    assert there.x.device.type == device.type
    torch.testing.assert_close(there.x.cpu(), here.x, rtol=1e-9, atol=1e-12)


def test_random_states_of_a_device_are_put_back(device):
    """By default too: whatever accelerator there is."""
    random = RandomState()
    random.save()
    first = torch.randn(3, device=device)
    assert random.has_moved()
    with random.replayed():
        assert torch.equal(torch.randn(3, device=device), first)


@pytest.mark.parametrize("order", [1, "newton"])
@pytest.mark.parametrize("solver", ["dense", "block_cg"])
def test_influence(device, solver, order):
    here, there = Case("mlp", dtype=torch.float64), Case("mlp", device, torch.float64)
    trained = Newton(here.parameters, weight_decay=1e-2)
    for _ in range(30):
        trained.step(here.loss)
    there.model.load_state_dict(here.model.state_dict())
    for case in (here, there):
        analysis = so.Influence(objective(case, l2=1e-2), solver=solver, damping=0.1)
        test = [(case.x[:3], case.y[:3])]
        case.scores = analysis.group([[0], [5, 7]], test, order=order).scores
    assert there.scores.device.type == device.type
    torch.testing.assert_close(there.scores.cpu(), here.scores, rtol=1e-9, atol=1e-12)
