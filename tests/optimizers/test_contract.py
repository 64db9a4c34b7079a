"""The contract of ``torch.optim.Optimizer``: options, groups, checkpoints, hooks, schedulers, dtypes."""

import copy
import io
import pickle

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import optim
from optim.methods.formed import Formed
from optim.methods.grown import Grown
from optim.methods.residual import Residual
from optim.methods.truncated import Truncated
from optim.optimizers.decay import WeightDecay

OPTIMIZERS = {
    "newton": optim.Newton,
    "newton_cubic": lambda p, **k: optim.Newton(p, bound="cubic", **k),
    "hessian_free": optim.HessianFree,
    "gauss_newton": optim.GaussNewton,
    "gauss_newton_cg": lambda p, **k: optim.GaussNewton(p, solver="cg", rtol=1e-10, **k),
}
# Steps that differ by rounding alone.
SAME = dict(rtol=1e-8, atol=1e-10)


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


@pytest.fixture(params=["gauss_newton", "gauss_newton_cg"])
def damped(request):
    """Those whose step solves one damped system: Hessian-free chooses among iterates of CG."""
    return OPTIMIZERS[request.param]


def closure_of(case, optimizer, factor=1.0, penalty=None):
    def closure():
        optimizer.zero_grad()
        loss = factor * case.value()
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        return loss

    return closure


def run(optimizer, closure, steps=4):
    return [float(optimizer.step(closure)) for _ in range(steps)]


def groups_of(case, **options):
    """Two groups; ``options`` are pairs of their values."""
    parameters = list(case.model.parameters())
    pairs = [{name: values[i] for name, values in options.items()} for i in range(2)]
    return [{"params": parameters[:2], **pairs[0]}, {"params": parameters[2:], **pairs[1]}]


class TestWeightDecay:
    def test_is_the_l2_term_of_the_closure(self):
        """Step for step; but not in the loss that is returned."""
        ours, other = zoo.network("mlp_cross_entropy"), zoo.network("mlp_cross_entropy")
        optimizer = optim.Newton(ours.model.parameters(), weight_decay=0.1)
        reference = optim.Newton(other.model.parameters())

        def penalty():
            return 0.05 * sum(p.square().sum() for p in other.model.parameters())

        losses = run(optimizer, closure_of(ours, optimizer))
        run(reference, closure_of(other, reference, penalty=penalty))
        for a, b in zip(ours.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, **SAME)
        assert losses[0] == pytest.approx(zoo.network("mlp_cross_entropy").value().item())

    def test_is_in_gradient_and_curvature_of_a_damped_system(self, damped):
        case = zoo.network("mlp_cross_entropy")
        assert_step_solves_the_damped_system(damped(case.model.parameters(), weight_decay=0.1), case, 0.1)

    def test_groups_have_their_own(self, damped):
        case = zoo.network("mlp_mse")
        optimizer = damped(groups_of(case, weight_decay=(0.0, 0.3)))
        sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
        rates = torch.cat([torch.full((size,), rate) for size, rate in zip(sizes, (0.0, 0.3), strict=True)])
        assert_step_solves_the_damped_system(optimizer, case, rates.double())

    def test_grad_is_plain_and_the_report_is_not(self, make):
        case = zoo.network("mlp_mse")
        expected = torch.autograd.grad(case.value(), list(case.model.parameters()))
        start = case.value().item()
        squares = sum(p.square().sum().item() for p in case.model.parameters())
        optimizer = make(case.model.parameters(), weight_decay=0.2)
        assert float(optimizer.step(closure_of(case, optimizer))) == pytest.approx(start)
        for p, gradient in zip(case.model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        assert optimizer.report.loss == pytest.approx(start + 0.1 * squares)
        assert optimizer.report.new_loss < optimizer.report.loss

    def test_leads_to_the_regularised_minimum(self, make):
        x = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = make([x], weight_decay=1.0)
        for _ in range(40):
            optimizer.step(lambda: F.mse_loss(x, torch.ones(2, dtype=torch.float64), reduction="sum"))
        torch.testing.assert_close(x.detach(), torch.full((2,), 2 / 3, dtype=torch.float64))

    def test_a_number_or_a_diagonal(self):
        a, b = torch.ones(2, requires_grad=True), torch.full((1,), 2.0, requires_grad=True)
        decay = WeightDecay.of([{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 1.0}])
        assert float(decay.value()) == 0.5 * 0.5 * 2 + 0.5 * 4
        assert decay.gradient(a).tolist() == [0.5, 0.5, 2.0]
        assert decay.diagonal(a.detach()).tolist() == [0.5, 0.5, 1.0]
        assert not WeightDecay.of([{"params": [a], "weight_decay": 0.0}])


def assert_step_solves_the_damped_system(optimizer, case, decay, scale=1.0):
    """One step against ``(G + decay + damping * scale) p = -(g + decay w)``, solved densely."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    w = torch.cat([p.detach().reshape(-1) for p in parameters])
    G = oracles.dense_gauss_newton(case)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(case.value(), parameters)])
    damping = 1.0
    shift = torch.as_tensor(decay + damping * scale, dtype=torch.float64).expand(len(w))
    expected = -torch.linalg.solve(G + torch.diag(shift), g + decay * w)
    for group in optimizer.param_groups:
        group.update(
            {k: v for k, v in dict(rtol=1e-12, progress=1e-15, damping=damping).items() if k in group}
        )
    optimizer.step(closure_of(case, optimizer))
    step = torch.cat([p.detach().reshape(-1) for p in parameters]) - w
    assert optimizer.report.rho > 0.5
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-7)


def test_groups_may_scale_the_damping(damped):
    case = zoo.network("mlp_cross_entropy")
    optimizer = damped(groups_of(case, damping_scale=(1.0, 20.0)))
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    scale = torch.cat([torch.full((size,), s) for size, s in zip(sizes, (1.0, 20.0), strict=True)]).double()
    assert_step_solves_the_damped_system(optimizer, case, 0.0, scale)


def test_maximize_is_minimising_the_negative(make):
    ours, other = zoo.network("mlp_cross_entropy"), zoo.network("mlp_cross_entropy")
    optimizer = make(ours.model.parameters(), maximize=True)
    reference = make(other.model.parameters())
    gains = run(optimizer, closure_of(ours, optimizer, factor=-1.0))
    losses = run(reference, closure_of(other, reference))
    assert gains == pytest.approx([-loss for loss in losses], rel=1e-9)
    for a, b in zip(ours.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, **SAME)
        torch.testing.assert_close(a.grad, -b.grad, **SAME)
    assert optimizer.report.loss == pytest.approx(reference.report.loss)
    assert optimizer.report.curvature == reference.report.curvature


@pytest.mark.parametrize("option", ["fused", "foreach", "capturable", "differentiable"])
def test_options_that_do_not_apply_say_why(make, option):
    w = torch.ones(2, requires_grad=True)
    make([w], **{option: False})
    with pytest.raises(TypeError, match=f"does not support {option}=True: "):
        make([w], **{option: True})
    with pytest.raises(TypeError, match="unexpected option 'momentum'; it takes lr, "):
        make([w], momentum=0.9)


@pytest.mark.parametrize(
    ("option", "bad"), [("weight_decay", -0.1), ("weight_decay", "a"), ("damping_scale", 0.0)]
)
def test_group_options_out_of_range(make, option, bad):
    w = torch.ones(2, requires_grad=True)
    if option not in make([w]).defaults:  # Newton has no damping
        pytest.skip("not an option of this optimizer")
    with pytest.raises(ValueError, match=f"{option} must be a"):
        make([{"params": [w], option: bad}])


def resumed(optimizer, make, parameters):
    """A new optimizer with the state of another, through a file that is read with torch's defaults."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make(parameters)
    again.load_state_dict(torch.load(file, weights_only=True))
    if next(iter(again.param_groups[0]["params"])).dtype == optimizer.param_groups[0]["params"][0].dtype:
        assert_same_state(again.state_dict(), optimizer.state_dict())
    return again


def assert_same_state(ours, theirs):
    """Bit for bit."""
    # torch adds a "differentiable" of its own when it loads.
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {name: group[name] for name in other} == other
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())


def test_copies_and_checkpoints_go_on_alike(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters(), weight_decay=0.01)
    run(optimizer, closure_of(case, optimizer), 3)
    copies = [copy.deepcopy((case.model, optimizer)), pickle.loads(pickle.dumps((case.model, optimizer)))]
    model = copy.deepcopy(case.model)
    copies.append((model, resumed(optimizer, make, model.parameters())))
    results = []
    for model, again in [(case.model, optimizer), *copies]:
        copied = case._replace(model=model)
        run(again, closure_of(copied, again), 3)
        results.append(copied.value().item())
    assert results == pytest.approx([results[0]] * 4, rel=1e-10)


def test_a_checkpoint_of_an_older_version_gets_the_defaults(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters())
    run(optimizer, closure_of(case, optimizer), 2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["weight_decay"], group["maximize"]
    again = make(case.model.parameters())
    again.load_state_dict(state)
    assert all(g["weight_decay"] == 0.0 and g["maximize"] is False for g in again.param_groups)
    run(again, closure_of(case, again), 1)


def test_a_float64_checkpoint_loads_into_float32(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters())
    run(optimizer, closure_of(case, optimizer), 2)
    single = case._replace(
        model=copy.deepcopy(case.model).float(), inputs=case.inputs.float(), targets=case.targets.float()
    )
    again = resumed(optimizer, make, single.model.parameters())
    before = single.value().item()
    run(again, closure_of(single, again), 2)
    assert single.value().item() < before


def test_bfloat16_parameters_have_single_precision_vectors(make):
    case = zoo.network("mlp_mse")
    half = case._replace(
        model=case.model.bfloat16(), inputs=case.inputs.bfloat16(), targets=case.targets.bfloat16()
    )
    optimizer = make(half.model.parameters())
    before = half.value().item()
    run(optimizer, closure_of(half, optimizer), 15)
    assert half.value().item() < 0.7 * before
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in half.model.parameters())
    vectors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert all(t.dtype == torch.float32 for t in vectors)


def test_autocast_in_the_closure(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = run(optimizer, closure, 15)
    assert losses[-1] < 0.8 * losses[0]


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": torch.optim.lr_scheduler.ConstantLR,
    "LinearLR": torch.optim.lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": torch.optim.lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10, cycle_momentum=False),
    "ReduceLROnPlateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ExponentialLR(o, 0.9), torch.optim.lr_scheduler.ConstantLR(o)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of SequentialLR before torch 2.9
def test_every_scheduler_drives_lr(name, make):
    case = zoo.network("mlp_mse")
    optimizer = make(groups_of(case, lr=(1.0, 0.5)))
    scheduler = SCHEDULERS[name](optimizer)
    closure = closure_of(case, optimizer)
    start = case.value().item()
    for _ in range(4):
        loss = optimizer.step(closure)
        scheduler.step(loss) if name == "ReduceLROnPlateau" else scheduler.step()
    assert case.value().item() < start
    state = scheduler.state_dict()
    SCHEDULERS[name](optimizer).load_state_dict(state)


def test_hooks_run_around_the_step(make):
    case, seen = zoo.network("mlp_mse"), []
    optimizer = make(case.model.parameters())
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    optimizer.step(closure_of(case, optimizer))
    assert seen == ["before", "after"]


def test_parameters_of_any_shape(make):
    """Without dimensions, transposed, empty."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weight = zoo.vector(6, 1).view(2, 3).T.requires_grad_()
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    x, y = zoo.vector(30, 2).view(10, 3), zoo.vector(20, 3).view(10, 2)
    optimizer = make([scale, weight, empty])
    stride = weight.stride()
    losses = run(optimizer, lambda: F.mse_loss(scale * (x @ weight), y), 10)
    assert losses[-1] < losses[0]
    assert weight.stride() == stride


def test_a_group_may_be_added_between_steps(make):
    case = zoo.network("mlp_mse")
    parameters = list(case.model.parameters())
    optimizer = make(parameters[2:])
    run(optimizer, closure_of(case, optimizer), 2)
    before = [p.detach().clone() for p in parameters[:2]]
    optimizer.add_param_group({"params": parameters[:2], "lr": 0.5, "weight_decay": 0.1})
    run(optimizer, closure_of(case, optimizer), 2)
    assert not any(map(torch.equal, parameters[:2], before))


def test_a_tensor_lr(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters(), lr=torch.tensor(0.5))
    start = case.value().item()
    run(optimizer, closure_of(case, optimizer), 3)
    assert case.value().item() < start


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_a_solve_leaves_everything_as_it_was(make, error, monkeypatch):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters())
    run(optimizer, closure_of(case, optimizer), 2)
    parameters = list(case.model.parameters())
    before = [p.detach().clone() for p in parameters]
    grads = [p.grad for p in parameters]
    copies = [g.clone() for g in grads]
    random = torch.get_rng_state()
    state = copy.deepcopy(optimizer.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = case.value() + 0 * torch.rand(())
        loss.backward()
        return loss

    def interrupted(*_):
        raise error("in the solve")

    for form in (Grown, Formed, Residual, Truncated):
        monkeypatch.setattr(form, "solve", interrupted)
    with pytest.raises(error, match="in the solve"):
        optimizer.step(closure)
    assert all(map(torch.equal, parameters, before))
    assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))
    assert all(map(torch.equal, grads, copies))
    assert torch.equal(torch.get_rng_state(), random)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    monkeypatch.undo()
    start = case.value().item()
    run(optimizer, closure, 1)
    assert case.value().item() < start


class TestDampingScaleOfNewton:
    """An ellipsoid: ``sum_i scale_i p_i^2`` is bounded."""

    @staticmethod
    def problem():
        H = zoo.indefinite_matrix(6, seed=3)
        g = zoo.vector(6, 4)
        x = [
            torch.zeros(2, dtype=H.dtype, requires_grad=True),
            torch.zeros(4, dtype=H.dtype, requires_grad=True),
        ]

        def closure():
            p = torch.cat(x)
            return g @ p + 0.5 * p @ H @ p + 1e-3 * p.pow(4).sum()

        return H, g, x, closure

    @pytest.mark.parametrize("scales", [(1.0, 1.0), (4.0, 4.0), (1.0, 25.0)])
    def test_step_minimises_the_model_in_the_ellipsoid(self, scales):
        H, g, x, closure = self.problem()
        groups = [{"params": [p], "damping_scale": s} for p, s in zip(x, scales, strict=True)]
        optimizer = optim.Newton(groups, radius=0.3)
        optimizer.step(closure)
        step = torch.cat([p.detach() for p in x])
        scale = torch.tensor([scales[0]] * 2 + [scales[1]] * 4, dtype=H.dtype)
        assert optimizer.report.status == "boundary"
        # Within a part in a hundred, as the solver is asked for.
        assert float(step @ (scale * step)) ** 0.5 == pytest.approx(0.3, rel=1e-2)
        # (H + sigma S) p = -g, with a matrix that is not indefinite.
        sigma = float(-step @ (H @ step + g) / (step @ (scale * step)))
        torch.testing.assert_close((H + sigma * torch.diag(scale)) @ step, -g, rtol=1e-7, atol=1e-9)
        assert torch.linalg.eigvalsh(H + sigma * torch.diag(scale)).min() > -1e-8

    def test_products_alone_give_the_same_ellipsoid(self):
        _, _, x, closure = self.problem()
        groups = [{"params": [x[0]]}, {"params": [x[1]], "damping_scale": 25.0}]
        optimizer = optim.Newton(groups, radius=0.3, solver="cg")
        optimizer.step(closure)
        a, b = (p.detach() for p in x)
        assert optimizer.report.status in ("boundary", "negative_curvature")
        assert float(a @ a + 25 * b @ b) ** 0.5 == pytest.approx(0.3, rel=1e-8)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_group_without_a_rate_does_not_move(make, swapped):
    """Where the other group is at its minimum a line search along the whole solution moved both."""
    a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    moving, still = (b, a) if swapped else (a, b)
    optimizer = make([{"params": [moving]}, {"params": [still], "lr": 0.0}])
    if "damping" in optimizer.defaults:
        for group in optimizer.param_groups:
            group["damping"] = 1e-6
    targets = torch.tensor([0.0, 20.0], dtype=torch.float64)
    for _ in range(5):
        optimizer.step(lambda: F.mse_loss(torch.cat([10 * (a - b), a + b]), targets))
    assert still.item() == 1.0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_runs_eager_in_a_step(make, backend):
    """Steps are those of the model itself, to rounding; what it compiled is used outside."""
    torch._dynamo.reset()
    case, twin = zoo.network("mlp_mse"), zoo.network("mlp_mse")
    optimizer, reference = make(case.model.parameters()), make(twin.model.parameters())
    compiled = case._replace(model=torch.compile(case.model, backend=backend))
    before = compiled.value()
    torch.testing.assert_close(before, case.value())
    losses = run(optimizer, closure_of(compiled, optimizer))
    assert losses == pytest.approx(run(reference, closure_of(twin, reference)), rel=1e-8)
    assert optimizer.report.curvature == reference.report.curvature
    torch.testing.assert_close(compiled.value(), case.value())
    torch._dynamo.reset()


@pytest.mark.slow
def test_groups_whose_rates_differ_do_not_solve_the_same_system_again(make):
    """Where the one that moves has converged and the other does not move: ten times a step, once."""
    case = zoo.network("mlp_mse")
    optimizer = make(groups_of(case, lr=(1.0, 1e-28)))
    closure = closure_of(case, optimizer)
    run(optimizer, closure, 30)
    trials = []
    for _ in range(10):
        optimizer.step(closure)
        trials.append(optimizer.report.trials)
    assert sum(trials) < 30
