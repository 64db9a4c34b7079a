"""Gauss-Newton and Fisher products against dense float64 factors."""

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from secondorder import EmpiricalFisher, Fisher, fvp, ggnvp
from secondorder.functional import output_hessians

TOLERANCE = dict(rtol=1e-10, atol=1e-12)


def vector_like(tensors, seed=3):
    return tuple(zoo.vector(t.numel(), seed + i).view(t.shape) for i, t in enumerate(tensors))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def test_ggnvp_equals_dense(network_case):
    parameters = tuple(p.detach() for p in network_case.model.parameters())
    v = vector_like(parameters)
    expected = oracles.dense_gauss_newton(network_case) @ flat(v)
    for factor in (1, 2):
        value, product = ggnvp(
            network_case.outputs_of,
            lambda z, f=factor: f * network_case.loss(z, network_case.targets),
            parameters,
            v,
        )
        torch.testing.assert_close(flat(product), factor * expected, **TOLERANCE)
        torch.testing.assert_close(value, factor * network_case.value().detach())
        assert not any(p.requires_grad for p in product)


LOSSES = {
    "cross_entropy": (lambda z: F.cross_entropy(z, CLASSES), True),
    "cross_entropy_sum": (lambda z: F.cross_entropy(z, CLASSES, reduction="sum"), True),
    "ignore_index": (lambda z: F.cross_entropy(z, CLASSES, ignore_index=2), True),
    "label_smoothing": (lambda z: F.cross_entropy(z, CLASSES, label_smoothing=0.1), True),
    "probabilities": (lambda z: F.cross_entropy(z, PROBABILITIES), True),
    "smoothed_probabilities": (
        lambda z: F.cross_entropy(z, PROBABILITIES, label_smoothing=0.1),
        False,
    ),
    "class_weights": (lambda z: F.cross_entropy(z, CLASSES, weight=torch.arange(1, 4).double()), False),
    "module": (lambda z: nn.CrossEntropyLoss()(z, CLASSES), True),
    "positions": (lambda z: F.cross_entropy(z.view(2, 3, 2), CLASSES.view(2, 2)), False),
    "mse": (lambda z: F.mse_loss(z, VALUES), True),
    "mse_sum": (lambda z: nn.MSELoss(reduction="sum")(z, VALUES), True),
    "mse_weighted": (lambda z: F.mse_loss(z, VALUES, weight=VALUES.abs()), False),
    "bce": (lambda z: F.binary_cross_entropy_with_logits(z, PROBABILITIES), True),
    "bce_pos_weight": (
        lambda z: F.binary_cross_entropy_with_logits(z, PROBABILITIES, pos_weight=torch.tensor(2.0).double()),
        False,
    ),
    "two_losses": (lambda z: F.mse_loss(z, VALUES) + F.cross_entropy(z, CLASSES), False),
    "first_of_two": (lambda z: [F.mse_loss(z, VALUES), F.cross_entropy(z, CLASSES)][0], False),
    "huber": (lambda z: F.huber_loss(z, VALUES), False),
}
CLASSES, VALUES = torch.tensor([0, 2, 1, 1]), zoo.vector(12, 5).view(4, 3)
PROBABILITIES = zoo.vector(12, 6).view(4, 3).softmax(1) * 0.9


@pytest.mark.parametrize("name", LOSSES)
def test_loss_hessians_equal_autograds(name):
    loss, is_known = LOSSES[name]
    z = zoo.vector(12, 1).view(4, 3).requires_grad_()
    value, closed = output_hessians.evaluate(loss, (z,))
    assert (closed is not None) == is_known
    torch.testing.assert_close(value, loss(z))
    H = torch.autograd.functional.hessian(loss, z.detach())
    if closed is not None:
        u = zoo.vector(36, 2).view(3, 4, 3)
        expected = torch.einsum("abcd,kcd->kab", H, u)
        torch.testing.assert_close(closed(u), expected, **TOLERANCE)
        torch.testing.assert_close(closed(u[0]), expected[0], **TOLERANCE)
    w = zoo.vector(12, 7).view(4, 3)
    expected = (
        4
        * z.detach()
        * torch.einsum(
            "abcd,cd->ab", torch.autograd.functional.hessian(loss, z.detach() ** 2), z.detach() * w
        )
    )
    torch.testing.assert_close(ggnvp(lambda x: x**2, loss, z.detach(), w)[1], expected, **TOLERANCE)


def test_several_outputs_and_aux():
    x, v = zoo.vector(3, 1), zoo.vector(3, 2)

    def func(x):
        return (x.sin(), x.exp().sum()), {"seen": x.detach()}

    def loss(a, b):
        return (a.square().sum() * 0.5 + b) ** 2

    value, product, aux = ggnvp(func, loss, x, v, has_aux=True)
    J = torch.cat([torch.diag(x.cos()), x.exp()[None]])
    outputs = torch.cat([x.sin(), x.exp().sum()[None]])
    H = torch.autograd.functional.hessian(lambda z: loss(z[:3], z[3]), outputs)
    torch.testing.assert_close(product, J.T @ H @ J @ v, **TOLERANCE)
    assert torch.equal(aux["seen"], x)
    torch.testing.assert_close(value, loss(x.sin(), x.exp().sum()))


def test_third_derivatives_through_the_product():
    x, v = zoo.vector(3, 1), zoo.vector(3, 2)

    def product(x):
        return ggnvp(lambda x: x**3, lambda z: F.mse_loss(z, torch.zeros_like(z)), x, v, create_graph=True)[1]

    expected = torch.autograd.functional.jacobian(lambda x: 2 / 3 * (3 * x**2) ** 2 * v, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(product, x), expected, **TOLERANCE)


def test_calling_rules_are_those_of_the_functional_api():
    x = torch.ones(2)
    with pytest.raises(
        TypeError, match="inputs given to ggnvp must be either a Tensor or a tuple of Tensors"
    ):
        ggnvp(lambda x: x, lambda z: z.sum(), [x], x)
    with pytest.raises(RuntimeError, match="v has invalid size: should be torch.Size"):
        ggnvp(lambda x: x, lambda z: z.sum(), x, torch.ones(3))
    with pytest.raises(RuntimeError, match="vector v can only be None"):
        ggnvp(lambda x: x, lambda z: z.sum(), x)
    with pytest.raises(RuntimeError, match=r"loss must return a tensor with a single element, got \(2,\)"):
        ggnvp(lambda x: x * 2, lambda z: z, x, x)
    with pytest.raises(RuntimeError, match="strict mode"):
        ggnvp(lambda x: torch.ones(2, requires_grad=True) * 2, lambda z: z.square().sum(), x, x, strict=True)
    constant = ggnvp(lambda x: torch.ones(2), lambda z: z.square().sum(), x, x)
    assert torch.equal(constant[1], torch.zeros(2))
    scalar = ggnvp(lambda x: x**2, lambda z: z.square().sum(), torch.tensor(3.0))
    assert float(scalar[1]) == 72.0
    x.requires_grad_()
    ggnvp(lambda x: x**2, lambda z: z.square().sum(), x, torch.ones(2))
    assert x.grad is None


def test_attention_is_decomposed():
    model, x = zoo.Attention().double(), zoo.vector(60, 1).view(3, 5, 4)
    weight = model.qkv.weight.detach()

    def func(w):
        return torch.func.functional_call(model, {"qkv.weight": w}, (x,))

    got = ggnvp(func, lambda z: F.cross_entropy(z, torch.tensor([0, 1, 2])), weight, torch.ones_like(weight))[
        1
    ]
    assert got.isfinite().all()
    assert float((got * torch.ones_like(weight)).sum()) > 0


LIKELIHOOD = {"mlp_cross_entropy": "categorical", "mlp_mse": "normal", "mlp_bce": "bernoulli"}


class TestFvp:
    @pytest.mark.parametrize("name", LIKELIHOOD)
    @pytest.mark.parametrize("kind", ["exact", "monte-carlo", "empirical"])
    def test_equals_the_operators(self, name, kind):
        case = zoo.network(name)
        parameters = tuple(p.detach() for p in case.model.parameters())
        v, likelihood = vector_like(parameters), LIKELIHOOD[name]
        options = {
            "exact": {},
            "monte-carlo": {"num_samples": 3, "seed": 5},
            "empirical": {"targets": case.targets},
        }
        outputs, product = fvp(
            case.outputs_of, parameters, v, likelihood=likelihood, kind=kind, **options[kind]
        )
        torch.testing.assert_close(outputs, case.outputs().detach())
        if kind == "empirical":
            losses = case.loss(case.outputs(), case.targets, reduction="none")
            losses = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
            # The normal likelihood has half the square.
            losses = losses / 2 if likelihood == "normal" else losses
            operator = EmpiricalFisher(losses, case.model.parameters())
        else:
            operator = Fisher(case.outputs(), case.model.parameters(), likelihood=likelihood, **options[kind])
        torch.testing.assert_close(flat(product), operator @ flat(v), **TOLERANCE)

    def test_bad_input(self):
        x = torch.ones(2)
        with pytest.raises(
            ValueError, match="kind must be one of 'exact', 'monte-carlo', 'empirical', got 'mc'"
        ):
            fvp(lambda x: x, x, x, kind="mc")
        with pytest.raises(
            ValueError, match="targets are for kind='empirical' and only there, got them missing"
        ):
            fvp(lambda x: x, x, x, kind="empirical")
        with pytest.raises(ValueError, match="got them given with kind='exact'"):
            fvp(lambda x: x, x, x, targets=x)
        with pytest.raises(TypeError, match="func must return one tensor for fvp, got 2"):
            fvp(lambda x: (x, x), x, x)
