"""The six functions against ``torch.autograd.functional``: values, structure, flags, errors, side effects."""

import memory
import oracles
import pytest
import torch
import torch.autograd.functional as reference
import zoo
from torch import Tensor

import secondorder.functional as ours

# Both sides run the same kernels, in another order at most.
EXACT = dict(rtol=1e-13, atol=1e-13)
SIX = ("vjp", "jvp", "vhp", "hvp", "jacobian", "hessian")


def make(*shape, seed=0, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


FUNCTIONS = {
    "one_to_one": (lambda x: x.sin() * x.sum(), (make(3),)),
    "one_to_scalar": (lambda x: x.pow(3).sum() * x[0].exp(), (make(3),)),
    "two_to_one": (lambda x, y: x.outer(y).tanh(), (make(3), make(2, seed=1))),
    "two_to_two": (lambda x, y: (x * y.sum(), (x.sum() * y).cos()), (make(3), make(2, seed=1))),
    "two_to_scalar": (lambda x, y: x.outer(y).tanh().sum() ** 2, (make(3), make(2, seed=1))),
    "matrix_to_scalar": (lambda x: torch.linalg.slogdet(x @ x.T + 3 * torch.eye(3))[1], (make(3, 3),)),
    "ignores_second": (lambda x, y: x.square().sum(), (make(3), make(2, seed=1))),
    "linear": (lambda x: 2 * x.sum(), (make(3),)),
    "constant": (lambda x: torch.ones(()), (make(3),)),
    "zero_dim": (lambda x: x**3, (make(),)),
    "single_element": (lambda x: x**3, (make(1),)),
    "scalar_of_shape_one": (lambda x: x.square().sum().view(1, 1), (make(2),)),
    "float32": (lambda x: x.exp().sum(), (make(3, dtype=torch.float32),)),
    "mixed_dtypes": (lambda x, y: (x.double() * y).sum(), (make(2, dtype=torch.float32), make(2))),
    "expanded": (lambda x: x.square().sum() * x[0, 0], (make(3).expand(2, 3),)),
    "strided": (lambda x: x.square().sum() * x[0, 0], (make(4, 6)[::2, ::3],)),
    "requires_grad": (lambda x: x.pow(3).sum(), (make(3, grad=True),)),
    "in_graph": (lambda x: x.pow(3).sum(), (make(3, grad=True) * 2,)),
    "in_place_inside": (lambda x: x.clone().mul_(x).cos_().sum(), (make(3),)),
    "complex_to_real": (lambda x: (x * x.conj()).real.sum() ** 2, (make(2, dtype=torch.complex128),)),
}
SCALAR = [name for name, (f, x) in FUNCTIONS.items() if isinstance(f(*x), Tensor) and f(*x).numel() == 1]


def unwrap(values):
    """The single input as a tensor, several as a tuple."""
    return values[0] if len(values) == 1 else values


def outcome(function, *args, **kwargs):
    """What a call gives: ("value", result) or ("error", type, text)."""
    try:
        return ("value", function(*args, **kwargs))
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        return ("error", type(error), str(error))


def assert_same(mine, theirs):
    """Same structure, values, dtype, and whether a graph is attached."""
    assert type(mine) is type(theirs)
    if isinstance(mine, tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(mine, Tensor):
        torch.testing.assert_close(mine, theirs, **EXACT, equal_nan=True)
        assert mine.requires_grad == theirs.requires_grad
        assert (mine.grad_fn is None) == (theirs.grad_fn is None)
    else:
        assert mine == theirs


def compare(name, *args, **kwargs):
    mine = outcome(getattr(ours, name), *args, **kwargs)
    theirs = outcome(getattr(reference, name), *args, **kwargs)
    assert_same(mine, theirs)
    return mine


FLAGS = [{}, {"create_graph": True}, {"strict": True}, {"create_graph": True, "strict": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("case", FUNCTIONS)
@pytest.mark.parametrize("name", SIX)
def test_equals_torch(name, case, flags):
    func, inputs = FUNCTIONS[case]
    if name in ("jacobian", "hessian"):
        compare(name, func, unwrap(inputs), **flags)
        return
    shaped = func(*inputs) if name == "vjp" else unwrap(inputs)
    v = torch.utils._pytree.tree_map(lambda t: make(*t.shape, seed=3, dtype=t.dtype), shaped)
    compare(name, func, unwrap(inputs), v, **flags)
    compare(name, func, unwrap(inputs), **flags)  # v=None: 1, or an error


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("case", FUNCTIONS)
@pytest.mark.parametrize("name", ["jacobian", "hessian"])
def test_vectorized_equals_torch(name, case, create_graph):
    func, inputs = FUNCTIONS[case]
    compare(name, func, unwrap(inputs), vectorize=True, create_graph=create_graph)


@pytest.mark.parametrize("case", [name for name in FUNCTIONS if name not in ("expanded", "complex_to_real")])
@pytest.mark.parametrize("name", ["jacobian", "hessian"])
def test_forward_mode_equals_torch(name, case):
    """Values as torch's; but tuples are tuples and results are detached, where torch forgets both."""
    func, inputs = FUNCTIONS[case]
    if name == "hessian" and case not in SCALAR:
        pytest.skip("not a scalar function")
    option = {"strategy" if name == "jacobian" else "outer_jacobian_strategy": "forward-mode"}
    mine = getattr(ours, name)(func, unwrap(inputs), vectorize=True, **option)
    theirs = getattr(reference, name)(func, unwrap(inputs), vectorize=True, **option)
    assert_same(mine, torch.utils._pytree.tree_map(lambda t: t.detach(), as_tuples(theirs)))


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, tuple | list) else value


def test_forward_mode_takes_expanded_inputs():
    func, (x,) = FUNCTIONS["expanded"]
    got = ours.jacobian(func, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(got, reference.jacobian(func, x), **EXACT)


@pytest.mark.parametrize("vectorize", [False, True])
def test_outputs_without_elements(vectorize):
    x = make(3)
    result = ours.jacobian(lambda x: (x[:0], x**2), x, vectorize=vectorize)
    assert [tuple(block.shape) for block in result] == [(0, 3), (3, 3)]
    assert ours.jacobian(lambda x: x[:0], x, vectorize=vectorize).shape == (0, 3)
    assert ours.hessian(lambda x: x.square().sum(), x[:0], vectorize=vectorize).shape == (0, 0)


def scalar(x):
    return x.pow(3).sum()


BAD_CALLS = {
    "list_of_inputs": ((scalar, [make(2)]), {}),
    "number_in_tuple": ((lambda x, y: x.sum(), (make(2), 3.0)), {}),
    "output_is_a_list": ((lambda x: [x.sum()], make(2)), {}),
    "output_is_a_number": ((lambda x: 1.0, make(2)), {}),
    "output_is_a_tuple": ((lambda x: (x.sum(), x.sum()), make(2)), {}),
    "output_is_a_tuple_of_one": ((lambda x: (x.sum(),), make(2)), {}),
    "output_is_a_vector": ((lambda x: x * 2, make(2)), {}),
    "function_raises": ((lambda x: x @ make(7), make(2)), {}),
}
BAD_VECTORS = {
    "missing": None,
    "list": [make(2)],
    "wrong_size": make(3),
    "too_many": (make(2), make(2)),
    "number": 2.0,
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("name", SIX)
def test_bad_calls_fail_as_in_torch(name, bad, strict):
    args, kwargs = BAD_CALLS[bad]
    vector = () if name in ("jacobian", "hessian") else (make(2),)
    compare(name, *args, *vector, strict=strict, **kwargs)


@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("bad", BAD_VECTORS)
@pytest.mark.parametrize("name", ["vjp", "jvp", "vhp", "hvp"])
def test_bad_vectors_fail_as_in_torch(name, bad, is_tuple):
    inputs = (make(2),) if is_tuple else make(2)
    func = (lambda x: (x * 2,)) if name in ("vjp", "jvp") and is_tuple else (lambda x: x.pow(2).sum())
    kind = compare(name, func, inputs, BAD_VECTORS[bad])
    assert kind[0] == "error" or name == "vjp"


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "sideways"},
        {"strategy": "forward-mode"},
        {"strategy": "forward-mode", "create_graph": True},
        {"strategy": "forward-mode", "strict": True},
        {"vectorize": True, "strict": True},
    ],
    ids=str,
)
def test_bad_options_fail_as_in_torch(options):
    assert compare("jacobian", scalar, make(2), **options)[0] == "error"
    if "strategy" in options:
        options = {**options, "outer_jacobian_strategy": options["strategy"]}
        del options["strategy"]
    assert compare("hessian", scalar, make(2), **options)[0] == "error"


@pytest.mark.parametrize("name", SIX)
def test_user_tensors_are_untouched(name):
    captured = make(2, grad=True)
    captured.grad = torch.ones(2, dtype=torch.float64)
    x, calls = make(2, grad=True), []

    def func(point):
        calls.append(point)
        assert torch.is_grad_enabled()
        assert point is not x
        return (point * captured).square().sum() * torch.rand(())

    random_state = torch.get_rng_state()
    vector = () if name in ("jacobian", "hessian") else (make(2) if name != "vjp" else None,)
    with torch.no_grad():
        getattr(ours, name)(func, x, *vector)
        assert not torch.is_grad_enabled()
    state_after = torch.get_rng_state()
    assert len(calls) == 1
    assert x.grad is None
    assert x.requires_grad
    assert torch.equal(captured.grad, torch.ones(2, dtype=torch.float64))
    torch.set_rng_state(random_state)
    torch.rand(())
    assert torch.equal(torch.get_rng_state(), state_after)


@pytest.mark.parametrize("name", ["vhp", "hvp", "hessian"])
def test_third_derivative_through_the_result(name):
    v = make(3, seed=5)

    def second(x):
        if name == "hessian":
            return ours.hessian(lambda y: y.pow(4).sum(), x, create_graph=True) @ v
        return getattr(ours, name)(lambda y: y.pow(4).sum(), x, v, create_graph=True)[1]

    x = make(3, grad=True)
    (third,) = torch.autograd.grad(second(x).sum(), x)
    torch.testing.assert_close(third, 24 * x.detach() * v, **EXACT)


def test_unsymmetric_second_derivative_of_a_custom_function():
    """``hvp`` and ``vhp`` differ where a custom backward is not a gradient, as in torch."""

    x, v = make(2), make(2, seed=1)
    compare("hvp", zoo.Skewed.apply, x, v)
    compare("vhp", zoo.Skewed.apply, x, v)
    assert not torch.allclose(ours.hvp(zoo.Skewed.apply, x, v)[1], ours.vhp(zoo.Skewed.apply, x, v)[1])


def test_gradient_by_finite_differences(problem):
    x = problem.x0()
    gradient = ours.vjp(problem.func, x)[1]
    # Central differences of fourth order: relative 1e-9 on these functions.
    torch.testing.assert_close(gradient, oracles.central_gradient(problem.func, x), rtol=1e-8, atol=1e-6)


def test_hessian_product_by_finite_differences(problem):
    x, v = problem.x0(), make(len(problem.start), seed=4)
    for name in ("hvp", "vhp"):
        product = getattr(ours, name)(problem.func, x, v)[1]

        def slope(point):
            return ours.vjp(problem.func, point)[1] @ v

        torch.testing.assert_close(product, oracles.central_gradient(slope, x), rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_chunks_bound_the_memory_of_a_hessian(chunk_size):
    """The result, and for each row of a chunk a few tensors of the size of the hidden layer."""
    n, hidden = 64, 4096
    weight, x = make(hidden, n), make(n, seed=1)

    def func(x):
        return (weight @ x).tanh().square().sum()

    ours.hessian(func, x, chunk_size=2)  # what torch allocates once
    result, row = n * n * 8, hidden * 8
    # Vectors of the size of the hidden layer that are alive at once: two graphs, and six a row.
    budget = 2 * result + (12 + 6 * chunk_size) * row
    peak = memory.peak_bytes(lambda: ours.hessian(func, x, chunk_size=chunk_size))
    assert peak <= budget
    assert memory.peak_bytes(lambda: ours.hessian(func, x, vectorize=True)) > 2 * result + 64 * row
