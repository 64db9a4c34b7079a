"""Boxes: what SciPy takes, what is held, and what is left free."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds

from optim.functions.bounds import Box
from optim.functions.frame import Frame
from optim.functions.variables import Variables
from secondorder import MatrixOperator

DOUBLE = torch.float64
INF = math.inf


@pytest.mark.parametrize(
    "bounds",
    [
        [(0.0, 1.0), (None, 2.0), (-1.0, None)],
        ([0.0, -INF, -1.0], [1.0, 2.0, INF]),
        (torch.tensor([0.0, -INF, -1.0]), torch.tensor([1.0, 2.0, INF])),
        Bounds([0.0, -INF, -1.0], [1.0, 2.0, INF]),
        [[0.0, None, -1.0], [1.0, 2.0, None]],
    ],
)
def test_what_scipy_takes(bounds):
    box = Box.of(bounds, Variables(torch.zeros(3, dtype=DOUBLE)))
    assert box.lower.tolist() == [0.0, -INF, -1.0]
    assert box.upper.tolist() == [1.0, 2.0, INF]


def test_one_number_for_all_and_a_structure():
    assert Box.of((0.0, None), Variables(np.ones((2, 2)))).lower.tolist() == [0.0] * 4
    x0 = {"a": torch.zeros(2), "b": torch.zeros(())}
    box = Box.of(({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor(2.0)}, INF), Variables(x0))
    assert box.lower.tolist() == [0.0, 1.0, 2.0]


def test_nothing_bounded_is_no_box():
    variables = Variables(torch.zeros(2))
    assert Box.of(None, variables) is None
    assert Box.of((-INF, INF), variables) is None
    assert Box.of([(None, None)] * 2, variables) is None


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (([0.0, 3.0], [1.0, 2.0]), "lower <= upper, got 3.0 and 2.0 at entry 1"),
        (([0.0, math.nan], [1.0, 2.0]), "lower <= upper, got nan and 2.0 at entry 1"),
        (([0.0] * 3, 1.0), r"bounds must have the shape of x0, \(2,\), got \(3,\)"),
        (3.0, "a pair"),
    ],
)
def test_bad_bounds(bounds, text):
    with pytest.raises(ValueError, match=text):
        Box.of(bounds, Variables(torch.zeros(2)), two_by_two="sides")


def test_two_pairs_for_two_unknowns():
    variables, bounds = Variables(torch.zeros(2)), ([0.0, 3.0], [1.0, 4.0])
    assert Box.of(bounds, variables, two_by_two="sides").lower.tolist() == [0.0, 3.0]
    assert Box.of([[0.0], [1.0]], Variables(torch.zeros(1))).upper.tolist() == [1.0]
    with pytest.raises(ValueError, match="lower <= upper, got 5.0 and 4.0 at entry 1"):
        Box.of(([0.0, 3.0], [5.0, 4.0]), variables)


def test_held_are_those_that_the_gradient_pushes_out():
    box = Box(torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE))
    x = torch.tensor([0.0, 0.0, 1.0, 0.5], dtype=DOUBLE)
    g = torch.tensor([1.0, -1.0, -1.0, 9.0], dtype=DOUBLE)
    assert box.free(x, g).tolist() == [False, True, False, True]
    assert box.active(x).tolist() == [-1, -1, 1, 0]
    assert box.project(torch.tensor([-1.0, 0.2, 3.0, 1.0], dtype=DOUBLE)).tolist() == [0.0, 0.2, 1.0, 1.0]


@given(n=st.integers(1, 8), seed=st.integers(0, 999), is_scaled=st.booleans(), is_held=st.booleans())
def test_a_frame_is_a_change_of_variables(n, seed, is_scaled, is_held):
    """Against its matrix ``T``: displacement ``T s``, gradient ``T' g``, curvature ``T' B T``."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, generator=generator, dtype=DOUBLE) + 0.5 if is_scaled else None
    free = torch.rand(n, generator=generator) > 0.4 if is_held else None
    frame = Frame(scale, free)
    T = torch.diag(1 / scale) if is_scaled else torch.eye(n, dtype=DOUBLE)
    T = T[:, free] if is_held else T
    g = torch.randn(n, generator=generator, dtype=DOUBLE)
    B = torch.randn(n, n, generator=generator, dtype=DOUBLE)
    B = B + B.T
    s = torch.randn(T.shape[1], generator=generator, dtype=DOUBLE)
    curvature = frame.curvature(MatrixOperator(B))
    torch.testing.assert_close(frame.displacement(s), T @ s)
    torch.testing.assert_close(frame.step(T @ s), s)
    torch.testing.assert_close(frame.gradient(g), T.T @ g)
    torch.testing.assert_close(curvature.dense(), T.T @ B @ T)
    torch.testing.assert_close(curvature @ s, T.T @ B @ T @ s)
    torch.testing.assert_close(
        curvature @ torch.stack([s, 2 * s], 1), T.T @ B @ T @ torch.stack([s, 2 * s], 1)
    )
