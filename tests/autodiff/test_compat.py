"""What versions of torch do differently: as this one does it, and as an older one does."""

import inspect

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import optim  # noqa: F401 - it lets backward dispatch
from secondorder.autodiff import compat
from secondorder.autodiff.compat import dispatch_backward, in_checkpoint

PRESENT = torch.autograd.backward
# Since torch 2.7.
TAKES_EDGES = "Edge" in str(inspect.signature(PRESENT).parameters["tensors"].annotation)


def without_dispatch(
    tensors, grad_tensors=None, retain_graph=None, create_graph=False, grad_variables=None, inputs=None
):
    """As ``torch.autograd.backward`` is before torch 2.11."""
    with torch._C.DisableTorchFunction():
        PRESENT(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)


@pytest.fixture(params=["this torch", "one without dispatch"])
def backward(request, monkeypatch):
    """``torch.autograd.backward``, as ``optim`` leaves it, and what it was."""
    if request.param == "this torch":
        return PRESENT, inspect.unwrap(PRESENT)
    monkeypatch.setattr(torch.autograd, "backward", without_dispatch)
    table = dict(torch.jit._builtins._get_builtin_table())
    monkeypatch.setattr(torch.jit._builtins, "_builtin_table", table)
    dispatch_backward()
    return torch.autograd.backward, without_dispatch


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    calls = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Own.calls += (func,)
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: iter([x])])
def test_modes_and_subclasses_see_the_backward_function(backward, arrange):
    backward, _ = backward
    x = torch.ones(3, requires_grad=True)
    with Seen() as mode:
        backward(arrange(x.square().sum()))
    assert mode.calls.count(backward) == 1
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    Own.calls = ()
    backward(arrange(torch.ones((), requires_grad=True).as_subclass(Own)))
    assert Own.calls.count(backward) == 1


def test_a_method_call_is_seen_once(backward):
    with Seen() as mode:
        torch.ones((), requires_grad=True).exp().backward()
    assert mode.calls.count(torch.Tensor.backward) == 1
    assert backward[0] not in mode.calls


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_the_backward_function_does_what_it_did(backward):
    """Roots, weights, inputs and graphs by position and by name, and errors."""
    results = []
    for function in backward:
        x, y = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
        z, weights = (x * y).exp(), torch.tensor([3.0, 4.0])
        function(iter([z]), (weights,), True)
        function(tensors=[z, z.sum()], grad_tensors=[weights, None], retain_graph=True, inputs=[x])
        function(z, weights, create_graph=True)
        edge = torch.autograd.graph.get_gradient_edge(z) if TAKES_EDGES else z
        function(edge, weights, inputs=[y])
        errors = []
        for arguments in ([], [z], [torch.ones(())], [3]):
            with pytest.raises((RuntimeError, TypeError)) as error:
                function(*arguments)
            errors.append((type(error.value), str(error.value).replace("without_dispatch", "backward")))
        results.append((x.grad.tolist(), y.grad.tolist(), x.grad.requires_grad, errors))
    assert results[0] == results[1]
    assert inspect.signature(backward[0]) == inspect.signature(backward[1])


def test_it_is_replaced_once_and_where_it_has_to_be(backward):
    dispatch_backward()
    assert torch.autograd.backward is backward[0]
    has_dispatch = torch.__version__ >= (2, 11)
    assert (inspect.unwrap(PRESENT) is PRESENT) == has_dispatch
    assert torch.jit._builtins._find_builtin(backward[0]) == "aten::backward"


@pytest.mark.parametrize("can_read_hooks", [True, False])
def test_a_checkpoint_is_noticed(can_read_hooks, monkeypatch):
    if not can_read_hooks:  # as before torch 2.8
        monkeypatch.setattr(compat, "_top_hooks", None)
    seen = []

    def function(x):
        seen.append(in_checkpoint())
        return x.exp()

    x = torch.ones((), requires_grad=True)
    checkpoint(function, x, use_reentrant=False)
    with torch.no_grad():
        checkpoint(function, x, use_reentrant=False)
    checkpoint(function, x, use_reentrant=True)
    checkpoint(lambda x: checkpoint(function, x, use_reentrant=False), x, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        function(x)
    function(x)
    assert seen == [True, False, False, True, False, False]


@pytest.mark.parametrize("is_renamed", [False, True])
def test_products_are_those_of_autograd(is_renamed, monkeypatch):
    """By the engine itself, where torch still has it by that name and nobody watches."""
    if is_renamed:
        monkeypatch.setattr(compat, "_run_backward", None)
    w, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    outputs, v = (w.exp() * torch.arange(3.0),), (torch.tensor([1.0, 2.0, 3.0]),)
    for _ in range(2):
        product, nothing = compat.grad_of_fitting(outputs, (w, unused), v)
        assert torch.equal(product, torch.autograd.grad(outputs, w, v, retain_graph=True)[0])
        assert nothing is None
        assert w.grad is None
    with Seen() as mode:
        compat.grad_of_fitting(outputs, (w,), v)
    assert mode.calls == [torch.autograd.grad]
