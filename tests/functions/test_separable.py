"""Closed Hessians of batches: sums of functions of what is linear in x, and what is none."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

import optim
from optim.functions.batched import newton, separable
from optim.functions.batched.evaluation import batch_of, graph_of, sample
from optim.functions.batched.separable import form_of

DOUBLE = torch.float64


def margins(w, X, y):
    return y * (X @ w.unsqueeze(2))[:, :, 0]


SEPARABLE = {
    "logistic, ridge": lambda w, X, y: (
        torch.nn.functional.softplus(-margins(w, X, y)).sum(1) + 0.05 * w.square().sum(1)
    ),
    "poisson": lambda w, X, y: (X @ w.unsqueeze(2)).exp().sum((1, 2)) - margins(w, X, y).sum(1),
    "huber": lambda w, X, y: torch.where(
        margins(w, X, y).abs() < 1, margins(w, X, y) ** 2, 2 * margins(w, X, y).abs() - 1
    ).sum(1),
    "a product of two functions of one entry": lambda w, X, y: (w * w.tanh()).sum(1) / 3 - w[:, 0],
    "quartic and quotient": lambda w, X, y: (
        w[:, 0] ** 4 + (1 + y[:, 0] ** 2) / w[:, 1].exp() + w[:, 2:].sum(1)
    ),
}
COUPLED = {
    "rosenbrock": lambda w, X, y: 100 * (w[:, 1] - w[:, 0] ** 2) ** 2 + (1 - w[:, 0]) ** 2,
    "product of two": lambda w, X, y: w[:, 0] * w[:, 1] + w[:, 2] ** 2,
    "function of a sum": lambda w, X, y: margins(w, X, y).exp().sum(1).log(),
    "two cuts in one term": lambda w, X, y: (margins(w, X, y).exp() * w[:, :1]).sum(1),
    "unknown operation": lambda w, X, y: torch.logsumexp(margins(w, X, y), 1),
}


def table(count=6):
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(count, 9, 4, generator=generator, dtype=DOUBLE)
    y = torch.sign(torch.randn(count, 9, generator=generator, dtype=DOUBLE))
    return torch.randn(count, 4, generator=generator, dtype=DOUBLE), X, y


@pytest.mark.parametrize("is_mapped", [False, True], ids=["batch", "mapped"])
@pytest.mark.parametrize("name", SEPARABLE)
def test_hessians_of_separable_sums_are_those_of_autograd(name, is_mapped):
    fun, (x, X, y) = SEPARABLE[name], table()

    def one(w, X, y):
        return fun(w[None], X[None], y[None])[0]

    whole = batch_of(one, x, (X, y), 0) if is_mapped else batch_of(fun, x, (X, y), None)
    found = newton.form_at(whole, *graph_of(whole, x))
    assert found is not None
    index, elsewhere = torch.tensor([4, 1]), x.flip(0) + 0.3
    cut_down = (found.kept(index), whole.at(index), elsewhere[index])
    for form, batch, at in ((found, whole, elsewhere), cut_down):
        g, H = form.derivatives(*graph_of(batch, at))
        for i in range(len(at)):
            data = [arg[i] for arg in batch.args]
            dense = torch.autograd.functional.hessian(lambda w, data=data: one(w, *data), at[i])
            torch.testing.assert_close(H[i], dense, rtol=1e-12, atol=1e-12)
            slope = torch.autograd.functional.jacobian(lambda w, data=data: one(w, *data), at[i])
            torch.testing.assert_close(g[i], slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", COUPLED)
def test_functions_that_are_no_separable_sums_are_refused(name):
    x, X, y = table()
    assert not newton.has_form(batch_of(COUPLED[name], x, (X, y), None), x)


class Exp(torch.autograd.Function):
    """Couples entries, under a name of an elementwise operation."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.cumsum(1) ** 2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (2 * g * x.cumsum(1)).flip(1).cumsum(1).flip(1)


def part_of_another(x):
    """A term that is a part of another and is added by itself too."""
    e = x.exp()
    return e.sum(1), (e * x).sum(1)


# Of these the first part is a separable sum, the second not, or not seen to be.
HIDDEN = {
    "a known name": lambda x: (x.cosh().sum(1), Exp.apply(x).sum(1)),
    "a reciprocal": lambda x: (x.cosh().sum(1), 1 / x.exp().sum(1)),
    "part of another": part_of_another,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_sample_cannot_show_is_refused_by_the_graph(name):
    """All the problems of the sample have a weight of zero where it matters."""

    def fun(x, weight):
        first, second = HIDDEN[name](x)
        return first + weight * second

    x = table(9)[0]
    weight = torch.ones(9, dtype=DOUBLE)
    weight[sample(x)] = 0.0
    assert not newton.has_form(batch_of(fun, x, (weight,), None), x)
    result = optim.minimize(fun, x, (weight,), batched=True, max_iter=3)
    alone = optim.minimize(fun, x[1:2], (weight[1:2],), batched=True, max_iter=3)
    torch.testing.assert_close(result.x[1:2], alone.x)


def test_deep_graphs_are_read_without_recursion():
    def fun(x):
        total = x[:, 0]
        for _ in range(500):
            total = total + 0.004 * x[:, 1]
        return total.cosh() + x.square().sum(1)

    result = optim.minimize(fun, table()[0], batched=True)
    assert bool(result.success.all())
    torch.testing.assert_close(result.x, torch.zeros_like(result.x), rtol=0.0, atol=1e-7)


def test_data_that_all_problems_share_are_not_repeated_beyond_the_room(monkeypatch):
    """The Jacobians of this form repeat the table for each problem."""
    x, X, _ = table(30)
    batch = batch_of(lambda w, X: (w @ X.T).exp().sum(1), x, (X[0],), None)
    assert newton.form_at(batch, *graph_of(batch, x)) is not None
    monkeypatch.setattr(separable, "ROOM", 2 * X[0].numel())
    assert newton.form_at(batch, *graph_of(batch, x)) is None


def test_a_cut_of_another_size_has_another_form():
    """The same operations, on as many columns as the values of x say."""

    def fun(x):
        few = 1 if bool((x.detach() < 5).all()) else 2
        return (2 * x[:, :few]).exp().sum(1) + (3 * x).cosh().sum(1)

    x = table()[0]
    batch = batch_of(fun, x, (), None)
    form = newton.form_at(batch, *graph_of(batch, x))
    assert form.derivatives(*graph_of(batch, x + 0.1)) is not None
    assert form.derivatives(*graph_of(batch, x + 9)) is None


def test_where_the_sample_may_not_be_moved_there_is_no_form():
    def fun(x):
        if bool((x.detach() > 1).any()):
            raise ValueError("x must be at most 1.")
        return (x.exp() - 2 * x).sum(1)

    x = torch.full((4, 2), 0.95, dtype=DOUBLE)
    assert not newton.has_form(batch_of(fun, x, (), None), x)
    assert bool(optim.minimize(fun, x, batched=True).success.all())


def test_another_graph_has_another_form():
    x, X, y = table()
    form = form_of(*graph_of(batch_of(SEPARABLE["poisson"], x, (X, y), None), x))
    other = batch_of(SEPARABLE["logistic, ridge"], x, (X, y), None)
    assert form.derivatives(*graph_of(other, x)) is None


def test_what_is_linear_only_in_pieces_is_found_out():
    """The same graph on both sides of a kink, with other numbers in it."""

    def fun(x):
        return ((1 + (x > 0)) * x).cosh().sum(1)

    x = torch.full((3, 2), -2.0, dtype=DOUBLE)
    batch = batch_of(fun, x, (), None)
    form = form_of(*graph_of(batch, x))
    assert form.derivatives(*graph_of(batch, x + 1)) is not None
    assert form.derivatives(*graph_of(batch, x + 3)) is None
    H = newton.derivatives(batch, x + 3, form)[2]
    torch.testing.assert_close(H, torch.diag_embed(4 * (2 * (x + 3)).cosh()))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_logistic_regressions_are_scipys(dtype):
    """By the closed form, with problems that leave early."""
    x, X, y = table(40)
    X[20:] *= 4
    x, X, y = (0 * x).to(dtype), X.to(dtype), y.to(dtype)
    fun = SEPARABLE["logistic, ridge"]
    with torch.no_grad():
        result = optim.minimize(fun, x, (X, y), batched=True)
    if dtype == DOUBLE:
        assert bool(result.success.all()), result.message
    for i in range(0, 40, 5):
        data, labels = X[i].double().numpy(), y[i].double().numpy()

        def value(w, data=data, labels=labels):
            return np.logaddexp(0, -labels * (data @ w)).sum() + 0.05 * (w @ w)

        theirs = optimize.minimize(value, np.zeros(4), method="BFGS", options={"gtol": 1e-7})
        rtol = 1e-5 if dtype == DOUBLE else 1e-3
        np.testing.assert_allclose(result.x[i].numpy(), theirs.x, rtol=rtol, atol=rtol)


ONE_BY_ONE = (
    *(torch.exp, torch.tanh, torch.sin, torch.cosh, torch.abs, torch.nn.functional.softplus),
    *(lambda t: t**2, lambda t: t**3, lambda t: 1 / (t * t + 2), lambda t: 3 - t / 2, lambda t: 2 / t.exp()),
)
OF_TWO = (torch.add, torch.sub, torch.mul, lambda t, other: t / (other**2 + 1))
# Linear, by pieces at least: products with data, choices, sums, parts.
OTHERS = (
    lambda t, X: (X[:, :, : t.shape[1]] @ t.unsqueeze(2))[:, :, 0],
    lambda t, X: torch.where(t > 0, t, X[:, 0, :1] * t),
    lambda t, X: t.sum(1, keepdim=True),
    lambda t, X: t[:, [0, -1]],
    lambda t, X: torch.cat([t[:, :1], t], 1),
)


def expression(draw, x, X, weight):
    """Values of a random graph of operations, of which the first is summed and the others are weighted."""
    pool = [x]
    for _ in range(draw.randint(2, 7)):
        t, other, kind = draw.choice(pool), draw.choice(pool), draw.random()
        if kind < 0.4:
            pool.append(draw.choice(ONE_BY_ONE)(t))
        elif kind < 0.7 and t.shape == other.shape:
            pool.append(draw.choice(OF_TWO)(t, other))
        elif t.shape[1] <= X.shape[2]:
            pool.append(draw.choice(OTHERS)(t, X))
    first, *more = draw.sample(pool[1:] or pool, min(len(pool[1:]) or 1, 3))
    return first.sum(1) + sum((weight * part).sum(1) for part in more)


@settings(max_examples=150)
@given(st.integers(0, 10**6))
def test_a_form_has_the_hessians_of_autograd_or_is_refused(seed):
    """The sample sees the first term only: what the other problems compute has to be read off the graph."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 * torch.randn(5, 3, generator=generator, dtype=DOUBLE)
    X, weight = torch.randn(5, 4, 3, generator=generator, dtype=DOUBLE), torch.ones(5, 1, dtype=DOUBLE)
    weight[sample(x)] = 0.0
    batch = batch_of(lambda *data: expression(random.Random(seed), *data), x, (X, weight), None)
    form = newton.form_at(batch, *graph_of(batch, x))
    for at in () if form is None else (x, x + 0.2, -x):
        closed = form.derivatives(*graph_of(batch, at))
        H = newton.derivatives(batch, at)[2]
        if closed is not None and bool(H.isfinite().all()):
            torch.testing.assert_close(closed[1], H, rtol=1e-9, atol=1e-9 * (1 + float(H.abs().max())))
