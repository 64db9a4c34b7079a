"""What the space of residuals is worth, and each ingredient of it, on one thread.

python -m pytest tests/benchmarks/test_residual.py -s       prints what was measured and asserts the limits
"""

import math
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes
from problems import pinn
from torch import nn

import optim
from optim.methods.problem import QuadraticModel, Residuals
from optim.methods.residual import Residual
from secondorder import GaussNewton
from secondorder.operators.residual import ResidualJacobian

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = (0, 1, 2)


def wide(dtype):
    """670 thousand parameters, 1280 rows of softmax outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    net, inputs = net.to(dtype), torch.randn(128, 784, dtype=dtype)
    outputs = net(inputs)
    loss = F.cross_entropy(outputs, torch.randint(10, (128,)))
    operator = GaussNewton(loss, outputs, net.parameters())
    gradient = torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, [*net.parameters()], retain_graph=True)]
    )
    return operator, QuadraticModel(0.0, gradient, operator, float(gradient.norm()))


def exact(operator, model, damping):
    rows = ResidualJacobian.of(operator)
    return Residual(model, Residuals(rows, rows.target, None, 0.0), damping).solve(damping).step


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.slow
def test_an_exact_step_of_many_parameters():
    """Without the Jacobian, in the time of a few products: the step of CG solved to the last digit."""
    operator, model = wide(torch.float64)
    step = exact(operator, model, 0.1)
    expected = operator.solve(-model.gradient, solver="cg", damping=0.1, rtol=1e-14, max_iter=5000).x
    difference = float((step - expected).norm() / expected.norm())
    operator, model = wide(torch.float32)
    v = torch.randn(len(model.gradient))
    pairs = [
        (seconds(lambda: exact(operator, model, 0.1)), seconds(lambda: [operator @ v for _ in range(5)]) / 5)
        for _ in range(7)
    ]
    steps, products = (statistics.median(times) for times in zip(*pairs, strict=True))
    peak, rows = peak_bytes(lambda: exact(operator, model, 0.1)), 4 * 1280 * len(v)
    print(f"\n{steps / products:.1f} products, {peak / 2**20:.0f} MiB; the Jacobian: {rows / 2**20:.0f} MiB")
    print(f"differs from CG's by {difference:.1e}")
    assert difference <= 1e-10
    assert steps <= 20 * products
    assert peak <= 0.02 * rows


def steps_to(level, seed, **options):
    """Steps, each with one Jacobian, on the 1-D Poisson network; 600 for more."""
    torch.manual_seed(seed)
    net, loss = pinn()
    optimizer = optim.GaussNewton(net.parameters(), solver="direct", **options)
    for k in range(600):
        optimizer.step(loss)
        if optimizer.report.new_loss <= level:
            return k + 1
    return 600


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["marquardt", "nielsen"])
def test_acceleration(rule):
    """At most two thirds of the Jacobians without."""
    bent = [steps_to(1e-7, seed, rule=rule) for seed in SEEDS]
    plain = [steps_to(1e-7, seed, rule=rule, acceleration=False) for seed in SEEDS]
    print(f"\nJacobians to 1e-7, {rule}: {bent} with acceleration, {plain} without")
    assert statistics.geometric_mean(bent) <= 2 / 3 * statistics.geometric_mean(plain)


def seconds_to(level, seed, **options):
    torch.manual_seed(seed)
    net, loss = pinn()
    optimizer = optim.GaussNewton(net.parameters(), **options)
    start = time.process_time()
    while time.process_time() - start < 30:
        optimizer.step(loss)
        if optimizer.report.new_loss <= level:
            break
    return time.process_time() - start


@pytest.mark.slow
def test_residuals_beside_products():
    times = {solver: [seconds_to(1e-8, s, solver=solver) for s in SEEDS] for solver in ("auto", "subspace")}
    print(f"\nseconds to 1e-8: {times}")
    assert statistics.geometric_mean(times["auto"]) <= 0.5 * statistics.geometric_mean(times["subspace"])


def decays(seed):
    """``a exp(-b t) + c exp(-d t)`` at 60 points, in units that differ by factors up to a million."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 4, 60, dtype=torch.float64)
    noise = 1e-3 * torch.randn(60, dtype=torch.float64, generator=generator)
    y = 2 * torch.exp(-1.3 * t) + 0.7 * torch.exp(-0.2 * t) + noise
    units = torch.tensor([1e3, 1e-3, 1.0, 1e-2], dtype=torch.float64)
    w = (torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64) / units).requires_grad_()

    def loss():
        a, b, c, d = w * units
        return F.mse_loss(a * torch.exp(-b * t) + c * torch.exp(-d * t), y)

    return w, loss


@pytest.mark.slow
def test_scaling():
    """Of variables with units."""
    counts = {}
    for scaling in ("more", "identity"):
        counts[scaling] = []
        for seed in SEEDS:
            w, loss = decays(seed)
            optimizer = optim.GaussNewton([w], solver="direct", scaling=scaling, history=True)
            while len(optimizer.history) < 300 and loss() > 1.5e-6:
                optimizer.step(loss)
            counts[scaling].append(len(optimizer.history))
    print(f"\nsteps to the noise of the data: {counts}")
    assert statistics.geometric_mean(counts["more"]) <= 0.75 * statistics.geometric_mean(counts["identity"])


def fresh_points(seed, **options):
    """Relative errors of a Poisson network after 100 and 300 steps, each with 12 points of its own."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    generator = torch.Generator().manual_seed(seed + 100)
    optimizer = optim.GaussNewton(net.parameters(), solver="direct", **options)
    ends, grid = torch.tensor([[0.0], [1.0]]).double(), torch.linspace(0, 1, 501).double()[:, None]
    exact = torch.sin(math.pi * grid) + 0.5 * torch.sin(4 * math.pi * grid)
    errors = []
    for k in range(300):
        x = torch.rand(12, 1, dtype=torch.float64, generator=generator)
        source = math.pi**2 * torch.sin(math.pi * x) + 8 * math.pi**2 * torch.sin(4 * math.pi * x)

        def loss(x=x, source=source):
            z = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), z, create_graph=True)
            return ((second + source) / (4 * math.pi) ** 2).square().mean() + net(ends).square().mean()

        optimizer.step(loss)
        if k + 1 in (100, 300):
            with torch.no_grad():
                errors.append(float((net(grid) - exact).norm() / exact.norm()))
    return errors


@pytest.mark.slow
def test_spring():
    """On few points that change from step to step."""
    runs = {spring: [fresh_points(seed, spring=spring) for seed in SEEDS] for spring in (0.0, 0.9, 0.99)}
    means = {s: [statistics.geometric_mean(e) for e in zip(*r, strict=True)] for s, r in runs.items()}
    print(f"\nrelative errors after 100 and 300 steps: {means}")
    assert means[0.9][0] <= 0.75 * means[0.0][0]
    assert means[0.9][1] <= 0.75 * means[0.0][1]
