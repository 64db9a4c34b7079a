"""Closures that are not the function of the parameters that a step takes them for."""

import itertools
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import optim

OPTIMIZERS = {"newton": optim.Newton, "hessian_free": optim.HessianFree, "gauss_newton": optim.GaussNewton}
ALL = torch.randn(64, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X = ALL[:24]
STALE = "parameters enter it through a graph that was made before; call the model inside the closure"
OTHER = "closure gave a loss of .* and then, at the same parameters, .*Draw the batch"


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def targets(x):
    return x[:, :3].argmax(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def closure_of(optimizer, loss_of):
    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


class Stale:
    """Ways to compute a part of the loss once for several runs of the closure."""

    @staticmethod
    def loss(model):
        loss = F.cross_entropy(model(X), targets(X))
        return lambda: loss

    @staticmethod
    def outputs(model):
        outputs = model(X)
        return lambda: F.cross_entropy(outputs, targets(X))

    @staticmethod
    def features(model):
        features = model[:2](X)
        return lambda: F.cross_entropy(model[2](features), targets(X))

    @staticmethod
    def penalty(model):
        penalty = 0.1 * model[0].weight.square().sum()
        return lambda: F.cross_entropy(model(X), targets(X)) + penalty

    @staticmethod
    def a_cache(model):
        """Made inside: by the first run."""
        kept = []

        def loss():
            if not kept:
                kept.append(model[:2](X))
            return F.cross_entropy(model[2](kept[0]), targets(X))

        return loss

    @staticmethod
    def a_view(model):
        """Of a parameter: trials move the parameter, not the view."""
        weight = model[2].weight.T
        return lambda: F.cross_entropy(model[:2](X) @ weight, targets(X))


@pytest.mark.parametrize("kind", [name for name in vars(Stale) if not name.startswith("_")])
def test_a_forward_pass_outside_of_the_closure_is_an_error(make, kind):
    model = network()
    optimizer = make(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=STALE):
        optimizer.step(closure_of(optimizer, getattr(Stale, kind)(model)))
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    # Mended, it goes on.
    optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(X), targets(X))))
    assert optimizer.report.accepted


@pytest.mark.parametrize("returned", ["number", "detached", "loss_outputs", "filled"])
def test_it_is_one_whatever_the_closure_returns(make, returned):
    model = network()
    optimizer = make(model.parameters())
    outputs = model(X)

    def closure():
        loss = F.cross_entropy(outputs, targets(X))
        if returned == "loss_outputs":
            return loss, outputs
        if returned == "filled":
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                p.grad = g
        else:
            loss.backward()
        return loss.item() if returned == "number" else loss.detach()

    with pytest.raises(RuntimeError, match=STALE):
        optimizer.step(closure)


def test_it_is_one_in_a_later_step_too(make):
    model = network()
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(X), targets(X))))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=STALE):
        optimizer.step(closure_of(optimizer, Stale.outputs(model)))
    assert all(map(torch.equal, before, model.parameters()))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Fine:
    """What is no function of stale outputs, though parts of its graph are old, unseen, or made elsewhere."""

    @staticmethod
    def a_teacher(model):
        """Its graph is older, and leads to parameters that the optimizer does not move."""
        soft = network()(X).softmax(1)
        return lambda: -(model(X).log_softmax(1) * soft).sum(1).mean()

    @staticmethod
    def threads(model):
        """Nodes of another thread have numbers of their own, from zero."""

        def loss():
            with ThreadPoolExecutor(1) as pool:
                outputs = pool.submit(model, X).result()
            return F.cross_entropy(outputs, targets(X))

        return loss

    @staticmethod
    def a_gradient_penalty(model):
        def loss():
            x = X.clone().requires_grad_()
            outputs = model(x)
            (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
            return F.cross_entropy(outputs, targets(X)) + slope.square().mean()

        return loss

    @staticmethod
    def transforms(model):
        slope = torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))
        return lambda: F.cross_entropy(model(X), targets(X)) + slope(X).square().mean()

    @staticmethod
    def a_function_of_the_user(model):
        return lambda: F.cross_entropy(Doubled.apply(model(X)), targets(X))

    @staticmethod
    def a_checkpoint(model):
        return lambda: F.cross_entropy(checkpoint(model, X, use_reentrant=False), targets(X))

    @staticmethod
    def a_staircase(model):
        """No trial changes the loss."""

        def loss():
            z = model(X)
            return F.mse_loss(z + ((1e-3 * z).round() - z).detach(), torch.ones_like(z))

        return loss


@pytest.mark.filterwarnings("ignore:.* found no Gauss-Newton matrix")
@pytest.mark.parametrize("kind", [name for name in vars(Fine) if not name.startswith("_")])
def test_what_only_looks_stale_is_none(make, kind):
    model = network()
    optimizer = make(model.parameters())
    closure = closure_of(optimizer, getattr(Fine, kind)(model))
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.report.gradient_norm > 0


def test_graphs_of_other_threads_are_looked_at_once():
    model = network()
    optimizer = optim.HessianFree(model.parameters(), max_extension=1.0)
    loss, calls = Fine.threads(model), []

    def closure():
        calls.append(1)
        return loss()

    counts = []
    for _ in range(3):
        calls.clear()
        optimizer.step(closure)
        counts.append(len(calls) - optimizer.report.trials)
    assert counts == [2, 1, 1]


def test_a_graph_may_be_gone_through_twice(make):
    model = network()
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        outputs = model(X)
        loss = F.cross_entropy(outputs, targets(X))
        loss.backward(retain_graph=True)
        penalty = 0.1 * outputs.square().mean()
        penalty.backward()
        return loss + penalty

    for _ in range(2):
        optimizer.step(closure)
    assert optimizer.report.accepted


class Drawn:
    """Ways to draw another batch, or another number, in each run of the closure."""

    @staticmethod
    def an_iterator():
        batches = itertools.cycle(ALL.split(16))
        return lambda: next(batches)

    @staticmethod
    def numpy():
        generator = np.random.default_rng(0)
        return lambda: ALL[generator.integers(0, 64, 16)]

    @staticmethod
    def python():
        random.seed(0)
        return lambda: ALL[random.sample(range(64), 16)]

    @staticmethod
    def a_counter():
        calls = itertools.count()
        return lambda: X * (1 + 0.1 * next(calls))


@pytest.mark.parametrize("kind", [name for name in vars(Drawn) if not name.startswith("_")])
def test_another_function_in_each_run_is_warned_of_once(make, kind):
    model = network()
    optimizer = make(model.parameters(), lr=0.1)
    draw = getattr(Drawn, kind)()

    def loss():
        x = draw()
        return F.cross_entropy(model(x), targets(x))

    with pytest.warns(UserWarning, match=OTHER) as caught:
        optimizer.step(closure_of(optimizer, loss))
    assert [warning.filename for warning in caught] == [__file__]
    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))


def test_a_warning_that_is_an_error_leaves_everything_as_it_was(make):
    model = network()
    optimizer = make(model.parameters())
    draw, before = Drawn.a_counter(), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserWarning, match=OTHER):
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(draw()), targets(X))))
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("left", [1, 2])
def test_an_exhausted_iterator_says_what_to_do(make, left):
    """In the repeated run, or in a trial; in the first run it is the end of the user's data."""
    model = network()
    optimizer = make(model.parameters())
    batches = iter([X] * left)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match="iterator that it draws from is exhausted; draw the batch outside"
    ):
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(next(batches)), targets(X))))
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(StopIteration):
        optimizer.step(closure_of(optimizer, lambda: F.cross_entropy(model(next(batches)), targets(X))))


def test_the_repeated_run_is_one_and_is_counted():
    x = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer, calls = optim.Newton([x], radius=1.0, max_extension=1.0), []

    def closure():
        calls.append(1)
        return x.square().sum() + x.pow(4).sum()

    costs = []
    for _ in range(2):
        optimizer.step(closure)
        costs.append(optimizer.report.gradient_equivalents)
    # A gradient and its graph, three products, and a third for each evaluation without a gradient.
    assert costs == pytest.approx([2 + 3 * 2 + 2 / 3, 2 + 3 * 2 + 1 / 3])
    assert len(calls) == 3 + 2


class Deterministic:
    """Layers whose runs differ, unless a step makes them the same; with the dtype of their parameters."""

    @staticmethod
    def dropout():
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double(), None

    @staticmethod
    def batch_norm():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double(), None

    @staticmethod
    def power_iteration():
        layers = [spectral_norm(nn.Linear(4, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 3))]
        return nn.Sequential(*layers).double(), None

    @staticmethod
    def half_precision():
        return network().float(), torch.bfloat16

    @staticmethod
    def half_parameters():
        return network().bfloat16(), None

    @staticmethod
    def a_generator():
        generator = torch.Generator().manual_seed(0)

        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x + torch.randn(x.shape, generator=generator, dtype=x.dtype))

        return nn.Sequential(Noisy(4, 3)).double(), None


@pytest.mark.parametrize("kind", [name for name in vars(Deterministic) if not name.startswith("_")])
def test_what_is_the_same_function_is_not_warned_of(make, kind):
    torch.manual_seed(0)
    model, dtype = getattr(Deterministic, kind)()
    optimizer = make(model.parameters())
    x = X.to(next(model.parameters()).dtype)
    calls, closure = [], None

    def loss():
        calls.append(1)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return F.cross_entropy(model(x), targets(x))

    closure = closure_of(optimizer, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    # The repeated run took place.
    assert len(calls) >= 3


@pytest.mark.parametrize("watched", [False, True])
def test_no_warning_points_at_our_lines(watched, recwarn):
    """Of a number taken from a loss torch warns at the line that calls it: that would be one of ours."""
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
    optimizer = optim.GaussNewton(model.parameters(), model=model if watched else None)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        assert float(loss) == complex(loss).real == loss.item()
        return loss

    if watched:
        closure()
        optimizer.step()
    else:
        optimizer.step(closure)
    assert optimizer.report.accepted
    ours = str(Path(optim.__file__).parent.parent)
    assert not [w for w in recwarn if w.filename.startswith((ours + "/optim", ours + "/secondorder"))]


def test_higher_order_operators_are_named(make):
    p = torch.ones(2, requires_grad=True)
    optimizer = make([p])

    def closure():
        return torch.cond(p.sum() > 0, lambda q: q.sin().sum(), lambda q: q.cos().sum(), (p,))

    with pytest.raises(RuntimeError, match=r"torch\.cond and torch's other higher-order operators"):
        optimizer.step(closure)
    assert torch.equal(p.detach(), torch.ones(2))
