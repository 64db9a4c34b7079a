"""Gauss-Newton and Fisher products: pure functions with the calling rules of the functional API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff import graph, ladder
from secondorder.autodiff.backward import HessianGraph, cotangents, try_product
from secondorder.autodiff.convolutions import lighten_rows
from secondorder.autodiff.lighter import light_grad
from secondorder.functional import output_hessians
from secondorder.vectors import arguments
from secondorder.vectors.arguments import Tensors

Function = Callable[..., Any]
TensorOrTensors = Tensor | tuple[Tensor, ...]
# Multiplies by the middle factor, in the space of outputs.
Middle = Callable[[Tensors], Tensors]

FISHER_KINDS = ("exact", "monte-carlo", "empirical")


def ggnvp(
    func: Function,
    loss: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Generalised Gauss-Newton product ``J^T H J v`` of ``loss(func(inputs))``.

    ``J`` is the Jacobian of ``func``, ``H`` the Hessian of ``loss`` at the outputs: positive semidefinite
    where ``loss`` is convex. ``H`` is a closed form where ``loss`` returns the result of ``mse_loss``,
    ``cross_entropy`` or ``binary_cross_entropy_with_logits`` (``F`` or ``nn``) of the outputs, without
    weights; else autograd's.

    Args:
        func: Takes the inputs, returns the outputs: a tensor or a tuple of tensors.
        loss: Takes the outputs (a tuple is unpacked into arguments), returns a scalar.
        inputs: Point of differentiation, the parameters.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where an output does not depend on an input, instead of returning zeros.
        has_aux: ``func`` returns ``(outputs, aux)``; ``aux`` is passed on as the last result.

    Returns:
        ``(value, product)``: the loss, and the product with the shapes of ``inputs``.

    Raises:
        TypeError: ``inputs``, ``v`` or the outputs are neither a tensor nor a tuple of tensors.
        RuntimeError: ``v`` is missing or has the wrong sizes; ``loss`` does not return a scalar; ``strict``
            found no dependence.

    Cost: 1.8 to 2.4 gradients, and up to 2.3 times the peak memory of one; ``GaussNewton`` keeps the graph
    for further products at 0.9 to 1.4.

    Reference: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> ggnvp(lambda w: w**2, lambda z: (z - 1).square().sum(), w, torch.ones(2))
        (tensor(9.), tensor([ 8., 32.]))
    """

    def compute() -> tuple[Any, ...]:
        def middle(outputs: Tensors) -> tuple[Tensor, Middle]:
            value, closed = output_hessians.evaluate(loss, outputs)
            _check_value(value)
            if closed is not None and not create_graph:
                return value, lambda u: (closed(u[0]),)
            return value, _loss_hessian(value, outputs, create_graph)

        return _through_outputs(func, inputs, v, middle, "ggnvp", create_graph, strict, has_aux)

    return ladder.climb(compute)


def fvp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    likelihood: str = "categorical",
    kind: str = "exact",
    targets: Tensor | None = None,
    num_samples: int = 1,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Fisher product ``F v`` of the mean negative log-likelihood of ``func``'s outputs.

    Args:
        func: Takes the inputs, returns one tensor: logits for "categorical" (classes in dimension 1) and
            "bernoulli", means for "normal" (unit variance); samples in dimension 0.
        inputs: Point of differentiation, the parameters.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: The product carries a graph.
        strict: Raise where an output does not depend on an input, instead of returning zeros.
        likelihood: "categorical", "bernoulli" or "normal".
        kind: "exact", the expectation over the model's own distribution, which is the Gauss-Newton matrix of
            the negative log-likelihood; "monte-carlo", its unbiased estimate from drawn targets;
            "empirical", the mean outer product of the gradients at ``targets``.
        targets: For "empirical": class indices, or values shaped like the outputs.
        num_samples: For "monte-carlo": targets drawn for each sample.
        seed: For "monte-carlo": of a generator of its own.

    Returns:
        ``(outputs, product)``: the outputs, and the product with the shapes of ``inputs``.

    Raises:
        TypeError: ``inputs``, ``v`` or the output are not tensors.
        ValueError: ``likelihood`` or ``kind`` is unknown; ``targets`` are missing, or given where they have
            no use; ``num_samples`` is not positive.
        RuntimeError: ``v`` is missing or has the wrong sizes; ``strict`` found no dependence.

    Cost: 1.8 to 2.4 gradients, and up to 2.3 times the peak memory of one.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method, sections 5 and
        11.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> fvp(lambda w: x @ w, torch.zeros(2), torch.ones(2), likelihood="bernoulli")[1]
        tensor([0.1250, 0.5000])
    """
    _check_fisher(likelihood, kind, targets, num_samples)

    def compute() -> tuple[Any, ...]:
        def middle(outputs: Tensors) -> tuple[Any, Middle]:
            if len(outputs) != 1:
                raise TypeError(f"func must return one tensor for fvp, got {len(outputs)}.")
            z = outputs[0] if create_graph else outputs[0].detach()
            scale = 1 / max(output_hessians.count_samples(likelihood, z), 1)
            if kind == "exact":
                product = output_hessians.of_likelihood(likelihood, z, scale)
            elif kind == "monte-carlo":
                product = output_hessians.of_samples(likelihood, z, scale, num_samples, seed)
            elif targets is not None:
                product = output_hessians.of_targets(likelihood, z, targets, scale)
            return outputs[0], lambda u: (product(u[0]),)

        return _through_outputs(func, inputs, v, middle, "fvp", create_graph, strict, False)

    return ladder.climb(compute)


def _through_outputs(
    func: Function,
    inputs: Any,
    v: Any,
    middle: Callable[[Tensors], tuple[Any, Middle]],
    name: str,
    create_graph: bool,
    strict: bool,
    has_aux: bool,
) -> tuple[Any, ...]:
    """``J^T M J v`` for a middle factor ``M`` in the space of outputs."""
    with torch.enable_grad():
        is_tuple, inputs = arguments.as_tuple(inputs, "inputs", name)
        inputs = arguments.fresh_inputs(inputs, create_graph)
        vector = arguments.input_vector(v, inputs, is_tuple, create_graph, name)
        found = arguments.call(func, inputs, name, strict, has_aux)
        graph.refuse_wrong_rows(found.tensors, inputs, create_graph=create_graph)
        value, multiply = middle(found.tensors)
        duals = cotangents(found.tensors)
        if create_graph:
            rows = arguments.grad(found.tensors, inputs, duals, create_graph=True)
        else:
            rows = light_grad(found.tensors, inputs, duals, rows=True, unread=True)
            lighten_rows(rows, found.tensors)
        arguments.require_grad_of_grad_inputs(rows, strict)
    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        columns = arguments.grad(rows, duals, vector, create_graph=create_graph, retain_graph=True)
        Jv = arguments.fill_zeros(columns, found.tensors, strict, create_graph, "back_trick")
        grads = arguments.grad(found.tensors, inputs, multiply(Jv), create_graph=create_graph)
        if create_graph:
            try_product(grads, inputs)
        product = arguments.fill_zeros(grads, inputs, strict, create_graph, "back")
    results = (
        arguments.give_back((value,), False, create_graph),
        arguments.give_back(product, is_tuple, create_graph),
    )
    return (*results, arguments.give_back_aux(found.aux, create_graph)) if has_aux else results


def _loss_hessian(value: Tensor, outputs: Tensors, create_graph: bool) -> Middle:
    """The loss's Hessian in the space of outputs, by a second backward pass."""
    with torch.enable_grad():
        gradient = arguments.grad((value,), outputs, create_graph=True)
        kept = HessianGraph.of(value, gradient, outputs)

    def multiply(u: Tensors) -> Tensors:
        grads = arguments.grad(kept.outputs, kept.inputs, u, create_graph=create_graph, retain_graph=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, outputs, strict=True))

    return multiply


def _check_value(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuntimeError(f"loss must return a tensor with a single element, got {what}.")


def _check_fisher(likelihood: str, kind: str, targets: Any, num_samples: int) -> None:
    output_hessians.check(likelihood, "mean", num_samples)
    if kind not in FISHER_KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, FISHER_KINDS))}, got {kind!r}.")
    if (targets is None) == (kind == "empirical"):
        what = "missing" if targets is None else f"given with kind={kind!r}"
        raise ValueError(f"targets are for kind='empirical' and only there, got them {what}.")
