import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secondorder.vectors import flat

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@given(SHAPES, st.integers(0, 2**16))
def test_round_trip(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    vector = flat.flatten(tensors)
    assert vector.shape == (sum(t.numel() for t in tensors),)
    assert all(map(torch.equal, flat.unflatten(vector, tensors), tensors))


@given(SHAPES, st.integers(1, 3), st.integers(0, 2**16))
def test_rows_are_single_vectors(shapes, k, seed):
    generator = torch.Generator().manual_seed(seed)
    like = [torch.empty(shape) for shape in shapes]
    stacked = [torch.randn((k, *shape), generator=generator) for shape in shapes]
    matrix = flat.flatten_rows(stacked)
    for i in range(k):
        assert torch.equal(matrix[i], flat.flatten([t[i] for t in stacked]))
    assert all(map(torch.equal, flat.unflatten_rows(matrix, like), stacked))


def test_wrong_length_is_refused():
    with pytest.raises(RuntimeError):
        flat.unflatten(torch.zeros(3), [torch.zeros(2)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_is_finite(value):
    vector = torch.zeros(5)
    assert flat.is_finite(vector)
    vector[3] = value
    assert not flat.is_finite(vector)


def test_numbers_whose_sum_overflows_are_finite():
    assert flat.is_finite(torch.full((4,), 3e38))
    assert not flat.is_finite(torch.tensor([float("inf"), float("-inf")]))
