"""A loss over a dataset: independent of how the data is cut, equal to dense references, safe to call."""

import random
from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secondorder import Objective
from secondorder.vectors.flat import flatten

DOUBLE = torch.float64
# The issue's: how the data is cut must not show in float64.
SAME = dict(rtol=1e-10, atol=1e-12)
L2 = 0.3
OPERATORS = ("hessian", "gauss_newton", "empirical_fisher")


def sum_of(loss):
    """The loss summed over samples, from the mean over a batch."""
    return lambda outputs, targets: len(outputs) * loss(outputs, targets)


def objective(case, data=None, reduction="mean", **options):
    data = (case.inputs, case.targets) if data is None else data
    loss = case.loss if reduction == "mean" else sum_of(case.loss)
    return Objective(case.model, loss, data, reduction=reduction, **{"l2": L2, **options})


def sources(case):
    """One dataset in several forms, with ragged last batches."""
    inputs, targets = case.inputs, case.targets
    dataset = TensorDataset(inputs, targets)
    return {
        "whole": dict(),
        "ones": dict(batch_size=1),
        "tensors": dict(batch_size=4),
        "dataset": dict(data=dataset, batch_size=2),
        "loader": dict(data=DataLoader(dataset, batch_size=3, shuffle=True)),
        "list": dict(data=[(inputs[:1], targets[:1]), (inputs[1:], targets[1:])]),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.slow
def test_all_quantities_equal_dense_ones_however_the_data_is_cut(network_case, reduction):
    case = network_case
    parameters = tuple(case.model.parameters())
    n = sum(p.numel() for p in parameters)
    scale = 1.0 if reduction == "mean" else len(case.inputs)
    eye, w = torch.eye(n, dtype=DOUBLE), flatten([p.detach() for p in parameters])
    value = scale * case.value().detach() + L2 / 2 * w.square().sum()
    grads = torch.autograd.grad(case.value(), parameters, allow_unused=True, materialize_grads=True)
    dense = {
        "hessian": scale * oracles.dense_hessian(case.loss_of, parameters) + L2 * eye,
        "gauss_newton": scale * oracles.dense_gauss_newton(case) + L2 * eye,
        "empirical_fisher": scale * oracles.dense_empirical_fisher(case) + L2 * eye,
    }
    v = zoo.vector(n, 5)
    for name, source in sources(case).items():
        whole = objective(case, reduction=reduction, **source)
        both = whole.value_and_gradient()
        torch.testing.assert_close(whole.value(), value, **SAME, msg=name)
        torch.testing.assert_close(both[0], value, **SAME)
        torch.testing.assert_close(both[1], scale * flatten(grads) + L2 * w, **SAME)
        for operator, matrix in dense.items():
            A = getattr(whole, operator)()
            torch.testing.assert_close(A @ v, matrix @ v, **SAME)
            # A second product, which may run on kept graphs, and a block of them.
            torch.testing.assert_close(A @ v, matrix @ v, **SAME)
            torch.testing.assert_close(A @ eye[:, :3], matrix[:, :3], **SAME)
            torch.testing.assert_close(A.diagonal(), matrix.diagonal(), **SAME)
            torch.testing.assert_close(A.dense(chunk_size=7), matrix, **SAME)


def test_no_graph_is_left_behind(network_case):
    for quantity in objective(network_case).value_and_gradient():
        assert not quantity.requires_grad


def test_fisher_is_the_gauss_newton_matrix_of_cross_entropy():
    case = zoo.network("cnn_batch_norm")
    whole = objective(case, batch_size=2, l2=0.0)
    torch.testing.assert_close(whole.fisher().dense(), oracles.dense_gauss_newton(case), **SAME)
    drawn = whole.fisher(num_samples=2000, seed=1)
    torch.testing.assert_close(drawn @ torch.ones(drawn.shape[0], dtype=DOUBLE), drawn.dense().sum(1), **SAME)
    assert (drawn.dense() - whole.fisher().dense()).norm() < 0.1 * whole.fisher().dense().norm()


@pytest.mark.parametrize("keep_graph", [True, False])
def test_graphs_are_kept_or_not_on_request(keep_graph):
    case, calls = zoo.network("mlp_mse"), []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    A = objective(case, batch_size=4).hessian(keep_graph=keep_graph)
    assert not calls, "construction must not walk the data"
    v = torch.ones(A.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(A @ v, A @ v)
    assert len(calls) == (3 if keep_graph else 6)


def test_one_batch_keeps_its_graph():
    case, calls = zoo.network("mlp_mse"), []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    A = objective(case).gauss_newton()
    for _ in range(3):
        A @ torch.ones(A.shape[0], dtype=DOUBLE)
    assert len(calls) == 1


def test_memory_is_that_of_one_batch():
    from memory import peak_bytes

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    x, y = torch.randn(512, 8), torch.randn(512, 1)
    peaks = {}
    for samples in (64, 512):
        H = Objective(model, F.mse_loss, (x[:samples], y[:samples]), batch_size=32).hessian()
        v = torch.ones(H.shape[0])
        # The first pass looks at the loss more closely.
        H @ v
        peaks[samples] = peak_bytes(lambda H=H, v=v: H @ v)
    assert peaks[512] <= 1.05 * peaks[64]


def test_a_changed_parameter_is_noticed():
    case = zoo.network("mlp_mse")
    H = objective(case, batch_size=4).hessian()
    with torch.no_grad():
        next(case.model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        H @ torch.ones(H.shape[0], dtype=DOUBLE)


def test_nothing_of_the_caller_changes():
    case = zoo.network("cnn_batch_norm")
    case.model[0].weight.grad = torch.ones_like(case.model[0].weight)
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=2, shuffle=True)
    buffers = [b.clone() for b in case.model.buffers()]
    state = torch.get_rng_state()
    whole = objective(case, loader)
    whole.value_and_gradient()
    whole.hessian() @ torch.ones(whole.gradient().shape, dtype=DOUBLE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, buffers, case.model.buffers()))
    assert torch.equal(case.model[0].weight.grad, torch.ones_like(case.model[0].weight))


def test_augmentation_repeats_itself():
    """Products of one operator see one dataset, even if loading it draws random numbers."""
    case = zoo.network("mlp_mse")

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn_like(x), y

    whole = objective(case, DataLoader(Noisy(case.inputs, case.targets), batch_size=4, shuffle=True))
    torch.testing.assert_close(whole.value(), whole.value(), **SAME)
    H = whole.hessian()
    v = torch.ones(H.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(H @ v, H @ v, **SAME)


def test_attention_is_decomposed_once():
    model = zoo.Attention().double()
    inputs, targets = torch.randn(6, 3, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1, 2])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    whole = Objective(model, F.cross_entropy, (inputs, targets), batch_size=2)
    H = whole.hessian()
    v = torch.ones(H.shape[0], dtype=DOUBLE)
    product = H @ v
    assert len(calls) <= 4
    calls.clear()
    torch.testing.assert_close(H @ v, product, **SAME)
    assert len(calls) == 3
    names = [name for name, _ in model.named_parameters()]

    def loss_of(*values):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))
        return F.cross_entropy(outputs, targets)

    torch.testing.assert_close(product, oracles.dense_hessian(loss_of, tuple(model.parameters())) @ v, **SAME)


def test_tuples_and_dicts_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Bilinear(2, 3, 1)

        def forward(self, left, right):
            return self.linear(left, right)

    model, a, b, y = Two(), torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 1)
    lists = [((a[:2], b[:2]), y[:2]), ((a[2:], b[2:]), y[2:])]
    dicts = [({"left": a[:2], "right": b[:2]}, y[:2]), ({"right": b[2:], "left": a[2:]}, y[2:])]
    expected = F.mse_loss(model(a, b), y)
    for data in (lists, dicts):
        torch.testing.assert_close(Objective(model, nn.MSELoss(), data).value(), expected.detach())


def test_some_parameters():
    case = zoo.network("mlp_cross_entropy")
    chosen = [case.model[2].weight]
    H = objective(case, parameters=chosen, l2=0.0, batch_size=4).hessian()
    full = oracles.dense_hessian(case.loss_of, tuple(case.model.parameters()))
    before = sum(p.numel() for p in list(case.model.parameters())[:2])
    where = slice(before, before + chosen[0].numel())
    torch.testing.assert_close(H.dense(), full[where, where], **SAME)


def test_newton_step_on_a_linear_model_is_exact():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, dtype=DOUBLE), torch.randn(200, 1, dtype=DOUBLE)
    model = nn.Linear(5, 1, dtype=DOUBLE)
    whole = Objective(model, F.mse_loss, (x, y), l2=0.1, batch_size=64)
    step = whole.hessian().solve(-whole.gradient()).x
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()) + step, model.parameters()
    )
    assert whole.gradient().norm() < 1e-12


MODELS = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "Dropout '1' in training mode"),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "BatchNorm1d '1' in training"),
    "no_running_statistics": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
        "BatchNorm1d '1' without running",
    ),
    "lstm_dropout": (lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.2), "LSTM '' in training mode"),
    "rrelu": (lambda: nn.Sequential(nn.Linear(4, 3), nn.RReLU()), "RReLU '1' in training mode"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_module_that_depends_on_chance_or_batch_is_named(name):
    build, message = MODELS[name]
    with pytest.raises(ValueError, match=message):
        Objective(build(), F.mse_loss, (torch.randn(6, 4), torch.randn(6, 3)))


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"), [(FunctionalDropout, "draw random numbers"), (Counting, "'calls' has changed")]
)
def test_a_forward_pass_that_is_not_a_function_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        Objective(model(4, 3), F.mse_loss, (torch.randn(6, 4), torch.randn(6, 3))).value()


def test_a_loss_that_depends_on_the_batch_is_refused():
    case = zoo.network("mlp_cross_entropy")
    weight = torch.tensor([1.0, 20.0, 0.1], dtype=DOUBLE)
    data = case.inputs, case.targets
    with pytest.raises(ValueError, match="halves give"):
        Objective(case.model, lambda z, t: F.cross_entropy(z, t, weight=weight), data).value()
    with pytest.raises(ValueError, match="CrossEntropyLoss with class weights"):
        Objective(case.model, nn.CrossEntropyLoss(weight=weight), data)
    summed = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    with pytest.raises(ValueError, match="'sum' and 'mean'"):
        Objective(case.model, summed, (case.inputs, case.targets))
    value = Objective(case.model, summed, (case.inputs, case.targets), reduction="sum", batch_size=2).value()
    torch.testing.assert_close(value, summed(case.outputs(), case.targets).detach())


BAD = {
    "iterator": (dict(data=iter([1])), TypeError, "list_iterator; it is walked"),
    "number": (dict(data=3), TypeError, "got int"),
    "triple": (dict(data=[(1, 2, 3)]), TypeError, "got a tuple of 3 as batch 0"),
    "lengths": (
        dict(data=(torch.zeros(3, 4), torch.zeros(2, 3))),
        ValueError,
        r"\(3, 4\) and targets .*\(2, 3\)",
    ),
    "empty_list": (dict(data=[]), ValueError, "at least one sample"),
    "empty_tensors": (dict(data=(torch.zeros(0, 4), torch.zeros(0, 3))), ValueError, "at least one sample"),
    "drop_last": (
        dict(data=DataLoader(TensorDataset(torch.zeros(3, 4)), batch_size=2, drop_last=True)),
        ValueError,
        "drop_last=True",
    ),
    "batch_size": (dict(batch_size=0), ValueError, "batch_size must be a positive integer, got 0"),
    "l2": (dict(l2=-1.0), ValueError, "l2 must be non-negative, got -1.0"),
    "reduction": (dict(reduction="none"), ValueError, "'mean' or 'sum', got 'none'"),
    "unreduced": (dict(loss=lambda z, t: (z - t) ** 2), ValueError, r"got \(6, 3\); reduce it"),
    "parameters": (dict(parameters=[]), ValueError, "at least one tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    options, error, message = BAD[name]
    arguments = {"loss": F.mse_loss, "data": (torch.randn(6, 4), torch.randn(6, 3)), **options}
    with pytest.raises(error, match=message):
        Objective(nn.Linear(4, 3), arguments.pop("loss"), arguments.pop("data"), **arguments).value()


def test_progress_bar_names_the_pass(capsys):
    case = zoo.network("mlp_mse")
    whole = objective(case, batch_size=2, progress=True)
    whole.value()
    whole.hessian() @ torch.ones(whole.gradient().shape, dtype=DOUBLE)
    shown = capsys.readouterr().err
    assert all(f"{name}:" in shown for name in ("value", "gradient", "hessian"))
    assert "batch" in shown
    assert repr(whole) == "Objective(Sequential, 37 parameters, l2=0.3, 'mean')"


@pytest.mark.parametrize("ignored", [slice(0, 10), slice(90, 100)])
def test_ignored_targets_are_noticed_wherever_they_are(ignored):
    torch.manual_seed(0)
    inputs, targets = torch.randn(103, 6), torch.randint(3, (103,))
    targets[ignored] = -100
    whole = Objective(nn.Linear(6, 3), F.cross_entropy, (inputs, targets), batch_size=20)
    with pytest.raises(ValueError, match="drop class weights and ignored targets"):
        whole.value()


def test_shapes_that_broadcast_are_shown():
    data = torch.randn(30, 6), torch.randn(30)
    warned = pytest.warns(UserWarning, match="different to the input size")
    with warned, pytest.raises(ValueError, match=r"outputs \(30, 1\), targets \(30,\).*mind the shapes"):
        Objective(nn.Linear(6, 1), F.mse_loss, data).value()


def test_wrong_kinds_are_named():
    data = torch.randn(6, 4), torch.randn(6, 3)
    for model, kind in ((F.mse_loss, "function"), (nn.Linear, "the class Linear")):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {kind}"):
            Objective(model, F.mse_loss, data)
    with pytest.raises(TypeError, match="loss must be a function or a loss module, got the class MSELoss"):
        Objective(nn.Linear(4, 3), nn.MSELoss, data)
    model = nn.Linear(4, 3)
    with pytest.raises(TypeError, match="parameters must be an iterable of tensors, got one tensor"):
        Objective(model, F.mse_loss, data, parameters=model.weight)


def test_a_pair_of_several_inputs_is_cut_into_batches():
    torch.manual_seed(0)
    model = nn.Bilinear(2, 3, 1)
    a, b, y = torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 1)
    expected = F.mse_loss(model(a, b), y).detach()
    for inputs in ((a, b), {"input1": a, "input2": b}):
        value = Objective(model, F.mse_loss, (inputs, y), batch_size=2).value()
        torch.testing.assert_close(value, expected)


def test_log_probabilities_have_no_gauss_newton_matrix():
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1))
    whole = Objective(model, F.nll_loss, (torch.randn(6, 4), torch.randint(3, (6,))))
    with pytest.warns(UserWarning, match="Gauss-Newton matrix is zero"):
        whole.gauss_newton() @ torch.ones(15)
    single = Objective(nn.Linear(4, 1), F.mse_loss, (torch.randn(6, 4), torch.randn(6, 1)))
    with pytest.raises(ValueError, match=r"two classes or more in dimension 1 .* got shape \(6, 1\)"):
        single.fisher() @ torch.ones(5)


def test_a_mode_that_changes_later_is_noticed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    whole = Objective(model, F.mse_loss, (torch.randn(10, 3), torch.randn(10, 4)), batch_size=4)
    H = whole.hessian()
    whole.value(), H @ torch.ones(H.shape[0])
    model.train()
    for call in (whole.value, whole.gradient, lambda: H @ torch.ones(H.shape[0])):
        with pytest.raises(ValueError, match="BatchNorm1d '1' in training mode"):
            call()
    assert model[1].num_batches_tracked == 0


def test_every_source_of_randomness_is_replayed():
    case = zoo.network("mlp_mse")

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            noise = np.random.standard_normal() + random.random()  # noqa: NPY002
            return x + noise, y

    generator = torch.Generator().manual_seed(0)
    dataset = Noisy(case.inputs, case.targets)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, generator=generator)
    before = generator.get_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    H = objective(case, loader).fisher(likelihood="normal", num_samples=1)
    v = torch.ones(H.shape[0], dtype=DOUBLE)
    torch.testing.assert_close(H @ v, H @ v, **SAME)
    assert torch.equal(generator.get_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_new_data_of_a_parameter_is_noticed():
    case = zoo.network("mlp_mse")
    H = objective(case, batch_size=4).hessian()
    v = torch.ones(H.shape[0], dtype=DOUBLE)
    torch.nn.utils.vector_to_parameters(v, case.model.parameters())
    with pytest.raises(RuntimeError, match="parameters have changed"):
        H @ v


def test_samples_that_are_left_out_or_missing():
    case = zoo.network("mlp_mse")
    dataset = TensorDataset(case.inputs, case.targets)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(dataset), 4, drop_last=True)
    with pytest.raises(ValueError, match="drop_last=True"):
        objective(case, DataLoader(dataset, batch_sampler=sampler))
    batches = [(case.inputs, case.targets), (case.inputs[:0], case.targets[:0])]
    whole = objective(case, batches, l2=0.0)
    torch.testing.assert_close(whole.value(), case.value().detach())
    assert bool((whole.hessian() @ torch.ones(37, dtype=DOUBLE)).isfinite().all())


def test_drawn_targets_differ_between_batches():
    """The same inputs in two batches: with one seed for both, the draws would be copies."""
    x = torch.randn(4, 3, dtype=DOUBLE)
    model = nn.Linear(3, 3, dtype=DOUBLE)
    data = torch.cat([x, x]), torch.zeros(8, dtype=torch.long)
    whole = Objective(model, F.cross_entropy, data, batch_size=4)
    both = whole.fisher(num_samples=1).dense()
    one = Objective(model, F.cross_entropy, (x, data[1][:4])).fisher(num_samples=1).dense()
    assert not torch.allclose(both, one)


def test_samples_are_counted_from_inputs_where_targets_are_no_tensor():
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    batches = [(x[:2], None), (x[2:], None)]
    value = Objective(model, lambda z, _: z.square().mean(), batches).value()
    torch.testing.assert_close(value, model(x).square().mean().detach())


def test_an_exception_in_a_pass_leaves_no_trace():
    """Random state and grad mode are back when it is caught, not when the traceback is thrown away."""
    case, calls = zoo.network("mlp_mse"), []

    def breaks(module, inputs):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 2:
            torch.rand(3)
            raise KeyboardInterrupt

    case.model.register_forward_pre_hook(breaks)
    whole = objective(case, DataLoader(TensorDataset(case.inputs, case.targets), batch_size=4, shuffle=True))
    torch.rand(5)
    H, v = whole.hessian(), torch.ones(37, dtype=DOUBLE)
    for call in (whole.value, whole.gradient, lambda: H @ v):
        calls.clear()
        state = torch.get_rng_state(), random.getstate()
        with torch.no_grad():
            try:
                call()
            except KeyboardInterrupt:
                assert torch.equal(torch.get_rng_state(), state[0])
                assert random.getstate() == state[1]
                assert not torch.is_grad_enabled()
            else:
                pytest.fail("the pass went through")


def test_products_run_in_the_grad_mode_of_the_caller():
    case, modes = zoo.network("mlp_mse"), []
    H = objective(case, batch_size=4).hessian()

    def product(operator):
        modes.append(torch.is_grad_enabled())
        return operator @ torch.ones(37, dtype=DOUBLE)

    H._sum(product)
    with torch.no_grad():
        H._sum(product)
    assert modes == [True] * 3 + [False] * 3


class Pair(NamedTuple):
    scores: torch.Tensor
    other: torch.Tensor


class Opaque:
    """Outputs that nothing is known of, as a dataclass of a library."""

    def __init__(self, scores):
        self.scores = scores


# How the scores lie in outputs, the classes in targets; and how the loss finds both.
STRUCTURES = {
    "tensor": (lambda z: z, lambda t: t, lambda z: z, lambda t: t),
    "tuple": (lambda z: (z, z + 1), lambda t: t, lambda z: z[0], lambda t: t),
    "dict": (lambda z: z, lambda t: {"label": t}, lambda z: z, lambda t: t["label"]),
    "dicts": (lambda z: {"z": z, "task": "a"}, lambda t: {"t": t}, lambda z: z["z"], lambda t: t["t"]),
    "nested": (
        lambda z: [{"head": (z, None)}],
        lambda t: {"a": {"b": (t, t)}},
        lambda z: z[0]["head"][0],
        lambda t: t["a"]["b"][1],
    ),
    "named_tuple": (lambda z: Pair(z, z), lambda t: Pair(t, t), lambda z: z.scores, lambda t: t.other),
    "opaque": (Opaque, lambda t: t, lambda z: z.scores, lambda t: t),
    # As a library's outputs beside the loss it has computed: they cannot be cut.
    "with_a_scalar": (lambda z: (z, z.sum()), lambda t: t, lambda z: z[0], lambda t: t),
}
CLASS_WEIGHT = torch.tensor([1.0, 20.0, 0.1], dtype=DOUBLE)
REDUCED = {
    "plain": ("mean", F.cross_entropy),
    "sum": ("sum", lambda z, t: F.cross_entropy(z, t, weight=CLASS_WEIGHT, reduction="sum")),
    "weighted": ("mean", lambda z, t: F.cross_entropy(z, t, weight=CLASS_WEIGHT)),
    "weighted_by_hand": (
        "mean",
        lambda z, t: -(CLASS_WEIGHT[t] * z.log_softmax(1)[range(len(t)), t]).sum() / CLASS_WEIGHT[t].sum(),
    ),
    "ignored": ("mean", lambda z, t: F.cross_entropy(z, t, ignore_index=1)),
}


class Structured(nn.Module):
    def __init__(self, base, structure):
        super().__init__()
        self.base, self.structure = base, structure

    def forward(self, x):
        return self.structure(self.base(x))


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_loss_that_depends_on_the_cut_is_refused_in_any_structure(structure, name, is_sorted):
    """Sorted by class, the halves of a batch hold one class and agree."""
    case = zoo.network("mlp_cross_entropy")
    inputs = torch.cat([case.inputs, case.inputs.flip(1)])
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2])
    if not is_sorted:
        targets = targets[torch.randperm(18, generator=torch.Generator().manual_seed(1))]
    wrap, wrap_target, scores, classes = STRUCTURES[structure]
    reduction, loss = REDUCED[name]
    model = Structured(case.model, wrap)
    values = []
    for size in (1, 2, 7, 18):
        batches = [(x, wrap_target(t)) for x, t in zip(inputs.split(size), targets.split(size), strict=True)]
        whole = Objective(model, lambda z, t: loss(scores(z), classes(t)), batches, reduction=reduction)
        if name in ("plain", "sum"):
            values.append(whole.value())
        else:
            for first in (whole.value, whole.gradient, lambda: whole.hessian() @ whole._flat()):  # noqa: B023
                with pytest.raises(
                    ValueError, match="loss must be the mean .* drop class weights and ignored"
                ):
                    first()
    for value in values:
        torch.testing.assert_close(value, loss(case.model(inputs), targets).detach(), **SAME)


def test_what_cannot_be_cut_or_joined_is_not_looked_at():
    """Sequences of several lengths, a mask that all samples share, names."""
    model = Structured(nn.Linear(3, 2).double(), lambda z: (z, torch.ones(4, 4)))
    batches = [(zoo.vector(6 * k, k).view(2, k, 3), ["a", "b"]) for k in (1, 2, 3)]
    value = Objective(model, lambda z, names: z[0].square().mean() + 0 * len(names), batches).value()
    expected = sum(model(x)[0].square().mean() for x, _ in batches) / 3
    torch.testing.assert_close(value, expected.detach())
    batches = [(x, len(x)) for x, _ in batches]
    torch.testing.assert_close(Objective(model, lambda z, _: z[0].square().mean(), batches).value(), value)


def test_a_loss_that_the_model_computes_is_looked_at_too():
    """As models of libraries do that are given the labels; it cannot be cut, inputs can."""

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = zoo.network("mlp_cross_entropy").model

        def forward(self, x, labels):
            scores = self.base(x)
            return {"loss": F.cross_entropy(scores, labels), "scores": scores}

    case = zoo.network("mlp_cross_entropy")
    for ignored in (0, 3):
        labels = case.targets.clone()
        labels[:ignored] = -100
        for size in (1, 4):
            pairs = zip(case.inputs.split(size), labels.split(size), strict=True)
            batches = [({"x": x, "labels": t}, None) for x, t in pairs]
            whole = Objective(WithLoss(), lambda outputs, _: outputs["loss"], batches)
            if ignored:
                with pytest.raises(ValueError, match="ignored targets"):
                    whole.value()
            else:
                torch.testing.assert_close(whole.value(), case.value().detach(), **SAME)


@pytest.mark.parametrize("batch_size", [1, 5, 15])
def test_what_comes_beside_tensors_hides_no_weights(batch_size):
    """Names of the samples, and how many there are."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 3).double(), torch.randn(30, 3).double(), torch.arange(30) % 3
    cuts = [slice(start, start + batch_size) for start in range(0, 30, batch_size)]
    weight = torch.tensor([0.2, 1.0, 5.0]).double()
    data = [(x[c], {"y": y[c], "n": torch.tensor(batch_size), "name": ["a"] * batch_size}) for c in cuts]
    plain = Objective(model, lambda z, t: F.cross_entropy(z, t["y"]), data)
    torch.testing.assert_close(plain.value(), F.cross_entropy(model(x), y).detach())
    with pytest.raises(ValueError, match="loss must be the mean over the samples"):
        Objective(model, lambda z, t: F.cross_entropy(z, t["y"], weight=weight), data).value()
