import pytest
import torch
import torch.nn.functional as F
import zoo

from secondorder.functional import check_derivatives, module_function


class Cube(torch.autograd.Function):
    """Its gradient is right for a factor of 3; its second derivative never, for backward hides an ``x``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ctx.factor * x * x.detach(), None


def test_right_derivatives_pass(problem, network_case):
    check_derivatives(problem.func, problem.x0())
    function, parameters = module_function(
        network_case.model, network_case.loss, network_case.inputs, network_case.targets
    )
    check_derivatives(function, parameters)


def test_the_wrong_operation_is_named():
    x = zoo.vector(12, 1).view(4, 3)

    def normed(v):
        return (torch._weight_norm(v.tanh(), torch.ones(4, 1, dtype=v.dtype), 0).exp()).sum()

    with pytest.raises(RuntimeError, match=r"order 2 is wrong \(.*\) in .*_weight_norm"):
        check_derivatives(normed, x)
    check_derivatives(normed, x, order=1)


def test_missing_derivatives_are_named():
    with pytest.raises(RuntimeError, match=r"order 2 is missing .*hardsigmoid.* in .*hardsigmoid"):
        check_derivatives(lambda x: F.hardsigmoid(x.sin()).exp().sum(), zoo.vector(5, 1))


def test_custom_functions_are_found():
    x = zoo.vector(4, 1)
    with pytest.raises(RuntimeError, match="order 1 is wrong"):
        check_derivatives(lambda x: Cube.apply(x, 2), x)
    check_derivatives(lambda x: Cube.apply(x, 3), x, order=1)
    with pytest.raises(RuntimeError, match="order 2 is wrong"):
        check_derivatives(lambda x: Cube.apply(x, 3), x)


def test_in_place_operations_and_tuples():
    def func(x, y):
        z = x.clone()
        z.mul_(y).sin_()
        return z, (z * y).sum()

    check_derivatives(func, (zoo.vector(3, 1), zoo.vector(3, 2)))


def test_bad_input():
    with pytest.raises(ValueError, match="float64 for finite differences, got torch.float32"):
        check_derivatives(lambda x: x.sum(), torch.ones(2))
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        check_derivatives(lambda x: x.sum(), torch.ones(2).double(), order=3)


class WrongOfComplex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.complex(x, x)

    @staticmethod
    def backward(ctx, g):
        return g.real * 7


class WrongAndSmall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 1e-10 * x

    @staticmethod
    def backward(ctx, g):
        return -7e-10 * g


@pytest.mark.parametrize("function", [WrongOfComplex, WrongAndSmall])
def test_complex_and_small_outputs_are_checked(function):
    with pytest.raises(RuntimeError, match="derivative of order 1 is wrong"):
        check_derivatives(function.apply, torch.rand(3, dtype=torch.float64) + 1)


def test_running_statistics_do_not_move():
    norm = torch.nn.BatchNorm1d(3).double()
    check_derivatives(lambda x: norm(x).sum(), torch.randn(4, 3, dtype=torch.float64))
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
