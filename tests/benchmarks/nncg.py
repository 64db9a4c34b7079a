"""Newton's method by Nyström-preconditioned CG, written from its paper: a peer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Product = Callable[[Tensor], Tensor]
RANK, DAMPING, STEPS_A_SKETCH = 60, 1e-2, 20
TOLERANCE, MAX_PRODUCTS = 1e-16, 1000
SUFFICIENT, SHORTER, MAX_SEARCHES = 0.1, 0.5, 60


class Sketch(NamedTuple):
    """``U diag(values) U^T``, nearly a matrix: shapes (n, rank) and (rank,), descending.

    Reference: Frangella, Tropp and Udell (2023), Randomized Nyström preconditioning, algorithms 2.1 and 5.1.
    """

    vectors: Tensor
    values: Tensor

    @classmethod
    def of(cls, product: Product, like: Tensor) -> Sketch:
        test = torch.linalg.qr(like.new_empty(len(like), RANK).normal_()).Q
        image = torch.stack([product(v) for v in test.T], 1)
        shift = torch.finfo(like.dtype).eps * float(image.norm())
        inner = test.T @ image
        # Not positive definite: by the least eigenvalue more, as in the authors' code.
        shift += max(0.0, -2 * float(torch.linalg.eigvalsh((inner + inner.T) / 2)[0]))
        image = image + shift * test
        factor = torch.linalg.cholesky(test.T @ image)
        half = torch.linalg.solve_triangular(factor.T, image, upper=True, left=False)
        vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
        return cls(vectors, (roots.square() - shift).clamp(min=0.0))

    def precondition(self, r: Tensor) -> Tensor:
        along = self.vectors.T @ r
        scaled = (self.values[-1] + DAMPING) / (self.values + DAMPING) * along
        return r + self.vectors @ (scaled - along)


def solve(product: Product, b: Tensor, x: Tensor, sketch: Sketch, is_over: Callable[[], bool]) -> Tensor:
    """``(H + damping) x = b`` by preconditioned CG; curvature is not looked at."""
    r = b - product(x) - DAMPING * x
    z = sketch.precondition(r)
    p, rz = z, r @ z
    for _ in range(MAX_PRODUCTS):
        if r.norm() <= TOLERANCE or is_over():
            break
        image = product(p) + DAMPING * p
        length = rz / (p @ image)
        x, r = x + length * p, r - length * image
        z, last = sketch.precondition(r), rz
        rz = r @ z
        p = z + rz / last * p
    return x


class NNCG:
    """Damped Newton steps, each solved from the last one, and Armijo's line search.

    Args:
        parameters: To be trained.
        is_over: Whether the time is up, asked after each product.

    Reference: Rathore, Lei, Frangella, Lu and Udell (2024), Challenges in training PINNs: a loss landscape
        perspective, algorithms 4 to 7; constants of its experiments.
    """

    def __init__(self, parameters: Sequence[Tensor], is_over: Callable[[], bool]) -> None:
        self._parameters, self._is_over = list(parameters), is_over
        self._steps, self._step = 0, torch.zeros_like(parameters_to_vector(self._parameters)).detach()

    def step(self, loss: Callable[[], Tensor]) -> float:
        """One step; what it cost in gradients, a product as two and a trial as a third."""
        before, products = loss(), 0
        parts = torch.autograd.grad(before, self._parameters, create_graph=True)
        graph = parameters_to_vector(parts)
        gradient = graph.detach()

        def hessian(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return parameters_to_vector(torch.autograd.grad(graph, self._parameters, v, retain_graph=True))

        if self._steps % STEPS_A_SKETCH == 0:
            self._sketch = Sketch.of(hessian, gradient)
        self._steps += 1
        self._step = solve(hessian, gradient, self._step, self._sketch, self._is_over)
        return 2 + 2 * products + self._search(loss, float(before.detach()), gradient) / 3

    @torch.no_grad()
    def _search(self, loss: Callable[[], Tensor], before: float, gradient: Tensor) -> int:
        start, slope, length = parameters_to_vector(self._parameters), -float(gradient @ self._step), 1.0
        for tried in range(MAX_SEARCHES):
            vector_to_parameters(start - length * self._step, self._parameters)
            if float(loss()) <= before + SUFFICIENT * length * slope:
                return tried + 1
            length *= SHORTER
        vector_to_parameters(start, self._parameters)
        return MAX_SEARCHES
