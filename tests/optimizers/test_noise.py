"""Past convergence: steps whose change of the loss is rounding cost little, and leave the control usable."""

import math

import pytest
import torch
import torch.nn.functional as F

import optim
from optim.methods import control

OPTIMIZERS = {
    "newton": optim.Newton,
    "newton_cubic": lambda p, **k: optim.Newton(p, bound="cubic", **k),
    "newton_cg": lambda p, **k: optim.Newton(p, solver="cg", **k),
    "hessian_free": optim.HessianFree,
    "gauss_newton": optim.GaussNewton,
    "gauss_newton_cg": lambda p, **k: optim.GaussNewton(p, solver="cg", **k),
}
DTYPES = [torch.float64, torch.float32]
CONVERGED, MORE = 25, 30
# Of the recorded run, the full step, its gradient, and one more.
EVALUATIONS = 4


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


class Objective:
    """A loss of ``w`` that can be changed, and counts its evaluations."""

    def __init__(self, name, dtype):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(60, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(60, generator=generator, dtype=torch.float64)
        self.X, self.name, self.calls = X.to(dtype), name, 0
        if name == "logistic":
            self.y = (X[:, 0] + noise > 0).to(dtype)
            self.other = 1 - self.y
        elif name == "poisson":
            self.y = X[:, 1].exp().round().to(dtype)
            self.other = X[:, 2].exp().round().to(dtype)
        else:
            self.y = noise.to(dtype)
            self.other = (3 * noise + 5 * X[:, 0]).to(dtype)
        self.w = torch.zeros(5, dtype=dtype, requires_grad=True)

    def __call__(self):
        self.calls += 1
        z = self.X @ self.w
        if self.name == "logistic":
            return F.binary_cross_entropy_with_logits(z, self.y)
        if self.name == "poisson":
            return F.poisson_nll_loss(z, self.y)
        # An offset that the digits of the loss are spent on.
        return F.mse_loss(z, self.y) + (100.0 if self.name == "offset" else 0.0)

    def change(self):
        self.y = self.other


OBJECTIVES = ["least_squares", "logistic", "poisson", "offset"]


def control_of(optimizer):
    group = optimizer.param_groups[0]
    return group.get("damping") or group["radius"] or group["cubic_weight"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_past_convergence_evaluates_the_loss_four_times(make, name, dtype):
    objective = Objective(name, dtype)
    optimizer = make([objective.w])
    for _ in range(CONVERGED):
        optimizer.step(objective)
    # Once it has come to rest the control does not move with ratios that are rounding.
    control, loss = control_of(optimizer), float(objective().detach())
    for _ in range(MORE):
        objective.calls = 0
        optimizer.step(objective)
        assert objective.calls <= EVALUATIONS
    assert control_of(optimizer) == control
    # Rounding of the terms that the loss sums.
    assert float(objective().detach()) <= loss + 4 * torch.finfo(dtype).eps * max(1.0, abs(loss))


@pytest.mark.parametrize("rates", [(1.0, 0.5), (1.0, 0.0)], ids=str)
def test_groups_with_their_own_rates_do_not_search_there_either(make, rates):
    objective = Objective("logistic", torch.float64)
    u, v = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (2, 3))

    def closure():
        objective.w = torch.cat([u, v])
        return objective()

    optimizer = make([{"params": [p], "lr": rate} for p, rate in zip((u, v), rates, strict=True)])
    for _ in range(2 * CONVERGED):
        optimizer.step(closure)
    for _ in range(MORE):
        objective.calls = 0
        optimizer.step(closure)
        # A step whose entries are scaled is not the model's: both are evaluated.
        assert objective.calls <= EVALUATIONS + 1


def steps_to(optimizer, objective, target):
    for step in range(100):
        if float(objective().detach()) <= target:
            return step
        optimizer.step(objective)
    return math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_changed_objective_is_met_as_by_a_fresh_optimizer(make, name, dtype):
    objective = Objective(name, dtype)
    optimizer = make([objective.w])
    for _ in range(CONVERGED + 12):
        optimizer.step(objective)
    objective.change()
    start, w = float(objective().detach()), objective.w.detach().clone()
    fresh = make([objective.w])
    for _ in range(50):
        fresh.step(objective)
    least = float(objective().detach())
    target = least + 1e-3 * (start - least)
    steps = []
    for each in (make([objective.w]), optimizer):
        objective.w.data.copy_(w)
        steps.append(steps_to(each, objective, target))
    assert steps[1] <= steps[0] + 2


@pytest.mark.parametrize("make_damped", ["hessian_free", "gauss_newton_cg"])
def test_a_plateau_is_no_convergence(make_damped):
    """Far from the minimum decreases are rounding, by too much damping: the control loosens."""
    target = torch.arange(1.0, 4.0)
    w = torch.zeros(3, requires_grad=True)
    optimizer = OPTIMIZERS[make_damped]([w], damping=1.0)

    def closure():
        return 1 + 2e-5 * F.mse_loss(w, target)

    optimizer.step(closure)
    assert math.isfinite(optimizer.report.rho)
    assert optimizer.report.loss - optimizer.report.new_loss <= control.noise_of(1.0, 2.0**-23)
    for _ in range(60):
        optimizer.step(closure)
    torch.testing.assert_close(w.detach(), target, rtol=0.05, atol=0.0)


def test_a_long_step_to_an_equal_loss_is_refused():
    """Newton's step for ``|x|^1.5`` goes to ``-x``: the loss does not change, and rounding is no excuse."""
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optim.Newton([x], radius=4.0, max_trials=1)
    optimizer.step(lambda: x.square().pow(0.75).sum())
    assert not optimizer.report.accepted
    assert optimizer.report.rho == pytest.approx(0.0, abs=1e-12)
    assert optimizer.param_groups[0]["radius"] == pytest.approx(0.5)


def test_a_gradient_that_the_loss_does_not_show_is_followed():
    """Straight-through rounding: the loss is a staircase, and its gradient that of the slope below it."""
    x = torch.tensor([2.4], dtype=torch.float64, requires_grad=True)

    def closure():
        rounded = x + (x.round() - x).detach()
        return rounded.square().sum()

    optimizer = optim.Newton([x], radius=0.2)
    for _ in range(40):
        optimizer.step(closure)
    assert float(closure().detach()) == 0.0


@pytest.mark.parametrize(
    ("actual", "predicted", "unseen"),
    [
        (0.0, 1.0, True),  # no change at all
        (-1e-13, 1e-13, True),  # cancellation
        (-1e-3, 1e-13, False),
        (-1e-13, 1e-3, False),
        (-math.inf, 1e-13, False),
        (math.nan, 1e-13, False),
    ],
)
def test_what_the_loss_may_not_show(actual, predicted, unseen):
    limit = control.CANCELLATION * control.noise_of(1.0, 2.0**-52)
    assert control.is_refused(actual, predicted)
    assert control.is_unseen(actual, predicted, limit) == unseen


def test_what_the_loss_refuses():
    assert not control.is_refused(1e-13, 1e-13)  # a decrease is one
    assert not control.is_refused(0.0, 0.0)


def test_a_quiet_ratio_loosens_at_most():
    for rho in (-math.inf, math.nan, -1.0, 0.2, 0.7):
        assert control.quiet_ratio(rho, True) == control.NEUTRAL
    assert control.quiet_ratio(0.9, True) == 0.9
    assert control.quiet_ratio(0.9, False) == control.NEUTRAL
    assert control.trust_radius(2.0, control.NEUTRAL, 1e-9) == 2.0
    assert control.levenberg_marquardt_damping(2.0, control.NEUTRAL) == 2.0
    assert control.nielsen_damping(2.0, 2.0, control.NEUTRAL) == (2.0, 2.0)
