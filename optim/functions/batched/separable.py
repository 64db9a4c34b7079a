"""Hessians of sums of functions of single numbers that are linear in x: ``J' diag(q) J``, with J fixed.

Logistic and Poisson regression are such sums, ridge penalties too. What a function is, is read off its
graph: from x up to the cuts every operation is linear, from there to the terms every one is elementwise,
and what joins the terms is linear again. Where an operation is not known, there is no such form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Names of operations, without "Backward" and the number after it. Linear in what has a derivative:
LINEAR = frozenset(
    (
        *("Add", "Alias", "Clone", "Expand", "Neg", "Permute", "ReshapeAlias", "Select", "Slice", "Split"),
        *("Squeeze", "Stack", "Cat", "Sub", "Rsub", "Sum", "Mean", "T", "Transpose", "Unbind", "Unsqueeze"),
        *("UnsafeView", "View"),
    )
)
# Linear where one factor has a derivative; Div where that is the numerator.
PRODUCTS = frozenset(("Bmm", "Mm", "Mv", "Dot", "Mul", "Div"))
# Functions of each entry.
ELEMENTWISE = frozenset(
    (
        *(
            "Softplus",
            "LogSigmoid",
            "Exp",
            "Exp2",
            "Expm1",
            "Log",
            "Log1P",
            "Log2",
            "Sigmoid",
            "Tanh",
            "Cosh",
        ),
        *("Sinh", "Sin", "Cos", "Atan", "Asinh", "Erf", "Sqrt", "Rsqrt", "Reciprocal", "Abs", "Square"),
    )
)
# Linear, but what they do may depend on x: allowed only above the terms.
CHOICES = frozenset(("Where", "Index", "IndexSelect", "Gather"))
# Of several operands, entry by entry: those with a derivative have to be of the same entry.
JOINING = frozenset(("Add", "Sub", "Rsub", "Mul", "Div", "Where"))
# Of these the exponent is a number.
POWERS = ("PowBackward0",)
# Rounding of two ways to the same numbers, in units of the largest that were added.
SAME = 1e4
# Numbers of a Jacobian that are multiplied at once on a CPU: the product of all would be new memory each
# time, which costs more than to multiply.
CHUNK = 2**18
# Part of x, and of one, by which the sample is moved: many functions are special where they start.
MOVED = 0.1


class RefusedError(Exception):
    """The graph is of no such form."""


class Terms(NamedTuple):
    """A graph of the form.

    Attributes:
        roots: Of each elementwise term, its edge and that of its cut.
        names: Of all operations, in the order in which they were met.
    """

    roots: tuple[tuple[GradientEdge, GradientEdge], ...]
    names: tuple[str, ...]


class _Kind(NamedTuple):
    """What an edge carries: elementwise functions of a cut, sums of such things, or what is linear in x."""

    name: str
    cut: GradientEdge | None = None


_X, _SUM = _Kind("linear"), _Kind("sum")


class _Reader:
    """Finds the terms under a value."""

    def __init__(self, x: GradientEdge) -> None:
        self._x, self._kinds = x.node, {x.node: _X}
        self.roots: dict[tuple[Node, int], tuple[GradientEdge, GradientEdge]] = {}
        self.names: list[str] = []

    def kind(self, node: Node) -> _Kind:
        """Of what the node computes. The graphs of a few operations are not deep."""
        if node not in self._kinds:
            self._kinds[node] = self._read(node)
        return self._kinds[node]

    def _read(self, node: Node) -> _Kind:
        whole = node.name()
        self.names.append(whole)
        name = whole.partition("Backward")[0]
        operands = node.next_functions
        edges = [GradientEdge(operand, place) for operand, place in operands if operand is not None]
        kinds = [self.kind(edge.node) for edge in edges]
        is_one = len(edges) == 1
        if name in LINEAR or (name in PRODUCTS and is_one and not (name == "Div" and operands[0][0] is None)):
            if all(kind is _X for kind in kinds):
                return _X
            if is_one and name in JOINING | {"Neg"} and kinds[0].cut is not None:
                return kinds[0]
        cut = self._cut(edges, kinds)
        if cut is not None and (name in ELEMENTWISE or whole in POWERS or name in JOINING):
            return _Kind("elementwise", cut)
        if name not in LINEAR | PRODUCTS | CHOICES or (name in PRODUCTS and not is_one):
            raise RefusedError
        for edge, kind in zip(edges, kinds, strict=True):
            self.add_root(edge, kind)
        return _SUM

    def _cut(self, edges: list[GradientEdge], kinds: list[_Kind]) -> GradientEdge | None:
        """The cut of which all operands are functions, entry by entry."""
        cuts = {
            edge if kind is _X else kind.cut for edge, kind in zip(edges, kinds, strict=True) if kind != _SUM
        }
        return cuts.pop() if len(cuts) == 1 and _SUM not in kinds else None

    def add_root(self, edge: GradientEdge, kind: _Kind) -> None:
        """A term ends at this edge."""
        if kind.cut is not None:
            self.roots[edge.node, edge.output_nr] = (edge, kind.cut)


def terms_of(value: Tensor, x: Tensor) -> Terms | None:
    """Of a value with a graph to the leaf x; None where it has not the form."""
    reader = _Reader(get_gradient_edge(x))
    edge = get_gradient_edge(value)
    try:
        reader.add_root(edge, reader.kind(edge.node))
    except RefusedError:
        return None
    return Terms(tuple(reader.roots.values()), tuple(reader.names))


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
        jacobians: Transposed, of each cut, shape (L, n, k); None for one that is x.
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
        if len(found) != len(self.jacobians):
            return None
        (g,) = torch.autograd.grad(total, x, retain_graph=True)
        rest, size = _rest(g, self.jacobians, self.sizes, found)
        error = (rest - self.rest).abs().amax(1)
        if bool((error > SAME * torch.finfo(x.dtype).eps * (size + self.rest.abs().amax(1))).any()):
            return None
        L, n = x.shape
        H = x.new_zeros(L, n, n)
        for J, curved in zip(self.jacobians, found, strict=True):
            if J is None:
                H.diagonal(dim1=1, dim2=2).add_(curved.curvature.view(L, n))
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


def form_of(value: Tensor, x: Tensor) -> Form | None:
    """Of values with a graph to the leaf x, shape (L, n); None where it has none.

    Cost: n backward passes through its linear part.
    """
    terms = terms_of(value, x) if value.requires_grad else None
    if terms is None:
        return None
    with torch.enable_grad():
        total = value.sum()
        found = curvatures(total, terms)
        (g,) = torch.autograd.grad(total, x, retain_graph=True)
        jacobians: list[Tensor | None] = []
        for cut, curved in found.items():
            if cut.node is get_gradient_edge(x).node:
                jacobians.append(None)
            elif not curved.slope.ndim or len(curved.slope) != len(x):
                return None
            else:
                jacobians.append(_jacobian(cut, curved.slope, x))
    sizes = tuple(
        torch.ones_like(x[:, 0], requires_grad=False)
        if J is None
        else torch.linalg.vector_norm(J, dim=2).amax(1)
        for J in jacobians
    )
    rest, _ = _rest(g, jacobians, sizes, list(found.values()))
    return Form(terms.names, tuple(jacobians), sizes, rest)


def _jacobian(cut: GradientEdge, like: Tensor, x: Tensor) -> Tensor:
    """Of a cut by x, transposed, shape (L, n, k)."""
    u = torch.zeros_like(like, requires_grad=True)
    (g,) = torch.autograd.grad(cut, x, u, create_graph=True)
    parts = [torch.autograd.grad(part, u, retain_graph=True)[0] for part in g.sum(0).unbind()]
    return torch.stack([part.reshape(len(x), -1) for part in parts], 1)


def moved(x: Tensor) -> Tensor:
    """Points near x at which nothing is special."""
    return x + MOVED * (1 + x.abs()) * torch.linspace(0.7, 1.0, x.shape[1], dtype=x.dtype, device=x.device)
