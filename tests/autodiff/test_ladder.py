"""Where torch has no second derivative: once more under ``decompose()``, else an error with a remedy."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from secondorder import GaussNewton, Hessian, functional
from secondorder.autodiff.decompose import decompose


def distances(x):
    return torch.cdist(x.view(3, 2), x.view(3, 2) + 1).square()


def total(x):
    return distances(x).exp().mul(0.01).sum()


FINITE = "finite-differences"
X, V = zoo.vector(6, 1), zoo.vector(6, 2)


def dense_jacobian(func):
    with decompose():
        return torch.autograd.functional.jacobian(func, X).view(-1, 6)


def test_jvp_and_linearize():
    expected = (dense_jacobian(distances) @ V).view(3, 3)
    torch.testing.assert_close(functional.jvp(distances, X, V)[1], expected)
    torch.testing.assert_close(functional.jvp(distances, X, V, strategy="forward-mode")[1], expected)
    torch.testing.assert_close(functional.linearize(distances, X)[1](V), expected)


def test_every_way_to_a_hessian():
    with decompose():
        expected = torch.autograd.functional.hessian(total, X)
    product = expected @ V
    for strategy in ("auto", "double-backward", "reverse-over-reverse", "forward-over-reverse"):
        torch.testing.assert_close(functional.hvp(total, X, V, strategy=strategy)[1], product)
    torch.testing.assert_close(functional.vhp(total, X, V)[1], product)
    torch.testing.assert_close(functional.hvps(total, X, V[None])[1][0], product)
    torch.testing.assert_close(functional.hessian(total, X), expected)
    torch.testing.assert_close(functional.hessian(total, X, vectorize=True), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.soft_margin_loss])
def test_forward_mode_through_losses(loss):
    of_x = partial(loss, target=zoo.vector(6, 3))
    expected = torch.autograd.functional.hessian(of_x, X)
    got = functional.hessian(of_x, X, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(got, expected)
    product = functional.hvp(of_x, X, V, strategy="forward-over-reverse")[1]
    torch.testing.assert_close(product, expected @ V)


def test_the_second_run_sees_the_same_masks_and_moves_no_buffer():
    norm = nn.BatchNorm1d(2).double()

    def func(x):
        return torch.cdist(F.dropout(norm(x.view(3, 2))), torch.ones(2, 2).double()).square().sum()

    torch.manual_seed(0)
    value, product = functional.hvp(func, X, V)
    state, buffers = torch.get_rng_state(), [b.clone() for b in norm.buffers()]
    norm.reset_running_stats()
    torch.manual_seed(0)
    assert float(func(X).detach()) == pytest.approx(float(value), rel=1e-12)
    assert torch.equal(state, torch.get_rng_state())
    for once, buffer in zip(norm.buffers(), buffers, strict=True):
        assert torch.equal(once, buffer)
    assert product.isfinite().all()


def ctc(x):
    log_probs = x.view(3, 1, 2).log_softmax(-1)
    return F.ctc_loss(log_probs, torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1]))


def test_without_a_decomposition_the_error_names_operation_and_remedy():
    for call in (
        partial(functional.hvp, ctc, X, V),
        partial(functional.hessian, ctc, X),
        partial(functional.linearize_grad, ctc, X),
    ):
        with pytest.raises(RuntimeError, match=r"_ctc_loss_backward has no .*strategy='finite-differences'"):
            call()


def test_finite_differences_on_request():
    got = functional.hvp(ctc, X, V, strategy=FINITE)[1]

    def slope(x):
        return functional.vjp(ctc, x)[1] @ V

    torch.testing.assert_close(got, oracles.central_gradient(slope, X, h=1e-3), rtol=1e-7, atol=1e-9)
    # A third of the digits is lost, whatever the length of the vector, for functions of scale one or more.
    for scale in (1.0, 1e3):
        for size in (1e-8, 1e8):
            point, vector = (scale * X, scale * V), (size * V, 2 * size * X)

            def func(x, y, scale=scale):
                return ((x / scale).sin() * (y / scale).exp()).sum()

            value, got, grad = functional.hvp(func, point, vector, strategy=FINITE, return_grad=True)
            expected = functional.hvp(func, point, vector, return_grad=True)
            torch.testing.assert_close(value, expected[0])
            torch.testing.assert_close(grad, expected[2])
            for part, exact in zip(got, expected[1], strict=True):
                assert (part - exact).norm() <= 1e-6 * exact.norm()


def test_finite_differences_see_one_mask_and_move_buffers_once():
    norm = nn.BatchNorm1d(2).double()

    def func(x):
        return F.dropout(norm(x.view(3, 2))).pow(3).sum()

    torch.manual_seed(0)
    got = functional.hvp(func, X, V, strategy=FINITE)[1]
    assert int(norm.num_batches_tracked) == 1
    torch.manual_seed(0)
    torch.testing.assert_close(got, functional.hvp(func, X, V)[1], rtol=1e-6, atol=1e-7)


def test_what_finite_differences_cannot_do():
    with pytest.raises(RuntimeError, match="create_graph=True needs a second derivative"):
        functional.hvp(ctc, X, V, True, strategy=FINITE)
    with pytest.raises(RuntimeError, match="strict=True needs reverse mode, got strategy='finite"):
        functional.hvp(ctc, X, V, strict=True, strategy=FINITE)
    with pytest.raises(TypeError, match="needs real inputs"):
        functional.hvp(lambda z: z.abs().sum(), torch.ones(2) * 1j, torch.ones(2) * 1j, strategy=FINITE)
    zero = functional.hvp(ctc, X, torch.zeros(6).double(), strategy=FINITE)[1]
    assert torch.equal(zero, torch.zeros(6).double())


def attention(x):
    """By a fused kernel, which has no second derivative in any torch so far; cdist has one since 2.14."""
    rows = x.view(1, 1, 3, 2)
    return F.scaled_dot_product_attention(rows, rows.sin(), rows + 1).view(3, 2)


def test_operators_on_a_given_graph_say_what_to_do():
    x = X.clone().requires_grad_()
    outputs = attention(x)
    loss = outputs.square().sum()
    for operator in (Hessian(loss, [x]), GaussNewton(loss, outputs, [x])):
        for vector in (V, V[:, None]):
            with pytest.raises(
                RuntimeError, match=r"attention.*_backward has no .* inside `with secondorder\.decompose"
            ):
                operator @ vector
    with decompose():
        operator = Hessian(attention(x).square().sum(), [x])
    expected = functional.hvp(lambda x: attention(x).square().sum(), X, V)[1]
    torch.testing.assert_close(operator @ V, expected)
