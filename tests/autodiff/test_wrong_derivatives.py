"""Kinds of derivatives that torch gets wrong in silence, away from the survey's regular points and shapes."""

import itertools

import oracles
import pytest
import routes
import survey
import torch
import torch.autograd.functional as reference
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import optim
from secondorder import GaussNewton, Hessian, Jacobian, Objective, functional, fvp, ggnvp
from secondorder.autodiff.decompose import decompose

TOLERANCE = dict(rtol=1e-9, atol=1e-9)
make = survey.make


def loss(z):
    return (z.sin() * make(*z.shape, seed=4)).sum() + z.pow(4).sum()


# --- create_graph: the third derivative --------------------------------------------------------------------

NORMS = (
    "layer_norm",
    "layer_norm_two_dims",
    "batch_norm_train",
    "group_norm",
    "instance_norm",
    "rms_norm",
    "weight_norm",
    "attention",
)
# Functions of (scalar, outputs, point, u, v, create_graph) that give one number.
WITH_GRAPH = {
    "hvp": lambda f, z, x, u, v, c: functional.hvp(f, x, v, create_graph=c)[1].mul(u).sum(),
    "vhp": lambda f, z, x, u, v, c: functional.vhp(f, x, v, create_graph=c)[1].mul(u).sum(),
    "hessian": lambda f, z, x, u, v, c: (
        functional.hessian(f, x, create_graph=c).flatten() @ torch.outer(u.flatten(), v.flatten()).flatten()
    ),
    "jvp": lambda f, z, x, u, v, c: functional.jvp(z, x, v, create_graph=c)[1].sin().sum(),
    "jacobian": lambda f, z, x, u, v, c: functional.jacobian(z, x, create_graph=c).sin().sum(),
    "ggnvp": lambda f, z, x, u, v, c: ggnvp(z, loss, x, v, create_graph=c)[1].mul(u).sum(),
    "fvp": lambda f, z, x, u, v, c: fvp(z, x, v, create_graph=c, likelihood="normal")[1].mul(u).sum(),
    "vjp of vjp": lambda f, z, x, u, v, c: (
        functional.vjp(lambda x: functional.vjp(f, x, create_graph=True)[1].mul(v).sum(), x, create_graph=c)[
            1
        ]
        .mul(u)
        .sum()
    ),
    "value_and_grad": lambda f, z, x, u, v, c: (
        functional.vhp(
            lambda x: functional.value_and_grad(f, x, create_graph=True)[1].sin().sum(), x, v, create_graph=c
        )[1]
        .mul(u)
        .sum()
        if c
        else functional.vhp(
            lambda x: reference.vjp(decomposed(f), x, create_graph=True)[1].sin().sum(), x, v
        )[1]
        .mul(u)
        .sum()
    ),
}


def decomposed(func):
    def result(x):
        with decompose():
            return func(x)

    return result


@pytest.mark.slow
@pytest.mark.parametrize("route", WITH_GRAPH)
@pytest.mark.parametrize("name", NORMS)
def test_whoever_asks_for_a_graph_gets_right_derivatives(name, route):
    operation, (x, *_) = survey.OPERATIONS[name]
    number, arguments = WITH_GRAPH[route], (survey.objective(operation), routes.flat(operation))
    u, v = make(*x.shape, seed=5), make(*x.shape, seed=6)
    point = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(number(*arguments, point, u, v, True), point)
    expected = oracles.central_gradient(lambda x: number(*arguments, x, u, v, False).detach(), x)
    assert float((got - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-3)


def gradient_inside(layer):
    """A function that holds a gradient through ``layer``, whose third derivatives it needs."""

    def func(x):
        x = x if x.requires_grad else x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            (layer(x) * make(*x.shape, seed=4)).sin().sum(), x, create_graph=True
        )
        return gradient.square().sum()

    return func


@pytest.mark.parametrize(
    "route",
    ["hvp", "vhp", "hvps", "hessian", "hessian vectorize", "linearize_grad", "Hessian", "Hessian fresh"],
)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "torch.batch_norm"])
def test_a_gradient_inside_the_function(norm, route):
    layers = {
        "layer_norm": lambda x: F.layer_norm(x, (3,)),
        "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
        "torch.batch_norm": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    }
    func, x = gradient_inside(layers[norm]), make(4, 3)
    expected = routes.difference(lambda x: reference.vjp(func, x)[1].reshape(-1), x)
    torch.testing.assert_close(routes.HESSIANS[route](func, x), expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_inside_a_loss_that_is_given_is_refused_by_name():
    x = make(4, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative of a gradient through layer_norm is wrong"):
        Hessian(gradient_inside(lambda x: F.layer_norm(x, (3,)))(x), [x])


@pytest.mark.parametrize("name", ["layer_norm", "det", "solve", "logcumsumexp_0", "slogdet", "softmax_0"])
def test_a_graph_through_forward_mode_is_one_of_reverse_mode(name):
    """Torch gets derivatives through forward mode wrong."""
    operation, (x, *_) = survey.OPERATIONS[name]
    # Of size one: differences of the sine of a large number say nothing.
    x = x / x.abs().max()
    scalar, outputs = survey.objective(operation), routes.flat(operation)
    v = make(*x.shape, seed=6)
    numbers = [
        lambda x, c: functional.jvp(outputs, x, v, c, strategy="forward-mode")[1].sin().sum(),
        lambda x, c: functional.hvp(scalar, x, v, c, strategy="forward-over-reverse")[1].sin().sum(),
    ]
    for number in numbers:
        point = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(number(point, True), point)
        expected = oracles.central_gradient(lambda x: number(x, False).detach(), x)  # noqa: B023
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeros", ["mask", "dropout"])
def test_zeros_that_reach_a_backward_undefined_there(zeros):
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()

    def func(x):
        y = x.logcumsumexp(0)
        torch.manual_seed(0)
        return y * mask if zeros == "mask" else F.dropout(y)

    x, v = make(4), make(4, seed=1)
    expected = reference.jacobian(func, x)
    for route, matrix in routes.JACOBIANS.items():
        torch.testing.assert_close(matrix(func, x), expected, msg=route)
    middle = reference.hessian(loss, func(x))
    torch.testing.assert_close(ggnvp(func, loss, x, v)[1], expected.T @ middle @ expected @ v)
    torch.testing.assert_close(GaussNewton.of(func, loss, x) @ v, expected.T @ middle @ expected @ v)


def test_operators_called_directly_are_wrong_in_forward_mode_too():
    index, x = torch.tensor([0, 0, 1]), make(3)

    def scattered(x):
        return torch.ops.aten.scatter_reduce(torch.zeros(2).double(), 0, index, x, "prod", include_self=False)

    def inverse(x):
        return torch.ops.aten.cholesky_inverse(torch.tril(x.view(2, 2)) + 2 * torch.eye(2))

    with pytest.raises(RuntimeError, match="scatter_reduce with reduce='prod' is wrong"):
        functional.jvp(scattered, x, x, strategy="forward-mode")
    options = dict(vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(functional.jacobian(scattered, x, **options), reference.jacobian(scattered, x))
    torch.testing.assert_close(
        functional.jacobian(inverse, make(4), **options), reference.jacobian(inverse, make(4))
    )


# --- higher-order operators --------------------------------------------------------------------------------


def test_higher_order_operators_are_refused_by_name():
    """Their second derivative is zero in torch, and so is ``J v`` by two backward passes."""

    def branch(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin() * x, lambda x: x.cos(), (x,))

    x = torch.tensor([1.0, 2.0])
    leaf = x.clone().requires_grad_()
    loss_of_branch = branch(leaf).sum()
    calls = [
        lambda: functional.hvp(lambda x: branch(x).sum(), x, x),
        lambda: functional.hessian(lambda x: branch(x).sum(), x),
        lambda: functional.jvp(branch, x, x),
        lambda: Hessian(loss_of_branch, [leaf]),
        lambda: Jacobian.of(branch, x),
        lambda: ggnvp(branch, lambda z: z.square().sum(), x, x),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="higher-order operator cond"):
            call()


# --- formulas that divide by an input, or are others without a graph ---------------------------------------


def determinant(A):
    """By Leibniz' formula: a polynomial."""
    n = len(A)
    total = 0
    for order in itertools.permutations(range(n)):
        inversions = sum(order[j] > order[i] for i in range(n) for j in range(i))
        total = total + (-1) ** inversions * torch.stack([A[i, order[i]] for i in range(n)]).prod()
    return total


def product(x):
    total = torch.ones((), dtype=x.dtype)
    for factor in x.unbind():
        total = total * factor
    return total


A = make(3, 3, seed=7)
MATRICES = {
    "regular": A,
    "identity": torch.eye(3, dtype=torch.float64),
    "permutation": torch.eye(3, dtype=torch.float64).roll(1, 0),
    "equal rows": A[[0, 1, 1]],
    "proportional rows": torch.stack([A[0], A[1], 1.5 * A[0] - A[1]]),
    "zero column": A * torch.tensor([0.0, 1.0, 1.0]).double(),
    "zero": torch.zeros(3, 3, dtype=torch.float64),
    "rank one": torch.ones(3, 3, dtype=torch.float64),
    "integers": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]).double(),
}
FORWARD = "hvp forward-over-reverse"


@pytest.mark.slow
@pytest.mark.parametrize("route", [route for route in routes.HESSIANS if route != "hvp create_graph"])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("outer", [lambda d: d, lambda d: (d + 1) ** 2], ids=["det", "square"])
def test_determinants_of_special_matrices(name, route, outer):
    matrix = MATRICES[name]
    expected = reference.hessian(lambda A: outer(determinant(A)), matrix).reshape(9, 9)
    got = routes.HESSIANS[route](lambda A: outer(torch.linalg.det(A)), matrix)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_determinants_without_division(n):
    batch = torch.stack([make(n, n, seed=3), torch.eye(n).double(), make(n, n, seed=5)])
    batch[1, -1] = 0
    with decompose():
        got = torch.linalg.det(batch)
    torch.testing.assert_close(got, torch.linalg.det(batch), **TOLERANCE)


def test_a_determinant_in_a_closure():
    """At zero torch's Hessian of it is NaN, and no step was taken."""
    p = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = optim.Newton([p])
    optimizer.step(lambda: torch.linalg.det(p) + (p - A).square().sum())
    assert optimizer.report.accepted
    assert p.isfinite().all()


@pytest.mark.parametrize("name", ["equal rows", "proportional rows", "zero column", "integers"])
def test_a_determinant_that_is_given(name):
    """Nothing is computed again: ``H v`` is right where the rank is one less."""
    expected = reference.hessian(lambda A: (determinant(A) + 1) ** 2, MATRICES[name]).reshape(9, 9)
    leaf = MATRICES[name].clone().requires_grad_()
    got = Hessian((torch.linalg.det(leaf) + 1) ** 2, [leaf]).dense()
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("entries", "v", "dtype", "square"),
    [
        # Found by a search over random ones: torch's product is right, and v^T H was wrong, infinite or NaN.
        ([1e19, 1e-13, 1e-7, 1e-5], [0.0, -1e-13, -1e-7, 1e-5], torch.float32, True),
        ([1e-21, 0.0, 1e19, 1e19], [1e-21, 0.0, 2e19, 0.0], torch.float32, True),
        ([1e8, 1e-9, 1e-3, 1e-3], [2e8, 2e-9, 0.0, -2e-3], torch.float32, False),
        ([2.8e9, -5.4e-17, 1.1e-5, -9.8e-3], [-2.8e9, 5.4e-17, -1.1e-5, -2e-2], torch.bfloat16, True),
        ([3.5e-13, -1.9e5, -1.3e16, 2.2e-7], [-7e-13, 1.9e5, -2.7e16, -2.2e-7], torch.bfloat16, False),
    ],
)
def test_products_whose_parts_overflow(entries, v, dtype, square):
    x, v = torch.tensor(entries, dtype=dtype), torch.tensor(v, dtype=dtype)

    def of(prod):
        return (lambda x: (prod(x) + 1) ** 2) if square else prod

    expected = reference.hvp(of(product), x.double(), v.double())[1]
    # Some units in the last place of the result's largest entry.
    atol = 40 * torch.finfo(dtype).eps * float(expected.abs().max())
    leaf = x.clone().requires_grad_()
    H = Hessian(of(torch.prod)(leaf), [leaf])
    for got in (
        functional.hvp(of(torch.prod), x, v)[1],
        functional.vhp(of(torch.prod), x, v)[1],
        functional.linearize_grad(of(torch.prod), x)[2](v),
        H @ v,
    ):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


# --- a norm at zero ----------------------------------------------------------------------------------------

AT_ZERO = {
    "norm": torch.linalg.vector_norm,
    "frobenius": lambda x: torch.linalg.matrix_norm(x[None]),
    "normalize": lambda x: F.normalize(x, dim=0).sum(),
    "cosine_similarity": lambda x: F.cosine_similarity(x, torch.ones_like(x), dim=0),
    "dist": lambda x: torch.dist(x, torch.zeros_like(x)),
    "renorm": lambda x: torch.renorm(x[None], 2, 0, 1.0).sum(),
    "in a smooth function": lambda x: (
        torch.linalg.vector_norm(x) * x.square().sum() + x.sin().sum() + x.square().sum()
    ),
}


@pytest.mark.parametrize("name", AT_ZERO)
def test_a_norm_at_zero_is_one_number_on_every_route(name):
    """The one that torch's hvp gives; its vhp, hessian and ours gave NaN."""
    func, x = AT_ZERO[name], torch.zeros(3, dtype=torch.float64)
    expected = torch.stack([reference.hvp(func, x, e)[1] for e in torch.eye(3, dtype=torch.float64)], dim=1)
    assert expected.isfinite().all()
    for route, matrix in routes.HESSIANS.items():
        torch.testing.assert_close(matrix(func, x), expected, msg=route, **TOLERANCE)
    torch.testing.assert_close(functional.hessian_diag(func, x), expected.diagonal())
    rows = functional.batch_hessian(lambda X: torch.stack([func(x) for x in X]), x[None])
    torch.testing.assert_close(rows[0], expected, **TOLERANCE)


def test_a_loss_that_is_a_norm_at_zero():
    """The same rule in the space of outputs."""
    x, v = make(3), make(3, seed=1)

    def distance(z):
        return torch.linalg.vector_norm(z) + z.square().sum()

    def residual(x):
        return (x - x.detach()) * 2

    J = 2 * torch.eye(3, dtype=torch.float64)
    H = torch.stack([reference.hvp(distance, torch.zeros(3).double(), e)[1] for e in torch.eye(3).double()])
    expected = J.T @ H @ J @ v
    torch.testing.assert_close(ggnvp(residual, distance, x, v)[1], expected)
    torch.testing.assert_close(GaussNewton.of(residual, distance, x) @ v, expected)
    model = nn.Linear(1, 1, bias=False).double()
    data = torch.ones(4, 1).double(), model.weight.detach().expand(4, 1).clone()

    def mean(z, y):
        return torch.linalg.vector_norm(z - y, dim=1).mean() + (z - y).square().mean()

    matrix = Objective(model, mean, data, batch_size=2).gauss_newton().dense()
    torch.testing.assert_close(matrix, torch.full((1, 1), 2.0, dtype=torch.float64))


# --- arguments in forward mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["jacobian", "hessian", "jvp"])
def test_forward_mode_keeps_strides_and_the_users_tensor(strategy):
    base = make(4, 6)
    seen = []

    def func(x):
        seen.append(x.stride())
        return (x * x.sin()).sum(1)

    for x in (base.T, base[:, ::2], base, base[0].expand(3, 6)):
        before = x.clone()
        if strategy == "jacobian":
            got = functional.jacobian(func, x, vectorize=True, strategy="forward-mode")
            torch.testing.assert_close(got, reference.jacobian(func, x))
        elif strategy == "hessian":
            got = functional.hessian(lambda x: func(x).sum(), x, **routes.FORWARD)
            torch.testing.assert_close(got, reference.hessian(lambda x: func(x).sum(), x))
        else:
            got = functional.jvp(func, x, make(*x.shape, seed=2), strategy="forward-mode")[1]
            torch.testing.assert_close(got, reference.jvp(func, x, make(*x.shape, seed=2))[1])
        assert torch.equal(x, before)
        if 0 not in x.stride():
            assert set(seen) == {x.stride()}
        seen.clear()


def test_a_function_that_writes_to_its_argument_does_not_reach_the_user():
    x = make(3)
    before = x.clone()

    def doubled(x):
        x *= 2
        return x * x

    got = functional.jacobian(doubled, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(got, torch.diag(8 * before))
    assert torch.equal(x, before)


class _Counts(nn.Module):
    """What torch.func refuses, each in a function that torch.autograd.functional differentiates."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x):
        return self.norm(x.view(-1, 3))


REFUSED = {
    "written buffers": _Counts,
    "requires_grad_": lambda: lambda x: (x.sin() * x.detach().clone().requires_grad_().exp()).sum(0),
    "nested call": lambda: lambda x: functional.vjp(lambda y: (y**3).sum(), x, create_graph=True)[1] * x,
    "numpy": lambda: lambda x: x * float(x.detach().numpy().sum()),
    "random numbers": lambda: lambda x: x**2 * torch.rand(6, dtype=torch.float64),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("matrix", ["jacobian", "hessian"])
def test_forward_mode_where_torch_func_refuses(name, matrix):
    x = make(6)

    def call(module, **options):
        func = REFUSED[name]()
        torch.manual_seed(0)
        if matrix == "jacobian":
            return func, module.jacobian(func, x, **options)
        return func, module.hessian(lambda x: func(x).sin().sum(), x, **options)

    ours = dict(vectorize=True, strategy="forward-mode") if matrix == "jacobian" else routes.FORWARD
    func, got = call(functional, **ours)
    _, expected = call(reference)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    if name == "written buffers":
        assert int(func.norm.num_batches_tracked) == 1


# --- what is on no path ------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def test_what_is_on_no_path_to_the_inputs_is_not_refused():
    """Torch gives the right answer there."""
    w = make(3, seed=1).requires_grad_()
    x, v = make(3), make(3, seed=2)

    def func(x):
        return (x**3 * Once.apply(w)).sum()

    torch.testing.assert_close(functional.hvp(func, x, v)[1], reference.hvp(func, x, v)[1])
    torch.testing.assert_close(
        functional.hessian(func, x, create_graph=True), reference.hessian(func, x, create_graph=True)
    )
    rows = functional.jvp(lambda x: x**3 * Once.apply(w), x, v)[1]
    torch.testing.assert_close(rows, reference.jvp(lambda x: x**3 * Once.apply(w), x, v)[1])


def test_a_hopeless_function_is_called_once():
    calls = []

    def func(x):
        calls.append(1)
        return Once.apply(x).sum()

    with pytest.raises(RuntimeError, match="Once is once_differentiable"):
        functional.hvp(func, make(3), make(3))
    assert len(calls) == 1


def test_errors_of_forward_mode_speak_of_forward_derivatives():
    grid = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grid_sampler_2d has no forward derivative"):
        functional.jvp(
            lambda x: F.grid_sample(x, grid, align_corners=False),
            make(1, 1, 3, 3),
            make(1, 1, 3, 3),
            strategy="forward-mode",
        )


# --- checkpoints -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A block with attention and layer norm, whose activations are computed again."""

    def __init__(self, use_checkpoint):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True).double()
        self.use_checkpoint = use_checkpoint

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.use_checkpoint else self.block(x)


def test_checkpointed_blocks_on_every_route():
    """By the math kernel, also in products on a kept graph; ``decompose()`` is not seen by a checkpoint."""
    plain, model, x = Checkpointed(False), Checkpointed(True), make(1, 2, 4)
    for route, matrix in {**routes.HESSIANS, **routes.GAUSS_NEWTONS}.items():
        if route in ("hvp create_graph", FORWARD, "hessian forward-mode"):
            continue
        is_scalar = route in routes.HESSIANS
        got, expected = (
            matrix(survey.objective(m) if is_scalar else routes.flat(m), x) for m in (model, plain)
        )
        torch.testing.assert_close(got, expected, msg=route, **TOLERANCE)
    data = make(3, 2, 4), make(3, 2, 4, seed=1)
    for build in ("hessian", "gauss_newton", "fisher"):
        options = dict(likelihood="normal") if build == "fisher" else {}
        matrices = [
            getattr(Objective(m, F.mse_loss, data, batch_size=2), build)(**options) for m in (model, plain)
        ]
        v = make(matrices[0].shape[0], seed=3)
        torch.testing.assert_close(matrices[0] @ v, matrices[1] @ v, **TOLERANCE)


def test_what_a_checkpoint_cannot_do_is_said_in_our_words():
    model, x = Checkpointed(True), make(1, 2, 4)
    with pytest.raises(RuntimeError, match=r"under torch\.utils\.checkpoint was computed again"):
        functional.hvp(survey.objective(model), x, x, create_graph=True)


def test_a_determinant_in_a_checkpoint_of_a_closure():
    """Of a regular matrix it is torch's own, which a checkpoint computes again as it is."""
    p = (A + 3 * torch.eye(3)).clone().requires_grad_()
    optimizer = optim.Newton([p])
    optimizer.step(lambda: checkpoint(lambda q: torch.linalg.det(q) ** 2, p, use_reentrant=False))
    assert optimizer.report.accepted


def test_products_of_complex_entries_are_torchs():
    """Their Hessian is not symmetric: no side stands for the other."""
    x = torch.complex(make(3), make(3, seed=1))

    def func(x):
        return x.prod().abs().square() + (x * x).sum().real

    torch.testing.assert_close(functional.vhp(func, x, x)[1], reference.vhp(func, x, x)[1])
    torch.testing.assert_close(functional.hvp(func, x, x)[1], reference.hvp(func, x, x)[1])
    torch.testing.assert_close(Hessian.of(func, x) @ x, reference.vhp(func, x, x)[1])
