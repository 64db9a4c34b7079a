"""Cost of an exact step in the space of outputs, in products with the Gauss-Newton matrix on the kept graph.

CPU seconds, interleaved, medians: python -m pytest tests/benchmarks/test_gram.py -s
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from bench import BUILDERS
from memory import peak_bytes
from torch import nn

from secondorder import GaussNewton
from secondorder.operators.gram import gram

ROUNDS, PRODUCTS = 7, 5


def wide():
    """670 thousand parameters, 1280 rows."""
    model = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    return model, torch.randn(128, 784), torch.randint(10, (128,))


# Products that one step may take; the first of the others has 5120 rows, and takes most to solve.
LIMITS = {"wide": 20, "mlp": 150, "cnn": 60, "transformer": 100}


def seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.parametrize("build", [wide, *BUILDERS], ids=lambda build: build.__name__)
def test_gram_solve_and_transpose(build):
    """Of the damped system, by Cholesky factors."""
    model, inputs, targets = build()
    outputs = model(inputs)
    curvature = GaussNewton(F.cross_entropy(outputs, targets), outputs, model.parameters())
    jacobian = curvature.jacobian
    u, v = torch.randn(jacobian.shape[0]), torch.randn(jacobian.shape[1])

    def step():
        matrix = gram(jacobian).matrix
        factor = torch.linalg.cholesky(matrix + matrix.diagonal().mean() * torch.eye(len(matrix)))
        return jacobian.T @ torch.cholesky_solve(u[:, None], factor)[:, 0]

    def products():
        for _ in range(PRODUCTS):
            curvature @ v

    steps, others = zip(*[(seconds(step), seconds(products)) for _ in range(ROUNDS)], strict=True)
    count = statistics.median(steps) / statistics.median(others) * PRODUCTS
    peak, rows = peak_bytes(lambda: gram(jacobian)), 4 * jacobian.shape[0] * jacobian.shape[1]
    print(
        f"\n{build.__name__}: {count:.1f} products, {peak / 2**20:.0f} MiB; the rows: {rows / 2**20:.0f} MiB"
    )
    assert count <= LIMITS[build.__name__]
    # All rows of the transformer and the convolutional network are few.
    assert build is not wide or peak <= 0.01 * rows
