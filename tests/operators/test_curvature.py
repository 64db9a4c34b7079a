"""Curvature operators against dense float64 matrices."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo

from secondorder import (
    Block,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    Jacobian,
    functional,
    fvp,
    ggnvp,
)
from secondorder.autodiff.decompose import decompose
from secondorder.operators.curvature import GradientBlock
from secondorder.vectors.flat import flatten

# The same arithmetic in another order.
TOLERANCE = dict(rtol=1e-10, atol=1e-12)


def parameters_of(case):
    return list(case.model.parameters())


def hessian_of(case):
    return Hessian(case.value(), parameters_of(case))


def gauss_newton_of(case, **options):
    outputs = case.outputs()
    return GaussNewton(case.loss(outputs, case.targets), outputs, parameters_of(case), **options)


LIKELIHOOD = {
    F.cross_entropy: "categorical",
    F.mse_loss: "normal",
    F.binary_cross_entropy_with_logits: "bernoulli",
}


def losses_of(case):
    """One loss for each sample."""
    losses = case.loss(case.outputs(), case.targets, reduction="none")
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def test_hessian_equals_dense(network_case):
    operator = hessian_of(network_case)
    dense = oracles.dense_hessian(network_case.loss_of, parameters_of(network_case))
    torch.testing.assert_close(operator.dense(), dense, **TOLERANCE)
    v = zoo.vector(len(dense), 1)
    torch.testing.assert_close(operator @ v, dense @ v, **TOLERANCE)
    gradient = torch.autograd.grad(
        network_case.value(), parameters_of(network_case), allow_unused=True, materialize_grads=True
    )
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
    torch.testing.assert_close(operator @ u, operator @ u, **TOLERANCE)


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


def test_forms_are_those_of_each_block():
    """The sum is that of the whole; each is that of its block alone, outputs nested in one another too."""
    case = zoo.network("mlp_mse")
    parameters, hidden = parameters_of(case), case.model[:2](case.inputs)
    outputs = case.model[2](hidden)
    loss = F.mse_loss(outputs, case.targets)
    blocks = [Block(loss, (outputs,), torch.ones_like(loss)), GradientBlock((0.3 * hidden,), (hidden,))]
    operator = GaussNewton.of_blocks(blocks, parameters)
    v = zoo.vector(operator.shape[0], 1)
    alone = [float(v @ (GaussNewton.of_blocks([block], parameters) @ v)) for block in blocks]
    assert operator.forms(v) == pytest.approx(alone, rel=1e-10)
    assert float(v @ (operator @ v)) == pytest.approx(sum(alone), rel=1e-10)


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
    with pytest.warns(UserWarning, match="Gauss-Newton matrix is zero"):
        G = GaussNewton(outputs.sum(), outputs, [w])
    assert torch.equal(G @ torch.ones(2), torch.zeros(2))
    assert torch.equal(G @ torch.ones(2, 3), torch.zeros(2, 3))


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


MAKERS = {
    "hessian": lambda case, **options: Hessian(case.value(), parameters_of(case), **options),
    "gauss_newton": gauss_newton_of,
    "fisher": lambda case, **options: Fisher(
        case.outputs(), parameters_of(case), likelihood=LIKELIHOOD[case.loss], **options
    ),
    "empirical_fisher": lambda case, **options: EmpiricalFisher(
        losses_of(case), parameters_of(case), **options
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_without_the_kept_graph(network_case, make):
    kept, fresh = make(network_case), make(network_case, keep_graph=False)
    V = zoo.vector(5 * kept.shape[0], 1).view(-1, 5)
    torch.testing.assert_close(fresh @ V, kept @ V, **TOLERANCE)
    torch.testing.assert_close(fresh @ V[:, 0], kept @ V[:, 0], **TOLERANCE)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_batched_or_not(network_case, make):
    products = []
    V = zoo.vector(9 * sum(p.numel() for p in parameters_of(network_case)), 1).view(-1, 9)
    for batched in (True, False, None):
        operator = make(network_case, batched=batched)
        products.append(operator @ V)
    torch.testing.assert_close(products[0], products[1], **TOLERANCE)
    torch.testing.assert_close(products[2], products[1], **TOLERANCE)


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_restriction_is_the_diagonal_block(network_case, make, keep_graph):
    operator = make(network_case, keep_graph=keep_graph)
    dense = operator.dense()
    sizes = [p.numel() for p in operator.parameters]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for start, size, block in zip(starts, sizes, operator.blocks(), strict=True):
        where = slice(start, start + size)
        torch.testing.assert_close(block.dense(), dense[where, where], **TOLERANCE)
    pair = [0, len(sizes) - 1]
    rows = torch.cat([torch.arange(starts[i], starts[i] + sizes[i]) for i in pair])
    part = operator.restrict(pair)
    torch.testing.assert_close(part.dense(), dense[rows][:, rows], **TOLERANCE)
    torch.testing.assert_close(operator.dense(), dense)
    if isinstance(operator, Hessian):
        torch.testing.assert_close(part.gradient, operator.gradient[rows])
    with pytest.raises(ValueError, match="positions in parameters, integers below"):
        operator.restrict([])


def test_jacobian_equals_dense(network_case):
    parameters = parameters_of(network_case)
    dense = oracles.dense_jacobian(network_case.outputs_of, parameters)
    for options in ({}, {"keep_graph": False}, {"batched": True}, {"batched": False}):
        J = Jacobian(network_case.outputs(), parameters, **options)
        assert J.shape == tuple(dense.shape)
        torch.testing.assert_close(J.dense(), dense, **TOLERANCE)
        torch.testing.assert_close(J.T.dense(), dense.T, **TOLERANCE)
        torch.testing.assert_close((J @ J.T).dense(), dense @ dense.T, **TOLERANCE)
        assert (J @ J.T).is_symmetric
        v, u = zoo.vector(J.shape[1], 1), zoo.vector(J.shape[0], 2)
        torch.testing.assert_close(u @ (J @ v), v @ (J.T @ u), **TOLERANCE)
    torch.testing.assert_close(gauss_newton_of(network_case).kernel.dense(), dense @ dense.T, **TOLERANCE)


def test_from_a_function(network_case):
    function, parameters = functional.module_function(
        network_case.model, network_case.loss, network_case.inputs, network_case.targets
    )
    operator = Hessian.of(function, parameters)
    expected = hessian_of(network_case)
    torch.testing.assert_close(operator.dense(), expected.dense(), **TOLERANCE)
    torch.testing.assert_close(operator.gradient, expected.gradient, **TOLERANCE)

    def outputs(parameters):
        return torch.func.functional_call(network_case.model, parameters, (network_case.inputs,))

    def loss(z):
        return network_case.loss(z, network_case.targets)

    dense = oracles.dense_gauss_newton(network_case)
    torch.testing.assert_close(GaussNewton.of(outputs, loss, parameters).dense(), dense, **TOLERANCE)
    # Not known: its Hessian is autograd's.
    torch.testing.assert_close(
        GaussNewton.of(outputs, lambda z: 2 * loss(z), parameters).dense(), 2 * dense, **TOLERANCE
    )
    J = oracles.dense_jacobian(network_case.outputs_of, parameters_of(network_case))
    torch.testing.assert_close(Jacobian.of(outputs, parameters).dense(), J, **TOLERANCE)
    likelihood = LIKELIHOOD[network_case.loss]
    fisher = Fisher.of(outputs, parameters, likelihood=likelihood)
    torch.testing.assert_close(fisher.dense(), MAKERS["fisher"](network_case).dense(), **TOLERANCE)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_float32_is_close_to_float64(network_case, make):
    exact = make(network_case).dense()
    single = network_case._replace(
        model=network_case.model.float(),
        inputs=network_case.inputs.float(),
        targets=network_case.targets.float()
        if network_case.targets.is_floating_point()
        else network_case.targets,
    )
    assert (make(single).dense().double() - exact).norm() <= 1e-5 * exact.norm()


def test_attention_needs_no_care_from_the_user():
    torch.manual_seed(0)
    model, x = zoo.Attention().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    targets = torch.tensor([0, 2, 1])
    function, parameters = functional.module_function(model, F.cross_entropy, x, targets)
    values = tuple(parameters.values())

    def of_values(*values):
        return function(dict(zip(parameters, values, strict=True)))

    with decompose():
        dense = oracles.dense_hessian(of_values, values)
    torch.testing.assert_close(Hessian.of(function, parameters).dense(), dense, **TOLERANCE)
    for options in ({}, {"keep_graph": False}):
        operator = GaussNewton.of(
            lambda p: torch.func.functional_call(model, p, (x,)),
            lambda z: F.cross_entropy(z, targets),
            parameters,
            **options,
        )
        with decompose():
            outputs = model(x)
            loss = F.cross_entropy(outputs, targets)
            expected = GaussNewton(loss, outputs, model.parameters()).dense()
        torch.testing.assert_close(operator.dense(), expected, **TOLERANCE)
        assert torch.linalg.eigvalsh(expected)[0] > -1e-12


def test_frozen_parameters_are_left_out():
    case = zoo.network("mlp_cross_entropy")
    full = hessian_of(case).dense()
    first = next(iter(case.model.parameters())).requires_grad_(False)
    operator = Hessian(case.value(), [p for p in case.model.parameters() if p.requires_grad])
    n = first.numel()
    torch.testing.assert_close(operator.dense(), full[n:, n:], **TOLERANCE)


def test_complex_parameters():
    """As torch: with the Hessian of the real function of real and imaginary parts."""
    x = torch.complex(zoo.vector(4, 1), zoo.vector(4, 2))
    v = torch.complex(zoo.vector(4, 3), zoo.vector(4, 4))

    def func(z):
        return (z.abs() ** 3).sum() + (z[0] * z[1].conj()).real

    expected = torch.autograd.functional.vhp(func, x, v)[1]
    torch.testing.assert_close(Hessian.of(func, x) @ v, expected, **TOLERANCE)


def test_products_of_a_block_without_a_batching_rule():
    """Where vmap has no rule for an operation, blocks are multiplied one after another."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if float(g.detach().abs().sum()) < 0:
                return g
            return g * 3 * x**2

    x = torch.ones(9, dtype=torch.float64, requires_grad=True)
    outputs = Cube.apply(x)
    operator = GaussNewton(outputs.square().sum(), outputs, [x])
    torch.testing.assert_close(operator @ torch.eye(9).double(), 18 * torch.eye(9).double())
    together = GaussNewton(outputs.square().sum(), outputs, [x], batched=True)
    torch.testing.assert_close(together @ torch.eye(9).double(), 18 * torch.eye(9).double())


class TestFisher:
    def test_exact_is_the_gauss_newton_matrix(self, network_case):
        scale = 1.0
        if network_case.loss is F.mse_loss:
            scale = 2 / network_case.targets[0].numel()
        if network_case.loss is F.binary_cross_entropy_with_logits:
            scale = 1 / network_case.targets[0].numel()
        fisher = MAKERS["fisher"](network_case)
        torch.testing.assert_close(
            scale * fisher.dense(), oracles.dense_gauss_newton(network_case), **TOLERANCE
        )

    @pytest.mark.parametrize("name", ["mlp_cross_entropy", "mlp_mse", "mlp_bce"])
    def test_samples_are_unbiased_and_reproducible(self, name):
        case = zoo.network(name)
        exact = MAKERS["fisher"](case).dense()
        state = torch.get_rng_state()
        estimates = torch.stack(
            [MAKERS["fisher"](case, num_samples=8, seed=seed).dense() for seed in range(50)]
        )
        assert torch.equal(torch.get_rng_state(), state)
        error = (estimates.mean(0) - exact).norm()
        spread = (estimates - exact).square().sum((1, 2)).mean().sqrt() / 50**0.5
        assert error < 2 * spread
        assert spread < 0.1 * exact.norm()
        again = MAKERS["fisher"](case, num_samples=8, seed=0).dense()
        torch.testing.assert_close(again, estimates[0], **TOLERANCE)
        assert torch.linalg.eigvalsh(estimates[0])[0] > -1e-12

    def test_empirical_is_the_mean_of_outer_products(self, network_case):
        losses, parameters = losses_of(network_case), parameters_of(network_case)
        options = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        rows = [flatten(torch.autograd.grad(loss, parameters, **options)) for loss in losses]
        G = torch.stack(rows)
        operator = EmpiricalFisher(losses, parameters)
        torch.testing.assert_close(operator.dense(), G.T @ G / len(G), **TOLERANCE)
        torch.testing.assert_close(operator.kernel.dense(), G @ G.T, **TOLERANCE)
        total = EmpiricalFisher(losses, parameters, reduction="sum")
        torch.testing.assert_close(total.dense(), G.T @ G, **TOLERANCE)

    def test_bad_input(self):
        w = torch.ones(2, requires_grad=True)
        with pytest.raises(
            ValueError, match="likelihood must be one of 'categorical', 'bernoulli', 'normal', got 'poi"
        ):
            Fisher(w * 2, [w], likelihood="poisson")
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
            Fisher(w * 2, [w], reduction="none")
        with pytest.raises(ValueError, match="num_samples must be a positive integer, got 0"):
            Fisher(w * 2, [w], num_samples=0)
        with pytest.raises(
            ValueError, match=r"losses must have shape \(N,\), .* got \(\); compute them with"
        ):
            EmpiricalFisher(w.sum(), [w])
        with pytest.raises(ValueError, match="outputs must carry a graph"):
            Jacobian(w.detach(), [w])
        with pytest.raises(ValueError, match="real or complex together, got torch.complex64"):
            Jacobian(w.to(torch.complex64), [w])


def test_outputs_of_another_dtype():
    """As under autocast: flat vectors have the dtype of the parameters."""
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    outputs = w.square().float()
    J = Jacobian(outputs, [w])
    expected = torch.diag(2 * w.detach())
    for dense in (J.dense(), J.T.dense()):
        assert dense.dtype == torch.float64
        torch.testing.assert_close(dense, expected)
    G = GaussNewton(outputs.square().sum(), outputs, [w])
    torch.testing.assert_close(G.dense(), 2 * expected**2)


def test_parameters_that_can_not_be_meant():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"got one tensor; pass \[parameter\]"):
        Hessian(w.square().sum(), w)
    with pytest.raises(ValueError, match=r"each tensor once, got parameters\[1\] twice"):
        Hessian(w.square().sum(), [w, w])
    with pytest.raises(ValueError, match="loss must depend on at least one of the parameters"):
        Hessian(w.square().sum(), [torch.ones(3, requires_grad=True)])
    H = Hessian(w.square().sum(), [w])
    for bad in ([], [1], ["w"], [w], 3):
        with pytest.raises(ValueError, match="indices must be positions in parameters, integers below 1"):
            H.restrict(bad)
    assert H.restrict(0).shape == (2, 2)


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def test_once_differentiable_functions_are_refused():
    """Their second derivative would be zero, and so would ``J v``."""
    p = torch.zeros(2, requires_grad=True)
    ones = torch.ones(2)
    outputs = Exponential.apply(p)
    calls = [
        lambda: Hessian(outputs.sum(), [p]),
        lambda: Jacobian(outputs, [p]),
        lambda: GaussNewton(outputs.square().sum(), outputs, [p]),
        lambda: EmpiricalFisher(outputs, [p]),
        lambda: functional.hvp(lambda x: Exponential.apply(x).sum(), ones, ones),
        lambda: functional.jvp(Exponential.apply, ones, ones),
        lambda: functional.linearize(Exponential.apply, ones),
        lambda: ggnvp(Exponential.apply, lambda z: z.square().sum(), ones, ones),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="Exponential is once_differentiable"):
            call()


def test_inference_mode_is_refused():
    p = torch.zeros(2, requires_grad=True)
    H = Hessian(p.exp().sum(), [p], keep_graph=False)
    kept, J = Hessian(p.exp().sum(), [p]), Jacobian(p.exp(), [p], keep_graph=False)
    with torch.inference_mode():
        for call in (
            lambda: H @ torch.ones(2),
            lambda: kept @ torch.ones(2),
            lambda: J @ torch.ones(2),
            lambda: functional.hvp(lambda x: x.exp().sum(), torch.ones(2), torch.ones(2)),
        ):
            with pytest.raises(RuntimeError, match="inference_mode"):
                call()


def test_complex_parameters_have_no_complex_matrix():
    c = torch.tensor([1 + 1j], requires_grad=True)
    H = Hessian((c**3).real.sum(), [c])
    for call in (H.dense, H.diagonal, Jacobian(1j * c, [c]).dense):
        with pytest.raises(TypeError, match="use torch.view_as_real"):
            call()


def test_a_loss_that_is_changed_in_place_has_no_closed_form():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    v = torch.ones(2, dtype=torch.float64)

    def loss(z):
        value = F.mse_loss(z, torch.zeros_like(z))
        value *= 10
        value += 0.5 * z.pow(4).sum()
        return value

    expected = 10.0 + 6 * w.square()
    torch.testing.assert_close(ggnvp(lambda w: w, loss, w, v)[1], expected)
    torch.testing.assert_close(GaussNewton.of(lambda w: w, loss, w) @ v, expected)


def test_targets_of_the_empirical_fisher_do_not_broadcast():
    x, w = torch.randn(6, 2), torch.zeros(2, 3)
    for targets in (torch.tensor([0]), torch.zeros(7, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"targets must have shape \(6,\)"):
            fvp(lambda w: x @ w, w, w, kind="empirical", targets=targets)
    with pytest.raises(TypeError, match="targets must be classes of dtype torch.int64, got torch.float32"):
        fvp(lambda w: x @ w, w, w, kind="empirical", targets=torch.zeros(6))


class TestPositions:
    """Classes at several positions of a sample, as in segmentation and language models: shape (N, C, T)."""

    @staticmethod
    def outputs():
        w = zoo.vector(6, 1).requires_grad_()
        x = zoo.vector(2 * 3 * 4 * 6, 2).view(2, 3, 4, 6)
        return (x @ w).tanh(), w

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_fisher_is_the_gauss_newton_matrix(self, reduction):
        outputs, w = self.outputs()
        targets = torch.randint(3, (2, 4))
        loss = F.cross_entropy(outputs, targets, reduction=reduction)
        expected = GaussNewton(loss, outputs, [w]).dense()
        got = Fisher(outputs, [w], reduction=reduction)
        torch.testing.assert_close(got.dense(), expected, **TOLERANCE)
        drawn = Fisher(outputs, [w], reduction=reduction, num_samples=4000).dense()
        assert (drawn - expected).norm() <= 0.1 * expected.norm()

    def test_empirical_fisher_product_has_one_score_a_position(self):
        outputs, w = self.outputs()
        targets = torch.randint(3, (2, 4))
        losses = F.cross_entropy(outputs, targets, reduction="none").reshape(-1)
        expected = EmpiricalFisher(losses, [w]).dense()
        x = zoo.vector(2 * 3 * 4 * 6, 2).view(2, 3, 4, 6)
        columns = [
            fvp(lambda w: (x @ w).tanh(), w.detach(), e, kind="empirical", targets=targets)[1]
            for e in torch.eye(6, dtype=torch.float64)
        ]
        torch.testing.assert_close(torch.stack(columns, dim=1), expected, **TOLERANCE)


def test_sums_and_means_of_the_empirical_fisher():
    w = torch.ones(2, requires_grad=True)
    losses = torch.tensor([[1.0, 0.0], [0.0, 2.0]]) @ w
    mean, total = EmpiricalFisher(losses, [w]).dense(), EmpiricalFisher(losses, [w], reduction="sum").dense()
    torch.testing.assert_close(total, 2 * mean)
    torch.testing.assert_close(EmpiricalFisher(losses, [w], reduction="sum").diagonal(), total.diagonal())


def test_a_wrong_second_derivative_is_refused_where_the_graph_is_given():
    v = torch.ones(3, 2, requires_grad=True)
    loss = torch._weight_norm(v, torch.ones(3, 1), 0).pow(3).sum()
    with pytest.raises(RuntimeError, match="second derivative of weight_norm is wrong"):
        Hessian(loss, [v])


def test_restricted_jacobian_after_its_transpose_was_used():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    J = Jacobian(a * 2 + b * 3, [a, b])
    assert (J.T @ torch.ones(2)).tolist() == [2.0, 2.0, 3.0, 3.0]
    second = J.restrict([1])
    assert second.T.shape == (2, 2)
    assert (second.T @ torch.ones(2)).tolist() == [3.0, 3.0]


def test_products_that_carry_a_graph_use_no_closed_form():
    """Its softmax is taken at detached outputs: third derivatives would be lost."""
    x, w = zoo.vector(8, 1).view(4, 2), zoo.vector(6, 2).view(2, 3).requires_grad_()
    targets, v = torch.tensor([0, 1, 2, 0]), zoo.vector(6, 3).view(2, 3)
    loss = partial(F.cross_entropy, target=targets)
    product = ggnvp(lambda w: x @ w, loss, w, v, create_graph=True)[1]
    (third,) = torch.autograd.grad((product * v).sum(), w)

    def along(point):
        return (torch.autograd.functional.hvp(lambda w: loss(x @ w), point, v)[1] * v).sum()

    expected = oracles.central_gradient(along, w.detach())
    torch.testing.assert_close(third, expected, rtol=1e-6, atol=1e-8)
    drawn = fvp(lambda w: x @ w, w, v, create_graph=True)[1]
    (third,) = torch.autograd.grad((drawn * v).sum(), w)
    torch.testing.assert_close(third, expected, rtol=1e-6, atol=1e-8)
