import pytest
import torch
import zoo

from secondorder import FunctionOperator, MatrixOperator


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
    with pytest.raises(ValueError, match=r"number or have shape \(6,\), got \(2,\)"):
        operator + torch.ones(2)
    with pytest.raises(ValueError, match=r"shape \(n, n\), got \(2, 3\)"):
        MatrixOperator(torch.ones(2, 3))
    with pytest.raises(TypeError):
        operator * operator


def test_repr(pair):
    assert repr(pair[2]) == "MatrixOperator(shape=(6, 6), dtype=torch.float64, device=cpu)"
