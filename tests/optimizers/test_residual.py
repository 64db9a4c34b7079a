"""GaussNewton in the space of residuals: by dense linear algebra, and what it does with closures."""

import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import optim

# Of float64, times the condition of a damped system.
TIGHT = 1e-10
DAMPING = 0.1


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def network(wide, dtype=torch.float64):
    """Fewer rows than parameters, or more."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(5 if wide else 60, 4, dtype=dtype)
    return net, x


LOSSES = {
    "mse": lambda z: F.mse_loss(z, torch.linspace(-1, 1, z.numel()).to(z).view_as(z)),
    "cross_entropy": lambda z: F.cross_entropy(z, torch.arange(len(z)) % 3, label_smoothing=0.1),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.3)),
}


def dense_step(net, x, loss, damping, decay=0.0, scale=1.0):
    """``-(J' Q J + (decay + damping scale) I)^-1 (g + decay w)`` from torch's own derivatives."""
    parameters = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]

    def outputs(*values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach() for p in parameters)
    J = torch.autograd.functional.jacobian(outputs, values)
    z = outputs(*values)
    J = torch.cat([part.reshape(z.numel(), -1) for part in J], 1)
    Q = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())
    g = J.T @ torch.autograd.functional.jacobian(loss, z).reshape(-1) + decay * flat(values)
    B = J.T @ Q @ J
    return -torch.linalg.solve(B + (decay + damping * scale) * torch.eye(len(g)).double(), g)


def taken(net, x, loss, **options):
    """The first step, and the report."""
    optimizer = optim.GaussNewton(net.parameters(), solver="direct", damping=DAMPING, max_trials=1, **options)
    before = flat(p.detach().clone() for p in net.parameters())
    optimizer.step(lambda: loss(net(x)))
    assert optimizer.report.form.startswith("residual")
    return flat(p.detach() for p in net.parameters()) - before, optimizer.report


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "tall"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"damping_scale": 3.0}], ids=str)
def test_the_step_is_the_primal_one(wide, name, options):
    net, x = network(wide)
    decay, scale = options.get("weight_decay", 0.0), options.get("damping_scale", 1.0)
    expected = dense_step(net, x, LOSSES[name], DAMPING, decay, scale)
    step, report = taken(net, x, LOSSES[name], acceleration=False, **options)
    assert report.accepted
    torch.testing.assert_close(step, expected, rtol=TIGHT, atol=TIGHT * float(expected.norm()))


def test_it_is_the_step_of_the_other_forms():
    steps = {}
    for solver in ("direct", "subspace"):
        net, x = network(True)
        optimizer = optim.GaussNewton(
            net.parameters(), solver=solver, damping=DAMPING, rtol=1e-13, max_trials=1, acceleration=False
        )
        before = flat(p.detach().clone() for p in net.parameters())
        optimizer.step(lambda net=net, x=x: LOSSES["cross_entropy"](net(x)))
        steps[solver] = flat(p.detach() for p in net.parameters()) - before
    torch.testing.assert_close(steps["direct"], steps["subspace"], rtol=1e-8, atol=1e-9)


def test_groups_that_do_not_move_and_scales_of_their_own():
    net, x = network(True)
    groups = [
        {"params": net[0].parameters(), "lr": 0.0},
        {"params": net[2].weight, "damping_scale": 4.0},
        {"params": net[2].bias},
    ]
    optimizer = optim.GaussNewton(groups, solver="direct", damping=DAMPING, max_trials=1, acceleration=False)
    other, _ = network(True)
    half = nn.Sequential(other[2])
    hidden = torch.tanh(other[0](x)).detach()
    loss = LOSSES["mse"]
    scales = torch.cat([torch.full((18,), 4.0), torch.ones(3)]).double()
    J = torch.autograd.functional.jacobian(
        lambda W, b: F.linear(hidden, W, b), (half[0].weight.detach(), half[0].bias.detach())
    )
    J = torch.cat([part.reshape(15, -1) for part in J], 1)
    z = half(hidden).detach()
    g = J.T @ torch.autograd.functional.jacobian(loss, z).reshape(-1)
    expected = -torch.linalg.solve(J.T @ J * (2 / 15) + DAMPING * scales.diag(), g)
    first, before = net[0].weight.detach().clone(), flat(p.detach().clone() for p in net[2].parameters())
    optimizer.step(lambda: loss(net(x)))
    assert torch.equal(net[0].weight, first)
    step = flat(p.detach() for p in net[2].parameters()) - before
    torch.testing.assert_close(step, expected, rtol=TIGHT, atol=TIGHT)


def test_a_gradient_that_the_closure_clips_is_followed():
    """What the residuals would give is another step: the form falls back."""
    net, x = network(True)
    optimizer = optim.GaussNewton(net.parameters(), solver="direct", damping=1e3)

    def closure():
        optimizer.zero_grad()
        loss = LOSSES["mse"](net(x))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        return loss

    optimizer.step(closure)
    assert optimizer.report.form.startswith("formed")
    assert math.isclose(optimizer.report.gradient_norm, 1e-3, rel_tol=1e-5)


def test_one_clipped_gradient_does_not_switch_the_form_off():
    net, x = network(True)
    optimizer, forms = optim.GaussNewton(net.parameters()), []
    for k in range(3):

        def closure(k=k):
            optimizer.zero_grad()
            loss = LOSSES["mse"](net(x))
            loss.backward()
            if k == 1:
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            return loss

        optimizer.step(closure)
        forms.append(optimizer.report.form.split()[0])
    assert forms == ["residual", "grown", "residual"]


@pytest.mark.parametrize("memory", [2.0**15, 2.0**17, 2.0**20, 2.0**23])
def test_where_memory_is_short_another_form_is_taken(memory):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 144, 1))
    x = torch.randn(64, 1, 12, 12)
    optimizer = optim.GaussNewton(net.parameters(), memory=memory, curvature_batch=None)
    for _ in range(2):
        optimizer.step(lambda: F.mse_loss(net(x), x.mean((1, 2, 3))[:, None]))
        assert optimizer.report.accepted


def test_passes_are_counted_as_they_are_made():
    """Samples that mix need one for each row: the next step knows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(60, 4).double()
    optimizer = optim.GaussNewton(net.parameters(), solver="direct")
    optimizer.step(lambda: F.mse_loss(net(x), x[:, :1]))
    assert optimizer.report.products >= 30
    first = optimizer.param_groups[0]["residual_cost"]
    optimizer.step(lambda: F.mse_loss(net(x), x[:, :1]))
    assert optimizer.param_groups[0]["residual_cost"] == first
    assert first[-1] > 10
    wide = nn.Sequential(nn.Linear(784, 30), nn.Tanh(), nn.Linear(30, 10))
    inputs = torch.randn(50, 784)
    optimizer = optim.GaussNewton(wide.parameters(), solver="direct")
    optimizer.step(lambda: F.cross_entropy(wide(inputs), torch.arange(50) % 10))
    assert optimizer.report.products < 20


def test_an_empty_batch_of_outputs():
    net, x = network(False)
    optimizer = optim.GaussNewton(net.parameters(), solver="direct")
    loss = LOSSES["mse"]
    optimizer.step(lambda: loss(net(x)) + F.mse_loss(net(x[:0]), net(x[:0]).detach(), reduction="sum"))
    assert optimizer.report.accepted


def test_samples_that_mix_are_no_harm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(6, 4).double()
    expected = dense_step(net, x, LOSSES["mse"], DAMPING)
    step, _ = taken(net, x, LOSSES["mse"], acceleration=False)
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-9)


def test_the_hessian_of_what_is_no_residual_takes_another_form():
    w = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
    optimizer = optim.GaussNewton([w], solver="direct")
    with pytest.warns(UserWarning, match="found no Gauss-Newton matrix"):
        optimizer.step(lambda: (w**4).sum() - w.prod())
    assert optimizer.report.form.startswith("formed")


class TestAcceleration:
    def counted(self, loss, **options):
        net, x = network(True)
        optimizer, calls = optim.GaussNewton(net.parameters(), solver="direct", **options), []
        for _ in range(3):
            calls.clear()
            optimizer.step(lambda: calls.append(1) or loss(net(x)))
        return len(calls), optimizer.report.trials

    def test_costs_an_evaluation_of_squares_and_is_never_there_for_others(self):
        calls, trials = self.counted(LOSSES["mse"])
        assert calls == 1 + 2 * trials
        for name in ("cross_entropy", "bce"):
            calls, trials = self.counted(LOSSES[name], max_extension=1.0)
            assert calls == 1 + trials
        calls, trials = self.counted(LOSSES["mse"], acceleration=False, max_extension=1.0)
        assert calls == 1 + trials

    def test_by_finite_differences(self):
        """Half the acceleration, from the second derivative of the outputs along the step."""
        net, x = network(True)
        plain, _ = taken(net, x, LOSSES["mse"], acceleration=False)
        net, _ = network(True)
        bent, report = taken(net, x, LOSSES["mse"], acceleration=True)
        assert report.accepted
        net, _ = network(True)
        parameters, names = tuple(net.parameters()), [name for name, _ in net.named_parameters()]
        start = flat(p.detach() for p in parameters)

        def outputs(t):
            parts = (start + t * plain).split([p.numel() for p in parameters])
            values = {n: v.view(p.shape) for n, v, p in zip(names, parts, parameters, strict=True)}
            return torch.func.functional_call(net, values, (x,)).reshape(-1)

        h = 1e-3
        second = (outputs(h) - 2 * outputs(0.0) + outputs(-h)) / h**2
        J = torch.autograd.functional.jacobian(
            lambda *v: torch.func.functional_call(net, dict(zip(names, v, strict=True)), (x,)), parameters
        )
        J = torch.cat([part.reshape(15, -1) for part in J], 1) * (2 / 15) ** 0.5
        second = second * (2 / 15) ** 0.5
        a = -torch.linalg.solve(J.T @ J + DAMPING * torch.eye(J.shape[1]).double(), J.T @ second)
        # The library's is a one-sided difference with a tenth of the step.
        assert float((bent - plain - a / 2).norm()) < 0.2 * float(a.norm() / 2)

    def test_random_numbers_and_buffers_are_as_in_the_recorded_run(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1)).double()
        x = torch.randn(8, 4).double()
        optimizer = optim.GaussNewton(net.parameters(), solver="direct")
        optimizer.step(lambda: F.mse_loss(net(x), x[:, :1]))
        # Of the same function, linear in the last layer alone, the first step goes as predicted.
        assert optimizer.report.accepted
        assert optimizer.report.new_loss < optimizer.report.loss

    def test_is_on_or_off(self):
        with pytest.raises(ValueError, match="acceleration must be True or False, got 'yes'"):
            optim.GaussNewton([torch.ones(2, requires_grad=True)], acceleration="yes")


class TestScaling:
    def fitted(self, units, scaling, steps=6):
        """``a exp(-b t)`` with parameters in other units."""
        t = torch.linspace(0, 4, 30, dtype=torch.float64)
        y = 2 * torch.exp(-1.3 * t) + 0.01 * torch.sin(17 * t)
        w = (torch.tensor([1.0, 0.5], dtype=torch.float64) / units).requires_grad_()
        optimizer = optim.GaussNewton([w], solver="direct", scaling=scaling)

        def residual():
            a, b = w * units
            return F.mse_loss(a * torch.exp(-b * t), y)

        for _ in range(steps):
            optimizer.step(residual)
        return w.detach() * units, optimizer

    def test_more_makes_units_irrelevant(self):
        ones = torch.ones(2, dtype=torch.float64)
        units = torch.tensor([1e3, 1e-3], dtype=torch.float64)
        plain, _ = self.fitted(ones, "more")
        scaled, optimizer = self.fitted(units, "more")
        torch.testing.assert_close(scaled, plain, rtol=1e-7, atol=1e-9)
        assert optimizer.state_dict()["state"][0]["column_scale"].shape == (2,)
        other, _ = self.fitted(units, "identity")
        assert float((other - plain).norm()) > 1e-3

    def test_what_shows_no_residuals_is_an_error(self):
        w = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
        optimizer = optim.GaussNewton([w], scaling="more")
        before = w.detach().clone()
        with (
            pytest.warns(UserWarning, match="found no Gauss-Newton matrix"),
            pytest.raises(RuntimeError, match='scaling="more" needs the residuals'),
        ):
            optimizer.step(lambda: (w**4).sum() - w.prod())
        assert torch.equal(w, before)

    def test_weight_decay_is_an_error(self):
        with pytest.raises(ValueError, match="scaling='more' takes no weight_decay, got 0.1"):
            optim.GaussNewton([torch.ones(2, requires_grad=True)], scaling="more", weight_decay=0.1)

    def test_unknown(self):
        with pytest.raises(ValueError, match="scaling must be one of 'identity', 'more', got 'jac'"):
            optim.GaussNewton([torch.ones(2, requires_grad=True)], scaling="jac")


class TestSpring:
    def test_is_damped_towards_a_part_of_the_last_step(self):
        """``argmin |J p - target|^2 + damping |p - mu last|^2``, by dense least squares."""
        net, x = network(True)
        loss, mu = LOSSES["mse"], 0.7
        optimizer = optim.GaussNewton(
            net.parameters(), spring=mu, damping=DAMPING, max_trials=1, acceleration=False
        )
        before = flat(p.detach().clone() for p in net.parameters())
        optimizer.step(lambda: loss(net(x)))
        between = flat(p.detach().clone() for p in net.parameters())
        damping = optimizer.param_groups[0]["damping"]
        last = between - before
        plain = dense_step(net, x, loss, damping)
        # (J' J + d I)^-1 d mu last, from the difference of two steps.
        names = [name for name, _ in net.named_parameters()]
        values = tuple(p.detach() for p in net.parameters())
        J = torch.autograd.functional.jacobian(
            lambda *v: torch.func.functional_call(net, dict(zip(names, v, strict=True)), (x,)), values
        )
        J = torch.cat([part.reshape(15, -1) for part in J], 1) * (2 / 15) ** 0.5
        system = J.T @ J + damping * torch.eye(J.shape[1]).double()
        expected = plain + torch.linalg.solve(system, damping * mu * last)
        optimizer.step(lambda: loss(net(x)))
        assert optimizer.report.accepted
        step = flat(p.detach() for p in net.parameters()) - between
        torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-9)

    def test_goes_on_when_loaded(self):
        runs = []
        for is_loaded in (False, True):
            net, x = network(True)
            optimizer = optim.GaussNewton(net.parameters(), spring=0.9)
            for k in range(6):
                if k == 3 and is_loaded:
                    state = optimizer.state_dict()
                    optimizer = optim.GaussNewton(net.parameters(), spring=0.9)
                    optimizer.load_state_dict(state)
                optimizer.step(lambda net=net, x=x: LOSSES["mse"](net(x)))
            runs.append(flat(p.detach() for p in net.parameters()))
        assert torch.equal(*runs)

    def test_without_residuals_is_an_error(self):
        case = zoo.network("mlp_mse")
        optimizer = optim.GaussNewton(case.model.parameters(), spring=0.9)

        def closure():
            optimizer.zero_grad()
            loss = case.value()
            loss.backward()
            for p in case.model.parameters():
                p.grad *= 0.5
            return loss

        with pytest.raises(
            RuntimeError, match="spring needs the space of residuals, but the gradient in .grad is not"
        ):
            optimizer.step(closure)

    @pytest.mark.parametrize("option", [{"spring": 0.9}, {"scaling": "more"}], ids=str)
    def test_all_samples_are_needed(self, option):
        w = [torch.ones(2, requires_grad=True)]
        with pytest.raises(ValueError, match="needs all residuals, got curvature_batch=20"):
            optim.GaussNewton(w, curvature_batch=20, **option)
        with pytest.raises(ValueError, match="must be off with a closure for curvature_batch"):
            optim.GaussNewton(w, curvature_batch=w[0].sum, **option)

    def test_keeps_the_step_in_units_of_the_parameters_and_not_shortened(self):
        net, x = network(True)
        optimizer = optim.GaussNewton(net.parameters(), spring=0.9, lr=0.1, damping_scale=4.0)
        before = flat(p.detach().clone() for p in net.parameters())
        optimizer.step(lambda: LOSSES["mse"](net(x)))
        moved = flat(p.detach() for p in net.parameters()) - before
        last = flat(optimizer.state[p]["last_solution"] for p in net.parameters())
        torch.testing.assert_close(last, moved / 0.1, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("option", [{"spring": 0.9}, {"scaling": "more"}], ids=str)
    @pytest.mark.parametrize("solver", ["subspace", "cg"])
    def test_another_solver_is_an_error(self, option, solver):
        with pytest.raises(ValueError, match=f"needs the space of residuals, got solver='{solver}'"):
            optim.GaussNewton([torch.ones(2, requires_grad=True)], solver=solver, **option)

    @pytest.mark.parametrize("spring", [-0.1, 1.5, "0.9"])
    def test_out_of_range(self, spring):
        with pytest.raises(ValueError, match="spring must be between 0 and 1"):
            optim.GaussNewton([torch.ones(2, requires_grad=True)], spring=spring)
