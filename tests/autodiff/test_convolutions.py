"""The lighter second backward pass of convolutions, against dense matrices, and what it saves."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import oracles
import pytest
import torch
import torch.nn.functional as F
from memory import PeakMemory
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secondorder import GaussNewton, Hessian, Jacobian
from secondorder.autodiff import convolutions
from secondorder.autodiff.graph import nodes
from secondorder.functional import hvp, linearize, linearize_grad, vhp
from secondorder.vectors.flat import unflatten

DOUBLE = torch.float64
TOLERANCE = dict(rtol=1e-11, atol=1e-12)

LAYERS = {
    "conv1d": (lambda **k: nn.Conv1d(2, 3, 3, **k), (2, 5)),
    "conv2d_strided": (lambda **k: nn.Conv2d(2, 3, 2, stride=2, padding=1, **k), (2, 4, 3)),
    "conv2d_dilated": (lambda **k: nn.Conv2d(2, 3, 2, dilation=2, **k), (2, 4, 4)),
    "conv2d_groups": (lambda **k: nn.Conv2d(4, 4, 2, groups=2, **k), (4, 3, 3)),
    "conv2d_depthwise": (lambda **k: nn.Conv2d(3, 3, 2, groups=3, **k), (3, 3, 3)),
    "conv2d_same": (lambda **k: nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular", **k), (2, 3, 3)),
    "conv3d": (lambda **k: nn.Conv3d(1, 2, 2, **k), (1, 3, 3, 2)),
    "transposed": (lambda **k: nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1, **k), (2, 2, 2)),
}


def two_layers(name, bias):
    """Convolution, tanh, the same again over it, and a linear map to three outputs."""
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=DOUBLE)
    first = build(bias=bias).to(DOUBLE)
    channels = first(x).shape[1]
    second = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 2](channels, 2, 1, bias=bias).to(DOUBLE)
    body = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten())
    model = nn.Sequential(*body, nn.Linear(body(x).shape[1], 3, dtype=DOUBLE))
    return model, x, torch.tensor([0, 2, 1])


@pytest.fixture(params=LAYERS)
def layers(request):
    return request.param


def functions(model, x, targets):
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def outputs_of(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    return outputs_of, lambda *values: F.cross_entropy(outputs_of(*values), targets)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, "first", "weight", "input"])
def test_products_equal_the_dense_matrices(layers, bias, frozen, batched):
    model, x, targets = two_layers(layers, bias)
    if frozen == "first":
        model[0].requires_grad_(False)
    elif frozen == "weight":
        model[2].weight.requires_grad_(False)
    elif frozen == "input":
        x.requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs_of, loss_of = functions(model, x, targets)
    outputs = model(x)
    loss = F.cross_entropy(outputs, targets)
    H, J = Hessian(loss, parameters, batched=batched), Jacobian(outputs, parameters, batched=batched)
    torch.testing.assert_close(H.dense(), oracles.dense_hessian(loss_of, parameters), **TOLERANCE)
    torch.testing.assert_close(J.dense(), oracles.dense_jacobian(outputs_of, parameters), **TOLERANCE)


@pytest.mark.parametrize("bias", [True, False])
def test_functional_products_equal_torchs(layers, bias):
    model, x, targets = two_layers(layers, bias)
    outputs_of, loss_of = functions(model, x, targets)
    values = tuple(p.detach() for p in model.parameters())
    v = tuple(torch.randn_like(p) for p in values)
    expected = torch.autograd.functional.hvp(loss_of, values, v)[1]
    for product in (
        hvp(loss_of, values, v)[1],
        vhp(loss_of, values, v)[1],
        linearize_grad(loss_of, values)[2](v),
    ):
        torch.testing.assert_close(product, expected, **TOLERANCE)
    torch.testing.assert_close(
        linearize(outputs_of, values)[1](v),
        torch.autograd.functional.jvp(outputs_of, values, v)[1],
        **TOLERANCE,
    )


@pytest.mark.parametrize("bias", [True, False])
def test_third_derivatives_pass_through(bias):
    model, x, targets = two_layers("conv2d_strided", bias)
    _, loss_of = functions(model, x, targets)
    values = tuple(p.detach().requires_grad_() for p in model.parameters())
    v = tuple(torch.randn_like(p) for p in values)

    def curvature(module):
        product = module.hvp(loss_of, values, v, create_graph=True)[1]
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(product, v, strict=True)), values)

    import secondorder.functional as ours

    torch.testing.assert_close(curvature(ours), curvature(torch.autograd.functional), **TOLERANCE)


def test_the_graph_of_the_user_keeps_its_hooks_and_its_life():
    model, x, targets = two_layers("conv2d_strided", True)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), targets)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    penalised = loss + sum(g.square().sum() for g in grads)
    before = torch.autograd.grad(penalised, parameters, retain_graph=True)
    H = Hessian(penalised, parameters)
    torch.testing.assert_close(flat(H.gradient, parameters), before, **TOLERANCE)
    after = torch.autograd.grad(penalised, parameters, retain_graph=True)
    assert all(map(torch.equal, before, after))
    node = weakref.ref(H._kept.outputs[0])
    del H
    gc.collect()
    assert node() is None


def flat(vector, parameters):
    return tuple(unflatten(vector, parameters))


def test_a_parameter_changed_in_place_is_still_noticed():
    model, x, targets = two_layers("conv2d_strided", True)
    parameters = list(model.parameters())
    H = Hessian(F.cross_entropy(model(x), targets), parameters)
    with torch.no_grad():
        parameters[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        H @ torch.ones(H.shape[0], dtype=DOUBLE)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_products_compute_what_they_need():
    """In floating point operations: exact, and the same on every machine."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    x, targets = torch.randn(4, 3, 10, 10), torch.tensor([0, 1, 2, 3])
    outputs = model(x)
    parameters = list(model.parameters())
    loss = F.cross_entropy(outputs, targets)
    gradient = flops(lambda: torch.autograd.grad(F.cross_entropy(model(x), targets), parameters))
    H, G = Hessian(loss, parameters), GaussNewton(loss, outputs, parameters)
    v = torch.ones(H.shape[0])
    # A forward pass is one unit a layer, a backward pass two; J v is two, J^T u two, H v four.
    assert flops(lambda: G @ v) <= 4 / 3 * gradient
    assert flops(lambda: H @ v) <= 2 * gradient


def test_a_pass_to_other_tensors_leaves_nothing_behind():
    """A pass that asks a node for its other results must not add to the next one."""
    x = torch.randn(2, 2, 5, 5, dtype=DOUBLE)
    W, b, A = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((3, 2, 3, 3), (3,), (2, 3, 3, 3)))
    H = Hessian((F.conv2d(x, W, b) * A).sum(), [W, b, A])
    first, second = H.restrict([0, 1]), H.restrict([0, 2])
    ones = torch.ones(second.shape[0], dtype=DOUBLE)
    before = second @ ones
    first @ torch.ones(first.shape[0], dtype=DOUBLE)
    assert torch.equal(second @ ones, before)
    grads = hvp(
        lambda W, b: (F.conv2d(x, W, b) * A).sum(), (W, b), (W, b), create_graph=True, return_grad=True
    )[2]
    got = torch.autograd.grad(grads[0].square().sum(), A)[0]
    plain = torch.autograd.grad((F.conv2d(x, W, b) * A).sum(), W, create_graph=True)[0]
    torch.testing.assert_close(got, torch.autograd.grad(plain.square().sum(), A)[0], **TOLERANCE)


def test_threads_do_not_mix_their_vectors():
    x = torch.randn(2, 2, 6, 6)
    point = (torch.randn(3, 2, 3, 3), torch.randn(3))
    push = linearize(lambda W, b: F.conv2d(x, W, b).tanh(), point)[1]
    vectors = [tuple(torch.randn_like(t) for t in point) for _ in range(4)]
    expected = [push(v) for v in vectors]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as executor:
            results = list(
                executor.map(lambda i: torch.allclose(push(vectors[i % 4]), expected[i % 4]), range(2000))
            )
    finally:
        sys.setswitchinterval(interval)
    assert all(results)


class Quantised(torch.autograd.Function):
    """Straight through a rounding: its backward calls the convolution's on an input without a graph."""

    @staticmethod
    def forward(ctx, x, w, b):
        rounded = (x * 8).round() / 8
        ctx.save_for_backward(rounded, w)
        return F.conv2d(rounded, w, b)

    @staticmethod
    def backward(ctx, g):
        rounded, w = ctx.saved_tensors
        options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3)
        return torch.ops.aten.convolution_backward(g, rounded, w, [w.shape[0]], *options)


class Upwards(torch.autograd.Function):
    """A transposed convolution whose backward has the cotangent where the convolution's has its input."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv_transpose2d(x, w)

    @staticmethod
    def backward(ctx, u):
        x, w = ctx.saved_tensors
        options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3)
        _, gw, gb = torch.ops.aten.convolution_backward(x, u, w, [w.shape[0]], *options)
        return F.conv2d(u, w), gw + 0 * gb[:, None, None, None]


def test_custom_functions_that_call_the_backward_of_a_convolution():
    x = torch.randn(2, 2, 4, 4, dtype=DOUBLE)
    point = tuple(torch.randn(*s, dtype=DOUBLE) for s in ((2, 2, 1, 1), (3, 2, 3, 3), (3,)))
    v = tuple(map(torch.randn_like, point))

    def func(inner, w, b):
        return Quantised.apply(F.conv2d(x, inner).tanh(), w, b).square().sum()

    expected = torch.autograd.functional.vhp(func, point, v)[1]
    got = hvp(func, point, v, strategy="reverse-over-reverse")[1]
    torch.testing.assert_close(got, expected, **TOLERANCE)
    point = (torch.randn(2, 3, 4, 4, dtype=DOUBLE), torch.randn(3, 2, 3, 3, dtype=DOUBLE))
    v = tuple(map(torch.randn_like, point))
    torch.testing.assert_close(
        linearize(Upwards.apply, point)[1](v),
        torch.autograd.functional.jvp(Upwards.apply, point, v)[1],
        **TOLERANCE,
    )


def test_hooks_stay_off_the_graph_of_the_user():
    x = torch.randn(2, 2, 5, 5, dtype=DOUBLE)
    W, b = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((3, 2, 3, 3), (3,)))
    user = torch.autograd.grad(F.conv2d(x, W, b).pow(3).sum(), (W, b), create_graph=True)
    loss = user[0].square().sum() + F.conv2d(x, W, b).pow(2).sum()
    gradient = torch.autograd.grad(loss, (W, b), create_graph=True)
    hooked = convolutions._own_nodes(gradient, (loss,))[0]
    assert hooked
    assert not set(hooked) & set(nodes((loss,)))


def test_hooks_keep_nothing_alive():
    x = torch.randn(2, 2, 5, 5, dtype=DOUBLE)
    W, b = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((3, 2, 3, 3), (3,)))
    with PeakMemory() as memory:
        for operator in (Hessian, Jacobian):
            A = operator(
                F.conv2d(F.conv2d(x, W, b).tanh(), W[:, :1].repeat(1, 3, 1, 1), b).pow(2).sum(), [W, b]
            )
            A @ torch.ones(A.shape[1], dtype=DOUBLE)
            assert memory.live > 0
            del A
            gc.collect()
            assert memory.live == 0
