"""Which form of the space a step gets: a cost model, and a bound on memory. Numbers in, numbers out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# A column of a formed matrix costs this part of a product alone: columns come in blocks, and in products of
# small networks most of the time is that of calls.
BLOCK_COST = 0.5
# The part of the known cost of a grown space that stays after a step with the formed matrix: after some of
# them the grown space is measured again.
KEPT = 0.95
# Of steps in the space of residuals half as many are needed, or fewer, where these are squares: they bend.
# They are worth as much more, and the grown space is measured again more rarely.
BENT, KEPT_BENT = 2.0, 0.98
# Part of a product that a backward pass is; multiplications of a singular value decomposition, and of the
# factoring of a matrix, in cubes of its size; those that a product of the smallest network takes the time of;
# and how many of large matrices take the time of one in a network; as measured.
PASS_COST, SINGULAR, FACTOR, LEAST_PRODUCT, DENSE = 0.5, 20, 0.5, 2e7, 2
# Up to this size singular values are always taken, of the matrix itself: they cost little.
LARGE = 400
# Products that a grown space is taken to cost before one was seen.
USUAL = 8.0
# A space that may hold fewer directions than this is worth less than CG.
LEAST_SIZE = 8
# Vectors of the length of the parameters for each direction, at the end of a step: V and B V, with room to
# grow, the last step's space, and this one's.
VECTORS = 6


class Form(NamedTuple):
    """``name`` is "grown", "residual", "formed" or "cg"; ``max_size`` bounds the size of a grown space."""

    name: str
    why: str
    max_size: int


def choose(
    solver: str,
    n: int,
    dtype: torch.dtype,
    *,
    usual: float,
    memory: float,
    max_iter: int,
    direct_limit: int,
    residual: float = math.inf,
) -> Form:
    """The form for a model of ``n`` parameters.

    Args:
        solver: "auto", or a form that is asked for.
        n: Parameters.
        dtype: Of the vectors.
        usual: Products that the grown space has been costing; 0 where that is not known.
        memory: Bytes that a space may take.
        max_iter: Products allowed.
        direct_limit: Parameters up to which "auto" may form the matrix; 0 for never.
        residual: Products that the space of residuals is worth; infinite where there is none.
    """
    room = int(memory / (VECTORS * n * dtype.itemsize))
    size = max(1, min(n, max_iter, room))
    if solver == "direct" and residual < math.inf:
        return Form("residual", "as asked", n)
    if solver == "direct" and n * n * dtype.itemsize <= memory:
        return Form("formed", "as asked", n)
    if solver == "cg":
        return Form("cg", "as asked", 0)
    if solver == "auto" and room < min(LEAST_SIZE, n):
        return Form("cg", f"memory={memory:.3g} bytes hold {room} directions", 0)
    if solver == "auto" and residual <= (usual or USUAL):
        return Form("residual", f"worth {residual:.0f} products, a space takes {usual or USUAL:.0f}", n)
    # In single precision the small eigenvalues of a formed matrix are rounding.
    if (
        solver == "auto"
        and n <= direct_limit
        and dtype == torch.float64
        and BLOCK_COST * n <= (usual or USUAL)
    ):
        return Form("formed", f"{n} columns cost less than {usual or USUAL:.0f} products", n)
    why = "as asked" if solver == "subspace" else "by products"
    if solver == "direct":
        why = f"memory={memory:.3g} bytes do not hold {n} columns"
    if room < min(n, max_iter):
        why += f", memory={memory:.3g} bytes hold {max(room, 1)} directions"
    return Form("grown", why, size)


def residual_cost(m: int, n: int, passes: float, product: float) -> float:
    """Products that a Jacobian of residuals costs, made and decomposed.

    Args:
        m: Residuals.
        n: Parameters.
        passes: Backward passes that make it.
        product: Multiplications of a product.
    """
    k = min(m, n)
    algebra = 2 * m * n * k + (FACTOR if LARGE < m < n else SINGULAR) * k**3
    return PASS_COST * passes + algebra / (DENSE * max(product, LEAST_PRODUCT))


def usual_cost(usual: float, form: Form, products: int) -> float:
    """What the grown space costs, after a step."""
    if form.name != "grown":
        return (KEPT_BENT if form.name == "residual" else KEPT) * usual
    return float(products) if usual == 0 else 0.5 * (usual + products)
