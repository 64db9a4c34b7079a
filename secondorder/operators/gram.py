"""``J J^T`` of a network's outputs without ``J``: from the inputs of its layers and their output-gradients.

Where samples do not mix, one backward pass brings a gradient for every sample to every layer, and as many
passes are enough as one sample has outputs. With rows ``a`` of what a linear layer took and ``b`` of what
came to it, its weight adds ``(A A^T) * (B B^T)`` and its bias ``B B^T``. Whether the layers were read right,
and samples do not mix, is found out for each parameter by a product ``J^T v``. For the others rows are
formed, by as many backward passes.

Reference: Novak, Sohl-Dickstein and Schoenholz (2022), Fast finite width neural tangent kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.graph import Place, Source, like
from secondorder.operators.layers import extent, factors, is_known
from secondorder.operators.parameters import Jacobian
from secondorder.operators.pieces import WIDTH, Piece, TooLargeError, Total, pulled_back, scatter
from secondorder.operators.uses import Use, signed, uses_of
from secondorder.solvers._probes import gaussian, identity_blocks

__all__ = ["Gram", "TooLargeError", "gram"]

# What a layer's factors need, in times of their size: they are sorted by samples, multiplied, and the pass
# itself holds some.
COPIES = 3
# What mixing changes in ``J^T v`` is far above ``eps ** (2 / 3)`` of it: the mean of a batch of a million
# samples moves a thousandth. Sums that cancel round by some ``eps`` of what is summed; and a gradient through
# many layers, or on a device that rounds more than the dtype does (TF32), as much as two passes differ by,
# times this, but never by more than a share of what is summed.
PROOF, CANCELLED, NOISE, MOST_NOISE = 2 / 3, 64, 8, 1e-2

_MIXED = "samples mix, or the gradient is not the one that its layers give"
_COMPUTED = "used by way of what is computed from parameters alone"
_CHEAPER = "rows cost less than products of their factors"


class Gram(NamedTuple):
    """``J J^T``, and how it was computed.

    Attributes:
        matrix: Shape (m, m), in the order of all entries of all outputs.
        forms: For each parameter "ghost" (its rows were not formed), "rows" (they were, for it alone) or
            "none" (they are zero, or have weight 0).
        why: Why rows were formed; empty where none were.
    """

    matrix: Tensor
    forms: tuple[str, ...]
    why: str


@torch.no_grad()
def gram(jacobian: Jacobian, weights: Sequence[float] | None = None, *, memory: float = 2.0**32) -> Gram:
    """``sum_p w_p J_p J_p^T`` over parameters, of a Jacobian that is not formed.

    The first dimension of an output counts samples. Linear, convolution, embedding and normalisation layers,
    and parameters that are added or multiplied with broadcasting, are read off the graph, wherever and how
    often they are used, without a hook. A parameter that is used by way of what is computed from parameters
    alone, as a normalised weight, has its rows formed, for it alone; one that is used otherwise, or whose
    gradient is not what its layers say, by as many backward passes: slower, as right.

    Args:
        jacobian: Of outputs in the graph, with ``m`` entries in all.
        weights: Of the parameters, non-negative; all 1 when None. Parameters of weight 0 cost nothing.
        memory: Bytes that may be allocated.

    Returns:
        The matrix, of the dtype of outputs and parameters, at least float32.

    Raises:
        TypeError: ``jacobian`` is not a Jacobian, or complex.
        ValueError: ``weights`` are too few, or negative; ``memory`` is not positive.
        TooLargeError: the matrix, the gradients at a layer or the rows of a parameter do not fit ``memory``.

    Cost: as many backward passes as a sample has outputs, to layers and not to parameters, two more for the
    proof, and ``m^2 / 2`` multiply-adds for each output of a layer: 9 products with the Gauss-Newton matrix
    for 1280 rows of an MLP of 670 thousand parameters. Memory: three matrices, and ``m`` gradients at the
    layers, or at some of them at a time, with one host read each. Parameters whose rows are formed by
    backward passes: ``m`` of these, and ``m`` times their size.

    Example:
        >>> layer = torch.nn.Linear(30, 20)
        >>> found = gram(Jacobian(layer(torch.ones(4, 30)), list(layer.parameters())))
        >>> found.matrix.shape, found.forms, found.why
        (torch.Size([80, 80]), ('ghost', 'ghost'), '')
    """
    factor = _checked(jacobian, weights, memory)
    total, outputs = _empty(jacobian, memory), list(_outputs(jacobian))
    sizes = [parameter.numel() for parameter in jacobian.parameters]
    wanted = [i for i, weight in enumerate(factor) if weight and sizes[i] and outputs]
    forms, why = ["none"] * len(factor), dict[str, list[int]]()
    for i in wanted:
        for name in sorted({use.node.name() for z in outputs for use in z.uses[i] if not is_known(use.node)}):
            why.setdefault(f"{name} is not known", []).append(i)
    slow = {i for indices in why.values() for i in indices}
    with jacobian._rung():
        for group in _groups(outputs, [i for i in wanted if i not in slow], total):
            for i, pieces in _proved(outputs, jacobian.parameters, group, total.matrix.dtype).items():
                if pieces is None:
                    why.setdefault(_MIXED, []).append(i)
                    slow.add(i)
                elif pieces and total.add(pieces, jacobian.parameters[i], factor[i]):
                    why.setdefault(_COMPUTED if any(p.base for p in pieces) else _CHEAPER, []).append(i)
                    forms[i] = "rows"
                elif pieces:
                    forms[i] = "ghost"
    index = torch.cat(
        [torch.zeros(0, dtype=torch.long, device=jacobian.device), *[z.order() for z in outputs]]
    )
    _add_passes(jacobian, sorted(slow), factor, total, index)
    for i in slow:
        forms[i] = "rows"
    return Gram(total.whole(index), tuple(forms), _listed(why))


def _checked(jacobian: Jacobian, weights: Sequence[float] | None, memory: float) -> list[float]:
    """The weights, as numbers."""
    if not isinstance(jacobian, Jacobian):
        raise TypeError(f"jacobian must be a Jacobian, got {type(jacobian).__name__}.")
    if jacobian.dtype.is_complex:
        raise TypeError(f"jacobian must be real, got {jacobian.dtype}; use torch.view_as_real.")
    if not memory > 0:
        raise ValueError(f"memory must be positive, in bytes, got {memory}.")
    count = len(jacobian.parameters)
    factor = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(factor) != count:
        raise ValueError(f"weights must hold one number for each of {count} parameters, got {len(factor)}.")
    for index, weight in enumerate(factor):
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights[{index}] must be non-negative and finite, got {weight}.")
    return factor


def _empty(jacobian: Jacobian, memory: float) -> Total:
    """A sum of no rows, with what is left of the memory."""
    dtype = torch.float32
    for each in (jacobian.dtype, *[z.dtype for z in jacobian.outputs]):
        dtype = torch.promote_types(dtype, each)
    m = jacobian.shape[0]
    matrices = 3 * m * m * dtype.itemsize
    if matrices > memory:
        raise TooLargeError(
            f"memory must be at least {matrices:.2e} bytes for a matrix of {m} x {m}, got {memory:.2e}."
        )
    return Total(torch.zeros(m, m, dtype=dtype, device=jacobian.device), memory - matrices)


def _listed(why: dict[str, list[int]]) -> str:
    return "; ".join(f"{reason} (parameters {', '.join(map(str, why[reason]))})" for reason in why)


class _Output(NamedTuple):
    """One output of the network.

    Attributes:
        source: It.
        start: Its first entry among those of all outputs.
        samples: How many.
        uses: Of each parameter, behind it.
    """

    source: Source
    start: int
    samples: int
    uses: list[list[Use]]

    @property
    def entries(self) -> int:
        """Of a sample."""
        return like(self.source).numel() // self.samples

    def order(self) -> Tensor:
        """Where its entries are among rows that have those of one entry of all samples together."""
        size = self.entries * self.samples
        place = torch.arange(self.start, self.start + size, device=like(self.source).device)
        return place.view(self.entries, self.samples).T.flatten()

    def gradients(self, nodes: Iterable[Node], dtype: torch.dtype) -> dict[Node, Tensor]:
        """With respect to the results of nodes, of each entry of a sample, for all samples at once."""
        places = {node: Place.of(node, 0) for node in nodes}
        z, count = like(self.source), self.entries
        basis = torch.eye(count, dtype=z.dtype, device=z.device)
        parts = []
        for some in basis.split(WIDTH) if places else ():
            seeds = some[:, None].expand(-1, self.samples, -1).reshape(-1, *z.shape)
            parts.append(pull_rows([self.source], list(places.values()), [seeds]))
        whole = [torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
        return {node: part.to(dtype) for node, part in zip(places, whole, strict=True)}

    def options(self, index: int, gradients: dict[Node, Tensor], dtype: torch.dtype) -> list[list[Piece]]:
        """What the rows of a parameter may be: its positions belong to samples in one order or another."""
        uses = self.uses[index]
        found = [factors(use, gradients[use.node]) for use in uses]
        both = self.samples > 1 and any(f.positions > self.samples for f in found if f)
        options = []
        for is_minor in (False, True) if both else (False,):
            pieces = [f and Piece.of(f, self.start, self.samples, is_minor, dtype) for f in found]
            if None not in pieces:
                pairs = zip(pieces, uses, strict=True)
                options.append([piece._replace(base=use.base) for piece, use in pairs if piece])
        return options


def _outputs(jacobian: Jacobian) -> Iterator[_Output]:
    """All of them that have entries."""
    start = 0
    for whole in jacobian._sources:
        for source in _parts(whole):
            z = like(source)
            if z.numel():
                samples = z.shape[0] if z.ndim else 1
                yield _Output(source, start, samples, uses_of(source, jacobian.parameters, is_known))
                start += z.numel()


def _parts(source: Source) -> Iterator[Source]:
    """What an output was joined from along its samples: batches of their own, as of domain and boundary."""
    node: Any = source.edge.node if isinstance(source, Place) else source.grad_fn
    parts = node.next_functions if node is not None and node.name() == "CatBackward0" else ()
    if not parts or signed(node._saved_dim) % like(source).ndim or not all(map(_is_inner, parts)):
        yield source
        return
    for part, number in parts:
        yield from _parts(Place.of(part, number))


def _is_inner(edge: tuple[Node | None, int]) -> bool:
    """Whether a tensor in the graph comes from an operation."""
    return edge[0] is not None and not hasattr(edge[0], "variable")


def _groups(outputs: Sequence[_Output], indices: Sequence[int], total: Total) -> Iterator[list[int]]:
    """Parameters, together as long as what comes to their layers fits."""
    group, held, seen = list[int](), 0, set[Node]()
    for i in indices:
        uses = [(use, z.entries) for z in outputs for use in z.uses[i]]
        alone = COPIES * sum(extent(use, count) for use, count in uses)
        total.require(alone, f"the gradients at the layers of parameters[{i}]")
        more = COPIES * sum(extent(use, count) for use, count in uses if use.node not in seen)
        if group and not total.fits(held + more):
            yield group
            group, held, seen, more = [], 0, set(), alone
        group.append(i)
        held += more
        seen.update(use.node for use, _ in uses)
    if group:
        yield group


def _proved(
    outputs: Sequence[_Output], parameters: Sequence[Tensor], group: Sequence[int], dtype: torch.dtype
) -> dict[int, list[Piece] | None]:
    """The rows of some parameters, or None where ``J^T v`` contradicts what their layers say."""
    tried: list[tuple[int, int, list[Piece]]] = []
    verdicts = []
    for number, output in enumerate(outputs):
        gradients = output.gradients({use.node for i in group for use in output.uses[i]}, dtype)
        eps = max(torch.finfo(x.dtype).eps for x in (like(output.source), *parameters))
        v, products = _products(output.source, [parameters[i] for i in group], dtype)
        v = v.view(output.samples, -1).T.flatten()
        for i, pair in zip(group, products, strict=True):
            for pieces in output.options(i, gradients, dtype):
                tried.append((i, number, pieces))
                verdicts.append(_agree(pieces, parameters[i], v, pair, eps))
    proved: dict[tuple[int, int], list[Piece]] = {}
    # One host read.
    for (i, number, pieces), is_right in zip(
        tried, torch.stack(verdicts).tolist() if verdicts else (), strict=True
    ):
        if is_right:
            proved.setdefault((i, number), pieces)
    found: dict[int, list[Piece] | None] = {}
    for i in group:
        parts = [proved.get((i, number)) for number in range(len(outputs))]
        found[i] = None if None in parts else [piece for part in parts for piece in part or ()]
    return found


def _products(
    source: Source, parameters: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """A random ``v`` and, for each parameter, ``J^T v`` and ``J^T (3 v) / 3``, which rounds otherwise."""
    z = like(source)
    v = gaussian(z.new_empty(z.numel()), 1, torch.Generator("cpu").manual_seed(0))[:, 0]
    seeds = torch.stack([v, 3 * v]).view(2, *z.shape)
    products = [product.to(dtype) for product in pull_rows([source], parameters, [seeds])]
    for product in products:
        product[1] /= 3
    return v.to(dtype), products


def _agree(pieces: Sequence[Piece], parameter: Tensor, v: Tensor, products: Tensor, eps: float) -> Tensor:
    """Whether ``J^T v`` is the same by pieces; where it is not finite, the matrix will say so."""
    expected, again = products.reshape(2, -1)
    pulled = torch.zeros_like(expected)
    for piece in pieces:
        part = pulled if piece.base is None else pulled.new_zeros(piece.base.like.numel())
        scatter(part, piece.spot).add_(piece.pulled(v).view(piece.spot.shape))
        if piece.base is not None:
            pulled += pulled_back(piece.base, parameter, part[None])[0]
    size = torch.stack([expected.new_zeros(()), *[piece.size for piece in pieces]]).norm()
    error, noise = torch.linalg.vector_norm(torch.stack([pulled, again]) - expected, dim=1)
    rounding = (CANCELLED * eps * size + NOISE * noise).minimum(MOST_NOISE * size)
    return ~(error > eps**PROOF * torch.linalg.vector_norm(expected) + rounding)


def _add_passes(
    jacobian: Jacobian, indices: Sequence[int], factor: Sequence[float], total: Total, index: Tensor
) -> None:
    """The rows of some parameters by backward passes, for as many together as fit."""
    place = index.argsort()
    m, rest = jacobian.shape[0], list(indices)
    while rest:
        # Gathered from blocks, and multiplied in another dtype.
        sizes = [2 * m * jacobian.parameters[i].numel() for i in rest]
        total.require(sizes[0], f"the rows of parameters[{rest[0]}]")
        count = max(k for k in range(1, len(rest) + 1) if k == 1 or total.fits(sum(sizes[:k])))
        some, rest = rest[:count], rest[count:]
        block = jacobian.restrict(some)
        like_rows = jacobian.outputs[0].new_empty(m, dtype=jacobian.dtype)
        columns = [block.T @ basis for _, basis in identity_blocks(like_rows, WIDTH)]
        rows = torch.cat(columns, dim=1).T[place].to(total.matrix.dtype)
        for i, part in zip(some, rows.split([jacobian.parameters[i].numel() for i in some], 1), strict=True):
            total.add_rows(part, factor[i])
