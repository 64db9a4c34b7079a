"""Sparse Jacobians and Hessians: a pattern, a colouring, a few products.

Reference: Coleman and Moré (1983, 1984), Estimation of sparse Jacobian (Hessian) matrices and graph coloring
problems; Gebremedhin, Manne and Pothen (2005), What color is your Jacobian?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.compat import sparse_coo
from secondorder.functional.colouring import distance_two_colours, star_colours
from secondorder.functional.linear import LinearMap, linearize, linearize_grad
from secondorder.vectors.tree import Tree

Function = Callable[..., Any]

# Entries of one batched pass: bounds memory.
PASS_SIZE = 2**22
# One random product must agree with the compressed matrix to this, relative.
VERIFY_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def sparse_jacobian(func: Function, inputs: Tensor, *, pattern: Tensor | None = None) -> Tensor:
    """The Jacobian as a sparse matrix, from as many products as it has colours.

    Columns that share no row get one colour, and are found by one product together (greedy distance-2
    colouring). One random product checks the result.

    Args:
        func: Takes a tensor of shape (n,), returns one of shape (m,).
        inputs: Shape (n,).
        pattern: Indices of the entries that may differ from zero, shape (2, nnz), as the ``indices()`` of a
            former result. Found by probing when None, with the control flow at ``inputs``: a superset.

    Returns:
        Sparse COO tensor of shape (m, n), coalesced, with the entries of the pattern.

    Raises:
        TypeError: ``inputs`` or the outputs are not real floating-point tensors.
        ValueError: shapes are not one-dimensional; ``pattern`` has another shape or misses an entry.

    Cost: a product for each colour, and one to check. Probing: one more evaluation, and one backward pass for
    each row, batched.

    Example:
        >>> sparse_jacobian(lambda x: x[1:] * x[:-1], torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[2., 1., 0.],
                [0., 3., 2.]])
    """
    _check_vector(inputs, "sparse_jacobian")
    outputs, jvp_fn = linearize(func, inputs)
    if not isinstance(outputs, Tensor) or outputs.ndim != 1:
        raise ValueError("func of sparse_jacobian must return one tensor of shape (m,).")
    if outputs.is_complex():
        raise TypeError(f"func of sparse_jacobian must return a real tensor, got {outputs.dtype}.")
    m, n = outputs.numel(), inputs.numel()
    if pattern is None:
        pattern = _probe_jacobian(func, inputs)
    _check_pattern(pattern, m, n)
    rows, columns = pattern
    colours = distance_two_colours(rows, columns, m, n)
    compressed = _compress(jvp_fn, colours, inputs, m)
    values = compressed[rows, colours[columns]]
    result = sparse_coo(pattern, values, (m, n)).coalesce()
    _verify(result, jvp_fn, inputs)
    return result


def sparse_hessian(func: Function, inputs: Tensor, *, pattern: Tensor | None = None) -> Tensor:
    """The Hessian as a sparse matrix, from as many products as it has colours.

    A star colouring uses the symmetry: an entry is read from its row or from its column. One random
    product checks the result.

    Args:
        func: Takes a tensor of shape (n,), returns one real element.
        inputs: Shape (n,).
        pattern: Indices of the entries that may differ from zero, shape (2, nnz), symmetric, as the
            ``indices()`` of a former result. Found by probing when None, with the control flow at
            ``inputs``: a superset.

    Returns:
        Sparse COO tensor of shape (n, n), coalesced, with the entries of the pattern.

    Raises:
        TypeError: ``inputs`` is not a floating-point tensor.
        ValueError: ``inputs`` is not one-dimensional; ``pattern`` has another shape or misses an entry.

    Cost: one gradient with a graph, a product for each colour (3 for a tridiagonal matrix), and one to
    check. Probing: one second backward pass for each unknown, batched.

    Example:
        >>> sparse_hessian(lambda x: (x[1:] * x[:-1]).sum(), torch.tensor([1.0, 2.0, 3.0])).to_dense()
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    _check_vector(inputs, "sparse_hessian")
    n = inputs.numel()
    _, _, hvp_fn = linearize_grad(func, inputs)
    if pattern is None:
        pattern = _probe_hessian(hvp_fn, inputs)
    _check_pattern(pattern, n, n)
    rows, columns = _symmetrised(pattern, n)
    colours = star_colours(rows, columns, n)
    compressed = _compress(hvp_fn, colours, inputs, n)
    # Entry (i, j) stands alone in row i of the colour of j, or in row j of the colour of i.
    key = rows * compressed.shape[1] + colours[columns]
    alone = torch.bincount(key, minlength=compressed.numel())[key] == 1
    values = torch.where(alone, compressed[rows, colours[columns]], compressed[columns, colours[rows]])
    indices = torch.stack([rows, columns])
    result = sparse_coo(indices, values, (n, n)).coalesce()
    _verify(result, hvp_fn, inputs)
    return result


def _compress(product: LinearMap, colours: Tensor, inputs: Tensor, rows: int) -> Tensor:
    """Products with the indicator vectors of the colours, shape (rows, number of colours)."""
    number = int(colours.max()) + 1 if colours.numel() else 0
    if number == 0 or rows == 0:
        return inputs.new_zeros(rows, number)
    seeds = torch.zeros(number, inputs.numel(), dtype=inputs.dtype, device=inputs.device)
    seeds[colours, torch.arange(inputs.numel(), device=inputs.device)] = 1
    return torch.stack([product(seed) for seed in seeds], dim=1)


def _probe_hessian(hvp_fn: LinearMap, inputs: Tensor) -> Tensor:
    """Where a NaN in the vector comes out: through every operation that might carry it."""
    n = inputs.numel()
    if n == 0:
        return torch.zeros(2, 0, dtype=torch.long, device=inputs.device)
    return _probe(lambda chunk: hvp_fn(chunk, batched=True), n, n, inputs).flip(0)


def _probe_jacobian(func: Function, inputs: Tensor) -> Tensor:
    tree = Tree.of(inputs, "sparse_jacobian")
    outputs = tree.call(func)
    m = outputs.numel()
    if m == 0 or not outputs.requires_grad:
        return torch.zeros(2, 0, dtype=torch.long, device=inputs.device)
    return _probe(lambda chunk: pull_rows([outputs], tree.leaves, [chunk])[0], m, inputs.numel(), outputs)


def _probe(pull: Callable[[Tensor], Tensor], count: int, width: int, like: Tensor) -> Tensor:
    """Indices (probe, entry) at which a unit vector of NaN comes out as NaN."""
    found, size = [], max(1, PASS_SIZE // max(count, width))
    for start in range(0, count, size):
        stop = min(start + size, count)
        chunk = torch.zeros(stop - start, count, dtype=like.dtype, device=like.device)
        chunk[:, start:stop].fill_diagonal_(torch.nan)
        hits = pull(chunk).isnan().nonzero().T
        hits[0] += start
        found.append(hits)
    return torch.cat(found, dim=1)


def _symmetrised(pattern: Tensor, n: int) -> tuple[Tensor, Tensor]:
    key = torch.unique(torch.cat([pattern[0] * n + pattern[1], pattern[1] * n + pattern[0]]))
    return key // n, key % n


def _verify(result: Tensor, product: LinearMap, inputs: Tensor) -> None:
    """Raise ValueError unless a random product agrees: a missed entry would change it."""
    if not result.shape[0]:
        return
    generator = torch.Generator(inputs.device).manual_seed(0)
    v = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype, device=inputs.device)
    expected = product(v)
    error = float((torch.mv(result, v) - expected).norm())
    if not error <= VERIFY_TOLERANCE.get(inputs.dtype, 1e-2) * float(expected.norm()):
        raise ValueError(
            f"pattern misses an entry that differs from zero: a random product is off by {error:.3g},"
            f" relative to {float(expected.norm()):.3g}; leave it out to have it found at this point."
        )


def _check_vector(inputs: Tensor, function: str) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs of {function} must be a tensor, got {type(inputs).__name__}.")
    if inputs.ndim != 1:
        raise ValueError(f"inputs of {function} must have shape (n,), got {tuple(inputs.shape)}.")
    if inputs.is_complex():
        raise TypeError(f"inputs of {function} must be real, got {inputs.dtype}.")


def _check_pattern(pattern: Tensor, rows: int, columns: int) -> None:
    if pattern.ndim != 2 or pattern.shape[0] != 2 or pattern.dtype != torch.long:
        raise ValueError(
            f"pattern must hold indices, shape (2, nnz), torch.int64, got {tuple(pattern.shape)},"
            f" {pattern.dtype}."
        )
    limits = torch.tensor([[rows], [columns]], device=pattern.device)
    if bool(((pattern < 0) | (pattern >= limits)).any()):
        raise ValueError(f"pattern must hold indices below ({rows}, {columns}), got larger or negative ones.")
