"""``Newton`` with each bound by name: options, reports, groups, units, batches."""

import io
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo

import optim

BOUNDS = ("trust-region", "cubic", "saddle-free")


def train(optimizer, case, steps):
    for _ in range(steps):
        optimizer.step(case.value)
    return optimizer.report


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bound": "ball"}, "bound must be one of 'trust-region', 'saddle-free', 'cubic', got 'ball'"),
        ({"bound": "cubic", "radius": 1.0}, "radius must be None with bound='cubic', got 1.0"),
        ({"cubic_weight": 2.0}, "cubic_weight must be None with bound='trust-region', got 2.0"),
        ({"bound": "cubic", "cubic_weight": 0.0}, "cubic_weight must be a positive number, got 0.0"),
        ({"bound": "cubic", "solver": "cg"}, "solver must not be 'cg' with bound='cubic'.*use 'auto'"),
        ({"bound": "saddle-free", "solver": "cg"}, "solver must not be 'cg' with bound='saddle-free'"),
    ],
)
def test_options_that_do_not_go_together(options, text):
    with pytest.raises(ValueError, match=text):
        optim.Newton([torch.ones(2, requires_grad=True)], **options)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_report_names_what_bounds_the_next_step(bound):
    case = zoo.network("mlp_mse")
    optimizer = optim.Newton(case.model.parameters(), bound=bound)
    report = train(optimizer, case, 3)
    name = "cubic_weight" if bound == "cubic" else "radius"
    unused = {"damping": 0.0, "radius": math.inf, "cubic_weight": 0.0}
    for other, value in unused.items():
        assert (getattr(report, other) == value) == (other != name)
    assert getattr(report, name) == optimizer.param_groups[0][name]
    assert f" {name}=" in repr(report)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("solver", ["subspace", "direct"])
def test_a_loss_in_other_units_takes_the_same_steps(bound, solver):
    reached = []
    for unit in (1.0, 1e-30, 1e30):
        case = zoo.network("mlp_mse")
        optimizer = optim.Newton(case.model.parameters(), bound=bound, solver=solver)
        for _ in range(8):
            optimizer.step(lambda case=case, unit=unit: unit * case.value())
            assert optimizer.report.accepted
        reached.append(optimizer.report.new_loss / unit)
    assert reached == pytest.approx([reached[0]] * 3, rel=1e-6)


def test_the_first_weight_comes_from_the_function():
    """A tenth of that which halves the step to the minimum along the gradient."""
    curvature, slope = 4.0, 12.0
    optimizer = optim.Newton([x := torch.tensor([3.0], requires_grad=True)], bound="cubic", max_trials=1)
    optimizer.step(lambda: 0.5 * curvature * x.square().sum())
    weight = 0.1 * 2 * curvature**2 / slope
    # (curvature + weight length) length = slope
    length = (math.sqrt(curvature**2 + 4 * weight * slope) - curvature) / (2 * weight)
    assert optimizer.report.step_norm == pytest.approx(length, rel=1e-6)
    assert optimizer.report.rho == pytest.approx(1.0, rel=1e-6)
    # The model is exact; a tenth of the weight would change nothing: a tenth of the curvature is enough.
    assert optimizer.report.cubic_weight == pytest.approx(0.1 * curvature / length, rel=1e-6)


def test_groups_scale_the_length_that_the_cubic_term_takes():
    """``(H + weight norm(p) D) p = -g``, with ``norm(p)^2 = p . D p``: solved densely."""
    case = zoo.network("mlp_mse")
    parameters = list(case.model.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "damping_scale": 20.0}]
    scale = torch.cat([torch.full((p.numel(),), 1.0 if i < 2 else 20.0) for i, p in enumerate(parameters)])
    H = oracles.dense_hessian(case.loss_of, parameters)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(case.value(), parameters)])
    before = torch.cat([p.detach().reshape(-1) for p in parameters])
    optimizer = optim.Newton(groups, bound="cubic", cubic_weight=50.0, solver="direct", max_extension=1.0)
    optimizer.step(case.value)
    assert optimizer.report.trials == 1
    step = torch.cat([p.detach().reshape(-1) for p in parameters]) - before
    D = torch.diag(scale.double())
    shifted = H + 50.0 * torch.sqrt(step @ D @ step) * D
    torch.testing.assert_close(shifted @ step, -g, rtol=1e-7, atol=1e-9)
    assert float(torch.linalg.eigvalsh(shifted)[0]) > 0


@pytest.mark.parametrize("bound", ["cubic", "saddle-free"])
def test_where_memory_is_short_a_small_space_is_left(bound):
    case = zoo.network("mlp_mse")
    n = sum(p.numel() for p in case.model.parameters())
    optimizer = optim.Newton(case.model.parameters(), bound=bound, memory=6.0 * 8 * n * 3)
    report = train(optimizer, case, 4)
    assert report.form.startswith("grown (memory=")
    assert report.iterations <= 3
    assert report.new_loss < report.loss


@pytest.mark.parametrize("bound", ["cubic", "saddle-free"])
def test_batches_are_learned_from(bound):
    torch.manual_seed(0)
    target, w = torch.arange(1.0, 6.0), torch.zeros(5, requires_grad=True)
    optimizer, errors = optim.Newton([w], bound=bound), []
    for step in range(200):
        inputs = torch.randn(8, 5)
        outputs = inputs @ target + torch.randn(8)
        optimizer.step(lambda inputs=inputs, outputs=outputs: F.mse_loss(inputs @ w, outputs))
        if step >= 100:
            errors.append((w.detach() - target).norm().item())
    assert optimizer.report.noisy
    assert sum(errors) / len(errors) < 0.8


def test_a_checkpoint_keeps_bound_and_weight():
    case = zoo.network("mlp_mse")
    optimizer = optim.Newton(case.model.parameters(), bound="cubic")
    train(optimizer, case, 3)
    file = io.BytesIO()
    torch.save((case.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    again = zoo.network("mlp_mse")
    again.model.load_state_dict(model)
    other = optim.Newton(again.model.parameters())
    other.load_state_dict(state)
    assert other.param_groups[0]["bound"] == "cubic"
    assert train(other, again, 3).new_loss == pytest.approx(train(optimizer, case, 3).new_loss, rel=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_convergence_is_quadratic_in_a_grown_space(bound):
    inputs = torch.randn(60, 12, dtype=torch.float64)
    labels = (inputs[:, 0] + torch.randn(60, dtype=torch.float64) > 0).double()
    w = torch.zeros(12, dtype=torch.float64, requires_grad=True)

    def loss():
        return F.binary_cross_entropy_with_logits(inputs @ w, labels) + 1e-3 * w.square().sum()

    optimizer = optim.Newton([w], bound=bound, solver="subspace")
    norms = []
    while not norms or (norms[-1] > 1e-11 and len(norms) < 30):
        optimizer.step(loss)
        norms.append(optimizer.report.gradient_norm)
    assert len(norms) <= 12
