"""The lighter second backward pass of convolutions, against dense matrices, and what it saves."""

import gc
import weakref

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secondorder import GaussNewton, Hessian, Jacobian
from secondorder.flat import unflatten
from secondorder.functional import hvp, linearize, linearize_grad, vhp

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
    node = weakref.ref(H._grads[0])
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
