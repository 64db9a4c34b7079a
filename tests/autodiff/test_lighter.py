"""Gradients that nobody reads are not computed, and products are what they are with them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from secondorder import GaussNewton, Hessian, ggnvp
from secondorder.autodiff import compat
from secondorder.functional import hvp, jvp, vhp

DOUBLE = torch.float64
TOLERANCE = dict(rtol=1e-11, atol=1e-12)

WEIGHTS = {
    "linear": lambda x, W, U, b: F.linear(F.linear(x, W, b).tanh(), U, b).tanh(),
    "without_bias": lambda x, W, U, b: F.linear(F.linear(x, W).tanh(), U).tanh() + b,
    "of_more_dimensions": lambda x, W, U, b: F.linear(F.linear(x[None], W, b).tanh(), U)[0].sin(),
    "not_transposed": lambda x, W, U, b: torch.addmm(b, (x @ W + b).tanh(), U).sin(),
    "shared": lambda x, W, U, b: F.linear(F.linear(x, W, b).tanh(), W, b) @ U,
    "used_elsewhere": lambda x, W, U, b: F.linear(F.linear(x, W, b).tanh(), U, b) * W.square().sum(),
    "transpose_used_elsewhere": lambda x, W, U, b: (lambda V: F.linear(x, U, b).tanh() @ V * V.sum())(W.t()),
    "linear_in_it": lambda x, W, U, b: F.linear(x, W, b) + U.tanh(),
    "of_constants": lambda x, W, U, b: F.linear(x, W) * U.sin() + F.linear(F.linear(x.sin(), U), W.cos(), b),
    "frozen_in_front": lambda x, W, U, b: F.linear(F.linear(x, W.detach()), U, b).sin() * W,
}


@pytest.fixture(params=WEIGHTS)
def func(request):
    torch.manual_seed(0)
    x = torch.randn(3, 3, dtype=DOUBLE)
    return lambda *weights: WEIGHTS[request.param](x, *weights)


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return tuple(torch.randn(*shape, dtype=DOUBLE) for shape in ((3, 3), (3, 3), (3,)))


def test_products_equal_torchs(func, weights):
    v = tuple(map(torch.randn_like, weights))

    def loss(*weights):
        return func(*weights).pow(3).sum()

    value, expected = torch.autograd.functional.vhp(loss, weights, v)
    for product in (hvp, vhp):
        found = product(loss, weights, v)
        torch.testing.assert_close(found, (value, expected), **TOLERANCE)
        gradient = product(loss, weights, v, return_grad=True)[2]
        torch.testing.assert_close(gradient, torch.func.grad(loss, (0, 1, 2))(*weights), **TOLERANCE)
    right = hvp(loss, weights, v, strategy="double-backward")[1]
    torch.testing.assert_close(right, expected, **TOLERANCE)
    expected = torch.autograd.functional.jvp(func, weights, v)
    torch.testing.assert_close(jvp(func, weights, v), expected, **TOLERANCE)


def test_operators_without_a_kept_graph(func, weights):
    parameters = [w.clone().requires_grad_() for w in weights]
    outputs = func(*parameters)
    loss = outputs.pow(4).sum()
    V = torch.randn(21, 5, dtype=DOUBLE)
    for make in (
        lambda **k: Hessian(loss, parameters, **k),
        lambda **k: GaussNewton(loss, outputs, parameters, **k),
    ):
        kept, fresh = make(), make(keep_graph=False)
        for _ in range(2):
            torch.testing.assert_close(fresh @ V, kept @ V, **TOLERANCE)
        torch.testing.assert_close(fresh.restrict([1, 2]) @ V[9:], kept.restrict([1, 2]) @ V[9:], **TOLERANCE)


def test_a_weight_that_is_returned(weights):
    x = torch.randn(3, 3, dtype=DOUBLE)
    v = tuple(map(torch.randn_like, weights))

    def func(W, U, b):
        return F.linear(F.linear(x, W, b).sin(), U, b), W, U.t()

    torch.testing.assert_close(
        jvp(func, weights, v), torch.autograd.functional.jvp(func, weights, v), **TOLERANCE
    )


def test_the_hook_of_a_user_on_a_weight_is_heard(weights):
    W, U, b = (w.clone().requires_grad_() for w in weights)
    x = torch.randn(3, 3, dtype=DOUBLE)
    W.register_hook(lambda gradient: 2 * gradient)
    loss = F.linear(F.linear(x, W, b).tanh(), U, b).pow(3).sum()
    kept, fresh = Hessian(loss, [W, U, b]), Hessian(loss, [W, U, b], keep_graph=False)
    v = torch.randn(21, dtype=DOUBLE)
    torch.testing.assert_close(fresh @ v, kept @ v, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_pass_is_made_in_vain(weights, dtype, monkeypatch):
    """In half precision nodes are torch's own: that is known before."""
    x, *values = (w.to(dtype) for w in (weights[0], *weights))
    passes, run = [], compat._run_backward
    monkeypatch.setattr(compat, "_run_backward", lambda *a, **k: passes.append(1) or run(*a, **k))

    def loss(W, U, b):
        return F.linear(F.linear(x, W, b).tanh(), U, b).float().square().sum()

    product = hvp(loss, tuple(values), tuple(values))[1]
    assert len(passes) == 1
    expected = torch.autograd.functional.vhp(loss, tuple(values), tuple(values))[1]
    # Of half precision eight bits, of sums of some dozen terms.
    tolerance = dict(rtol=0.05, atol=0.5) if dtype is torch.bfloat16 else dict(rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(product, expected, **tolerance)


def in_place(_, a, b, **__):
    """The counter does not know the product that is added in place."""
    return 2 * a[0] * a[1] * b[1]


def flops(function):
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        function()
    return counter.get_total_flops()


def test_products_compute_what_they_need():
    """In floating point operations: exact, and the same on every machine."""
    x, targets = torch.randn(50, 20), torch.randint(7, (50,))
    values = tuple(torch.randn(*shape) for shape in ((30, 20), (30,), (40, 30), (40,), (7, 40), (7,)))
    v = tuple(map(torch.randn_like, values))

    def outputs_of(W, b, V, c, U, d):
        return F.linear(F.linear(F.linear(x, W, b).tanh(), V, c).tanh(), U, d)

    def loss(outputs):
        return F.cross_entropy(outputs, targets)

    def loss_of(*values):
        return loss(outputs_of(*values))

    first, rest = (sum(2 * 50 * w.numel() for w in weights) for weights in (values[:1], values[2::2]))
    # A product of matrices a layer forward, one back to its input, six of H v; none to the data.
    assert flops(lambda: hvp(loss_of, values, v)) == 3 * first + 8 * rest
    # The gradient is one more a layer.
    assert flops(lambda: hvp(loss_of, values, v, return_grad=True)) == 4 * first + 9 * rest
    # Forward, back to the input, and J v: one for the weight, one for the input.
    assert flops(lambda: jvp(outputs_of, values, v)) == 2 * first + 4 * rest
    # And a backward pass.
    assert flops(lambda: ggnvp(outputs_of, loss, values, v)) == 3 * first + 6 * rest
