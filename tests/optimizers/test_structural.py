"""Structural damping: the change of hidden states beside the length of a step, against dense matrices."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

import optim
from optim.closure.hidden import HiddenStates
from secondorder import GaussNewton, Jacobian

DOUBLE = torch.float64
SAMPLES, STEPS = 7, 5


class Recurrent(nn.Module):
    """One output from the last hidden state."""

    def __init__(self, kind=nn.RNN):
        super().__init__()
        self.rnn, self.linear = kind(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(self.rnn(x)[0][:, -1])


class Unrolled(nn.Module):
    """The same by a cell; an LSTM's has two states."""

    def __init__(self, kind=nn.RNNCell):
        super().__init__()
        self.cell, self.linear = kind(2, 3), nn.Linear(3, 1)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.linear(state[0] if isinstance(state, tuple) else state)


@pytest.fixture
def data():
    x = torch.randn(SAMPLES, STEPS, 2, dtype=DOUBLE)
    return x, x[:, :, 0].sum(1, keepdim=True)


def made(kind=nn.RNN):
    torch.manual_seed(1)
    return Recurrent(kind).double()


def closure_of(model, data):
    x, y = data
    return lambda: F.mse_loss(model(x), y)


def dense(model, data):
    """Gradient, Gauss-Newton matrix, and ``J_h^T J_h`` over the number of entries of the hidden states."""
    parameters = list(model.parameters())
    x, y = data

    def jacobian(outputs):
        rows = [torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True) for z in outputs]
        filled = [
            [torch.zeros_like(p) if g is None else g for g, p in zip(row, parameters, strict=True)]
            for row in rows
        ]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in filled])

    states = model.rnn(x)[0]
    outputs = model.linear(states[:, -1])
    J, J_h = jacobian(outputs.reshape(-1)), jacobian(states.reshape(-1))
    residuals = (outputs - y).detach().reshape(-1)
    return 2 / SAMPLES * J.T @ residuals, 2 / SAMPLES * J.T @ J, J_h.T @ J_h / states.numel()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("solver", ["subspace", "cg"])
def test_a_step_solves_the_dense_system(data, kind, solver):
    """And is judged by the objective's own quadratic model."""
    model, damping, weight = made(kind), 3.0, 5.0
    g, G, S = dense(model, data)
    before, loss = flat(model), closure_of(model, data)
    optimizer = optim.HessianFree(
        model.parameters(),
        damping=damping,
        structural_damping=weight,
        solver=solver,
        rtol=1e-12,
        progress=1e-15,
        max_trials=1,
        max_extension=1.0,
    )
    optimizer.step(loss)
    expected = -torch.linalg.solve(G + damping * (torch.eye(len(g), dtype=DOUBLE) + weight * S), g)
    report = optimizer.report
    assert report.curvature == "gauss-newton (mse_loss) + structural damping"
    assert report.accepted
    torch.testing.assert_close(flat(model) - before, expected, rtol=1e-6, atol=1e-9)
    promised = float(-g @ expected - 0.5 * expected @ G @ expected)
    assert report.rho == pytest.approx((report.loss - report.new_loss) / promised, rel=1e-6)


def test_groups_scale_steps_and_not_states(data):
    """Weight decay is of the objective."""
    model, damping, weight, decay = made(), 0.3, 5.0, 0.2
    g, G, S = dense(model, data)
    before = flat(model)
    g, G = g + decay * before, G + decay * torch.eye(len(g), dtype=DOUBLE)
    groups = [{"params": model.rnn.parameters()}, {"params": model.linear.parameters(), "damping_scale": 9.0}]
    options = dict(damping=damping, structural_damping=weight, rtol=1e-12, max_trials=1, max_extension=1.0)
    optimizer = optim.HessianFree(groups, weight_decay=decay, **options)
    optimizer.step(closure_of(model, data))
    scale = torch.ones_like(g)
    scale[-4:] = 9.0
    expected = -torch.linalg.solve(G + damping * (torch.diag(scale) + weight * S), g)
    torch.testing.assert_close(flat(model) - before, expected, rtol=1e-6, atol=1e-9)
    promised = float(-g @ expected - 0.5 * expected @ G @ expected)
    report = optimizer.report
    assert report.rho == pytest.approx((report.loss - report.new_loss) / promised, rel=1e-6)


def test_another_damping_costs_no_pass_through_the_network(data, monkeypatch):
    """Nor another product: the form of a step is that of what products found."""
    model = made()
    optimizer = optim.HessianFree(model.parameters(), damping=1e-6, structural_damping=1.0, rtol=1e-6)
    monkeypatch.setattr(GaussNewton, "forms", None)
    passes, forward = [], Jacobian.forward.fget
    monkeypatch.setattr(Jacobian, "forward", property(lambda self: passes.append(1) or forward(self)))
    optimizer.step(closure_of(model, data))
    report = optimizer.report
    assert report.accepted
    assert report.trials > 2
    # One when the matrix is made: its graph is kept.
    assert len(passes) == report.products + 1


def test_it_holds_the_states_in_place(data):
    """The larger the weight, the less they change; without it most."""
    x, changes = data[0], []
    for weight in (0.0, 100.0, 10000.0):
        model = made()
        before = model.rnn(x)[0].detach()
        optimizer = optim.HessianFree(
            model.parameters(), damping=0.1, structural_damping=weight, max_trials=1, max_extension=1.0
        )
        optimizer.step(closure_of(model, data))
        assert optimizer.report.accepted
        changes.append(float((model.rnn(x)[0].detach() - before).square().mean()))
    assert changes[0] > 2 * changes[1] > 4 * changes[2]


def test_it_adds_no_pass_to_a_product(data, monkeypatch):
    """One forward and one backward pass through the graph, with states or without."""
    calls = {}
    for weight in (0.0, 1.0):
        count, grad = [], torch.autograd.grad

        def spy(*args, count=count, grad=grad, **kwargs):
            count.append(1)
            return grad(*args, **kwargs)

        model = made()
        optimizer = optim.HessianFree(
            model.parameters(), damping=0.1, structural_damping=weight, rtol=1e-12, max_trials=1
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", spy)
            optimizer.step(closure_of(model, data))
        products = optimizer.report.products
        assert products > 3
        calls[weight] = len(count), products
    # Its own: the gradient of its block, and the product with it, and the form of the step, in outputs.
    per_product = {w: count / products for w, (count, products) in calls.items()}
    assert per_product[1.0] <= per_product[0.0] + 1.5


def test_the_first_step_waits_for_a_damping(data):
    model = made()
    optimizer = optim.HessianFree(model.parameters(), structural_damping=1.0)
    optimizer.step(closure_of(model, data))
    assert optimizer.report.curvature == "gauss-newton (mse_loss)"
    optimizer.step(closure_of(model, data))
    assert optimizer.report.curvature == "gauss-newton (mse_loss) + structural damping"


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell], ids=lambda kind: kind.__name__)
def test_cells_are_seen_at_each_step(data, kind):
    torch.manual_seed(1)
    model = Unrolled(kind).double()
    states = HiddenStates()
    states.watching(closure_of(model, data))()
    count = STEPS * (2 if kind is nn.LSTMCell else 1)
    assert states.block(1.0).outputs[0].shape == (count * SAMPLES * 3,)


def test_the_states_of_an_unrolled_network_are_those_of_the_rolled(data):
    """The same steps, whichever way it is written."""
    rolled, unrolled = made(), Unrolled().double()
    names = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0", "bias_ih": "bias_ih_l0"}
    names["bias_hh"] = "bias_hh_l0"
    with torch.no_grad():
        for ours, theirs in names.items():
            getattr(unrolled.cell, ours).copy_(getattr(rolled.rnn, theirs))
    unrolled.linear.load_state_dict(rolled.linear.state_dict())
    for model in (rolled, unrolled):
        optimizer = optim.HessianFree(model.parameters(), structural_damping=10.0)
        for _ in range(4):
            optimizer.step(closure_of(model, data))
    torch.testing.assert_close(flat(rolled), flat(unrolled), rtol=1e-8, atol=1e-10)


def test_packed_sequences_are_seen(data):
    rnn = nn.GRU(2, 3, batch_first=True).double()
    lengths = torch.tensor([5, 4, 4, 3, 2, 2, 1])
    packed = nn.utils.rnn.pack_padded_sequence(data[0], lengths, batch_first=True)
    states = HiddenStates()
    states.watching(lambda: rnn(packed))()
    assert states.block(1.0).outputs[0].shape == (21, 3)


def test_modules_that_are_named_are_seen_alone(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    optimizer = optim.HessianFree(
        model.parameters(), damping=1.0, structural_damping=1.0, structural=[model[2]]
    )
    optimizer.step(closure_of(model, data))
    assert optimizer.report.curvature.endswith("+ structural damping")
    assert not model[2]._forward_hooks


def test_hooks_act_in_the_first_run_alone(data):
    """Neither in trials, nor outside of steps, nor after an exception."""
    model = made()
    optimizer = optim.HessianFree(
        model.parameters(), damping=0.1, structural_damping=1.0, structural=[model.rnn]
    )
    calls = []

    def closure():
        calls.append(len(model.rnn._forward_hooks))
        if len(calls) > 6:
            raise KeyError("trouble")
        return F.mse_loss(model(data[0]), data[1])

    optimizer.step(closure)
    assert calls == [1] + [0] * (len(calls) - 1)
    assert len(calls) > 1
    calls[:] = [0] * 6
    before = flat(model)
    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert calls[-1] == 1
    assert not model.rnn._forward_hooks
    assert not _global_forward_hooks
    assert torch.equal(flat(model), before)


def test_the_graph_is_not_held_after_a_step(data):
    model, seen = made(), []
    model.rnn.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output[0])))
    optimizer = optim.HessianFree(model.parameters(), damping=0.1, structural_damping=1.0)
    optimizer.step(closure_of(model, data))
    gc.collect()
    assert seen
    assert not any(ref() is not None for ref in seen)


def test_copies_go_on_alike(data):
    model = made()
    optimizer = optim.HessianFree(model.parameters(), structural_damping=10.0, structural=[model.rnn])
    optimizer.step(closure_of(model, data))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for each, again in [(model, optimizer), *copies]:
        for _ in range(2):
            again.step(closure_of(each, data))
    for each, _ in copies:
        torch.testing.assert_close(flat(each), flat(model), rtol=1e-9, atol=1e-12)


def test_where_the_hessian_is_used_there_is_none(data):
    model = made()
    optimizer = optim.HessianFree(model.parameters(), damping=1.0, structural_damping=1.0)
    with pytest.warns(UserWarning, match="found no Gauss-Newton matrix"):
        optimizer.step(lambda: -model(data[0]).square().sum())
    assert optimizer.report.curvature.startswith("hessian")
    assert "structural" not in optimizer.report.curvature


def test_misuse_is_named(data):
    model = made()
    with pytest.raises(ValueError, match="structural_damping must be a non-negative number, got -1"):
        optim.HessianFree(model.parameters(), structural_damping=-1)
    with pytest.raises(ValueError, match="structural_damping must be 0 with curvature='hessian', got 1"):
        optim.HessianFree(model.parameters(), structural_damping=1.0, curvature="hessian")
    with pytest.raises(TypeError, match="structural must hold torch.nn.Modules, got str"):
        optim.HessianFree(model.parameters(), structural_damping=1.0, structural=["rnn"])
    optimizer = optim.HessianFree(model.linear.parameters(), structural_damping=1.0)
    x = torch.randn(4, 3, dtype=DOUBLE)
    with pytest.raises(RuntimeError, match="needs hidden states, but no nn.RNN.*name the modules"):
        optimizer.step(lambda: model.linear(x).square().sum())
    with pytest.raises(TypeError, match="closure must be a function"):
        optimizer.step(3)
    watched = optim.HessianFree(model.parameters(), structural_damping=1.0, model=model)
    F.mse_loss(model(data[0]), data[1]).backward()
    with pytest.raises(RuntimeError, match="while a closure ran; give step a closure"):
        watched.step()
