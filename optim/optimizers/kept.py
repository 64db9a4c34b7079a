"""What one step leaves to the next: tensors in ``state[p]``, numbers in the groups."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.methods.grown import Grown, Ritz
from optim.methods.problem import Trial
from optim.methods.subspace import Subspace
from optim.methods.truncated import Truncated
from secondorder.vectors.flat import flatten, flatten_rows, is_finite, unflatten, unflatten_rows

# Of state: Ritz vectors of the last space, shape (k, *p.shape); the last solution of CG; the last step, where
# batches differ.
VECTORS, SOLUTION, STEP = "ritz_vectors", "cg_solution", "last_step"
# Of groups: the Ritz values, the curvature that is assumed across them, and the length of the vectors.
VALUES = "ritz_values"


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
        *values, rest, length = self._groups[0][VALUES] or (0.0, 0)
        parts = [part for part in self._parts(VECTORS) if part is not None]
        is_whole = len(parts) == len(self._parameters) and all(len(part) == len(values) for part in parts)
        if not values or not is_whole or length != sum(p.numel() for p in self._parameters):
            return None
        return Ritz(flatten_rows(parts), values, rest)

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
            self._keep(SOLUTION, unflatten(_finite(space.last), self._parameters))
        elif isinstance(space, Grown):
            ritz = space.ritz()
            self._keep(VECTORS, unflatten_rows(ritz.vectors, self._parameters))
            self.learn(**{VALUES: (*ritz.values, ritz.rest, ritz.vectors.shape[1])})

    def keep_step(self, trial: Trial | None, is_wanted: bool) -> None:
        """Keep the step, to try it on other samples, or forget the last one."""
        if not is_wanted:
            for parameter in self._parameters:
                self._state.get(parameter, {}).pop(STEP, None)
        elif trial is None:
            self._keep(STEP, [_single(torch.zeros_like(p)) for p in self._parameters])
        else:
            self._keep(STEP, unflatten(trial.step, self._parameters))

    def make(self, name: str) -> None:
        """Fill ``state`` as a first step does: distributed checkpoints take one on zero gradients for it."""
        if not any(p.grad is not None for p in self._parameters) or any(
            map(self._state.get, self._parameters)
        ):
            return
        zeros = [_single(p.detach()) for p in self._parameters]
        self._keep(name, [z.new_zeros((0, *z.shape) if name == VECTORS else z.shape) for z in zeros])

    def _keep(self, name: str, parts: Iterable[Tensor]) -> None:
        for parameter, part in zip(self._parameters, parts, strict=True):
            self._state[parameter][name] = part.clone()

    def _parts(self, name: str) -> list[Tensor | None]:
        # Not state[p], which would make an entry. As the parameters are now: a model may be cast.
        found = [(p, self._state.get(p, {}).get(name)) for p in self._parameters]
        return [part if part is None else part.to(p.device, _single_of(p)) for p, part in found]


def _single_of(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(_single_of(tensor))


def _finite(x: Tensor) -> Tensor:
    return x if is_finite(x) else torch.zeros_like(x)
