import gc

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
import zoo
from memory import PeakMemory

from secondorder import (
    FunctionOperator,
    Hessian,
    Jacobian,
    LinearOperator,
    MatrixOperator,
    Objective,
    block_cg,
    cg,
    cholesky,
    direct,
    minres,
)
from secondorder.functional import sparse_hessian
from secondorder.vectors.flat import flatten


@pytest.fixture
def pair():
    A, B = zoo.indefinite_matrix(6, 1), zoo.spd_matrix(6, 10.0, 2)
    return A, B, MatrixOperator(A), FunctionOperator(lambda v: B @ v, B[0])


def test_algebra_equals_dense(pair):
    A, B, first, second = pair
    diagonal, eye = zoo.vector(6, 3), torch.eye(6, dtype=torch.float64)
    cases = {
        "sum": (first + second, A + B),
        "difference": (first - second, A - B),
        "scaled": (2.5 * first * 2, 5 * A),
        "negative": (-second, -B),
        "number": (second + 0.5, B + 0.5 * eye),
        "number_first": (0.5 + second, B + 0.5 * eye),
        "minus_number": (second - 0.5, B - 0.5 * eye),
        "diagonal": (first + diagonal, A + diagonal.diag()),
    }
    for operator, matrix in cases.values():
        torch.testing.assert_close(operator.dense(), matrix)
        torch.testing.assert_close(operator.dense(chunk_size=4), matrix)
        v = zoo.vector(6, 4)
        torch.testing.assert_close(operator @ v, matrix @ v)


def test_empty_block(pair):
    assert (pair[2] @ torch.zeros(6, 0, dtype=torch.float64)).shape == (6, 0)


def test_spectrum_is_computed_once(pair):
    assert pair[2].spectrum is pair[2].spectrum
    torch.testing.assert_close(pair[2].spectrum.values, torch.linalg.eigvalsh(pair[0]))


def test_bad_input(pair):
    operator = pair[3]
    with pytest.raises(ValueError, match=r"v must have shape \(6,\) or \(6, k\), got \(5,\)"):
        operator @ torch.zeros(5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"dtype torch.float64, got torch.float32"):
        operator @ torch.zeros(6)
    with pytest.raises(ValueError, match="v must be on cpu, got meta"):
        operator @ torch.zeros(6, dtype=torch.float64, device="meta")
    with pytest.raises(TypeError, match="v must be a tensor, got list"):
        operator @ [1.0]
    with pytest.raises(ValueError, match=r"one shape, got \(6, 6\) and \(2, 2\)"):
        operator + MatrixOperator(torch.eye(2))
    with pytest.raises(ValueError, match=r"number or a diagonal of shape \(6,\), got \(2,\)"):
        operator + torch.ones(2)
    with pytest.raises(ValueError, match=r"shape \(m, n\), got \(2,\)"):
        MatrixOperator(torch.ones(2))
    with pytest.raises(TypeError):
        operator * operator
    wide = MatrixOperator(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"diagonal needs a square operator, got shape \(2, 3\)"):
        (wide + wide).diagonal()
    with pytest.raises(ValueError, match=r"adding a number or a diagonal needs a square operator"):
        wide + 1.0
    with pytest.raises(ValueError, match=r"must fit for A @ B, got shapes \(2, 3\) and \(6, 6\)"):
        wide @ operator
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        operator.dense(chunk_size=0)
    with pytest.raises(ValueError, match="transpose must be given for 3 rows and 2 columns"):
        FunctionOperator(lambda v: v, torch.ones(2), rows=3)
    with pytest.raises(ValueError, match="solver must be one of 'auto', 'cg', 'minres', 'direct', 'lsmr'"):
        operator.solve(torch.ones(6, dtype=torch.float64), solver="qr")
    with pytest.raises(ValueError, match="damping must be non-negative, got -1"):
        operator.solve(torch.ones(6, dtype=torch.float64), damping=-1.0)
    with pytest.raises(ValueError, match="M is for solver='cg' or 'minres', got solver='direct'"):
        operator.solve(torch.ones(6, dtype=torch.float64), solver="direct", M=torch.eye(6))
    with pytest.raises(NotImplementedError, match="has no transpose; give it a method _rmatvec"):
        Unsymmetric().T @ torch.ones(2)


class Unsymmetric(LinearOperator):
    is_symmetric = False

    def __init__(self):
        super().__init__((2, 2), torch.float32, torch.device("cpu"))

    def _matvec(self, v):
        return v.cumsum(0)


def test_rectangular_algebra_equals_dense():
    A, B, S = (zoo.vector(24, seed).view(shape) for seed, shape in ((1, (6, 4)), (2, (6, 4)), (3, (4, 6))))
    first, second, third = MatrixOperator(A), MatrixOperator(B), MatrixOperator(S)
    cases = {
        "sum": (first + second, A + B),
        "difference": (first - 2 * second, A - 2 * B),
        "quotient": (first / 2, A / 2),
        "transpose": (first.T, A.T),
        "transposed_twice": (first.T.T, A),
        "transposed_sum": ((first + second).T, (A + B).T),
        "product": (first @ third, A @ S),
        "transposed_product": ((first @ third).T, (A @ S).T),
        "shifted_product": (first @ third + 0.5, A @ S + 0.5 * torch.eye(6, dtype=A.dtype)),
        "transposed_shifted": ((first @ third + zoo.vector(6, 4)).T, (A @ S).T + zoo.vector(6, 4).diag()),
        "number_minus": (1.0 - first @ third, torch.eye(6, dtype=A.dtype) - A @ S),
        "square": (first.T @ first, A.T @ A),
    }
    for name, (operator, matrix) in cases.items():
        assert operator.shape == tuple(matrix.shape)
        torch.testing.assert_close(operator.dense(), matrix)
        torch.testing.assert_close(operator.T.dense(), matrix.T)
        v, u = zoo.vector(matrix.shape[1], 5), zoo.vector(matrix.shape[0], 6)
        torch.testing.assert_close(operator @ v, matrix @ v)
        torch.testing.assert_close(operator.T @ u, matrix.T @ u)
        assert operator.is_symmetric == (name == "square")
        if matrix.shape[0] == matrix.shape[1]:
            torch.testing.assert_close(operator.diagonal(chunk_size=3), matrix.diagonal())
    assert first.T.T is first
    torch.testing.assert_close(Unsymmetric() @ torch.ones(2, 3), torch.tensor([[1.0] * 3, [2.0] * 3]))


def test_scipy_takes_the_operators(pair):
    eigenvalues = scipy.sparse.linalg.eigsh(pair[3].to_scipy(), k=2, return_eigenvectors=False)
    np.testing.assert_allclose(sorted(eigenvalues), torch.linalg.eigvalsh(pair[1])[-2:].numpy())
    A = MatrixOperator(zoo.vector(24, 1).view(6, 4).float())
    found = A.to_scipy()
    assert (found.shape, found.dtype) == ((6, 4), np.float32)
    np.testing.assert_allclose(found @ np.eye(4, dtype=np.float32), A.dense().numpy())
    np.testing.assert_allclose(
        found.T @ np.ones(6, dtype=np.float32), (A.T @ torch.ones(6)).numpy(), rtol=1e-5
    )
    values = scipy.sparse.linalg.svds(found, k=2, return_singular_vectors=False)
    np.testing.assert_allclose(sorted(values), torch.linalg.svdvals(A.dense())[:2].flip(0).numpy(), rtol=1e-4)


def test_solve_dispatches(pair):
    A, B, first, second = pair
    b, block = zoo.vector(6, 7), zoo.vector(12, 8).view(6, 2)
    for target in (b, block):
        torch.testing.assert_close(second.solve(target).x, torch.linalg.solve(B, target))
        for solver in ("cg", "minres", "direct", "lsmr"):
            result = second.solve(target, solver=solver, rtol=1e-10, damping=0.0)
            assert result.status == "converged"
            torch.testing.assert_close(result.x, torch.linalg.solve(B, target))
            damped = second.solve(target, solver=solver, rtol=1e-10, damping=0.5)
            matrix = B @ B if solver == "lsmr" else B
            right = B @ target if solver == "lsmr" else target
            expected = torch.linalg.solve(matrix + 0.5 * torch.eye(6, dtype=B.dtype), right)
            torch.testing.assert_close(damped.x, expected)
    assert first.solve(b, solver="cg").status == "negative_curvature"
    torch.testing.assert_close(first.solve(b, solver="minres", rtol=1e-10).x, torch.linalg.solve(A, b))
    assert second.solve(b, solver="cg", M=torch.linalg.inv(B)).iterations == 1
    assert second.solve(b, M=torch.linalg.inv(B)).iterations == 1


def test_repr(pair):
    assert repr(pair[2]) == "MatrixOperator(shape=(6, 6), dtype=torch.float64, device=cpu)"


def test_products_that_mirror_are_symmetric():
    J = MatrixOperator(zoo.vector(12, 1).view(4, 3))
    D = MatrixOperator(torch.diag(zoo.vector(4, 2)))
    skew = MatrixOperator(zoo.vector(16, 3).view(4, 4))
    assert (J.T @ J).is_symmetric
    assert (J.T @ D @ J).is_symmetric
    assert (J.T @ (D @ J)).is_symmetric
    assert not (J.T @ skew @ J).is_symmetric
    dense = J.dense().T @ D.dense() @ J.dense()
    torch.testing.assert_close((J.T @ D @ J).dense(), dense)


def test_repr_shows_what_it_is_made_of():
    A = MatrixOperator(torch.eye(2))
    assert repr(A) == "MatrixOperator(shape=(2, 2), dtype=torch.float32, device=cpu)"
    assert "LinearOperator(2 * (MatrixOperator + 0.1), shape=(2, 2)" in repr(2 * (A + 0.1))
    J = MatrixOperator(torch.ones(3, 2))
    assert "MatrixOperator.T @ MatrixOperator + diagonal" in repr(J.T @ J + torch.ones(2))


def test_sparse_matrices():
    x = zoo.vector(20, 1)
    S = sparse_hessian(lambda x: (x[1:] * x[:-1]).sum() + 3 * x.pow(2).sum(), x)
    b, dense = zoo.vector(20, 2), S.to_dense()
    expected = torch.linalg.solve(dense, b)
    for solve in (cg, minres, direct, cholesky):
        torch.testing.assert_close(solve(S, b).x, expected, rtol=1e-3, atol=1e-4)
    A = MatrixOperator(S)
    assert A.is_symmetric
    torch.testing.assert_close(A.diagonal(), dense.diagonal())
    torch.testing.assert_close(A.solve(b).x, expected)
    with pytest.raises(ValueError, match="A must be symmetric"):
        cg(torch.triu(dense).to_sparse(), b)


def test_another_dtype():
    A = MatrixOperator(torch.tensor([[2.0, 1.0], [0.0, 3.0]])).to(torch.float64)
    assert (A @ torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert (A.T @ torch.ones(2, dtype=torch.float64)).tolist() == [2.0, 4.0]
    assert A.dense().dtype == torch.float64


def test_mistakes_are_named():
    b = zoo.vector(3, 1)
    A = MatrixOperator(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"function must return a tensor of shape \(3,\), .* got \(2,\)"):
        FunctionOperator(lambda v: v[:2], b) @ b
    with pytest.raises(ValueError, match="torch.float64, got .* torch.float32"):
        FunctionOperator(lambda v: v.float(), b) @ b
    with pytest.raises(TypeError, match=r"like must be a vector such as torch.zeros\(n\), got int"):
        FunctionOperator(lambda v: v, 3)
    with pytest.raises(TypeError, match="matrix must have a floating-point dtype, got torch.int64"):
        MatrixOperator(torch.eye(3, dtype=torch.long))
    for solve in (cg, minres, lambda A, b, M: block_cg(A, b[:, None], M=M)):
        with pytest.raises(TypeError, match="M must support M @ r, got function"):
            solve(A, b, M=lambda r: r)
        with pytest.raises(ValueError, match=r"M must have shape \(3, 3\), got \(3,\); use diagonal_prec"):
            solve(A, b, M=torch.ones(3))
        with pytest.raises(ValueError, match=r"M must have shape \(3, 3\), got \(2, 2\)"):
            solve(A, b, M=torch.eye(2))
    for solve in (cholesky, direct, LinearOperator.solve):
        with pytest.raises(ValueError, match="damping must be non-negative, got -1"):
            solve(A, b, damping=-1)
    with pytest.raises(TypeError, match="max_iter must be an integer, got 1.5"):
        cg(A, b, max_iter=1.5)
    with pytest.raises(ValueError, match="shift must be finite, got nan"):
        A + float("nan")
    with pytest.raises(ValueError, match="wrap a matrix in MatrixOperator"):
        A + torch.eye(3)
    assert not cg(A, b.clone().requires_grad_()).x.requires_grad


def test_transposes_do_not_keep_their_operators_alive():
    w = torch.ones(3, requires_grad=True)
    gc.disable()
    try:
        with PeakMemory() as memory:
            J = Jacobian(w.exp().sin(), [w])
            (J @ J.T).dense(), J.T @ torch.ones(3)
            del J
            assert memory.live == 0
    finally:
        gc.enable()


def test_shifts_are_copied_and_converted():
    A, shift = MatrixOperator(torch.eye(2)), torch.ones(2, dtype=torch.float64)
    shifted = A + shift
    shift.fill_(100.0)
    assert (shifted @ torch.ones(2)).tolist() == [2.0, 2.0]
    assert shifted.solve(torch.ones(2), solver="cg").x.dtype == torch.float32
    with pytest.raises(TypeError):
        A + np.ones(2)


def test_to_scipy_whatever_the_default_device():
    with torch.device("meta"):
        S = MatrixOperator(torch.eye(2, device="cpu")).to_scipy()
    assert (S @ np.ones(2, dtype=np.float32)).tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match="got torch.bfloat16"):
        MatrixOperator(torch.eye(2, dtype=torch.bfloat16)).to_scipy()


def of_two_parameters():
    parameters = [zoo.vector(6, 1).view(2, 3).requires_grad_(), zoo.vector(2, 2).requires_grad_()]
    loss = (parameters[0].sin().sum(1) * parameters[1]).square().sum()
    return Hessian(loss, parameters)


def test_products_from_the_left_and_by_a_call_equal_dense(pair):
    """A tensor leaves ``v @ A`` to the operator, NumPy's array too, which is then named."""
    A, u = zoo.vector(24, 1).view(6, 4), zoo.vector(6, 4)
    wide, U = MatrixOperator(A), zoo.vector(18, 5).view(3, 6)
    for operator, matrix in ((pair[2], pair[0]), (wide, A), (wide.T @ pair[3], A.T @ pair[1])):
        left = u if len(matrix) == 6 else u[:4]
        rows = U if len(matrix) == 6 else U[:, :4]
        torch.testing.assert_close(left @ operator, left @ matrix)
        torch.testing.assert_close(rows @ operator, rows @ matrix)
        right = zoo.vector(matrix.shape[1], 6)
        torch.testing.assert_close(operator(right), matrix @ right)
    with pytest.raises(ValueError, match=r"v must have shape \(6,\) or \(k, 6\) for v @ A, got \(4, 3\)"):
        torch.zeros(4, 3, dtype=torch.float64) @ wide
    for product in (lambda: u.numpy() @ wide, lambda: wide.T @ u.numpy(), lambda: wide.T(u.numpy())):
        with pytest.raises(
            TypeError, match=r"got ndarray; convert it with torch.from_numpy, or use A.to_sci"
        ):
            product()


def test_products_with_a_list_of_tensors_equal_dense():
    hessian = of_two_parameters()
    v = zoo.vector(8, 3)
    parts = (v[:6].view(2, 3), v[6:])
    whole = Objective(
        torch.nn.Linear(3, 2).double(),
        F.mse_loss,
        (zoo.vector(12, 1).view(4, 3), zoo.vector(8, 2).view(4, 2)),
    )
    other = MatrixOperator(zoo.spd_matrix(8, 10.0, 2))
    for operator in (
        hessian,
        hessian + 0.5,
        -hessian,
        other + 2 * hessian,
        whole.hessian(),
        hessian.to(torch.float32),
    ):
        dense = operator.dense()
        for kind in (list, tuple):
            given = kind(part.to(operator.dtype) for part in parts)
            for products in (operator @ given, operator(given), given @ operator):
                assert type(products) is kind
                assert [p.shape for p in products] == [p.shape for p in parts]
                torch.testing.assert_close(flatten(products), dense @ v.to(operator.dtype))
    block = hessian.restrict([1])
    torch.testing.assert_close((block @ [parts[1]])[0], block.dense() @ parts[1])


@pytest.mark.parametrize(
    "kind", ["count", "shape", "names", "entries", "dict", "number", "no_parts", "dtype", "dtypes"]
)
def test_what_is_no_list_of_parts_is_named(kind):
    hessian = of_two_parameters()
    v = [torch.zeros_like(p) for p in hessian.parameters]
    cases = {
        "count": (hessian, v[:1], ValueError, "a tensor for each of 2 parameters, got a list of 1"),
        "shape": (
            hessian,
            [v[0].T, v[1]],
            ValueError,
            r"v\[0\] must be a tensor of shape \(2, 3\), got \(3, 2\)",
        ),
        "names": (hessian, [("a", v[0]), ("b", v[1])], ValueError, r"v\[0\] must be a tensor .* got tuple"),
        "entries": (hessian, [1.0, 2.0], ValueError, r"v\[0\] must be a tensor .* got float"),
        "dict": (hessian, {"a": v[0], "b": v[1]}, TypeError, r"got dict; pass list\(v.values\(\)\)"),
        "number": (hessian, 2.0, TypeError, "v must be a tensor, got float"),
        "no_parts": (
            MatrixOperator(hessian.dense()),
            v,
            TypeError,
            r"got list; join .* parameters_to_vector",
        ),
        "dtypes": (
            hessian,
            [v[0], v[1].float()],
            TypeError,
            "one dtype, got torch.float64 and torch.float32",
        ),
        "dtype": (hessian, [x.float() for x in v], TypeError, "dtype torch.float64, got torch.float32"),
    }
    operator, given, error, text = cases[kind]
    for product in (lambda: operator @ given, lambda: operator(given), lambda: given @ operator):
        with pytest.raises(error, match=text):
            product()
