"""What one step leaves to the next: tensors in ``state[p]``, numbers in the groups."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers import NystromPreconditioner
from secondorder.vectors.flat import flatten, flatten_rows, unflatten, unflatten_rows
from secondorder.vectors.host import listed

from ..methods.grown import Grown, Ritz
from ..methods.scale import more_scale
from ..methods.subspace import Subspace
from ..methods.truncated import Sketch, Truncated

# Of state: Ritz vectors of the last space, and of a sketch, shape (k, *p.shape); the last solution of CG; the
# last step, where batches differ; the last step, of which a part is taken again; the scale of the variables.
VECTORS, SKETCH, SOLUTION, STEP = "ritz_vectors", "sketch_vectors", "cg_solution", "last_step"
LAST, SCALE = "last_solution", "column_scale"
# Of groups: the values of the vectors, one number more (curvature that is assumed across Ritz vectors; steps
# that a sketch served), and the length of the vectors.
VALUES, SKETCH_VALUES = "ritz_values", "sketch_values"


class Kept:
    """State of an optimizer as flat vectors.

    Args:
        state: By parameter.
        groups: Of the optimizer.
        parameters: In the order of the flat vectors.
    """

    def __init__(
        self,
        state: MutableMapping[Tensor, dict[str, Any]],
        groups: Sequence[dict[str, Any]],
        parameters: Sequence[Tensor],
    ) -> None:
        self._state, self._groups, self._parameters = state, groups, parameters

    def learn(self, **numbers: Any) -> None:
        """Keep numbers, in all groups."""
        for group in self._groups:
            group.update(numbers)

    def ritz(self) -> Ritz | None:
        """The last space; None where there is none, or parameters came or went since."""
        found = self._rows(VECTORS, VALUES)
        return None if found is None else Ritz(*found)

    def sketch(self, rank: int, steps: int) -> Sketch:
        """The last one, for so many steps; then, or where parameters came or went, one to be drawn."""
        found = self._rows(SKETCH, SKETCH_VALUES)
        if found is None or found[2] >= steps or len(found[1]) != min(rank, found[0].shape[1]):
            return Sketch(rank)
        vectors, values, age = found
        # The damping of the first solve takes the place of this one.
        return Sketch(rank, NystromPreconditioner(vectors.new_tensor(values), vectors.T, 1.0), int(age))

    def vector(self, name: str) -> Tensor | None:
        """A vector that was kept, zero for parameters that came since; None where there is none."""
        parts = self._parts(name)
        if all(part is None for part in parts):
            return None
        pairs = zip(parts, self._parameters, strict=True)
        return flatten([_single(torch.zeros_like(p)) if part is None else part for part, p in pairs])

    def keep_space(self, space: Subspace | None, with_solution: bool) -> None:
        """Keep the space, or the solution of CG, for the next step."""
        if isinstance(space, Truncated) and with_solution and space.last is not None:
            last = space.last if space.is_finite else torch.zeros_like(space.last)
            self._keep(SOLUTION, unflatten(last, self._parameters))
        elif isinstance(space, Grown):
            ritz = space.ritz()
            self._keep(VECTORS, unflatten_rows(ritz.vectors, self._parameters))
            self.learn(**{VALUES: (*ritz.values, ritz.rest, ritz.vectors.shape[1])})

    def keep_sketch(self, sketch: Sketch | None) -> None:
        """Keep what preconditioned CG in this step."""
        if sketch is not None and sketch.last is not None:
            vectors, values = sketch.last.vectors.T, listed(sketch.last.values)
            self._keep(SKETCH, unflatten_rows(vectors, self._parameters))
            self.learn(**{SKETCH_VALUES: (*values, sketch.age + 1, vectors.shape[1])})

    def keep(self, name: str, vector: Tensor | None, is_wanted: bool = True) -> None:
        """Keep a vector, or zero for None; or forget the last one."""
        if not is_wanted:
            for parameter in self._parameters:
                self._state.get(parameter, {}).pop(name, None)
        elif vector is None:
            self._keep(name, [_single(torch.zeros_like(p)) for p in self._parameters])
        else:
            self._keep(name, unflatten(vector, self._parameters))

    def make(self, *names: str) -> None:
        """Fill ``state`` as a first step does: distributed checkpoints take one on zero gradients for it."""
        if not any(p.grad is not None for p in self._parameters) or any(
            map(self._state.get, self._parameters)
        ):
            return
        zeros = [_single(p.detach()) for p in self._parameters]
        for name in names:
            rows = (0,) if name in (VECTORS, SKETCH) else ()
            self._keep(name, [z.new_zeros((*rows, *z.shape)) for z in zeros])

    def _rows(self, vectors: str, values: str) -> tuple[Tensor, list[float], float] | None:
        """Vectors as rows, their values, the number beside them; None where parameters came or went."""
        *numbers, beside, length = self._groups[0].get(values) or (0.0, 0)
        parts = [part for part in self._parts(vectors) if part is not None]
        is_whole = len(parts) == len(self._parameters) and all(len(part) == len(numbers) for part in parts)
        if not numbers or not is_whole or length != sum(p.numel() for p in self._parameters):
            return None
        return flatten_rows(parts), numbers, beside

    def _keep(self, name: str, parts: Iterable[Tensor]) -> None:
        for parameter, part in zip(self._parameters, parts, strict=True):
            self._state[parameter][name] = part.clone()

    def _parts(self, name: str) -> list[Tensor | None]:
        # Not state[p], which would make an entry. As the parameters are now: a model may be cast.
        found = [(p, self._state.get(p, {}).get(name)) for p in self._parameters]
        return [part if part is None else part.to(p.device, _single_of(p)) for p, part in found]


def column_scale(state: Kept, steps: int, columns: Tensor | None) -> Tensor:
    """The scale of the variables, kept, from the norms of the columns of their residuals' Jacobian.

    Raises:
        RuntimeError: there is no Jacobian.
    """
    if columns is None:
        raise RuntimeError(
            'scaling="more" needs the residuals of a loss that is a sum over outputs, as mse_loss; this'
            ' closure shows none. Use scaling="identity".'
        )
    scale = more_scale(columns, state.vector(SCALE), steps)
    state.keep(SCALE, scale)
    state.learn(scale_steps=steps + 1)
    return scale


def _single_of(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(_single_of(tensor))
