"""One Jacobian or Hessian a sample, and the diagonal of a Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff import graph, ladder
from secondorder.autodiff.backward import HessianGraph, pull_rows
from secondorder.functional.linear import LinearMap, linearize_grad
from secondorder.vectors import arguments
from secondorder.vectors.tree import Tree

Function = Callable[..., Any]


def batch_jacobian(func: Function, inputs: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The Jacobian of each sample, for a function that treats the samples of a batch apart.

    Args:
        func: Takes a batch, shape ``(B, *in)``, returns a batch, shape ``(B, *out)``. Sample ``b`` of the
            outputs must depend on sample ``b`` of the inputs only: batch normalisation in training mode
            breaks it.
        inputs: Shape ``(B, *in)``.
        chunk_size: Output elements of one batched pass; all when None.

    Returns:
        Shape ``(B, *out, *in)``.

    Raises:
        TypeError: ``inputs`` is not a floating-point tensor; ``func`` returns no tensor.
        ValueError: the outputs have another batch size.

    Cost: one evaluation, and one backward pass over the batch for each element of ``out``: ``B`` times
    fewer than ``jacobian``.

    Example:
        >>> batch_jacobian(lambda x: x**2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[1]
        tensor([[6., 0.],
                [0., 8.]])
    """
    tree, x = _one_batch(inputs, chunk_size, "batch_jacobian")
    outputs = _outputs(tree, func, "batch_jacobian")
    if outputs.ndim == 0 or outputs.shape[0] != x.shape[0]:
        raise ValueError(
            f"func must return one output a sample, got shape {tuple(outputs.shape)}"
            f" for {x.shape[0]} samples."
        )
    return _rows_of_samples(outputs, x, chunk_size)


def batch_hessian(func: Function, inputs: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """The Hessian of each sample, for a function that treats the samples of a batch apart.

    Args:
        func: Takes a batch, shape ``(B, *in)``, returns one number a sample, shape (B,). Sample ``b`` of the
            outputs must depend on sample ``b`` of the inputs only.
        inputs: Shape ``(B, *in)``.
        chunk_size: Input elements of one batched pass; all when None.

    Returns:
        Shape ``(B, *in, *in)``.

    Raises:
        TypeError: ``inputs`` is not a floating-point tensor; ``func`` returns no tensor.
        ValueError: the outputs do not have shape (B,).

    Cost: one gradient over the batch, and one second backward pass for each element of a sample.

    Example:
        >>> batch_hessian(lambda x: x.pow(3).sum(1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[1]
        tensor([[18.,  0.],
                [ 0., 24.]])
    """
    tree, x = _one_batch(inputs, chunk_size, "batch_hessian")

    def compute() -> Tensor:
        outputs = _outputs(tree, func, "batch_hessian")
        if tuple(outputs.shape) != (x.shape[0],):
            raise ValueError(
                f"func must return one number a sample, shape ({x.shape[0]},), got {tuple(outputs.shape)}."
            )
        graph.refuse_wrong((outputs,), (x,))
        with torch.enable_grad():
            total = outputs.sum()
            kept = HessianGraph.of(total, arguments.grad((total,), (x,), create_graph=True), (x,))
        rows = torch.zeros_like(x) if kept.outputs[0] is None else kept.outputs[0]
        return _rows_of_samples(rows, kept.inputs[0], chunk_size)

    return ladder.climb(compute)


def _one_batch(inputs: Tensor, chunk_size: int | None, function: str) -> tuple[Tree, Tensor]:
    """The checked batch and its tensor."""
    arguments.check_chunk_size(chunk_size)
    tree = Tree.of(inputs, function)
    if not isinstance(inputs, Tensor) or inputs.is_complex() or inputs.ndim == 0:
        got = (
            f"{tuple(inputs.shape)}, {inputs.dtype}" if isinstance(inputs, Tensor) else type(inputs).__name__
        )
        raise TypeError(f"inputs of {function} must be one real tensor of shape (B, ...), got {got}.")
    return tree, tree.leaves[0]


def _outputs(tree: Tree, func: Function, function: str) -> Tensor:
    """What ``func`` gives at the batch: one real tensor."""
    outputs = tree.call(func)
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"func of {function} must return a real floating-point tensor, got {got}.")
    return outputs


def _rows_of_samples(outputs: Tensor, x: Tensor, chunk_size: int | None) -> Tensor:
    """Derivatives of each output element, summed over samples: they do not mix."""
    batch, shape = outputs.shape[0], outputs.shape[1:]
    m = shape.numel()
    if not outputs.requires_grad or m == 0 or batch == 0:
        return x.new_zeros(batch, *shape, *x.shape[1:])
    basis = torch.eye(m, dtype=outputs.dtype, device=outputs.device)
    size = m if chunk_size is None else min(chunk_size, m)
    rows = [
        pull_rows([outputs], [x], [chunk.view(-1, 1, *shape).expand(-1, batch, *shape)])[0]
        for chunk in basis.split(size)
    ]
    return torch.cat(rows).movedim(0, 1).reshape(batch, *shape, *x.shape[1:])


def hessian_diag(
    func: Function,
    inputs: Any,
    *,
    num_probes: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """The diagonal of the Hessian.

    Args:
        func: Takes the inputs (a tuple is unpacked into arguments), returns one real element.
        inputs: Point of differentiation: a tensor, a tuple, or any pytree, such as a dict of parameters.
        num_probes: None for the exact diagonal; else the mean of ``z * (H z)`` over so many random sign
            vectors, unbiased, its variance the sum of the squared off-diagonal entries of a row over
            ``num_probes``.
        generator: Source of the random signs.
        chunk_size: Vectors in one batched pass; at most 128 when None.

    Returns:
        The diagonal in the structure of ``inputs``.

    Raises:
        TypeError: ``inputs`` hold something else than floating-point tensors.
        ValueError: ``func`` does not return one real element; ``num_probes`` is not positive.

    Cost: one gradient with a graph, and ``n`` products (exact) or ``num_probes``.

    Reference: Hutchinson (1990), A stochastic estimator of the trace; Bekas, Kokiopoulou and Saad (2007), An
    estimator for the diagonal of a matrix.

    Example:
        >>> hessian_diag(lambda x: x.pow(3).sum(), torch.tensor([1.0, 2.0]))
        tensor([ 6., 12.])
    """
    is_number = isinstance(num_probes, int) and not isinstance(num_probes, bool)
    if num_probes is not None and not (is_number and num_probes >= 1):
        raise ValueError(f"num_probes must be a positive integer or None, got {num_probes!r}.")
    arguments.check_chunk_size(chunk_size)
    tree = Tree.of(inputs, "hessian_diag")
    if any(leaf.is_complex() for leaf in tree.leaves):
        raise TypeError("inputs of hessian_diag must be real, got complex ones.")
    _, _, hvp_fn = linearize_grad(func, inputs)
    if num_probes is None:
        return tree.rebuild(_exact_diagonal(tree, hvp_fn, 128 if chunk_size is None else chunk_size))
    signs = [
        torch.randint(2, (num_probes, *x.shape), generator=generator, device=x.device).to(x.dtype) * 2 - 1
        for x in tree.leaves
    ]
    products = hvp_fn(tree.rebuild(signs), batched=True, chunk_size=128 if chunk_size is None else chunk_size)
    return tree.rebuild(
        (z * Hz).mean(0) for z, Hz in zip(signs, tree.vector(products, batched=True), strict=True)
    )


def _exact_diagonal(tree: Tree, hvp_fn: LinearMap, chunk_size: int) -> list[Tensor]:
    diagonals = []
    for position, leaf in enumerate(tree.leaves):
        entries = []
        for start in range(0, leaf.numel(), chunk_size):
            k = min(chunk_size, leaf.numel() - start)
            vectors = [x.new_zeros(k, *x.shape) for x in tree.leaves]
            vectors[position].view(k, -1)[:, start : start + k].fill_diagonal_(1)
            products = tree.vector(hvp_fn(tree.rebuild(vectors), batched=True), batched=True)
            entries.append(products[position].reshape(k, -1)[:, start : start + k].diagonal())
        diagonals.append(torch.cat(entries).view(leaf.shape) if entries else leaf.new_zeros(leaf.shape))
    return diagonals
