"""Solvers on a device: as the CPU does it, with few reads and launches, however far they go ahead."""

from __future__ import annotations

import functools
import math

import pytest
import simulated
import torch
import zoo

from secondorder.solvers import (
    RelativeProgress,
    block_cg,
    cg,
    cholesky,
    direct,
    eigsh,
    gltr,
    lsmr,
    minres,
    nystrom,
    steihaug,
    trace,
    trust_region,
)

N = 40


def systems(dtype):
    definite = zoo.spd_matrix(N, 1e2, 1).to(dtype)
    return {"definite": definite, "indefinite": zoo.indefinite_matrix(N, seed=1).to(dtype)}


def vector(seed, dtype):
    return zoo.vector(N, seed).to(dtype)


def seeded():
    return torch.Generator("cpu").manual_seed(0)


# Each takes a matrix as an operator, a right-hand side, and another vector.
ITERATIVE = {
    "cg": lambda A, b, x, **k: cg(A, b, **k),
    "cg from a start": lambda A, b, x, **k: cg(A, b, x0=x, **k),
    "cg with a preconditioner": lambda A, b, x, **k: cg(A, b, M=_jacobi(A), **k),
    "cg with a callback": lambda A, b, x, **k: cg(A, b, rtol=1e-10, callback=RelativeProgress(), **k),
    "steihaug": lambda A, b, x, **k: steihaug(A, b, 0.5, **k),
    "steihaug in a norm": lambda A, b, x, **k: steihaug(A, b, 0.5, M=_jacobi(A), **k),
    "minres": lambda A, b, x, **k: minres(A, b, **k),
    "minres with a preconditioner": lambda A, b, x, **k: minres(A, b, M=_jacobi(A), **k),
    "minres from a start": lambda A, b, x, **k: minres(A, b, x0=x, **k),
    "lsmr": lambda A, b, x, **k: lsmr(A, b, **k),
    "lsmr with damping": lambda A, b, x, **k: lsmr(A, b, damping=0.1, **k),
    "lsmr from a start": lambda A, b, x, **k: lsmr(A, b, x0=x, **k),
    "block_cg": lambda A, b, x, **k: block_cg(A, torch.stack([b, x], dim=1), **k),
    "block_cg with a preconditioner": lambda A, b, x, **k: block_cg(
        A, torch.stack([b, x], dim=1), M=_jacobi(A), **k
    ),
}
OTHERS = {
    "gltr": lambda A, b, x: gltr(A, b, 0.5),
    "direct": lambda A, b, x: direct(A, b),
    "cholesky": lambda A, b, x: cholesky(A, b),
    "trust_region": lambda A, b, x: trust_region(A, b, 0.5),
    "eigsh": lambda A, b, x: eigsh(A, 3, v0=b, generator=seeded()),
    "trace": lambda A, b, x: trace(A, generator=seeded()),
    "nystrom": lambda A, b, x: nystrom(A, 8, damping=0.1, generator=seeded()) @ b,
}


class Operator:
    """Products with a symmetric matrix, or its inverse diagonal; it knows how many launches they took."""

    is_symmetric = True

    def __init__(self, matrix, spent=None):
        self.matrix, self.shape = matrix, (len(matrix), len(matrix))
        self.dtype, self.device = matrix.dtype, matrix.device
        self.spent = [0] if spent is None else spent

    def __matmul__(self, v):
        before = launched(v)
        if self.matrix.ndim == 2:
            product = self.matrix @ v
        else:
            product = self.matrix.view(-1, *[1] * (v.ndim - 1)) * v
        self.spent[0] += launched(v) - before
        return product

    @property
    def T(self):  # noqa: N802
        return self


def launched(v):
    return torch.ops.simulated.counts()[0] if v.device.type == simulated.NAME else 0


def _jacobi(A):
    return A.inverse


def operator(matrix):
    A = Operator(matrix)
    A.inverse = Operator(1 / matrix.diagonal().abs(), A.spent)
    return A


def parts(result):
    found = result if isinstance(result, tuple) else (result,)
    return [part for part in found if isinstance(part, torch.Tensor | float | int | str)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["definite", "indefinite"])
@pytest.mark.parametrize("name", [*ITERATIVE, *OTHERS])
def test_numbers_are_those_of_the_cpu(device, same, name, kind, dtype):
    solve, A = {**ITERATIVE, **OTHERS}[name], systems(dtype)[kind]
    b, x = vector(2, dtype), vector(3, dtype)
    if (name, kind) in {("cholesky", "indefinite"), ("nystrom", "indefinite")}:
        pytest.skip("is for definite ones")
    here = parts(solve(operator(A), b, x))
    there = parts(solve(operator(A.to(device)), b.to(device), x.to(device)))
    for one, other in zip(there, here, strict=True):
        if isinstance(one, str | int):
            assert one == other
        else:
            same(one, other)


# Beside products: an iteration, and a solve.
READS = {"minres": 5, "minres with a preconditioner": 5, "minres from a start": 6, "block_cg": 2}
READS["block_cg with a preconditioner"] = 2
LAUNCHES = dict.fromkeys(ITERATIVE, 16) | {"block_cg with a preconditioner": 18}


@pytest.mark.parametrize("check_every", [1, 4, 7])
@pytest.mark.parametrize("kind", ["definite", "indefinite"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_host_reads(counted, name, kind, check_every):
    """One for some iterations, one at the end; block CG looks at sizes first, MINRES verifies meanwhile."""
    A = operator(systems(torch.float64)[kind].to(counted))
    b, x = (vector(seed, torch.float64).to(counted) for seed in (2, 3))
    counter = simulated.Counter()
    result = ITERATIVE[name](A, b, x, check_every=check_every)
    assert result.status in ("converged", "least_squares", "stopped", "boundary", "negative_curvature")
    begun = result.iterations + (result.status in ("boundary", "negative_curvature"))
    assert counter.counts.reads <= math.ceil(begun / check_every) + READS.get(name, 1), counter.why
    assert counter.counts.uploads <= (2 * begun if "block" in name else 0)


@pytest.mark.parametrize("name", ITERATIVE)
def test_launches_of_an_iteration(counted, name):
    """What ten iterations more take, without the products."""
    solve = ITERATIVE[name]
    matrix = zoo.spd_matrix(N, 1e4, 1)
    b, x = (vector(seed, torch.float64).to(counted) for seed in (2, 3))
    launches = []
    for max_iter in (3, 13):
        A = operator(matrix.to(counted))
        counter = simulated.Counter()
        rtol = {} if "callback" in name else {"rtol": 0.0}
        if "steihaug" in name:
            run = functools.partial(steihaug, A, b, 1e6, M=_jacobi(A) if "norm" in name else None)
        else:
            run = functools.partial(solve, A, b, x)
        result = run(max_iter=max_iter, **rtol)
        assert result.iterations == max_iter
        launches.append(counter.counts.launches - A.spent[0])
    assert (launches[1] - launches[0]) / 10 <= LAUNCHES[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["definite", "indefinite"])
@pytest.mark.parametrize("name", ITERATIVE)
def test_results_do_not_depend_on_how_far_ahead(name, kind, dtype):
    A, b, x = operator(systems(dtype)[kind]), vector(2, dtype), vector(3, dtype)
    first = ITERATIVE[name](A, b, x)
    for check_every in (2, 5, 1000):
        result = ITERATIVE[name](A, b, x, check_every=check_every)
        assert torch.equal(result.x, first.x)
        assert result._replace(x=None, direction=None, columns=(), products=0) == first._replace(
            x=None, direction=None, columns=(), products=0
        )
        assert (result.direction is None) == (first.direction is None)
        assert result.direction is None or torch.equal(result.direction, first.direction)
        assert result.products >= first.products
