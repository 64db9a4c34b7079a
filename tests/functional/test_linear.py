"""``value_and_grad``, ``linearize``, ``linearize_grad``, ``hvps`` and the extras of torch's six functions."""

import pytest
import torch
import torch.autograd.functional as reference
import zoo

import secondorder.functional as ours
from secondorder.autodiff import compat
from secondorder.functional import hvps, linearize, linearize_grad, module_function, value_and_grad

EXACT = dict(rtol=1e-12, atol=1e-12)


def polynomial(x, y):
    return (x.outer(y).tanh().sum() + x.pow(3).sum()) * y.exp().sum()


@pytest.fixture
def point():
    return zoo.vector(3, 1), zoo.vector(2, 2)


def test_value_and_grad_of_a_dict():
    case = zoo.network("mlp_cross_entropy")
    function, parameters = module_function(case.model, case.loss, case.inputs, case.targets)
    value, grads = value_and_grad(function, parameters)
    expected = torch.autograd.grad(case.value(), list(case.model.parameters()))
    assert value.item() == pytest.approx(case.value().item())
    assert not value.requires_grad
    for (name, grad), reference_grad in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(grad, reference_grad, **EXACT)
        assert parameters[name].grad is None


def test_value_and_grad_with_aux_and_graph(point):
    x, y = point[0].requires_grad_(), point[1]
    value, (gx, gy), aux = value_and_grad(
        lambda x, y: (polynomial(x, y), {"twice": 2 * x}), (x, y), create_graph=True, has_aux=True
    )
    assert value.requires_grad
    (third,) = torch.autograd.grad(gx.square().sum() + gy.sum(), x)
    assert third.shape == x.shape
    torch.testing.assert_close(aux["twice"], 2 * x)
    detached = value_and_grad(lambda x: (x.sum(), 2 * x), x, has_aux=True)[2]
    assert not detached.requires_grad


def test_linearize_grad_multiplies_by_the_hessian(point):
    value, grad, hvp_fn = linearize_grad(polynomial, point)
    v = (zoo.vector(3, 3), zoo.vector(2, 4))
    expected_value, expected = reference.hvp(polynomial, point, v)
    torch.testing.assert_close(value, expected_value, **EXACT)
    torch.testing.assert_close(grad, reference.vjp(polynomial, point)[1], **EXACT)
    for _ in range(2):
        torch.testing.assert_close(hvp_fn(v), expected, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 7])
def test_batches_are_single_products(point, chunk_size):
    _, _, hvp_fn = linearize_grad(polynomial, point)
    V = (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64))
    batched = hvp_fn(V, batched=True, chunk_size=chunk_size)
    for i in range(5):
        single = hvp_fn((V[0][i], V[1][i]))
        torch.testing.assert_close((batched[0][i], batched[1][i]), single, **EXACT)
    torch.testing.assert_close(hvps(polynomial, point, V, chunk_size=chunk_size)[1], batched, **EXACT)


def test_linearize_multiplies_by_the_jacobian(point):
    def func(x, y):
        return x.outer(y).sin(), y.exp() * x.sum()

    outputs, jvp_fn = linearize(func, point)
    v = (zoo.vector(3, 3), zoo.vector(2, 4))
    torch.testing.assert_close((outputs, jvp_fn(v)), reference.jvp(func, point, v), **EXACT)
    V = (torch.stack([v[0], -v[0]]), torch.stack([v[1], -v[1]]))
    batched = jvp_fn(V, batched=True)
    torch.testing.assert_close(batched[0][1], -jvp_fn(v)[0], **EXACT)
    single, push = linearize(lambda p: p["a"] * p["b"], {"a": point[0], "b": 2 * point[0]})
    torch.testing.assert_close(push({"a": v[0], "b": v[0]}), 3 * point[0] * v[0], **EXACT)
    assert single.shape == (3,)


def test_custom_functions_get_the_product_from_the_right():
    x, v = zoo.vector(2, 1), zoo.vector(2, 2)
    expected = reference.hvp(zoo.Skewed.apply, x, v)[1]
    torch.testing.assert_close(linearize_grad(zoo.Skewed.apply, x)[2](v), expected, **EXACT)
    torch.testing.assert_close(ours.hvp(zoo.Skewed.apply, x, v)[1], expected, **EXACT)


def test_functions_without_dependence_give_zeros():
    _, grad, hvp_fn = linearize_grad(lambda x, y: x.sum(), (torch.ones(2), torch.ones(3)))
    assert grad[1].tolist() == [0.0, 0.0, 0.0]
    assert [t.tolist() for t in hvp_fn((torch.ones(2), torch.ones(3)))] == [[0, 0], [0, 0, 0]]
    batched = hvp_fn((torch.ones(4, 2), torch.ones(4, 3)), batched=True)
    assert [tuple(t.shape) for t in batched] == [(4, 2), (4, 3)]
    assert "LinearMap" in repr(hvp_fn)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: linearize_grad(lambda x: x, torch.ones(2)),
            ValueError,
            r"one real element, got shape \(2,\)",
        ),
        (lambda: linearize_grad(lambda x: 1.0, torch.ones(2)), TypeError, "must return a tensor, got float"),
        (lambda: linearize_grad(lambda x: x.sum(), torch.ones(2).long()), TypeError, "got torch.int64"),
        (
            lambda: linearize_grad(lambda x: x, {"a": "b"}),
            TypeError,
            "must be floating-point tensors, got str",
        ),
        (lambda: linearize_grad(lambda: 1, ()), TypeError, "at least one tensor, got none"),
        (
            lambda: linearize_grad(lambda x: x.sum(), torch.ones(2))[2](torch.ones(3)),
            ValueError,
            r"v must have shape \(2,\) and dtype torch.float32, got \(3,\)",
        ),
        (
            lambda: linearize_grad(lambda x: x.sum(), torch.ones(2))[2]((torch.ones(2),)),
            ValueError,
            "v must have the structure of the inputs",
        ),
        (
            lambda: hvps(lambda x: x.sum(), torch.ones(2), torch.ones(2)),
            ValueError,
            r"v must have shape \('k', 2\)",
        ),
        (
            lambda: hvps(lambda x: x.sum(), torch.ones(2), torch.ones(3, 2), chunk_size=0),
            ValueError,
            "chunk_size must be a positive integer or None, got 0",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


class TestExtrasOfTheSix:
    """What torch does not have: forward mode, chunks, gradients and outputs beside, auxiliary results."""

    def test_jvp_by_forward_mode(self, point):
        def func(x, y):
            return x.outer(y).sin(), y * 2

        v = (zoo.vector(3, 3), zoo.vector(2, 4))
        expected = reference.jvp(func, point, v)
        torch.testing.assert_close(ours.jvp(func, point, v, strategy="forward-mode"), expected, **EXACT)

    @pytest.mark.parametrize(
        "strategy", ["auto", "double-backward", "reverse-over-reverse", "forward-over-reverse"]
    )
    def test_hvp_strategies_agree(self, point, strategy):
        v = (zoo.vector(3, 3), zoo.vector(2, 4))
        value, product, grad = ours.hvp(polynomial, point, v, strategy=strategy, return_grad=True)
        torch.testing.assert_close((value, product), reference.hvp(polynomial, point, v), **EXACT)
        torch.testing.assert_close(grad, reference.vjp(polynomial, point)[1], **EXACT)
        assert not any(t.requires_grad for t in (value, *product, *grad))

    @pytest.mark.parametrize("function", [torch.linalg.det, lambda a: torch.linalg.solve(a, a[:, 0]).sum()])
    def test_forward_over_reverse_of_solve_and_det(self, function):
        A, V = zoo.spd_matrix(3, 5.0, 1), zoo.indefinite_matrix(3, 2)
        got = ours.hvp(function, A, V, strategy="forward-over-reverse")[1]
        torch.testing.assert_close(got, reference.hvp(function, A, V)[1], rtol=1e-10, atol=1e-10)

    def test_unknown_strategies(self, point):
        with pytest.raises(ValueError, match="strategy must be one of 'auto', .*, got 'sideways'"):
            ours.hvp(polynomial, point, point, strategy="sideways")
        with pytest.raises(RuntimeError, match="strict=True needs reverse mode"):
            ours.jvp(polynomial, point, point, strategy="forward-mode", strict=True)

    @pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp", "jacobian", "hessian"])
    def test_aux_comes_last(self, point, name):
        def func(x, y):
            return polynomial(x, y), {"note": "kept", "sum": x.sum()}

        v = () if name in ("jacobian", "hessian") else ((None,) if name == "vjp" else (point,))
        *results, aux = getattr(ours, name)(func, point, *v, has_aux=True)
        expected = getattr(reference, name)(polynomial, point, *v)
        torch.testing.assert_close(results[0] if not v else tuple(results), expected, **EXACT)
        assert aux["note"] == "kept"
        assert not aux["sum"].requires_grad
        with pytest.raises(TypeError, match=r"must return a tuple \(outputs, aux\) with has_aux=True"):
            getattr(ours, name)(polynomial, point, *v, has_aux=True)

    @pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
    def test_chunks(self, point, chunk_size, strategy):
        def func(x, y):
            return x.outer(y).sin(), y * x.sum()

        got, outputs, aux = ours.jacobian(
            lambda x, y: (func(x, y), 7),
            point,
            vectorize=True,
            strategy=strategy,
            chunk_size=chunk_size,
            return_output=True,
            has_aux=True,
        )
        torch.testing.assert_close(got, reference.jacobian(func, point), **EXACT)
        torch.testing.assert_close(outputs, func(*point), **EXACT)
        assert aux == 7
        dense, value = ours.hessian(
            polynomial,
            point,
            vectorize=True,
            outer_jacobian_strategy=strategy,
            chunk_size=chunk_size,
            return_output=True,
        )
        torch.testing.assert_close(dense, reference.hessian(polynomial, point), **EXACT)
        torch.testing.assert_close(value, polynomial(*point), **EXACT)

    def test_chunk_size_out_of_range(self, point):
        with pytest.raises(ValueError, match="chunk_size must be a positive integer or None, got 0"):
            ours.jacobian(polynomial, point, chunk_size=0)

    def test_holomorphic(self):
        z = torch.complex(zoo.vector(3, 1), zoo.vector(3, 2))
        got = ours.jacobian(lambda z: z.exp() * z.sum(), z, holomorphic=True)
        expected = torch.diag(z.exp() * z.sum()) + z.exp()[:, None]
        torch.testing.assert_close(got, expected, **EXACT)
        with pytest.raises(TypeError, match="needs complex inputs and outputs, got torch.float64"):
            ours.jacobian(lambda z: z.exp(), z.real, holomorphic=True)

    def test_the_graph_decides_how_hvp_is_computed(self, point, monkeypatch):
        calls = []
        run = torch.autograd.graph._engine_run_backward
        for module, name in ((torch.autograd, "_engine_run_backward"), (compat, "_run_backward")):
            monkeypatch.setattr(module, name, lambda *a, **k: calls.append(1) or run(*a, **k))
        ours.hvp(polynomial, point, point)
        plain = len(calls)
        ours.hvp(polynomial, point, point, strict=True)
        assert (plain, len(calls) - plain) == (2, 3)


def matrix(rows, columns, seed):
    return zoo.vector(rows * columns, seed).view(rows, columns)


def test_norms_at_zero_have_the_product_of_torch():
    """``v^T H`` is NaN there, ``H v`` is not: group lasso, and biases that start at zero."""
    X, v = matrix(5, 3, 1), (matrix(3, 2, 2), zoo.vector(2, 3))
    point = (matrix(3, 2, 4), torch.zeros(2, dtype=torch.float64))

    def func(W, b):
        return (X @ W + b).square().mean() + 0.1 * (W.norm() + torch.linalg.vector_norm(b))

    expected = reference.hvp(func, point, v)[1]
    assert all(bool(part.isfinite().all()) for part in expected)
    torch.testing.assert_close(ours.hvp(func, point, v)[1], expected)
    torch.testing.assert_close(linearize_grad(func, point)[2](v), expected)


def test_a_scaled_gradient_is_not_taken_for_symmetric():
    index, E, V = torch.tensor([1, 1, 2, 0]), matrix(4, 2, 1), matrix(4, 2, 2)

    def func(E):
        return torch.nn.functional.embedding(index, E, scale_grad_by_freq=True).pow(3).sum() * E.sum()

    expected = reference.hvp(func, E, V)[1]
    torch.testing.assert_close(ours.hvp(func, E, V)[1], expected)
    torch.testing.assert_close(linearize_grad(func, E)[2](V), expected)


def test_edges_of_vectors():
    _, _, hvp_fn = linearize_grad(lambda x, y: (x**3).sum() * y.sum(), (zoo.vector(3, 3), zoo.vector(2, 3)))
    empty = hvp_fn((torch.zeros(0, 3).double(), torch.zeros(0, 2).double()), batched=True)
    assert [tuple(part.shape) for part in empty] == [(0, 3), (0, 2)]
    with pytest.raises(ValueError, match=r"batches of one size, got leading dimensions \[2, 3\]"):
        hvp_fn((torch.zeros(2, 3).double(), torch.zeros(3, 2).double()), batched=True)
    with pytest.raises(ValueError, match="v must hold tensors"):
        linearize_grad(lambda x: (x**2).sum(), zoo.vector(1, 3))[2](3.0)
    with pytest.raises(TypeError, match=r"must return \(value, aux\)"):
        value_and_grad(lambda x: (x**2).sum(), zoo.vector(3, 3), has_aux=True)


def test_finite_differences_of_long_vectors():
    x, v = torch.ones(3), torch.full((3,), 1e30)
    product = ours.hvp(lambda x: (x**3).sum(), x, v, strategy="finite-differences")[1]
    torch.testing.assert_close(product / 1e30, 6 * x, rtol=1e-2, atol=1e-2)
