"""Second derivatives that torch lacks or gets wrong are found under ``decompose()``, or are a clear error."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secondorder import functional
from secondorder.functional import hessian, hvp, linearize_grad, vhp


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_normed(v):
    return (make(5, 3, seed=2) @ torch._weight_norm(v, make(4, 1, seed=1).abs() + 1, 0).T).sin().sum()


MISSING = {
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x).sin().sum(), make(1, 2, 3, 4)),
    "embedding_bag": (lambda w: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), w).sin().sum(), make(3, 2)),
    "pdist": (lambda x: F.pdist(x).sum(), make(4, 2)),
    "cdist": (lambda x: torch.cdist(x, x + 1).sum(), make(4, 2)),
    "hardsigmoid": (lambda x: F.hardsigmoid(x).sin().sum(), make(4, 2)),
    "multi_margin": (lambda x: F.multi_margin_loss(x, torch.tensor([0, 2, 1]), p=2), make(3, 4)),
    "weight_norm": (weight_normed, make(4, 3)),
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("product", ["hvp", "vhp", "linearize_grad", "hessian"])
def test_the_second_derivative_is_right(name, product):
    func, x = MISSING[name]
    v = make(*x.shape, seed=3)
    state = torch.get_rng_state()
    if product == "linearize_grad":
        got = linearize_grad(func, x)[2](v)
    elif product == "hessian":
        got = (hessian(func, x).view(x.numel(), x.numel()) @ v.view(-1)).view(x.shape)
    else:
        got = {"hvp": hvp, "vhp": vhp}[product](func, x, v)[1]
    assert torch.equal(torch.get_rng_state(), state)

    def slope(point):
        return functional.vjp(func, point)[1].mul(v).sum()

    torch.testing.assert_close(got, oracles.central_gradient(slope, x), rtol=1e-6, atol=1e-6)


def test_the_second_run_sees_the_random_numbers_of_the_first():
    def func(x):
        return (F.dropout(x, 0.5) * F.hardsigmoid(x)).square().sum()

    torch.manual_seed(0)
    value, _ = hvp(func, make(20), make(20, seed=1))
    torch.manual_seed(0)
    assert value.item() == pytest.approx(func(make(20)).item(), rel=1e-14)


def test_what_cannot_be_decomposed_is_named():
    def ctc(x):
        probabilities = x.view(4, 1, 3).log_softmax(2)
        return F.ctc_loss(probabilities, torch.tensor([[1]]), torch.tensor([4]), torch.tensor([1]))

    with pytest.raises(
        RuntimeError, match="_ctc_loss_backward has no second derivative in torch.*replace it"
    ):
        hvp(ctc, make(12), make(12, seed=1))


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="from the function"):
        hvp(lambda x: (_ for _ in ()).throw(RuntimeError("from the function")), make(2), make(2))


def test_a_module_with_weight_norm():
    """Torch's own product is more than a tenth off: the reason why it is always decomposed."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    function, parameters = functional.module_function(model, F.mse_loss, make(5, 3), make(5, 2, seed=1))
    names, values = list(parameters), tuple(p + 0.3 * make(*p.shape, seed=7) for p in parameters.values())
    v = tuple(make(*p.shape, seed=8) for p in values)

    def of_tuple(*values):
        return function(dict(zip(names, values, strict=True)))

    ours, theirs = hvp(of_tuple, values, v)[1], torch.autograd.functional.hvp(of_tuple, values, v)[1]
    h = 1e-5
    plus, minus = (
        functional.vjp(of_tuple, tuple(p + s * h * d for p, d in zip(values, v, strict=True)))[1]
        for s in (1, -1)
    )
    exact = [(a - b) / (2 * h) for a, b in zip(plus, minus, strict=True)]
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    error = sum(float((t - e).norm()) for t, e in zip(theirs, exact, strict=True))
    assert error > 0.1 * sum(float(e.norm()) for e in exact)
