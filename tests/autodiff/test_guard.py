"""Every write is undone, found by torch's own schemas, signatures and samples (issue 13, entry 16b)."""

import inspect
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from secondorder.autodiff.guard import WriteGuard, undo_writes

METHODS = [optim.Newton, optim.HessianFree, optim.GaussNewton]
SAMPLES = 3  # of each operation and data type
KINDS = (torch.float32, torch.complex64, torch.int64, torch.bool)


def tensors_in(*values):
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def shot(tensors):
    strides = [x.stride() if x.layout is torch.strided else None for x in tensors]
    return [(x.shape, s, x.detach().clone()) for x, s in zip(tensors, strides, strict=True)]


def differs(before, after):
    for (shape, stride, numbers), (shape_now, stride_now, now) in zip(before, after, strict=True):
        if (shape, stride) != (shape_now, stride_now):
            return True
        try:
            torch.testing.assert_close(now, numbers, rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return True
    return False


class Tally:
    """Calls functions guarded and unguarded; counts those that write, and names those that still did."""

    def __init__(self):
        self.writing, self.missed = 0, set()

    def call(self, name, func, args, kwargs):
        tensors = tensors_in(args, kwargs)
        before = shot(tensors)
        with undo_writes():
            attempt(func, args, kwargs)
        if differs(before, shot(tensors)):
            self.missed.add(name)
        attempt(func, args, kwargs)
        self.writing += differs(before, shot(tensors))


def attempt(func, args, kwargs):
    """Some samples are meant to fail, some only half way."""
    try:
        return func(*args, **kwargs)
    except Exception:
        return None


class Calls(TorchDispatchMode):
    """The operators that are called beneath, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        clone = lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
        self.calls.append((func, *pytree.tree_map(clone, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def samples(op):
    kinds = [kind for kind in KINDS if kind in op.dtypes][:1]
    for kind in kinds:
        # Not op.sample_inputs, which reads the stack for each: 25 seconds.
        for sample in itertools.islice(op.sample_inputs_func(op, "cpu", kind, requires_grad=False), SAMPLES):
            yield (sample.input, *sample.args), sample.kwargs


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_no_write_of_an_operation_is_missed():
    """As a function, a method, in place, as an operator; with ``out=``."""
    tally = Tally()
    for op in op_db:
        for args, kwargs in samples(op):
            variants = (op.op, op.method_variant, op.inplace_variant, op.inplace_operator_variant)
            for variant in filter(None, variants):
                tally.call(op.name, variant, args, kwargs)
            result = attempt(op.op, args, kwargs) if op.supports_out else None
            if tensors_in(result):
                out = pytree.tree_map(
                    torch.zeros_like, tuple(result) if isinstance(result, tuple) else result
                )
                tally.call(f"{op.name} out", op.op, args, {**kwargs, "out": out})
    assert not tally.missed
    assert tally.writing > 600


def test_no_write_of_an_operator_called_directly_is_missed():
    """All that the operations above call of ``torch.ops``, by overload and by packet."""
    tally, seen = Tally(), set()
    for op in op_db:
        for args, kwargs in samples(op):
            with Calls() as beneath:
                for variant in filter(None, (op.op, op.inplace_variant)):
                    attempt(variant, args, kwargs)
            for func, args_beneath, kwargs_beneath in beneath.calls:
                if func in seen or func.namespace != "aten":
                    continue
                seen.add(func)
                tally.call(str(func), func, args_beneath, kwargs_beneath)
                tally.call(str(func), func.overloadpacket, args_beneath, kwargs_beneath)
    assert not tally.missed
    assert tally.writing > 200


def options():
    """Functions of torch in Python that write to an argument when they are asked to."""
    functions = {func for group in get_overridable_functions().values() for func in group}
    found = {func.__name__: func for func in functions if inspect.isfunction(func)}
    for name, func in sorted(found.items()):
        names = inspect.signature(func, follow_wrapped=False).parameters
        if "inplace" in names and not name.startswith("_"):
            yield name, func


@pytest.mark.parametrize(("name", "func"), [pytest.param(*pair, id=pair[0]) for pair in options()])
def test_an_inplace_option_is_undone_however_it_is_given(name, func):
    torch.manual_seed(0)
    shape = {"dropout2d": (1, 4, 3, 3), "dropout3d": (1, 4, 3, 3, 3)}.get(name, (1, 4, 3))
    x = torch.linspace(-3, 3, torch.Size(shape).numel()).view(shape)
    parameters = list(inspect.signature(func).parameters.values())[1:]
    required = {p.name: 0.5 for p in parameters if p.default is p.empty}
    required |= {"training": True} if any(p.name == "training" for p in parameters) else {}
    positional = [required.get(p.name, p.default) if p.name != "inplace" else True for p in parameters]
    tally = Tally()
    for args, kwargs in [
        ((x,), {**required, "inplace": True}),
        ((), {"input": x, **required, "inplace": True}),
        ((x, *positional), {}),
    ]:
        tally.call(name, func, args, kwargs)
        x.copy_(torch.linspace(-3, 3, x.numel()).view(shape))
    assert tally.writing == 3
    assert not tally.missed


X, MEAN, VARIANCE = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
TABLE, INDEX = torch.full((4, 3), 5.0), torch.tensor([0, 2])


@pytest.mark.parametrize(
    "write",
    [
        lambda: F.batch_norm(X, MEAN, VARIANCE, training=True),
        lambda: F.batch_norm(input=X, running_mean=MEAN, running_var=VARIANCE, training=True),
        lambda: torch.batch_norm(X, None, None, MEAN, VARIANCE, True, 0.1, 1e-5, False),
        lambda: torch.native_batch_norm(X, None, None, MEAN, VARIANCE, True, 0.1, 1e-5),
        lambda: torch.instance_norm(X.T[None], None, None, MEAN, VARIANCE, True, 0.1, 1e-5, False),
        lambda: F.instance_norm(X.T[None], running_mean=MEAN, running_var=VARIANCE),
        lambda: torch.ops.aten.batch_norm(X, None, None, MEAN, VARIANCE, True, 0.1, 1e-5, False),
        lambda: torch.ops.aten.native_batch_norm.default(X, None, None, MEAN, VARIANCE, True, 0.1, 1e-5),
        lambda: F.embedding(INDEX, TABLE, max_norm=1.0),
        lambda: F.embedding(input=INDEX, weight=TABLE, max_norm=1.0),
        lambda: F.embedding(INDEX, TABLE, None, 1.0),
        lambda: F.embedding_bag(INDEX, TABLE, torch.tensor([0]), max_norm=1.0),
        lambda: torch.embedding_renorm_(TABLE, INDEX, 1.0, 2.0),
        lambda: torch.sigmoid_(input=MEAN),
        lambda: torch.add(MEAN, 1, out=MEAN),
        lambda: torch.ops.aten.add.out(MEAN, 1, out=MEAN),
        lambda: torch.ops.aten.add_.Tensor(MEAN, VARIANCE),
        lambda: torch.ops.aten.add_(MEAN, 1),
        lambda: torch._foreach_add_([MEAN, VARIANCE], 1.0),
        lambda: torch.narrow(input=MEAN, dim=0, start=0, length=2).add_(1),
        lambda: (torch.narrow(input=MEAN, dim=0, start=0, length=2), MEAN.add_(1)),
        lambda: (torch.add(MEAN, 1, out=MEAN), VARIANCE.add_(1)),
        lambda: MEAN.data.add_(1),
        lambda: setattr(MEAN, "data", MEAN + 1),
        lambda: MEAN.resize_(2, 2).fill_(3),
        lambda: TABLE.t_().add_(1),
        lambda: TABLE.unsqueeze_(0),
        lambda: MEAN.__setitem__(0, 4.0),
        lambda: MEAN.__ipow__(2.0) + MEAN.__iadd__(1),
        lambda: nn.init.uniform_(MEAN),
        lambda: nn.init.normal_(tensor=MEAN),
        lambda: nn.BatchNorm1d(3).train().forward(MEAN.expand(2, 3) + MEAN.add_(1)),
    ],
)
def test_a_write_is_undone(write):
    held = {"MEAN": torch.zeros(3), "VARIANCE": torch.ones(3), "TABLE": torch.full((4, 3), 5.0)}
    try:
        with undo_writes():
            write()
        for name, numbers in held.items():
            torch.testing.assert_close(globals()[name], numbers, rtol=0, atol=0)
        write()
        assert any(not torch.equal(globals()[name], numbers) for name, numbers in held.items())
    finally:
        for name, numbers in held.items():
            globals()[name].data = numbers


def test_a_write_of_an_operator_of_ones_own_is_undone():
    @torch.library.custom_op("secondorder_tests::count", mutates_args={"counter"})
    def count(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        return x.clone()

    counter = torch.zeros(())
    for call in (count, torch.ops.secondorder_tests.count, torch.ops.secondorder_tests.count.default):
        with undo_writes():
            call(torch.ones(2), counter)
            call(x=torch.ones(2), counter=counter)
        assert counter == 0


def test_a_gradient_that_was_there_is_written_back():
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.ones(2)
    with undo_writes():
        x.grad.mul_(3)
    assert x.grad.tolist() == [1, 1]


def test_numbers_that_share_memory_are_written_back():
    base = torch.zeros(1)
    spread = base.expand(3)
    with undo_writes():
        F.batch_norm(X, spread, torch.ones(1).expand(3))
        base.add_(1)
    assert spread.tolist() == [0, 0, 0]


def test_rewound_where_memory_was_exchanged():
    buffer, guard = torch.zeros(2), WriteGuard()
    memory = buffer.data
    guard.call(torch.Tensor.data.__set__, (buffer, torch.ones(3)), {})
    with guard.rewound():
        assert buffer.tolist() == [0, 0]
    assert buffer.tolist() == [1, 1, 1]
    guard.undo()
    assert buffer.tolist() == [0, 0]
    assert buffer.data_ptr() == memory.data_ptr()


class Writing(nn.Module):
    """A forward that moves a buffer in one of the ways that a name does not tell."""

    def __init__(self, write, hold):
        super().__init__()
        self.layer, self.write = nn.Linear(3, 3), write
        self.register_buffer("hold", hold)

    def forward(self, x):
        return self.layer(x) + self.write(self.hold).sum()


def halved(x):
    x.data = x.data / 2
    return x


WRITES = {
    "hardtanh": (lambda b: F.hardtanh(b, -0.5, 0.5, inplace=True), torch.ones(2)),
    "elu": (lambda b: F.elu(b, inplace=True), torch.full((2,), -1.0)),
    "embedding": (lambda b: F.embedding(input=INDEX, weight=b, max_norm=1.0), torch.full((4, 3), 5.0)),
    "keyword": (lambda b: torch.sigmoid_(input=b), torch.ones(2)),
    "operator": (lambda b: torch.ops.aten.mul_.Tensor(b, torch.tensor(0.5)), torch.ones(2)),
    "memory": (halved, torch.ones(2)),
    "norm": (
        lambda b: torch.batch_norm(X, None, None, b, torch.ones(3), True, 0.1, 1e-5, False) * 0 + b,
        torch.zeros(3),
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRITES)
def test_a_step_moves_a_buffer_as_one_forward_does(method, name):
    torch.manual_seed(0)
    write, hold = WRITES[name]
    model, x, y = Writing(write, hold.clone()), torch.randn(6, 3), torch.randn(6, 3)
    once = hold.clone()
    write(once)
    optimizer = method(model.parameters())
    result = None

    def closure():
        nonlocal result
        result = F.mse_loss(model(x), y)
        return result

    optimizer.step(closure)
    torch.testing.assert_close(model.hold, once)
    assert not torch.equal(once, hold)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRITES)
def test_a_step_that_fails_leaves_a_buffer_alone(method, name):
    write, hold = WRITES[name]
    model, x = Writing(write, hold.clone()), torch.randn(6, 3)

    def closure():
        model(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(model.parameters()).step(closure)
    torch.testing.assert_close(model.hold, hold, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_fails_leaves_a_renormed_embedding_alone(method):
    model = nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Linear(3, 1))
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def closure():
        loss = model(torch.arange(4)).square().mean()
        loss.backward()
        raise ValueError

    with pytest.raises(ValueError, match="^$"):
        method(model.parameters()).step(closure)
    for parameter, numbers in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, numbers)


def test_writes_inside_a_transform():
    """To what was made inside, and to what was there before."""
    buffer, x = torch.ones(3), torch.randn(4, 3)
    with undo_writes():
        inside = torch.vmap(lambda row: torch.nn.functional.relu(row, inplace=True))(x * 1)
        torch.vmap(lambda row: row.mul_(2))(buffer.expand(1, 3))
        assert torch.equal(buffer, torch.full((3,), 2.0))
    assert torch.equal(inside, x.relu())
    assert torch.equal(buffer, torch.ones(3))
