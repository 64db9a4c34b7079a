"""The distribution of the eigenvalues of a symmetric operator: stochastic Lanczos quadrature.

Lanczos from a random vector ``v`` gives the Gauss quadrature of the spectrum as ``v`` sees it: Ritz values
are the nodes, squared first components of the eigenvectors of the tridiagonal matrix the weights. The vectors
are not reorthogonalised: it makes copies of nodes whose weights add up to the right one, and sums over the
spectrum do not notice (Knizhnerman 1996, The simple Lanczos procedure: estimates of the error of the Gauss
quadrature).

Reference: Lin, Saad and Yang (2016), Approximating spectral densities of large matrices, SIAM Review 58;
Ghorbani, Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue
density, ICML.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, check_symmetric, dense, domain
from secondorder.solvers._probes import check_finite, rademacher
from secondorder.solvers._shown import in_lines


class SpectralDensity(NamedTuple):
    """The eigenvalues of an operator as a sum of weighted points.

    Attributes:
        nodes: Where the points lie, a row for each probe, shape (num_probes, steps); one row, the
            eigenvalues, where the matrix was decomposed.
        weights: Their shares, positive, the sum of a row 1, of the same shape.
        products: Products of ``A`` with one vector.
        is_exact: Whether the nodes are the eigenvalues, up to rounding.
    """

    nodes: Tensor
    weights: Tensor
    products: int
    is_exact: bool = False

    def __repr__(self) -> str:
        return in_lines(self)

    def mean(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The mean of ``function`` over the eigenvalues, ``trace(function(A)) / n``, and its standard error.

        The error is that of the random probes, without that of the quadrature: zero where the nodes are
        exact, infinite for one probe, which cannot tell.
        """
        samples = (self.weights * function(self.nodes)).sum(1)
        if len(samples) == 1:
            return float(samples[0]), 0.0 if self.is_exact else math.inf
        mean, deviation = torch.stack([samples.mean(), samples.std()]).tolist()
        return mean, deviation / len(samples) ** 0.5

    def evaluate(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density at the points of a grid, each node a Gaussian; its integral is 1.

        Args:
            grid: Points, shape (g,).
            width: Standard deviation of the Gaussians, in units of the eigenvalues; by default that of
                ``grid``.

        Returns:
            The density, shape (g,), per unit of the eigenvalues.

        Raises:
            ValueError: ``width`` is not positive.
        """
        width = self._width() if width is None else width
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}.")
        density = torch.zeros_like(grid, dtype=self.nodes.dtype)
        # A probe at a time: the table of all nodes by all points could be large.
        for nodes, weights in zip(self.nodes, self.weights, strict=True):
            density += torch.exp(-0.5 * ((grid[:, None] - nodes) / width).square()) @ weights
        return density / (len(self.nodes) * width * math.sqrt(2 * math.pi))

    def grid(self, num: int = 500) -> Tensor:
        """Points that cover all nodes and the tails of their Gaussians, shape (num,)."""
        lowest, highest = torch.stack([self.nodes.min(), self.nodes.max()]).tolist()
        margin = 5 * self._width()
        device = self.nodes.device
        return torch.linspace(lowest - margin, highest + margin, num, dtype=self.nodes.dtype, device=device)

    def _width(self) -> float:
        """One per cent of the range of the nodes: fine in a plot, and joins the nodes of a bulk."""
        lowest, highest = torch.stack([self.nodes.min(), self.nodes.max()]).tolist()
        return 0.01 * float(highest - lowest or abs(highest) or 1.0)


def spectral_density(
    A: Any,
    *,
    num_probes: int = 10,
    steps: int = 50,
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The distribution of all eigenvalues of a symmetric operator, from random probes.

    The mean of a polynomial of degree up to ``2 steps - 1`` over the spectrum is exact but for the probes.
    When the products would reach ``n``, the matrix is formed and decomposed instead.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n, k), symmetric.
        num_probes: Random vectors; the error falls with the root of their number, and of ``n``.
        steps: Lanczos steps of each, the number of nodes; the resolution at the ends of the spectrum is that
            of its range over ``steps^2``.
        like: A vector of shape (n,), where ``A`` has no ``shape`` and ``dtype``.
        generator: For the probes; torch's global one when None.

    Returns:
        ``SpectralDensity``: nodes and weights; ``evaluate`` gives the density on a grid, ``mean`` the mean of
        a function over the spectrum.

    Raises:
        TypeError: ``A`` has no products, or is neither float32 nor float64; a number is not an integer.
        ValueError: ``A`` is not symmetric or square; ``num_probes`` or ``steps`` is below 1.
        RuntimeError: a product holds NaN or infinity.

    Cost: ``steps`` products with a block of ``num_probes`` vectors, three such blocks of storage, one host
    read.

    Reference: Lin, Saad and Yang (2016), section 3.2; Ghorbani, Krishnan and Xiao (2019), algorithm 1.

    Example:
        >>> density = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 4.0])))
        >>> density.mean(lambda values: values)
        (2.0, 0.0)
    """
    like = domain(A, like)
    check_symmetric(A, "spectral_density needs real eigenvalues")
    check_count("num_probes", num_probes, 1)
    check_count("steps", steps, 1)
    if num_probes * steps >= like.shape[0]:
        return decomposed(A, like)
    diagonals, offdiagonals = tridiagonalize(A, rademacher(like, num_probes, generator), steps)
    nodes, weights = gauss(diagonals, offdiagonals)
    return SpectralDensity(nodes, weights, num_probes * steps)


def decomposed(A: Any, like: Tensor) -> SpectralDensity:
    """The distribution from the eigenvalues themselves."""
    matrix = dense(A, like)
    check_finite(matrix)
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)  # waits: once
    products = 0 if isinstance(A, Tensor) else len(values)
    weights = torch.full_like(values, 1 / max(len(values), 1))
    return SpectralDensity(values[None], weights[None], products, is_exact=True)


def tridiagonalize(A: Any, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos from every column of a block at once: one block product a step, no host read but the last.

    Args:
        A: Anything with ``A @ V`` for ``V`` of shape (n, p), symmetric.
        starts: Vectors that are not zero, shape (n, p).
        steps: Rows of the tridiagonal matrices.

    Returns:
        Their diagonals, shape (p, steps), and what stands beside them, shape (p, steps - 1). A column that
        spans an invariant subspace early goes on with copies of its first entry, uncoupled: their weight is
        zero.
    """
    eps = torch.finfo(starts.dtype).eps
    V, previous = starts / starts.norm(dim=0), torch.zeros_like(starts)
    coupling, largest = (starts.new_zeros(starts.shape[1]) for _ in range(2))
    is_alive = torch.ones_like(coupling, dtype=torch.bool)
    diagonals: list[Tensor] = []
    offdiagonals: list[Tensor] = []
    for _ in range(steps):
        W = A @ V - coupling * previous
        center = (V * W).sum(0)
        W = W - center * V
        diagonals.append(torch.where(is_alive, center, diagonals[0] if diagonals else center))
        coupling = W.norm(dim=0)
        largest = torch.maximum(largest, center.abs() + coupling)
        # Below this it is the rounding of the product. NaN counts as alive, and is found at the end.
        is_alive = is_alive & ~(coupling <= 10 * eps * largest)
        coupling = torch.where(is_alive, coupling, 0.0)
        offdiagonals.append(coupling)
        previous, V = V, torch.where(is_alive, W / torch.where(is_alive, coupling, 1.0), 0.0)
    inner, outer = torch.stack(diagonals, dim=1), torch.stack(offdiagonals, dim=1)
    check_finite(inner + outer)
    return inner, outer[:, :-1]


def gauss(diagonals: Tensor, offdiagonals: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss quadrature from tridiagonal matrices, both of shape (p, steps).

    Reference: Golub and Welsch (1969), Calculation of Gauss quadrature rules.
    """
    matrices = torch.diag_embed(diagonals)
    if offdiagonals.shape[1]:
        matrices = matrices + torch.diag_embed(offdiagonals, 1) + torch.diag_embed(offdiagonals, -1)
    nodes, vectors = torch.linalg.eigh(matrices)  # waits: once, for all
    return nodes, vectors[:, 0].square()
