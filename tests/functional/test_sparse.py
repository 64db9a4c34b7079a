"""Sparse matrices against dense ones; colourings against their definitions."""

import pytest
import torch
import torch.autograd.functional as reference
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder.functional import LinearMap, sparse_hessian, sparse_jacobian
from secondorder.functional.colouring import distance_two_colours, star_colours

EXACT = dict(rtol=1e-10, atol=1e-11)


def tridiagonal(x):
    return (x[1:] * x[:-1]).sin().sum() + x.pow(4).sum()


def arrow(x):
    return (x[0] * x[1:].sin()).sum() + x.pow(3).sum()


def grid(x):
    u = x.view(6, 6)
    return (u[1:] - u[:-1]).pow(4).sum() + (u[:, 1:] * u[:, :-1]).exp().sum()


HESSIANS = {
    "tridiagonal": (tridiagonal, 30, 3),
    "arrow": (arrow, 30, 2),
    "grid": (grid, 36, 9),
    "diagonal": (lambda x: x.pow(3).sum(), 20, 1),
    "dense": (lambda x: x.sum().pow(3), 8, 8),
    "zero": (lambda x: x.sum(), 8, 1),
    "switched": (lambda x: torch.where(x[1:] > 0, x[1:] * x[:-1], x[1:]).pow(2).sum(), 20, 3),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_hessian(name, monkeypatch):
    func, n, most = HESSIANS[name]
    x, products = zoo.vector(n, 1), []
    call = LinearMap.__call__

    def counted(self, v, **options):
        products.append(options.get("batched", False))
        return call(self, v, **options)

    monkeypatch.setattr(LinearMap, "__call__", counted)
    H = sparse_hessian(func, x)
    assert H.is_coalesced()
    torch.testing.assert_close(H.to_dense(), reference.hessian(func, x), **EXACT)
    assert products.count(False) <= most + 1
    again = sparse_hessian(func, x + 0.1, pattern=H.indices()) if name != "switched" else None
    if again is not None:
        torch.testing.assert_close(again.to_dense(), reference.hessian(func, x + 0.1), **EXACT)


def test_ten_thousand_unknowns_take_few_products(monkeypatch):
    x = zoo.vector(10_000, 1)
    index = torch.arange(10_000)
    band = torch.cat([torch.stack([index[:-1], index[1:]]), torch.stack([index, index])], dim=1)
    products, call = [], LinearMap.__call__
    monkeypatch.setattr(LinearMap, "__call__", lambda self, v, **o: products.append(1) or call(self, v, **o))
    H = sparse_hessian(tridiagonal, x, pattern=band)
    assert len(products) <= 20
    assert H.indices().shape[1] == 29_998
    diagonal = 12 * x**2
    inner = (x[1:] * x[:-1]).sin()
    diagonal[1:] -= inner * x[:-1] ** 2
    diagonal[:-1] -= inner * x[1:] ** 2
    dense_diagonal = torch.zeros_like(x)
    on = H.indices()[0] == H.indices()[1]
    dense_diagonal[H.indices()[0][on]] = H.values()[on]
    torch.testing.assert_close(dense_diagonal, diagonal, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_the_pattern_of_ten_thousand_unknowns_is_found():
    H = sparse_hessian(tridiagonal, zoo.vector(10_000, 1))
    rows, columns = H.indices()
    assert len(rows) == 29_998
    assert int((rows - columns).abs().max()) == 1


@pytest.mark.parametrize(
    ("func", "n"),
    [
        (lambda x: x[1:] * x[:-1], 12),
        (lambda x: torch.cat([x.sin(), x[:1] * x[1:2]]), 12),
        (lambda x: x.view(3, 4).sum(1), 12),
        (lambda x: x[:0], 3),
        (lambda x: torch.ones(2, dtype=torch.float64), 3),
    ],
)
def test_jacobian(func, n):
    x = zoo.vector(n, 1)
    J = sparse_jacobian(func, x)
    dense = torch.autograd.functional.jacobian(func, x) if func(x).numel() else torch.zeros(0, n).double()
    torch.testing.assert_close(J.to_dense(), dense, **EXACT)


def test_a_pattern_that_misses_an_entry_is_refused():
    x = zoo.vector(10, 1)
    diagonal = torch.arange(10).repeat(2, 1)
    with pytest.raises(ValueError, match="pattern misses an entry"):
        sparse_hessian(tridiagonal, x, pattern=diagonal)
    with pytest.raises(ValueError, match="pattern misses an entry"):
        sparse_jacobian(lambda x: x.cumsum(0), x, pattern=diagonal)


@given(st.integers(1, 14), st.floats(0.0, 0.5), st.integers(0, 2**16))
def test_star_colouring_has_no_path_of_four_in_two_colours(n, density, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n, n, generator=generator) < density
    matrix = matrix | matrix.T | torch.eye(n, dtype=torch.bool)
    rows, columns = matrix.nonzero().T
    colours = star_colours(rows, columns, n).tolist()
    edges = [(a, b) for a, b in zip(rows.tolist(), columns.tolist(), strict=True) if a != b]
    assert all(colours[a] != colours[b] for a, b in edges)
    after = {a: [b for c, b in edges if c == a] for a in range(n)}
    for a, b in edges:
        for c in after[b]:
            for d in after[c]:
                if c != a and d != b and d != a:
                    assert len({colours[a], colours[b], colours[c], colours[d]}) >= 3


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.0, 0.5), st.integers(0, 2**16))
def test_distance_two_colouring_separates_columns_that_share_a_row(m, n, density, seed):
    matrix = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < density
    rows, columns = matrix.nonzero().T
    colours = distance_two_colours(rows, columns, m, n)
    for row in matrix:
        used = colours[row]
        assert len(used) == len(used.unique())


def test_bad_input():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"must have shape \(n,\), got \(3, 1\)"):
        sparse_hessian(tridiagonal, x[:, None])
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        sparse_hessian(tridiagonal, [1.0])
    with pytest.raises(ValueError, match=r"indices, shape \(2, nnz\), torch.int64, got \(3,\)"):
        sparse_hessian(tridiagonal, x, pattern=torch.zeros(3))
    with pytest.raises(ValueError, match=r"indices below \(3, 3\)"):
        sparse_hessian(tridiagonal, x, pattern=torch.tensor([[3], [0]]))
    with pytest.raises(ValueError, match=r"one tensor of shape \(m,\)"):
        sparse_jacobian(lambda x: x.sum(), x)
