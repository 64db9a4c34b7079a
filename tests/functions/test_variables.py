"""What x0 may be, and what the function and the result make of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optim
from optim.functions.variables import Variables

DOUBLE = torch.float64


def test_a_dict_is_seen_as_a_dict():
    x0 = {"w": torch.zeros(2, 3, dtype=DOUBLE), "b": torch.zeros((), dtype=DOUBLE)}

    def fun(x):
        return (x["w"] - 1).square().sum() + (x["b"] + 2).square()

    result = optim.minimize(fun, x0)
    assert result.success
    torch.testing.assert_close(result.x["w"], torch.ones(2, 3, dtype=DOUBLE))
    torch.testing.assert_close(result.x["b"], torch.tensor(-2.0, dtype=DOUBLE))
    assert result.jac["w"].shape == (2, 3)


def test_a_tuple_is_one_argument():
    result = optim.minimize(
        lambda x, c: (x[0] - c).square().sum() + x[1].square().sum(),
        (torch.zeros(2), torch.ones(1)),
        args=(3.0,),
    )
    torch.testing.assert_close(result.x[0], torch.full((2,), 3.0))
    assert isinstance(result.x, tuple)


@pytest.mark.parametrize("x0", [np.zeros((2, 1)), [[0.0], [0.0]], [[0], [0]]])
def test_numbers_come_back_as_an_array(x0):
    seen = []

    def fun(x):
        seen.append((x.shape, x.dtype))
        return (x - 3).square().sum()

    result = optim.minimize(fun, x0)
    assert isinstance(result.x, np.ndarray)
    np.testing.assert_allclose(result.x, [[3.0], [3.0]])
    assert set(seen) == {(torch.Size([2, 1]), DOUBLE)}


def test_one_number():
    assert optim.minimize(lambda x: (x - 1.5) ** 2, 0.0).x == pytest.approx(1.5)


def test_one_argument_needs_no_tuple():
    assert optim.minimize(lambda x, c: (x - c) ** 2, 0.0, args=4.0).x == pytest.approx(4.0)


def test_what_comes_with_the_value_is_that_of_the_solution():
    result = optim.minimize(
        lambda x: ((x - 1).square().sum(), {"at": x.detach().clone()}), torch.zeros(2), has_aux=True
    )
    assert torch.equal(result.aux["at"], result.x)
    with pytest.raises(TypeError, match=r"fun must return \(value, aux\) with has_aux, got Tensor"):
        optim.minimize(lambda x: x.sum(), torch.zeros(2), has_aux=True)


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_packing_and_unpacking_undo_each_other(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    x0 = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    variables = Variables(x0)
    back = variables.unpack(variables.start)
    assert all(torch.equal(back[name], x0[name]) for name in x0)
    assert torch.equal(variables.pack(x0, "x"), variables.start)
    assert torch.equal(variables.pack(2.0, "x"), torch.full_like(variables.start, 2.0))


@pytest.mark.parametrize(
    ("x0", "text"),
    [
        ([torch.zeros(1), 1.0], "tensors alone or numbers alone, got float among tensors"),
        (
            {"a": torch.zeros(1), "b": torch.zeros(1, dtype=DOUBLE)},
            "one dtype and device, got torch.float32 on cpu",
        ),
        (
            torch.zeros(1, dtype=torch.bfloat16),
            r"of float64 or float32, got torch.bfloat16; use x0.float\(\)",
        ),
        (np.array([1j]), "real floating-point numbers, .* got complex128"),
        (None, "got NoneType"),
    ],
)
def test_what_x0_may_not_be(x0, text):
    with pytest.raises(TypeError, match=text):
        optim.minimize(lambda x: x.sum(), x0)
