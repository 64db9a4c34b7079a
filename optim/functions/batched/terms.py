"""Reads off a graph whether values are sums of functions of single numbers that are linear in x.

From x up to the cuts every operation is linear, from there to the terms every one is elementwise, and what
joins the terms is linear again. Where an operation is not known, there is no such form.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Names of operations, without "Backward" and the number after it. Linear in what has a derivative:
LINEAR = frozenset(
    (
        *("Add", "Alias", "Cat", "Clone", "Expand", "Mean", "Neg", "Permute", "ReshapeAlias", "Rsub"),
        *("Select", "Slice", "Split", "Squeeze", "Stack", "Sub", "Sum", "T", "Transpose", "Unbind"),
        *("UnsafeView", "Unsqueeze", "View"),
    )
)
# Linear where one factor has a derivative; Div where that is the numerator.
PRODUCTS = frozenset(["Bmm", "Div", "Dot", "Mm", "Mul", "Mv"])
# Functions of each entry. Of a power the exponent is a number.
ELEMENTWISE = frozenset(
    (
        *("Abs", "Asinh", "Atan", "Cos", "Cosh", "Erf", "Exp", "Exp2", "Expm1", "Log", "Log1P", "Log2"),
        *("LogSigmoid", "Reciprocal", "Rsqrt", "Sigmoid", "Sin", "Sinh", "Softplus", "Sqrt", "Square"),
        "Tanh",
    )
)
POWER = "PowBackward0"
# Linear, but what they do may depend on x: allowed only above the terms.
CHOICES = frozenset(["Gather", "Index", "IndexSelect", "Where"])
# Of several operands, entry by entry: those with a derivative have to be of the same entry.
JOINING = frozenset(["Add", "Div", "Mul", "Rsub", "Sub", "Where"])


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
    """Finds the terms under a value, not more than a few."""

    def __init__(self, x: GradientEdge, most: int) -> None:
        self._kinds, self._most = {x.node: _X}, most
        self.roots: dict[tuple[Node, int], tuple[GradientEdge, GradientEdge]] = {}
        self._inner: set[tuple[Node, int]] = set()
        self.names: list[str] = []

    def kind(self, node: Node) -> _Kind:
        """Of what the node computes. No recursion: a loop in Python makes a deep graph."""
        waiting = [node]
        while waiting:
            top = waiting[-1]
            below = [other for other, _ in top.next_functions if other is not None]
            unread = [other for other in below if other not in self._kinds]
            waiting.extend(unread)
            if not unread:
                waiting.pop()
                if top not in self._kinds:
                    self._kinds[top] = self._read(top)
        return self._kinds[node]

    def _read(self, node: Node) -> _Kind:
        whole = node.name()
        self.names.append(whole)
        name, _, number = whole.partition("Backward")
        if not number.isdigit():
            # The functions of others may have any name, but no number after it.
            raise RefusedError
        operands = node.next_functions
        edges = [GradientEdge(operand, place) for operand, place in operands if operand is not None]
        kinds = [self._kinds[edge.node] for edge in edges]
        is_one = len(edges) == 1
        is_product = name in PRODUCTS and is_one and not (name == "Div" and operands[0][0] is None)
        if name in LINEAR or is_product:
            if all(kind is _X for kind in kinds):
                return _X
            if is_one and name in JOINING | {"Neg"} and kinds[0].cut is not None:
                return self._elementwise(edges, kinds[0])
        cut = self._cut(edges, kinds)
        if cut is not None and (name in ELEMENTWISE or whole == POWER or name in JOINING):
            return self._elementwise(edges, _Kind("elementwise", cut))
        if not (name in LINEAR or is_product or name in CHOICES):
            raise RefusedError
        for edge, kind in zip(edges, kinds, strict=True):
            self.add_root(edge, kind)
        return _SUM

    def _elementwise(self, edges: list[GradientEdge], kind: _Kind) -> _Kind:
        self._inner.update((edge.node, edge.output_nr) for edge in edges)
        return kind

    def _cut(self, edges: list[GradientEdge], kinds: list[_Kind]) -> GradientEdge | None:
        """The cut of which all operands are functions, entry by entry."""
        if _SUM in kinds:
            return None
        cuts = {edge if kind is _X else kind.cut for edge, kind in zip(edges, kinds, strict=True)}
        return cuts.pop() if len(cuts) == 1 else None

    def add_root(self, edge: GradientEdge, kind: _Kind) -> None:
        """A term ends at this edge."""
        if kind.cut is not None:
            self.roots[edge.node, edge.output_nr] = (edge, kind.cut)
        if len(self.roots) > self._most:
            raise RefusedError

    def finish(self, value: GradientEdge) -> Terms:
        """The terms of this value. None is a part of another: what is asked of one would count it twice."""
        self.add_root(value, self.kind(value.node))
        if not self._inner.isdisjoint(self.roots):
            raise RefusedError
        return Terms(tuple(self.roots.values()), tuple(self.names))


def terms_of(value: Tensor, x: Tensor) -> Terms | None:
    """Of a value with a graph to the leaf x, shape (L, n); None where it has not the form.

    So it is too where there are more terms than variables: a pass for each variable costs less then.
    """
    try:
        return _Reader(get_gradient_edge(x), x.shape[1]).finish(get_gradient_edge(value))
    except RefusedError:
        return None
