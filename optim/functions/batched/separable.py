"""Hessians of sums of functions of single numbers that are linear in x: ``J' diag(q) J``, with J fixed.

Logistic and Poisson regression are such sums, ridge penalties too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .terms import Terms, terms_of

# Numbers of a Jacobian that are held, whatever the data are: data that all problems share are repeated in it.
ROOM = 2**24
# Rounding of two ways to the same numbers, in units of the largest that were added.
SAME = 1e4
# Numbers of a Jacobian that are multiplied at once on a CPU: the product of all would be new memory each
# time, which costs more than to multiply.
CHUNK = 2**18
# Part of x, and of one, by which the sample is moved: many functions are special where they start.
MOVED = 0.1


class Curved(NamedTuple):
    """What the terms of a cut do, of the sum of the values.

    Attributes:
        slope: First derivative by each entry of the cut.
        curvature: Second.
    """

    slope: Tensor
    curvature: Tensor


def curvatures(total: Tensor, terms: Terms) -> dict[GradientEdge, Curved]:
    """Of each cut whose terms are curved."""
    edges = [root for root, _ in terms.roots]
    weights = torch.autograd.grad(total, edges, retain_graph=True) if edges else ()
    found: dict[GradientEdge, Curved] = {}
    for (root, cut), weight in zip(terms.roots, weights, strict=True):
        (slope,) = torch.autograd.grad(root, cut, weight, create_graph=True)
        if not slope.requires_grad:
            # A linear function of the cut; its slope is constant.
            continue
        with torch.enable_grad():
            sum_of_slopes = slope.sum()
        (q,) = torch.autograd.grad(sum_of_slopes, cut, retain_graph=True, allow_unused=True)
        new = Curved(slope.detach(), torch.zeros_like(slope) if q is None else q)
        if cut in found:
            new = Curved(found[cut].slope + new.slope, found[cut].curvature + new.curvature)
        found[cut] = new
    return found


class Form(NamedTuple):
    """The form that a function has wherever it is evaluated.

    Attributes:
        names: Operations of its graph: another graph has another form.
        jacobians: Transposed, of each cut, shape (L, n, k); None for the identity.
        sizes: Largest norm of a row of each of these, shape (L,).
        rest: Gradient of what is linear in x, shape (L, n).
    """

    names: tuple[str, ...]
    jacobians: tuple[Tensor | None, ...]
    sizes: tuple[Tensor, ...]
    rest: Tensor

    def kept(self, index: Tensor) -> Form:
        """Of some of the problems."""
        jacobians = tuple(None if J is None else J[index] for J in self.jacobians)
        return Form(self.names, jacobians, tuple(size[index] for size in self.sizes), self.rest[index])

    def derivatives(self, value: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gradients and Hessians, shapes (L, n) and (L, n, n); None where the graph is not that of the form.

        The gradient tells it too: what is left of it without the terms is constant. One host read.
        """
        terms = terms_of(value, x)
        if terms is None or terms.names != self.names:
            return None
        with torch.enable_grad():
            total = value.sum()
        found = list(curvatures(total, terms).values())
        L, n = x.shape
        sizes = [n if J is None else J.shape[2] for J in self.jacobians]
        if [curved.slope.numel() for curved in found] != [L * size for size in sizes]:
            return None
        (g,) = torch.autograd.grad(total, x, retain_graph=True)
        rest, size = _rest(g, self.jacobians, self.sizes, found)
        error = (rest - self.rest).abs().amax(1)
        if bool((error > SAME * torch.finfo(x.dtype).eps * (size + self.rest.abs().amax(1))).any()):
            return None
        H = x.new_zeros(L, n, n)
        for J, curved in zip(self.jacobians, found, strict=True):
            if J is None:
                H.diagonal(dim1=1, dim2=2).add_(curved.curvature.reshape(L, n))
            else:
                _add_products(H, J, curved.curvature.reshape(L, 1, -1))
        return g, H


def _add_products(H: Tensor, J: Tensor, q: Tensor) -> None:
    """Add ``J diag(q) J'`` to H, a part of the problems at a time."""
    rows = max(1, CHUNK // J[0].numel()) if J.device.type == "cpu" else len(J)
    for some, at, by in zip(H.split(rows), J.split(rows), q.split(rows), strict=True):
        some.baddbmm_(at * by, at.transpose(1, 2))


def _rest(
    g: Tensor, jacobians: Sequence[Tensor | None], sizes: Sequence[Tensor], found: Sequence[Curved]
) -> tuple[Tensor, Tensor]:
    """What of the gradient the terms do not explain, shape (L, n), and the size of what was added, (L,)."""
    rest, size = g, g.abs().amax(1)
    for J, largest, curved in zip(jacobians, sizes, found, strict=True):
        slope = curved.slope.reshape(len(g), -1)
        rest = rest - (slope if J is None else torch.bmm(J, slope.unsqueeze(2))[:, :, 0])
        size = size + largest * torch.linalg.vector_norm(slope, dim=1)
    return rest, size


def form_of(value: Tensor, x: Tensor, data: int = 0) -> Form | None:
    """Of values with a graph to the leaf x, shape (L, n); None where it has none.

    Args:
        value: Shape (L,).
        x: The leaf.
        data: How many numbers the function has been given: the Jacobians may take twice as many.

    Cost: n backward passes through its linear part.
    """
    terms = terms_of(value, x) if value.requires_grad else None
    if terms is None:
        return None
    with torch.enable_grad():
        total = value.sum()
    found = curvatures(total, terms)
    slopes = [curved.slope for curved in found.values()]
    if any(not slope.ndim or len(slope) != len(x) for slope in slopes):
        return None
    if x.shape[1] * sum(slope.numel() for slope in slopes) > max(ROOM, 2 * data):
        return None
    (g,) = torch.autograd.grad(total, x, retain_graph=True)
    jacobians = [_jacobian(cut, slope, x) for cut, slope in zip(found, slopes, strict=True)]
    sizes = tuple(
        torch.ones_like(x[:, 0], requires_grad=False)
        if J is None
        else torch.linalg.vector_norm(J, dim=2).amax(1)
        for J in jacobians
    )
    rest, _ = _rest(g, jacobians, sizes, list(found.values()))
    return Form(terms.names, tuple(jacobians), sizes, rest)


def _jacobian(cut: GradientEdge, like: Tensor, x: Tensor) -> Tensor | None:
    """Of a cut by x, transposed, shape (L, n, k); None for the identity."""
    L, n = x.shape
    u = torch.zeros_like(like, requires_grad=True)
    with torch.enable_grad():
        (g,) = torch.autograd.grad(cut, x, u, create_graph=True)
        columns = g.sum(0).unbind()
    J = x.new_zeros(L, n, like.numel() // L)
    for i, column in enumerate(columns):
        # Of variables that are not in this cut there is no graph.
        part = torch.autograd.grad(column, u, retain_graph=True, allow_unused=True)[0]
        if part is not None:
            J[:, i] = part.reshape(L, -1)
    is_square = J.shape[2] == n
    return None if is_square and bool((torch.eye(n, dtype=J.dtype, device=J.device) == J).all()) else J


def moved(x: Tensor) -> Tensor:
    """Points near x at which nothing is special."""
    return x + MOVED * (1 + x.abs()) * torch.linspace(0.7, 1.0, x.shape[1], dtype=x.dtype, device=x.device)
