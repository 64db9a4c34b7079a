"""What goes wrong in a step leaves no trace: parameters, buffers, ``.grad``, modes, hooks, random state."""

import sys

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

import optim
import secondorder

OPTIMIZERS = {"newton": optim.Newton, "hessian_free": optim.HessianFree, "gauss_newton": optim.GaussNewton}
X = zoo.vector(96, 1).view(24, 4)
Y = (X[:, :3] + 0.1).argmax(1)


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


class Fault:
    """Multiplies the loss; at a chosen evaluation it raises, or gives what is not a number."""

    def __init__(self, at, what):
        self.at, self.what, self.calls = at, what, 0

    def __call__(self, loss):
        self.calls += 1
        if self.calls != self.at:
            return loss
        if isinstance(self.what, float):
            return loss * self.what
        raise self.what


def closure_of(model, optimizer, fault=lambda loss: loss):
    def closure():
        optimizer.zero_grad()
        loss = fault(F.cross_entropy(model(X), Y))
        loss.backward()
        return loss

    return closure


class Snapshot:
    """All that a step may touch, and must not where it fails."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.grads = [p.grad for p in model.parameters()]
        self.tensors = [t.clone() for t in self._tensors()]
        self.settings = self._settings()
        self.keys = list(optimizer.state)
        self.groups = self._groups()

    def _tensors(self):
        grads = [g for g in self.grads if g is not None]
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *grads, torch.get_rng_state(), *states]

    def _groups(self):
        groups = self.optimizer.param_groups
        return [{name: group[name] for name in group if name != "params"} for group in groups]

    def _settings(self):
        modules = self.model.modules()
        return {
            "training": [module.training for module in modules],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()],
            "modes": torch._C._len_torch_function_stack(),
            "grad": torch.is_grad_enabled(),
            "kernels": [
                torch.backends.cuda.math_sdp_enabled(),
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
            ],
            "stance": torch._dynamo.eval_frame._stance.stance if "torch._dynamo" in sys.modules else None,
            "autocast": torch.is_autocast_enabled("cpu"),
        }

    def assert_same(self):
        assert all(p.grad is g for p, g in zip(self.model.parameters(), self.grads, strict=True))
        assert all(map(torch.equal, self._tensors(), self.tensors))
        assert self._settings() == self.settings
        assert list(self.optimizer.state) == self.keys
        assert self._groups() == self.groups


@pytest.mark.parametrize("after", [0, 2], ids=["first_step", "later"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=type)
@pytest.mark.parametrize("at", [1, 2], ids=["recorded", "trial"])
def test_an_error_in_the_closure(make, at, error, after):
    model = network()
    optimizer = make(model.parameters())
    for _ in range(after):
        optimizer.step(closure_of(model, optimizer))
    snapshot = Snapshot(model, optimizer)
    with pytest.raises(type(error)):
        optimizer.step(closure_of(model, optimizer, Fault(at, error)))
    snapshot.assert_same()
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.report.accepted


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 1], ids=["first_step", "later"])
def test_an_error_in_a_product(make, error, after, monkeypatch):
    """In the middle of a solve."""
    model = network()
    options = {optim.HessianFree: {"rtol": 1e-9}, optim.Newton: {"solver": "cg", "radius": 100.0}}
    optimizer = make(model.parameters(), **options.get(make, {"solver": "cg"}))
    for _ in range(after):
        optimizer.step(closure_of(model, optimizer))
    snapshot, products = Snapshot(model, optimizer), []
    operator = secondorder.Hessian if make is optim.Newton else secondorder.GaussNewton
    product = operator._matvec

    def interrupted(self, v):
        products.append(1)
        if len(products) == 3:
            raise error("in a product")
        return product(self, v)

    monkeypatch.setattr(operator, "_matvec", interrupted)
    with pytest.raises(error, match="in a product"):
        optimizer.step(closure_of(model, optimizer))
    snapshot.assert_same()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(make, value):
    model = network()
    optimizer = make(model.parameters())
    optimizer.step(closure_of(model, optimizer))
    snapshot = Snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="loss at the current parameters must be finite, got"):
        optimizer.step(closure_of(model, optimizer, Fault(1, value)))
    snapshot.assert_same()


def test_a_gradient_that_is_not_finite(make):
    model = network()
    optimizer = make(model.parameters())
    optimizer.step(closure_of(model, optimizer))
    snapshot = Snapshot(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y) + (0 * model[0].weight.sum()).sqrt()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="gradient at the current parameters must be finite"):
        optimizer.step(closure)
    snapshot.assert_same()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_trials_that_are_not_finite(make, value):
    """Every trial: no step, no NaN, more damping, and an end."""
    model = network()
    optimizer = make(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    group, calls, control = optimizer.param_groups[0], [], 1.0
    group["damping" if "damping" in group else "radius"] = control

    def fault(loss):
        calls.append(1)
        return loss if len(calls) == 1 else loss * value

    optimizer.step(closure_of(model, optimizer, fault))
    assert not optimizer.report.accepted
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.report.trials == group["max_trials"]
    # max_trials solves, and for each at most a line search and a look at the iterates of CG.
    assert len(calls) < 100 * group["max_trials"]
    now = group.get("damping", group.get("radius"))
    assert now < control if "radius" in group else now > control


def test_a_trial_that_is_not_finite_is_followed_by_a_shorter_one(make):
    model = network()
    optimizer = make(model.parameters())
    fault = Fault(2, float("nan"))
    optimizer.step(closure_of(model, optimizer, fault))
    assert optimizer.report.accepted
    assert fault.calls > 2
    assert optimizer.report.new_loss < optimizer.report.loss
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_product_that_is_not_finite(make, solver, monkeypatch):
    """NaN from the curvature alone: parameters do not move, and are not NaN."""
    model = network()
    optimizer = make(model.parameters(), **({} if make is optim.HessianFree else {"solver": solver}))
    before = [p.detach().clone() for p in model.parameters()]
    operator = secondorder.Hessian if make is optim.Newton else secondorder.GaussNewton
    for name in ("_matvec", "_matmat"):
        product = getattr(operator, name)
        monkeypatch.setattr(operator, name, lambda self, v, product=product: product(self, v) * float("nan"))
    optimizer.step(closure_of(model, optimizer))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    moved = not all(map(torch.equal, before, model.parameters()))
    assert moved == optimizer.report.accepted
    if moved:
        assert optimizer.report.new_loss < optimizer.report.loss


def test_an_error_in_a_pre_hook_of_the_module(make):
    model = network()
    optimizer = make(model.parameters(), model=model)
    optimizer.step(closure_of(model, optimizer))
    snapshot = Snapshot(model, optimizer)
    handle = model[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure_of(model, optimizer))
    handle.remove()
    snapshot.assert_same()
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    assert float(optimizer.step()) > optimizer.report.new_loss


def test_several_processes_are_warned_of(make, monkeypatch):
    model = network()
    optimizer = make(model.parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="parameters of several processes drift apart"):
        optimizer.step(closure_of(model, optimizer))
    optimizer.step(closure_of(model, optimizer))  # once: warnings are errors


def test_an_error_after_a_rejected_trial_restores_damping_and_radius(make):
    model = network()
    optimizer = make(model.parameters())
    optimizer.step(closure_of(model, optimizer))
    snapshot, calls = Snapshot(model, optimizer), []

    def fault(loss):
        """NaN in trials until the control has moved, then an interrupt."""
        calls.append(1)
        if len(calls) == 1:
            return loss
        if len(calls) < 4:
            return loss * float("nan")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(model, optimizer, fault))
    assert len(calls) > 2
    snapshot.assert_same()
