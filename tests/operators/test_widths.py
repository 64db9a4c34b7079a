"""Into what widths a block of vectors is cut, by a clock and a memory of the test."""

import math

import pytest
import torch
import zoo

from secondorder import GaussNewton, Hessian, Jacobian
from secondorder.autodiff.graph import pass_bytes
from secondorder.operators import widths
from secondorder.operators.widths import Pieces

DOUBLE = torch.float64
TOLERANCE = dict(rtol=1e-11, atol=1e-12)
A = zoo.vector(25, 0).view(5, 5)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the products of the test pass."""
    now = [0.0]
    monkeypatch.setattr(widths.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(widths, "_affordable", lambda column_bytes, device: widths.MOST)
    return now


class Products:
    """With a matrix; a piece of a width takes ``seconds(width)`` a column."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.widths = clock, seconds, []

    def alone(self, v):
        return self.together(v[:, None])[:, 0]

    def together(self, V):
        width = V.shape[1]
        self.widths.append(width)
        self.clock[0] += width * self.seconds(width)
        return A @ V

    def multiply(self, cut, V):
        self.widths.clear()
        product = cut.multiply(V, self.alone, self.together, tuple)
        torch.testing.assert_close(product, A @ V, **TOLERANCE)
        return self.widths


@pytest.mark.parametrize("best", [1, 8, 16, 64])
@pytest.mark.parametrize("k", [8, 9, 100, 333])
def test_the_best_width_is_found_and_kept(clock, best, k):
    products = Products(clock, lambda width: 1 + abs(math.log2(width / best)))
    cut, V = Pieces(None), zoo.vector(5 * k, 1).view(5, k)
    for _ in range(4):
        products.multiply(cut, V)
    widths = products.multiply(cut, V)
    assert sum(widths) == k
    # Of those that fit into the block; pieces are even.
    found = max([w for w in cut.seconds if w <= best], default=1)
    assert cut.width == found
    assert max(widths) <= found
    assert len(widths) == math.ceil(k / found)


def test_wider_blocks_try_wider_pieces(clock):
    products, cut = Products(clock, lambda width: 1 / width), Pieces(None)
    for k in (8, 20, 100, 300, 1000, 1000):
        products.multiply(cut, zoo.vector(5 * k, 1).view(5, k))
    assert max(cut.seconds) == cut.width == 512


def test_one_width_that_is_slow_by_chance_does_not_end_the_search(clock):
    products, cut = Products(clock, lambda width: {16: 2.0}.get(width, 1 / width)), Pieces(None)
    products.multiply(cut, zoo.vector(5 * 200, 1).view(5, 200))
    assert cut.width == 64


def test_narrow_blocks_are_not_measured(clock):
    products, cut = Products(clock, lambda width: 1.0), Pieces(None)
    assert products.multiply(cut, zoo.vector(35, 1).view(5, 7)) == [1] * 7
    assert not cut.seconds


@pytest.mark.parametrize(("batched", "widths"), [(True, [100]), (False, [1] * 100)])
def test_as_asked_for(clock, batched, widths):
    products = Products(clock, lambda width: 1.0)
    assert products.multiply(Pieces(batched), zoo.vector(500, 1).view(5, 100)) == widths


@pytest.mark.parametrize(("most", "widest"), [(7, 1), (8, 8), (40, 32)])
def test_memory_bounds_the_width(clock, monkeypatch, most, widest):
    monkeypatch.setattr(widths, "_affordable", lambda column_bytes, device: most)
    products, cut = Products(clock, lambda width: 1 / width), Pieces(None)
    for _ in range(3):
        assert max(products.multiply(cut, zoo.vector(1000, 1).view(5, 200))) <= widest
    assert cut.width == widest


def test_a_piece_that_does_not_fit_is_cut_again(clock):
    products, cut = Products(clock, lambda width: 1 / width), Pieces(None)
    together = products.together

    def bounded(V):
        if V.shape[1] > 16:
            raise torch.OutOfMemoryError("too wide")
        return together(V)

    products.together = bounded
    for _ in range(3):
        products.multiply(cut, zoo.vector(1000, 1).view(5, 200))
    assert cut.width == 16


def test_batches_that_differ_or_fail_are_loops(clock):
    for together in (lambda V: A @ V + 1, lambda V: (_ for _ in ()).throw(RuntimeError("no batching rule"))):
        products, cut = Products(clock, lambda width: 1.0), Pieces(None)
        products.multiply(cut, zoo.vector(5 * 7, 1).view(5, 7))
        V = zoo.vector(500, 1).view(5, 100)
        found = cut.multiply(V, products.alone, together, tuple)
        torch.testing.assert_close(found, A @ V, **TOLERANCE)
        assert cut.width == 1


def test_memory_of_a_pass():
    x = torch.zeros(3, 5, dtype=DOUBLE, requires_grad=True)
    w = torch.zeros(5, dtype=DOUBLE, requires_grad=True)
    # The sum, the cosine, the product, and the two leaves.
    assert pass_bytes([(x * w).cos().sum()]) == 8 * (1 + 15 + 15 + 15 + 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_memory_affords(device):
    device = torch.device(device)
    assert widths._affordable(0, device) == widths.MOST
    assert widths._affordable(2**60, device) == (0 if device.type == "cpu" else widths.MOST)


def test_products_do_not_depend_on_the_width():
    case = zoo.network("cnn_batch_norm")
    parameters = list(case.model.parameters())
    outputs = case.model(case.inputs)
    loss = case.loss(outputs, case.targets)
    n = sum(p.numel() for p in parameters)
    V = zoo.vector(50 * n, 1).view(n, 50)
    for operator in (
        Hessian(loss, parameters),
        GaussNewton(loss, outputs, parameters),
        Jacobian(outputs, parameters),
    ):
        expected = torch.stack([operator @ v for v in V.unbind(1)], dim=1)
        for width in (8, 16, 32):
            operator._pieces._most = width
            operator._pieces.seconds = {1: 2.0, width: 1.0}
            torch.testing.assert_close(operator @ V, expected, **TOLERANCE)
