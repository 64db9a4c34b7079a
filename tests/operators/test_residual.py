"""The Jacobian of residuals against dense matrices."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secondorder import Block, GaussNewton
from secondorder.operators.residual import ResidualJacobian

# Of float64, times the size of a few products.
TIGHT = 1e-12


def network(outputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).to(dtype)


def x(n=7, dtype=torch.float64):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def images(outputs):
    return outputs.reshape(-1, 3, 2, 2)


LOSSES = {
    "mse": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "squares": lambda z: (z - 2).square().sum(),
    "cross_entropy": lambda z: F.cross_entropy(z, torch.arange(len(z)) % z.shape[1]),
    "weighted cross_entropy": lambda z: F.cross_entropy(
        z, torch.arange(len(z)) % 3, weight=torch.tensor([1.0, 2.0, 0.5]).to(z), label_smoothing=0.1
    ),
    "bce": lambda z: F.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.3), reduction="sum"),
    "huber": lambda z: F.huber_loss(z, torch.ones_like(z), delta=0.7),
    "poisson": lambda z: F.poisson_nll_loss(z, torch.ones_like(z)),
}


def made(loss, net, inputs, shape=lambda z: z):
    outputs = shape(net(inputs))
    value = loss(outputs)
    operator = GaussNewton.of_blocks([Block(value, (outputs,), torch.ones_like(value))], net.parameters())
    return value, operator, ResidualJacobian.of(operator)


def gradient_of(value, net):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, [*net.parameters()], retain_graph=True)]
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [2, 40])
def test_its_gram_matrix_is_the_gauss_newton_matrix(name, n):
    net = network()
    value, operator, A = made(LOSSES[name], net, x(n))
    dense = A.dense()
    matrix = operator.dense()
    torch.testing.assert_close(dense.T @ dense, matrix, rtol=TIGHT, atol=TIGHT * float(matrix.abs().max()))
    gradient = -dense.T @ A.target
    if A.rest is not None:
        gradient = gradient - A.jacobian.T @ A.rest
    torch.testing.assert_close(gradient, gradient_of(value, net), rtol=1e-9, atol=TIGHT)
    v, u = torch.randn(A.shape[1]).double(), torch.randn(A.shape[0]).double()
    torch.testing.assert_close(A @ v, dense @ v)
    torch.testing.assert_close(A.T @ u, dense.T @ u)
    torch.testing.assert_close(A.gram(), dense @ dense.T)
    torch.testing.assert_close(A.scaled(v).dense(), dense * v)
    torch.testing.assert_close(A.scaled(v).T @ u, v * (dense.T @ u))


def test_only_losses_without_curvature_somewhere_leave_a_rest():
    net = network()
    assert made(LOSSES["huber"], net, x())[2].rest is not None
    for name in ("mse", "squares", "bce", "poisson"):
        assert made(LOSSES[name], net, x())[2].rest is None


def test_classes_in_the_middle():
    net = network(12)
    target = torch.arange(7 * 4).reshape(7, 2, 2) % 3
    _, operator, A = made(lambda z: F.cross_entropy(z, target), net, x(), images)
    dense, matrix = A.dense(), operator.dense()
    torch.testing.assert_close(dense.T @ dense, matrix, rtol=TIGHT, atol=TIGHT)


def test_several_losses_and_a_penalty():
    net = network()
    first, second = net(x(3)), net(x(5))
    weight = net[0].weight
    values = [first.square().mean(), F.cross_entropy(second, torch.tensor([0, 1, 2, 0, 1])), weight.square()]
    outputs = [first, second, weight]
    weights = [torch.tensor(3.0).double(), torch.tensor(0.5).double(), torch.full_like(weight, 0.1)]
    blocks = [Block(v, (z,), w) for v, z, w in zip(values, outputs, weights, strict=True)]
    operator = GaussNewton.of_blocks(blocks, net.parameters())
    A = ResidualJacobian.of(operator)
    objective = sum((w * v).sum() for v, w in zip(values, weights, strict=True))
    torch.testing.assert_close(A.T @ A.target, -gradient_of(objective, net), rtol=1e-9, atol=TIGHT)
    torch.testing.assert_close(A.dense().T @ A.dense(), operator.dense(), rtol=TIGHT, atol=TIGHT)
    assert A.shape == (3 * 3 + 5 * 3 + 20, 43)


def test_what_has_no_such_form():
    net = network()
    outputs = net(x())
    # The root of a sum couples everything; it is convex, and its one block is small enough.
    value = outputs.square().sum().sqrt()
    operator = GaussNewton(value, outputs, net.parameters())
    dense = ResidualJacobian.of(operator).dense()
    torch.testing.assert_close(dense.T @ dense, operator.dense(), rtol=1e-9, atol=TIGHT)
    # Not convex.
    assert ResidualJacobian.of(GaussNewton(outputs.sin().sum(), outputs, net.parameters())) is None
    # One loss of two tensors.
    pair = net(x(2)), net(x(3))
    value = pair[0].square().sum() * pair[1].square().sum()
    assert ResidualJacobian.of(GaussNewton(value, pair, net.parameters())) is None


def test_the_oracle_agrees():
    """The Jacobian of weighted residuals from torch, for squares."""
    net = network()
    A = made(LOSSES["mse"], net, x())[2]
    J = oracles.dense_jacobian(lambda *p: net_function(net, p, x()), list(net.parameters()))
    torch.testing.assert_close(A.dense(), J * (2 / 21) ** 0.5, rtol=TIGHT, atol=TIGHT)


def net_function(net, parameters, inputs):
    names = [name for name, _ in net.named_parameters()]
    return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), inputs)
