"""What a step says of itself: the report, its history, the callback; and the forms that memory allows."""

import copy
import gc
import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from memory import PeakMemory, peak_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from optim.methods import control
from optim.methods.batches import BatchNoise
from optim.methods.forms import VECTORS
from optim.optimizers.report import Seconds

OPTIMIZERS = [optim.Newton, optim.HessianFree, optim.GaussNewton]


@pytest.fixture(params=OPTIMIZERS, ids=lambda cls: cls.__name__)
def make(request):
    return request.param


def train(optimizer, case, steps=3):
    def closure():
        optimizer.zero_grad()
        loss = case.value()
        loss.backward()
        return loss

    return [float(optimizer.step(closure)) for _ in range(steps)]


def test_history_is_a_table(make):
    case = zoo.network("mlp_cross_entropy")
    optimizer = make(case.model.parameters(), history=True)
    losses = train(optimizer, case)
    assert [report.loss for report in optimizer.history] == losses
    assert optimizer.history[-1] is optimizer.report
    columns = optimizer.history.columns()
    assert columns["loss"] == losses
    assert columns["new_loss"][:-1] == pytest.approx(losses[1:])
    parts = [f"seconds_{part}" for part in Seconds._fields]
    assert set(columns) == {*optim.StepReport._fields[:-1], *parts}
    assert all(len(column) == 3 for column in columns.values())
    assert all(value >= 0 for part in parts for value in columns[part])
    assert copy.deepcopy(optimizer).history == optimizer.history


def test_without_it_nothing_is_kept(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters())
    train(optimizer, case)
    assert optimizer.history is None


def test_callback_sees_every_step(make):
    case, seen = zoo.network("mlp_mse"), []
    optimizer = make(case.model.parameters(), callback=seen.append)
    train(optimizer, case)
    assert len(seen) == 3
    assert seen[-1] is optimizer.report
    with pytest.raises(TypeError, match="callback must be a function of a StepReport, got str"):
        make(case.model.parameters(), callback="print")
    with pytest.raises(ValueError, match="history must be True or False, got 1"):
        make(case.model.parameters(), history=1)


def test_an_error_in_a_callback_comes_after_the_step(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters(), callback=lambda report: 1 / 0)
    start = case.value().item()
    with pytest.raises(ZeroDivisionError):
        train(optimizer, case, 1)
    assert optimizer.report.accepted
    assert case.value().item() == pytest.approx(optimizer.report.new_loss)
    assert case.value().item() < start


def test_two_runs_make_equal_reports(make):
    """Seconds are not compared: no two runs take the same."""
    reports = []
    for _ in range(2):
        case = zoo.network("mlp_cross_entropy")
        optimizer = make(case.model.parameters())
        train(optimizer, case)
        reports.append(optimizer.report)
    assert reports[0] == reports[1]
    assert reports[0] != reports[1]._replace(loss=0.0)


def test_repr_names_form_and_noise(make):
    case = zoo.network("mlp_mse")
    optimizer = make(case.model.parameters(), solver="subspace")
    train(optimizer, case, 1)
    text = repr(optimizer.report)
    assert "form='grown (as asked)'" in text
    assert "noisy" not in text
    assert "noisy=True" in repr(optimizer.report._replace(noisy=True))


def test_products_and_cost_add_up(make):
    """A gradient and its graph, the products, and a third for each further run of the closure."""
    case, calls = zoo.network("mlp_cross_entropy"), []
    optimizer = make(case.model.parameters(), solver="subspace")
    for _ in range(3):
        calls.clear()
        optimizer.step(lambda: calls.append(1) or case.value())
        report = optimizer.report
        assert report.products == report.iterations > 0
        cost = 2 + report.products * (2.0 if make is optim.Newton else 4 / 3) + (len(calls) - 1) / 3
        assert report.gradient_equivalents == pytest.approx(cost)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_short_memory_means_cg_and_is_said(make):
    case = zoo.network("mlp_cross_entropy")
    optimizer = make(case.model.parameters(), memory=100.0)
    losses = train(optimizer, case, 10)
    assert optimizer.report.form.startswith("cg (memory=100 bytes hold 0 directions")
    assert losses[-1] < losses[0]


def test_memory_bounds_the_dimension():
    case = zoo.network("mlp_cross_entropy")
    n = sum(p.numel() for p in case.model.parameters())
    memory = VECTORS * 8 * n * 9.0
    optimizer = optim.GaussNewton(case.model.parameters(), solver="subspace", memory=memory, rtol=1e-12)
    train(optimizer, case)
    assert optimizer.report.iterations == 9
    assert optimizer.report.status == "max_iter"


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), "4GB"])
def test_memory_out_of_range(memory):
    with pytest.raises(ValueError, match="memory must be a positive number"):
        optim.HessianFree([torch.ones(2, requires_grad=True)], memory=memory)


def test_mini_batches_are_noticed(make):
    torch.manual_seed(0)
    X, model = (
        torch.randn(120, 4),
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)),
    )
    y = (X[:, 0] > 0).long() + (X[:, 1] > 0.3).long()
    optimizer, start = make(model.parameters()), F.cross_entropy(model(X), y).item()
    seen = []
    for _ in range(10):
        for rows in torch.randperm(120).split(30):
            optimizer.step(lambda rows=rows: F.cross_entropy(model(X[rows]), y[rows]))
            seen.append(optimizer.report.noisy)
    assert not seen[0]
    assert sum(seen) > 30
    assert F.cross_entropy(model(X), y).item() < 0.3 * start
    # A checkpoint goes on with the last step, which the next batch is tried on.
    assert all("last_step" in optimizer.state[p] for p in model.parameters())


def test_dropout_is_noise_too(make):
    torch.manual_seed(0)
    X = torch.randn(60, 4)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 2)
    )
    optimizer = make(model.parameters())
    for _ in range(12):
        optimizer.step(lambda: F.cross_entropy(model(X), (X[:, 0] > 0).long()))
    assert optimizer.report.noisy
    assert optimizer.report.new_loss < 0.4


@pytest.mark.parametrize("rule", ["marquardt", "nielsen"])
def test_damping_follows_the_rule_that_was_named(rule):
    case = zoo.network("mlp_mse")
    optimizer = optim.GaussNewton(case.model.parameters(), rule=rule)
    train(optimizer, case, 1)
    compared = 0
    for _ in range(10):
        before = optimizer.report.damping
        train(optimizer, case, 1)
        report = optimizer.report
        if report.trials == 1:
            follow = {
                "marquardt": control.marquardt_damping,
                "nielsen": lambda damping, rho: control.nielsen_damping(damping, 2.0, rho)[0],
            }[rule]
            # Never below what would change nothing.
            assert report.damping >= follow(before, report.rho) * (1 - 1e-12)
            compared += report.damping == pytest.approx(follow(before, report.rho), rel=1e-9)
    assert compared >= 5
    with pytest.raises(ValueError, match="rule must be one of 'marquardt', 'nielsen', got 'x'"):
        optim.GaussNewton(case.model.parameters(), rule="x")


def test_the_growth_of_nielsens_rule_lasts():
    """Rejections in a row raise damping by 2, 4, 8, ..., over the steps."""
    case, calls = zoo.network("mlp_mse"), []
    optimizer = optim.GaussNewton(case.model.parameters(), rule="nielsen", damping=1.0, max_trials=2)

    def closure():
        calls.append(1)
        return case.value() * (1.0 if is_recorded else float("nan"))

    class Recorded:
        def __bool__(self):
            return len(calls) == 1

    is_recorded = Recorded()
    for expected in (8.0, 8.0 * 8 * 16):
        calls.clear()
        optimizer.step(closure)
        assert not optimizer.report.accepted
        assert optimizer.report.damping == expected


def test_first_damping_and_radius_come_from_the_function():
    """A tenth of the curvature along the gradient; the length of Newton's step along it."""
    curvatures = torch.linspace(1.0, 50.0, 30, dtype=torch.float64)
    for scale in (1e-6, 1.0, 1e6):
        x = torch.ones(30, dtype=torch.float64, requires_grad=True)
        seen = []

        class Spy(optim.Newton):
            def _method(self, seen=seen):
                method = super()._method()

                def rule(size, rho, length, seen=seen, rule=method.rule):
                    seen.append(size)
                    return rule(size, rho, length)

                return method._replace(rule=rule)

        Spy([x]).step(lambda x=x, scale=scale: 0.5 * scale * (curvatures * x.square()).sum())
        g = scale * curvatures
        steepest = float((g * g * scale * curvatures).sum() / (g * g).sum())
        assert seen[0] == pytest.approx(float(g.norm()) / steepest, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("solver", ["subspace", "cg"])
def test_a_loss_in_other_units_takes_the_same_steps(make, solver, dtype):
    """From 1e-30 to 1e30 of it; in single precision to the rounding that the steps magnify."""
    reached = []
    for unit in (1.0, 1e-30, 1e30):
        case = zoo.network("mlp_mse")
        case = case._replace(
            model=case.model.to(dtype), inputs=case.inputs.to(dtype), targets=case.targets.to(dtype)
        )
        optimizer = make(case.model.parameters(), solver=solver)
        # CG in single precision stops where its own rounding says so.
        for _ in range(6 if solver == "subspace" else 2):
            optimizer.step(lambda case=case, unit=unit: unit * case.value())
            assert optimizer.report.accepted
        reached.append(optimizer.report.new_loss / unit)
    assert reached == pytest.approx(
        [reached[0]] * 3, rel=1e-2 if solver == "cg" or dtype == torch.float32 else 1e-6
    )


def test_a_report_before_any_size_is_known(make):
    x = torch.zeros(2, requires_grad=True)
    for options, status in (({}, "zero_gradient"), ({"lr": 0.0}, "zero_lr")):
        optimizer = make([x], **options)
        optimizer.step(lambda options=options: (x + 1.0 * bool(options)).square().sum())
        assert optimizer.report.status == status
        known = 0.0 if make is optim.Newton else math.inf
        size = optimizer.report.radius if make is optim.Newton else optimizer.report.damping
        other = optimizer.report.damping if make is optim.Newton else optimizer.report.radius
        assert math.isnan(size)
        assert other == known
        assert status in repr(optimizer.report)


def test_a_group_without_a_rate_is_as_good_as_frozen(make):
    """The others' model is their own: a joint one was refused, or paid for twice."""
    reached = []
    for frozen in (True, False):
        case = zoo.network("mlp_mse")
        first, last = case.model[0], case.model[2]
        if frozen:
            first.requires_grad_(False)
            optimizer = make(last.parameters())
        else:
            optimizer = make([{"params": first.parameters(), "lr": 0.0}, {"params": last.parameters()}])
        before = [p.detach().clone() for p in first.parameters()]
        for _ in range(8):
            train(optimizer, case, 1)
        assert all(map(torch.equal, before, first.parameters()))
        reached.append(case.value().item())
    assert reached[0] == pytest.approx(reached[1], rel=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_that_no_step_can_answer_does_not_run_away(make, seed):
    """Regression on eight noisy samples a step: sizes ran away until steps were an error."""
    torch.manual_seed(seed)
    target, w = torch.arange(1.0, 6.0), torch.zeros(5, requires_grad=True)
    optimizer, errors = make([w]), []
    for step in range(600):
        inputs = torch.randn(8, 5)
        outputs = inputs @ target + torch.randn(8)
        optimizer.step(lambda inputs=inputs, outputs=outputs: F.mse_loss(inputs @ w, outputs))
        if step >= 300:
            errors.append((w.detach() - target).norm().item())
            size = optimizer.report.radius if make is optim.Newton else 1 / optimizer.report.damping
            assert 1e-6 < size < 1e12
    assert sum(errors) / len(errors) < 0.8
    assert len(set(errors)) > 250


def test_one_large_batch_is_forgotten():
    noise = BatchNoise(changes=4.0, outputs=64.0)
    rates = []
    for outputs in (64, 10000, *[64] * 30):
        noise = noise.observed(1.0, outputs)
        rates.append(noise.rate)
    assert rates[1] == rates[0]
    assert rates[-1] > 0.9 * rates[0]


def test_memory_is_kept_to():
    """What a step allocates, state included, beside what it does without a space."""
    n_in, width = 200, 100
    inputs, targets = torch.randn(8, n_in), torch.randn(8, 2)
    peaks = []
    for directions in (1, 12):
        model = torch.nn.Sequential(torch.nn.Linear(n_in, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
        n = sum(p.numel() for p in model.parameters())
        optimizer = optim.HessianFree(
            model.parameters(), solver="subspace", rtol=1e-9, memory=VECTORS * 4.0 * n * directions
        )

        def step(optimizer=optimizer, model=model):
            optimizer.step(lambda: F.mse_loss(model(inputs), targets))

        step()
        peaks.append(peak_bytes(step))
        assert optimizer.report.iterations == directions
    assert peaks[1] - peaks[0] < VECTORS * 4 * n * 12


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_nothing_grows_over_fifty_steps(make, solver):
    """What lives after a step: the last space, whose size may change, and nothing else."""
    torch.manual_seed(0)
    X, y = torch.randn(40, 6), torch.randint(3, (40,))
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer, beside = make(model.parameters(), solver=solver), []
    with PeakMemory() as memory:
        for step in range(50):
            optimizer.step(
                lambda: F.cross_entropy(model(X), y) + 1e-2 * sum(p.norm() for p in model.parameters())
            )
            if step % 40 in range(5, 10):
                gc.collect()
                kept = [t for values in optimizer.state.values() for t in values.values()]
                beside.append(memory.live - sum(t.untyped_storage().nbytes() for t in kept))
    # A vector kept from each step would be forty; sizes that follow what was timed differ by less than one.
    vector = sum(p.nbytes for p in model.parameters())
    assert max(beside[-5:]) <= max(beside[:5]) + vector


class Reads(TorchDispatchMode):
    """Counts numbers that are read off single precision: the small algebra of the host is in double."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        single = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.float32
        self.count += single
        return func(*args, **(kwargs or {}))


def test_host_reads_of_a_step(make):
    """One a trial, one more where it is refused; the record with its gradient, and products, in one piece."""
    torch.manual_seed(0)
    X, y = torch.randn(60, 4), torch.randint(3, (60,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer, calls = make(model.parameters(), solver="subspace"), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    for _ in range(5):
        calls.clear()
        with Reads() as reads:
            optimizer.step(closure)
        assert optimizer.report.accepted
        assert len(calls) - 1 <= reads.count <= len(calls)


def test_options_of_other_optimizers_and_typos_are_named(make):
    w = [torch.ones(2, requires_grad=True)]
    with pytest.raises(TypeError, match=r"'history_size'; it takes .* Leave it out: a step finds its own"):
        make(w, history_size=10)
    with pytest.raises(TypeError, match=r"'max_iters'; it takes .* Did you mean max_iter\?"):
        make(w, max_iters=10)


def test_a_step_in_inference_mode_says_so(make):
    w = torch.ones(2, requires_grad=True)
    optimizer = make([w])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) takes away"):
        optimizer.step(lambda: w.square().sum())


def test_loss_and_outputs_in_the_other_order(make):
    case = zoo.network("mlp_mse")
    with pytest.raises(RuntimeError, match=r"return \(loss, outputs\), in this order"):
        make(case.model.parameters()).step(lambda: (case.outputs(), case.value()))


@pytest.mark.parametrize("solver", ["subspace", "cg"])
def test_a_model_that_is_cast_goes_on(make, solver):
    case = zoo.network("mlp_mse")
    case = case._replace(inputs=case.inputs.float(), targets=case.targets.float())
    case.model.float()
    optimizer = make(case.model.parameters(), solver=solver)
    train(optimizer, case, 2)
    case.model.double()
    wide = case._replace(inputs=case.inputs.double(), targets=case.targets.double())
    for _ in range(2):
        train(optimizer, wide, 1)
        assert optimizer.report.accepted
