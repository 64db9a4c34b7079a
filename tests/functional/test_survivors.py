"""Mutants that once survived the suite, each killed by name.

A mutant is a small wrong change of the library; its name says which.
"""

import inspect

import pytest
import torch
import torch.autograd.functional as reference

from secondorder import GaussNewton, Hessian, Jacobian, functional, fvp, ggnvp
from secondorder.autodiff.decompose import decompose

SIX = ("vjp", "jvp", "vhp", "hvp", "jacobian", "hessian")
X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64)


def test_cudnn_left_off_after_decomposing():
    read, write = torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled
    before = read()
    try:
        for enabled in (True, False):
            write(enabled)
            with decompose():
                assert not read()
            assert read() is enabled
            functional.hvp(lambda x: torch.nn.functional.hardsigmoid(x).square().sum(), X, V)
            assert read() is enabled
    finally:
        write(before)


def test_the_graph_of_v_is_not_kept_in_linear_maps():
    v = V.clone().requires_grad_()
    _, push = functional.linearize(lambda x: x**3, X)
    _, _, hvp_fn = functional.linearize_grad(lambda x: (x**4).sum(), X)
    leaf = X.clone().requires_grad_()
    operators = [Hessian((leaf**4).sum(), [leaf]), Jacobian(leaf**3, [leaf])]
    results = [push(v), hvp_fn(v), push(v[None], batched=True), hvp_fn(v[None], batched=True)]
    results += [operator @ v for operator in operators]
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("strategy", ["forward-over-reverse", "forward-mode"])
def test_an_expanded_vector_in_forward_mode(strategy):
    x, v = X.expand(2, 3).contiguous(), V[:1].expand(2, 3)
    if strategy == "forward-mode":
        got = functional.jvp(lambda x: x.sin() * x.sum(), x, v, strategy=strategy)[1]
        expected = reference.jvp(lambda x: x.sin() * x.sum(), x, v.contiguous())[1]
    else:
        got = functional.hvp(lambda x: (x**3).sum() * x.sum(), x, v, strategy=strategy)[1]
        expected = reference.hvp(lambda x: (x**3).sum() * x.sum(), x, v.contiguous())[1]
    torch.testing.assert_close(got, expected)


# In each the second of two is the one that strict refuses.
STRICT = [
    ("jacobian", lambda x, y: (x * y, x.detach())),
    ("jacobian", lambda x, y: x**2),
    ("vjp", lambda x, y: (x * y).sum() * 0 + x.sum()),
    ("vjp", lambda x, y: x.sum()),
    ("jvp", lambda x, y: (x * y, torch.ones(2))),
    ("jvp", lambda x, y: x**2),
    ("jvp", lambda x, y: x**2 + y.floor()),
    ("vhp", lambda x, y: (x**2).sum()),
    ("vhp", lambda x, y: (x**2).sum() + y.sum()),
    ("hvp", lambda x, y: (x**2).sum()),
    ("hvp", lambda x, y: (x**2).sum() + y.sum()),
    ("hessian", lambda x, y: (x**2).sum() + y.sum()),
    ("hessian", lambda x, y: (x**2).sum() + (y**2).sum()),
]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("name", "func"), STRICT)
def test_the_index_in_the_strict_message(name, func, create_graph):
    inputs = (X.clone().requires_grad_(), V.clone().requires_grad_())

    def outcome(module):
        arguments = () if name in ("jacobian", "hessian") else (None if name == "vjp" else inputs,)
        try:
            getattr(module, name)(func, inputs, *arguments, create_graph=create_graph, strict=True)
        except RuntimeError as error:
            return str(error)
        return "no error"

    assert outcome(functional) == outcome(reference)


CALLS = {
    "vjp": lambda f: functional.vjp(f, X),
    "vjp create_graph": lambda f: functional.vjp(f, X, create_graph=True),
    "jvp": lambda f: functional.jvp(f, X, V),
    "jvp forward-mode": lambda f: functional.jvp(f, X, V, strategy="forward-mode"),
    "vhp": lambda f: functional.vhp(f, X, V),
    "hvp": lambda f: functional.hvp(f, X, V),
    "hvp forward-over-reverse": lambda f: functional.hvp(f, X, V, strategy="forward-over-reverse"),
    "hvp finite-differences": lambda f: functional.hvp(f, X, V, strategy="finite-differences"),
    "jacobian": lambda f: functional.jacobian(f, X),
    "jacobian forward-mode": lambda f: functional.jacobian(f, X, vectorize=True, strategy="forward-mode"),
    "hessian": lambda f: functional.hessian(f, X),
    "hessian forward-mode": lambda f: functional.hessian(
        f, X, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "value_and_grad": lambda f: functional.value_and_grad(f, X),
    "linearize": lambda f: functional.linearize(f, X),
    "linearize_grad": lambda f: functional.linearize_grad(f, X),
    "batch_jacobian": lambda f: functional.batch_jacobian(f, X[None]),
    "ggnvp": lambda f: ggnvp(f, lambda z: z.sum(), X, V),
    "fvp": lambda f: fvp(f, X, V, likelihood="normal"),
    "Hessian": lambda f: Hessian.of(f, X),
    "GaussNewton": lambda f: GaussNewton.of(f, lambda z: z.sum(), X),
}


@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError, TypeError, NotImplementedError])
@pytest.mark.parametrize("call", CALLS)
def test_user_exception_wrapped(call, kind):
    """What the user's function raises comes through as it is."""
    raised = []

    def func(x):
        raised.append(kind("of the user"))
        raise raised[-1]

    with pytest.raises(kind) as caught:
        CALLS[call](func)
    assert any(caught.value is error for error in raised)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", SIX)
def test_positional_order_swapped(name):
    """A call that moves here from torch may give all of torch's arguments by position."""
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters.values() for module in (functional, reference)
    )
    positional = [p for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


def test_forward_mode_transposed():
    """Neither square nor symmetric, of two inputs and two outputs."""
    A = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    inputs = X, V[:2].clone()

    def func(x, y):
        return A @ x * y, x.outer(y)

    got = functional.jacobian(func, inputs, vectorize=True, strategy="forward-mode")
    expected = reference.jacobian(func, inputs)
    for mine, theirs in zip(got, expected, strict=True):
        for block, truth in zip(mine, theirs, strict=True):
            torch.testing.assert_close(block, truth)
    mixed = functional.hessian(
        lambda x, y: (A @ x.sin() * y**2).sum(),
        inputs,
        vectorize=True,
        outer_jacobian_strategy="forward-mode",
    )
    truth = reference.hessian(lambda x, y: (A @ x.sin() * y**2).sum(), inputs)
    torch.testing.assert_close(mixed, truth)
