"""A Jacobian in pieces, for each use of a parameter: what layers took, and the gradients that came to them.

Where samples do not mix, one backward pass brings a gradient for every sample to every layer, and as many
passes are enough as one sample has outputs. Whether the layers were read right, and samples do not mix, is
found out for each parameter by a product ``J^T v``.

Reference: Rochette, Manoel and Tramel (2019), Efficient per-example gradient computations in convolutional
neural networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.graph import Place, Source, like
from secondorder.operators.layers import extent, factors, is_known
from secondorder.operators.parameters import Jacobian
from secondorder.operators.pieces import WIDTH, Piece, pulled_back, scatter
from secondorder.operators.uses import Use, signed, uses_of
from secondorder.solvers._probes import gaussian
from secondorder.vectors.host import read

# What a layer's factors need, in times of their size: they are sorted by samples, multiplied, and the pass
# itself holds some.
COPIES = 3
# What mixing changes in ``J^T v`` is far above ``eps ** (2 / 3)`` of it: the mean of a batch of a million
# samples moves a thousandth. Sums that cancel round by some ``eps`` of what is summed; and a gradient through
# many layers, or on a device that rounds more than the dtype does (TF32), as much as two passes differ by,
# times this, but never by more than a share of what is summed.
PROOF, CANCELLED, NOISE, MOST_NOISE = 2 / 3, 64, 8, 1e-2

_MIXED = "samples mix, or the gradient is not the one that its layers give"


class Room(Protocol):
    """What knows how much memory there is."""

    def fits(self, numbers: float) -> bool:
        """Whether there is room for so many."""

    def require(self, numbers: float, what: str) -> None:
        """Raise unless there is."""


class Layers:
    """The uses of some parameters behind the outputs of a Jacobian.

    Args:
        jacobian: Of outputs in the graph.
        indices: Of the parameters.

    Attributes:
        outputs: Those that have entries.
        unread: Parameters that no pieces say all of, with the reason; complete after ``pieces``.
    """

    def __init__(self, jacobian: Jacobian, indices: Sequence[int]) -> None:
        self._jacobian, self._indices = jacobian, indices
        self.outputs = list(_outputs(jacobian))
        self.unread: dict[str, list[int]] = {}
        for i in indices:
            nodes = {use.node for z in self.outputs for use in z.uses[i]}
            for name in sorted({node.name() for node in nodes if not is_known(node)}):
                self.unread.setdefault(f"{name} is not known", []).append(i)

    @property
    def slow(self) -> list[int]:
        """Parameters in ``unread``."""
        return sorted({i for indices in self.unread.values() for i in indices})

    @property
    def passes(self) -> int:
        """Backward passes that bring the gradients, with those of the proof."""
        return sum(z.entries for z in self.outputs) + 2 * len(self.outputs)

    def pieces(self, room: Room, dtype: torch.dtype) -> Iterator[tuple[int, list[Piece]]]:
        """Parameters that are read, each with its pieces; none where it does not matter."""
        slow = set(self.slow)
        known = [i for i in self._indices if i not in slow and self.outputs]
        with self._jacobian._rung():
            for group in _groups(self.outputs, known, room):
                for i, pieces in _proved(self.outputs, self._jacobian.parameters, group, dtype).items():
                    if pieces is None:
                        self.unread.setdefault(_MIXED, []).append(i)
                    else:
                        yield i, pieces

    def order(self) -> Tensor:
        """Where the entries of all outputs are among the rows of pieces."""
        none = torch.zeros(0, dtype=torch.long, device=self._jacobian.device)
        return torch.cat([none, *[z.order() for z in self.outputs]])

    def multiplications(self) -> float:
        """Of a product ``J v``, about."""
        return sum(use.multiplications for z in self.outputs for uses in z.uses for use in uses)


class Output(NamedTuple):
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


def _outputs(jacobian: Jacobian) -> Iterator[Output]:
    """All of them that have entries."""
    start = 0
    for whole in jacobian._sources:
        for source in _parts(whole):
            z = like(source)
            if z.numel():
                samples = z.shape[0] if z.ndim else 1
                yield Output(source, start, samples, uses_of(source, jacobian.parameters, is_known))
                start += z.numel()


def _parts(source: Source) -> Iterator[Source]:
    """What an output was joined from along its samples: batches of their own, as of domain and boundary."""
    node, joined = _node(source), source
    # Of one order of entries.
    while node is not None and node.name() in _RESHAPED and _is_inner(node.next_functions[0]):
        joined = Place.of(*node.next_functions[0])
        node = _node(joined)
    parts = node.next_functions if node is not None and node.name() == "CatBackward0" else ()
    if not parts or signed(node._saved_dim) % like(joined).ndim or not all(map(_is_inner, parts)):
        yield source
        return
    for part, number in parts:
        yield from _parts(Place.of(part, number))


# Views that keep the order of entries.
_RESHAPED = {
    *(f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze")),
    *(f"SqueezeBackward{i}" for i in range(4)),
}


def _node(source: Source) -> Any:
    """What made it; None where nothing did."""
    return source.edge.node if isinstance(source, Place) else source.grad_fn


def _is_inner(edge: tuple[Node | None, int]) -> bool:
    """Whether a tensor in the graph comes from an operation."""
    return edge[0] is not None and not hasattr(edge[0], "variable")


def _groups(outputs: Sequence[Output], indices: Sequence[int], room: Room) -> Iterator[list[int]]:
    """Parameters, together as long as what comes to their layers fits."""
    group, held, seen = list[int](), 0, set[Node]()
    for i in indices:
        uses = [(use, z.entries) for z in outputs for use in z.uses[i]]
        alone = COPIES * sum(extent(use, count) for use, count in uses)
        room.require(alone, f"the gradients at the layers of parameters[{i}]")
        more = COPIES * sum(extent(use, count) for use, count in uses if use.node not in seen)
        if group and not room.fits(held + more):
            yield group
            group, held, seen, more = [], 0, set(), alone
        group.append(i)
        held += more
        seen.update(use.node for use, _ in uses)
    if group:
        yield group


def _proved(
    outputs: Sequence[Output], parameters: Sequence[Tensor], group: Sequence[int], dtype: torch.dtype
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
    for (i, number, pieces), is_right in zip(tried, read(*verdicts) if verdicts else (), strict=True):
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
