"""Curvature operators against dense float64 matrices."""

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo

from secondorder import Block, GaussNewton, Hessian
from secondorder.flat import flatten

# The same arithmetic in another order.
TOLERANCE = dict(rtol=1e-10, atol=1e-12)


def parameters_of(case):
    return list(case.model.parameters())


def hessian_of(case):
    return Hessian(case.value(), parameters_of(case))


def gauss_newton_of(case):
    outputs = case.outputs()
    return GaussNewton(case.loss(outputs, case.targets), outputs, parameters_of(case))


def test_hessian_equals_dense(network_case):
    operator = hessian_of(network_case)
    dense = oracles.dense_hessian(network_case.loss_of, parameters_of(network_case))
    torch.testing.assert_close(operator.dense(), dense, **TOLERANCE)
    v = zoo.vector(len(dense), 1)
    torch.testing.assert_close(operator @ v, dense @ v, **TOLERANCE)
    gradient = torch.autograd.grad(network_case.value(), parameters_of(network_case))
    torch.testing.assert_close(operator.gradient, flatten(gradient), **TOLERANCE)


def test_gauss_newton_equals_dense(network_case):
    operator = gauss_newton_of(network_case)
    dense = oracles.dense_gauss_newton(network_case)
    torch.testing.assert_close(operator.dense(), dense, **TOLERANCE)
    v = zoo.vector(len(dense), 1)
    torch.testing.assert_close(operator @ v, dense @ v, **TOLERANCE)
    assert torch.linalg.eigvalsh(operator.dense())[0] > -1e-12


@pytest.mark.parametrize("make", [hessian_of, gauss_newton_of])
def test_symmetric_and_linear_and_repeatable(network_case, make):
    operator = make(network_case)
    u, v = zoo.vector(operator.shape[0], 1), zoo.vector(operator.shape[0], 2)
    torch.testing.assert_close(u @ (operator @ v), v @ (operator @ u), **TOLERANCE)
    torch.testing.assert_close(operator @ (2 * u - v), 2 * (operator @ u) - operator @ v, **TOLERANCE)
    assert torch.equal(operator @ u, operator @ u)


@pytest.mark.parametrize("make", [hessian_of, gauss_newton_of])
def test_no_graph_and_no_grad_is_left_behind(network_case, make):
    product = make(network_case) @ zoo.vector(sum(p.numel() for p in parameters_of(network_case)), 1)
    assert not product.requires_grad
    assert all(p.grad is None for p in parameters_of(network_case))


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    model, x = torch.nn.Linear(3, 2).double(), torch.randn(7, 3, dtype=torch.float64)
    outputs = model(x)
    loss = F.cross_entropy(outputs, torch.tensor([0, 1, 1, 0, 1, 0, 0]))
    parameters = list(model.parameters())
    torch.testing.assert_close(
        GaussNewton(loss, outputs, parameters).dense(), Hessian(loss, parameters).dense(), **TOLERANCE
    )


def test_several_outputs_that_a_loss_couples():
    w = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    a, b = w[0].exp(), w.square().sum()
    loss = (a * b - 1) ** 2
    outputs = torch.stack([a, b]).detach()
    H = torch.autograd.functional.hessian(lambda z: (z[0] * z[1] - 1) ** 2, outputs)
    J = torch.autograd.functional.jacobian(lambda w: torch.stack([w[0].exp(), w.square().sum()]), w.detach())
    torch.testing.assert_close(GaussNewton(loss, (a, b), [w]).dense(), J.T @ H @ J, **TOLERANCE)


def test_weighted_blocks_add_up():
    case = zoo.network("mlp_mse")
    outputs = case.outputs()
    first, second = F.mse_loss(outputs, case.targets), F.huber_loss(outputs, case.targets)
    weights = torch.tensor([2.0, 0.5], dtype=torch.float64)
    blocks = [Block(first, (outputs,), weights[0]), Block(second, (outputs,), weights[1])]
    operator = GaussNewton.of_blocks(blocks, parameters_of(case))
    case = case._replace(loss=lambda z, t: 2 * F.mse_loss(z, t) + 0.5 * F.huber_loss(z, t))
    torch.testing.assert_close(operator.dense(), oracles.dense_gauss_newton(case), **TOLERANCE)


def test_parameters_without_influence_have_zero_blocks():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    linear = torch.ones(1, requires_grad=True)
    operator = Hessian(used.pow(3).sum() + linear.sum(), [unused, used, linear])
    expected = torch.diag(torch.tensor([0.0, 0, 0, 6, 6, 0]))
    torch.testing.assert_close(operator.dense(), expected)
    outputs = used.square()
    operator = GaussNewton(outputs.square().sum(), outputs, [unused, used])
    torch.testing.assert_close(operator.dense(), torch.diag(torch.tensor([0.0, 0, 0, 8, 8])))


def test_linear_loss_has_no_curvature():
    w = torch.ones(2, requires_grad=True)
    assert torch.equal(Hessian(w.sum(), [w]) @ torch.ones(2), torch.zeros(2))
    assert torch.equal(Hessian(w.sum(), [w]) @ torch.ones(2, 3), torch.zeros(2, 3))
    outputs = w.square()
    assert torch.equal(GaussNewton(outputs.sum(), outputs, [w]) @ torch.ones(2), torch.zeros(2))
    assert torch.equal(GaussNewton(outputs.sum(), outputs, [w]) @ torch.ones(2, 3), torch.zeros(2, 3))


def test_float32_is_close_to_float64(network_case):
    exact = hessian_of(network_case).dense()
    single = network_case._replace(
        model=network_case.model.float(),
        inputs=network_case.inputs.float(),
        targets=network_case.targets.float()
        if network_case.targets.is_floating_point()
        else network_case.targets,
    )
    torch.testing.assert_close(hessian_of(single).dense().double(), exact, rtol=1e-4, atol=1e-5)


def test_parameters_may_be_a_generator(network_case):
    operator = Hessian(network_case.value(), network_case.model.parameters())
    assert operator.gradient.shape == (operator.shape[0],)
    with pytest.raises(TypeError, match=r"parameters\[0\] must be a tensor, got str"):
        Hessian(network_case.value(), ["weight"])


def test_bad_input():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(2,\)"):
        Hessian(w * 2, [w])
    with pytest.raises(ValueError, match="loss must carry a graph"):
        Hessian(w.detach().sum(), [w])
    with pytest.raises(ValueError, match="at least one tensor"):
        Hessian(w.sum(), [])
    with pytest.raises(ValueError, match=r"parameters\[1\] must require gradients"):
        Hessian(w.sum(), [w, torch.ones(1)])
    with pytest.raises(ValueError, match="share dtype and device"):
        Hessian(w.sum(), [w, torch.ones(1, dtype=torch.float64, requires_grad=True)])
    with pytest.raises(ValueError, match="loss must depend on outputs"):
        GaussNewton(w.sum(), w * 2, [w])
    with pytest.raises(ValueError, match="loss and outputs must carry a graph"):
        GaussNewton(w.sum(), w.detach(), [w])
    with pytest.raises(ValueError, match="at least one loss"):
        GaussNewton.of_blocks([], [w])
