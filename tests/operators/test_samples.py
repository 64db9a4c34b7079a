"""The Gauss-Newton matrix of some samples against dense matrices of these samples, in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secondorder import Block, GaussNewton
from secondorder.operators.samples import (
    SampledGaussNewton,
    block_matrices,
    by_all,
    by_matrices,
)

TOLERANCE = dict(rtol=1e-12, atol=1e-14)
N, ROWS = 9, torch.tensor([1, 4, 5, 8])
WEIGHTS = torch.tensor([2.0, 0.5, 3.0, 1.0], dtype=torch.float64)


def network(outputs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    return net, torch.randn(N, 4, dtype=torch.float64)


def of_classes(z):
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return F.cross_entropy(z, torch.arange(N) % 3, weight=weight, ignore_index=2)


LOSSES = {
    "cross_entropy": (3, of_classes),
    "mse": (3, lambda z: F.mse_loss(z, torch.ones_like(z))),
    "sum": (1, lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z), reduction="sum")),
    "by_hand": (2, lambda z: (1 - z).square().sum(1).sqrt().mean()),
    "flattened": (6, lambda z: F.cross_entropy(z.reshape(-1, 3), torch.arange(2 * N) % 3)),
    "squashed": (3, lambda z: F.mse_loss(torch.sigmoid(z), torch.zeros_like(z))),
}


def dense(net, x, loss):
    """``sum_i w_i J_i^T M_ii J_i`` by rows of Jacobians and the dense Hessian of the loss."""
    names, parameters = zip(*net.named_parameters(), strict=True)

    def outputs(*values):
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    jacobians = torch.autograd.functional.jacobian(outputs, parameters)
    J = torch.cat([j.reshape(N, -1, p.numel()) for j, p in zip(jacobians, parameters, strict=True)], 2)
    M = torch.autograd.functional.hessian(loss, net(x).detach())
    total = 0
    for row, weight in zip(ROWS, WEIGHTS, strict=True):
        E = J.shape[1]
        total = total + weight * J[row].T @ M[row, :, row].reshape(E, E) @ J[row]
    return total


@pytest.mark.parametrize("way", ["matrices", "all"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "squashed"])
def test_equals_the_dense_matrix_of_its_samples(name, way):
    outputs, loss = LOSSES[name]
    net, x = network(outputs)
    z = net(x)
    value = loss(z)
    whole = GaussNewton.of_blocks([Block(value, (z,), torch.ones_like(value))], [z])
    middle = by_matrices(block_matrices(whole)[ROWS]) if way == "matrices" else by_all(whole, ROWS)
    sampled = SampledGaussNewton(middle, [net(x[ROWS])], WEIGHTS, net.parameters())
    expected = dense(net, x, loss)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(sampled.dense(), expected, **TOLERANCE)
    v = torch.randn(expected.shape[1], dtype=torch.float64)
    torch.testing.assert_close(sampled @ v, expected @ v, **TOLERANCE)
    some = sampled.restrict([2])
    torch.testing.assert_close(
        some.dense(), expected[25 : 25 + 5 * outputs, 25 : 25 + 5 * outputs], **TOLERANCE
    )


@pytest.mark.parametrize("name", LOSSES)
def test_of_all_samples_it_is_the_matrix_itself(name):
    """Also where the loss is one of what is made of the outputs, as of probabilities."""
    outputs, loss = LOSSES[name]
    net, x = network(outputs)
    z = net(x)
    end = torch.sigmoid(z) if name == "squashed" else z
    value = F.mse_loss(end, torch.zeros_like(end)) if name == "squashed" else loss(end)
    block = Block(value, (end,), torch.ones_like(value))
    whole = GaussNewton.of_blocks([block], [z])
    expected = GaussNewton.of_blocks([block], list(net.parameters())).dense()
    every, ones = torch.arange(N), torch.ones(N, dtype=torch.float64)
    for middle in (by_all(whole, every), by_matrices(block_matrices(whole))):
        sampled = SampledGaussNewton(middle, [net(x)], ones, net.parameters())
        torch.testing.assert_close(sampled.dense(), expected, **TOLERANCE)


def test_several_outputs_of_other_shapes():
    torch.manual_seed(0)
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x, rows = torch.randn(N, 4, dtype=torch.float64), ROWS

    def outputs(x):
        return (x @ w)[:, 0], (x @ w)[:, 1:5].reshape(-1, 2, 2)

    def loss(a, b):
        return (a.square() * b.square().sum((1, 2))).sum() + a.square().sum()

    first, second = outputs(x)
    value = loss(first, second)
    whole = GaussNewton.of_blocks([Block(value, (first, second), torch.ones_like(value))], [first, second])
    (a, b), ones = outputs(x[rows]), torch.ones(len(rows), dtype=torch.float64)
    own = loss(a, b)
    expected = GaussNewton(own, (a, b), [w]).dense()
    for middle in (by_all(whole, rows), by_matrices(block_matrices(whole)[rows])):
        sampled = SampledGaussNewton(middle, [a, b], ones, [w])
        torch.testing.assert_close(sampled.dense(), expected, **TOLERANCE)
