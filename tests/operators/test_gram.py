"""The Gram of a Jacobian against explicit rows, one backward pass each, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import zoo
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_bytes
from torch import nn
from torch.overrides import TorchFunctionMode

from secondorder import Jacobian
from secondorder.autodiff.graph import Place
from secondorder.operators.gram import TooLargeError, gram
from secondorder.operators.pieces import Total
from secondorder.vectors.flat import flatten

# Sums of the same numbers in another order, relative to the norm.
TOLERANCE = 1e-12
# Each parameter, in the order of the module's.
SHORT = {"g": "ghost", "r": "rows", "n": "none"}


def rows_of(outputs, parameters):
    """``J``, one row a backward pass."""
    entries = [entry for z in outputs for entry in z.reshape(-1)]
    grads = [
        torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in entries
    ]
    return torch.stack([flatten(grad) for grad in grads])


def check(outputs, parameters, forms=None, why="", **options):
    """The Gram of outputs, compared with ``J J^T``; ``forms`` in first letters, where they matter."""
    outputs, parameters = outputs if isinstance(outputs, tuple) else (outputs,), list(parameters)
    J = rows_of(outputs, parameters)
    found = gram(Jacobian(outputs, parameters), **options)
    error = torch.linalg.matrix_norm(found.matrix - J @ J.T) / torch.linalg.matrix_norm(J @ J.T)
    assert error <= TOLERANCE
    if forms is not None:
        assert found.forms == tuple(SHORT[form] for form in forms), found
    assert why in found.why
    assert bool(found.why) == ("rows" in found.forms)
    assert not found.matrix.requires_grad
    return found


def normal(*shape):
    return torch.randn(shape, dtype=zoo.DOUBLE)


def network(*layers):
    return nn.Sequential(*layers).to(zoo.DOUBLE)


def head(model, x, width=3):
    """With a layer on top, that outputs be few."""
    features = model(x).flatten(1)
    return network(*model, nn.Flatten(), nn.Linear(features.shape[1], width))


# Layers, and the shape of one sample.
LAYERS = {
    "linear": (lambda: [nn.Linear(5, 7)], (5,)),
    "linear without bias": (lambda: [nn.Linear(5, 7, bias=False)], (5,)),
    "two linear": (lambda: [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9)], (5,)),
    "linear at positions": (lambda: [nn.Linear(5, 6)], (4, 5)),
    "linear on a strided input": (
        lambda: [nn.Flatten(1, -1), nn.Unflatten(1, (5, 2)), _Last()],
        (10,),
    ),
    "conv2d": (lambda: [nn.Conv2d(4, 6, 3)], (4, 6, 5)),
    "conv2d strided": (lambda: [nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0))], (4, 6, 5)),
    "conv2d dilated": (lambda: [nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=1)], (4, 6, 5)),
    "conv2d same": (lambda: [nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2)], (4, 6, 5)),
    "conv2d circular": (lambda: [nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")], (4, 4, 3)),
    "conv2d in groups": (lambda: [nn.Conv2d(4, 6, 3, groups=2, bias=False)], (4, 6, 5)),
    "conv2d depthwise": (lambda: [nn.Conv2d(4, 8, 3, groups=4)], (4, 6, 5)),
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3)], (4, 6)),
    "conv1d strided": (lambda: [nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2)], (4, 9)),
    "conv1d depthwise": (lambda: [nn.Conv1d(4, 4, 3, groups=4)], (4, 6)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2, stride=(1, 2, 1))], (2, 3, 4, 2)),
    "transposed conv2d": (lambda: [nn.ConvTranspose2d(4, 6, 3)], (4, 3, 2)),
    "transposed conv2d strided": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)],
        (4, 3, 2),
    ),
    # More output_padding than stride: windows where no input is.
    "transposed conv1d dilated": (
        lambda: [nn.ConvTranspose1d(4, 6, 3, dilation=3, output_padding=2)],
        (4, 3),
    ),
    "layer norm": (lambda: [nn.Linear(5, 8), nn.LayerNorm(8)], (5,)),
    "layer norm of images": (lambda: [nn.Tanh(), nn.LayerNorm([4, 3, 2])], (4, 3, 2)),
    "rms norm": (lambda: [nn.Linear(5, 8), nn.RMSNorm(8)], (5,)),
    "group norm": (lambda: [nn.Linear(5, 8), nn.GroupNorm(2, 8)], (5,)),
    "group norm of images": (lambda: [nn.Tanh(), nn.GroupNorm(2, 4)], (4, 3, 2)),
    "instance norm": (lambda: [nn.Tanh(), nn.InstanceNorm2d(4, affine=True)], (4, 3, 2)),
    "batch norm in evaluation": (lambda: [nn.Linear(5, 8), _trained(nn.BatchNorm1d(8))], (5,)),
    "batch norm of images in evaluation": (
        lambda: [nn.Tanh(), _trained(nn.BatchNorm2d(4))],
        (4, 3, 2),
    ),
    "prelu": (lambda: [nn.Conv1d(4, 6, 2), nn.PReLU(6)], (4, 3)),
    "elementwise": (lambda: [_Elementwise()], (4, 5)),
    "class token": (lambda: [_Token(), nn.Linear(5, 5)], (2, 5)),
    "weight in pieces": (lambda: [_Pieces()], (5,)),
    "experts": (lambda: [_Experts()], (5,)),
}


class _Last(nn.Module):
    """A linear layer of a transposed input, which is no view of rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(x.transpose(1, 2))


def _trained(norm):
    """In evaluation mode, with running statistics that are not trivial."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


class _Elementwise(nn.Module):
    """All that parameters are added and multiplied with, broadcast over samples and otherwise."""

    def __init__(self):
        super().__init__()
        shapes = ((5,), (4, 1), (1, 4, 5), (), (5,))
        self.parameters_ = nn.ParameterList([nn.Parameter(1.5 + torch.rand(shape)) for shape in shapes])

    def forward(self, x):
        a, b, c, d, e = self.parameters_
        y = torch.add(x, a, alpha=2) * b
        return torch.sub(y / d, c, alpha=3) - e / (2 + x.square())


class _Token(nn.Module):
    """A learned position in front of the others."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 5))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class _Pieces(nn.Module):
    """A weight that is used in pieces."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(15, 5))

    def forward(self, x):
        a, b, c = self.weight.chunk(3)
        return (
            F.linear(x, a).tanh() * F.linear(x, b)
            + x @ c.mT.contiguous()
            - x @ self.weight[2:15:6].T @ self.weight[4:13:4]
        )


class _Experts(nn.Module):
    """One linear layer for each of three, in a batched product."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.bmm(x.expand(3, *x.shape), self.weight).transpose(0, 1)


@pytest.fixture(params=["ghost", "rows"])
def route(request, monkeypatch):
    """What costs less is not looked at; both have to be right."""
    monkeypatch.setattr(Total, "_is_ghost_cheaper", lambda self, pieces: request.param == "ghost")
    return request.param


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, route):
    build, shape = LAYERS[name]
    x = normal(6, *shape)
    model = head(network(*build()), x)
    count = len(list(model.parameters()))
    # Pieces of one weight have rows of their own.
    check(
        model(x), model.parameters(), "g" * count if route == "ghost" and name != "weight in pieces" else None
    )


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(route, padding_idx):
    indices = torch.randint(4, (6, 5))
    model = head(network(nn.Embedding(8, 3, padding_idx=padding_idx)), indices)
    check(model(indices), model.parameters(), "ggg" if route == "ghost" else None)


def test_embedding_scaled_by_frequency_depends_on_the_batch():
    indices = torch.randint(4, (6, 5))
    model = head(network(nn.Embedding(8, 3, scale_grad_by_freq=True)), indices)
    check(model(indices), model.parameters(), why="samples mix")


def test_networks_of_the_zoo(network_case, route):
    model = network_case.model
    check(network_case.outputs(), model.parameters())


def test_weights_that_are_used_twice(route):
    x, w = normal(6, 5), nn.Parameter(normal(5, 5))
    form = route[0]
    check(((x @ w).tanh() @ w)[:, :3], [w], form)
    check(((x @ w).tanh() @ w.T)[:, :3], [w], form)
    # In what is multiplied from the left as well.
    check(((x @ w).tanh() @ w + (w.T @ x.T).T)[:, :3], [w], form)
    check(x @ w[:, 0], [w], form)
    # Other entries, and an entry-wise product.
    check((x @ w)[:, :3] + x @ w[:, 2:], [w], "r")
    check((x @ w)[:, :3] * (x * w[0])[:, :3], [w], "r")


def test_embedding_tied_with_the_last_layer(route):
    embedding = nn.Embedding(9, 5).to(zoo.DOUBLE)
    features = embedding(torch.randint(4, (6, 3))).tanh().mean(1)
    check(F.linear(features, embedding.weight)[:, :4], [embedding.weight], route[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer(route, batch_first):
    """Positions of a sample, or samples at a position, are neighbours."""
    layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=batch_first).to(zoo.DOUBLE)
    x = normal(3, 2, 8) if batch_first else normal(2, 3, 8)
    z = layer(x).sum(1 if batch_first else 0)[:, :3]
    check(z, layer.parameters(), "g" * 12 if route == "ghost" else None)


@pytest.mark.parametrize("mixed", ["keys", "values", ""])
def test_attention_with_packed_weights(route, mixed):
    """Of which queries, keys and values use pieces."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True).to(zoo.DOUBLE)
    q, k, v = normal(6, 3, 4), normal(6, 2, 4), normal(6, 2, 4)
    inputs = {"keys": (q, k, k), "values": (q, k, v), "": (k, k, k)}[mixed]
    found = check(attention(*inputs)[0].sum(1), attention.parameters())
    assert "samples mix" not in found.why
    assert "not known" not in found.why


def test_attention_over_the_batch_mixes_samples():
    attention = nn.MultiheadAttention(4, 2).to(zoo.DOUBLE)
    x = normal(6, 4)
    z = attention(x, x, x)[0] + x
    check(z, attention.parameters(), why="samples mix")


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent(kind, route):
    model, readout = kind(3, 4).to(zoo.DOUBLE), network(nn.Linear(4, 2))
    parameters = [*model.parameters(), *readout.parameters()]
    last = model(normal(5, 6, 3))[0][-1]
    check(readout(last), parameters, "gggggg" if route == "ghost" else None)


def test_a_fused_recurrent_layer_is_not_known():
    model = nn.LSTM(3, 4)
    z = model(torch.randn(5, 6, 3))[0][-1]
    found = gram(Jacobian(z, list(model.parameters())))
    J = rows_of([z], list(model.parameters()))
    torch.testing.assert_close(found.matrix, J @ J.T, rtol=1e-4, atol=1e-5)
    assert set(found.forms) in ({"rows"}, {"rows", "ghost"})


def laplacian(model, x):
    """Of the network with respect to where it is evaluated."""
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = [
        torch.autograd.grad(z.sum(), x, create_graph=True)[0][:, i] for i, z in enumerate(first.unbind(1))
    ]
    return torch.stack(second).sum(0)


def test_physics_informed_network(route):
    model = network(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    inner, boundary = laplacian(model, normal(7, 2)), model(normal(4, 2))[:, 0]
    forms = "gggggg" if route == "ghost" else "rgrgrg"
    found = check((inner, boundary), model.parameters(), forms)
    # Joined to one vector of residuals, of which 11 "samples" are two batches.
    joined = check(torch.cat([inner, boundary]), model.parameters(), forms)
    check(torch.cat([inner, boundary]).flatten()[None, :, None].squeeze(0), model.parameters(), forms)
    assert torch.equal(found.matrix, joined.matrix)


@pytest.mark.parametrize(
    "of",
    [
        lambda z: z[:, 0],
        lambda z: z[:, :1],
        lambda z: z,
        lambda z: z.view(6, 2, 2),
        lambda z: z.sum(),
        lambda z: z[:1],
        lambda z: (z[:, :1], z[:, 1:].square(), z.sum(1)),
        lambda z: torch.cat([z[:, :1], z[:, 1:].square()], 1),
        lambda z: torch.cat([z, z[:2].exp()]),
    ],
)
def test_shapes_of_outputs(of, route):
    model = network(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4))
    check(of(model(normal(6, 5))), model.parameters(), "gggg" if route == "ghost" else "rgrg")


def test_outputs_that_only_the_graph_knows(route):
    model = network(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4))
    z, parameters = model(normal(6, 5)), list(model.parameters())
    expected = gram(Jacobian(z, parameters))
    found = gram(Jacobian([Place.of(z.grad_fn, 0)], parameters))
    assert torch.equal(found.matrix, expected.matrix)
    assert found.forms == expected.forms


def test_outputs_that_are_transposed_mix_samples():
    model = network(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 4))
    check(model(normal(6, 5)).T, model.parameters(), "rrrr", "samples mix")


def test_batch_norm_in_training_mixes_samples_before_it():
    """Its own parameters, and what comes behind it, do not."""
    model = network(nn.Linear(5, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 3))
    check(model(normal(6, 5)), model.parameters(), "rrgggg", "samples mix")


@pytest.mark.parametrize(
    ("share", "dtype"), [(1.0, torch.float64), (1e-7, torch.float64), (1e-2, torch.float32)]
)
def test_samples_that_mix_a_little(share, dtype):
    """By what they share with the mean of 100 samples."""
    model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)
    z = model(torch.randn(100, 5, dtype=dtype))
    found = gram(Jacobian(z - share * z.mean(0), list(model.parameters()), keep_graph=False))
    assert found.forms[:3] == ("rows",) * 3
    assert "samples mix" in found.why


def test_the_form_that_costs_less():
    """Wide layers by products; rows where positions are many and weights small, or outputs few."""
    wide = network(nn.Conv1d(4, 40, 3, stride=3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 20))
    check(wide(normal(6, 4, 7)), wide.parameters(), "gggg")
    small = network(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 1))
    check(small(normal(6, 2, 22)), small.parameters(), "rgrg", "rows cost less")


def test_several_networks():
    one, two, x = (
        network(nn.Linear(5, 30)),
        network(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 2)),
        normal(6, 5),
    )
    parameters = [*one.parameters(), *two.parameters(), nn.Parameter(normal(3))]
    check((two(one(x)[:, :5]), one(x[:4, :5])[:, 7].exp()), parameters, "ggggggn")


def test_frozen_parameters():
    model = network(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    check(model(normal(6, 5)), [p for p in model.parameters() if p.requires_grad], "gg")


@pytest.mark.parametrize("is_known", [True, False])
def test_weights(is_known):
    """Of a single and of all parameters; no pass is spent on those of weight 0."""
    model = network(nn.Linear(5, 30), nn.Tanh() if is_known else nn.BatchNorm1d(30), nn.Linear(30, 3))
    z, parameters = model(normal(6, 5)), list(model.parameters())
    J = rows_of([z], parameters)
    factor = [0.0, 2.0, *[0.5] * (len(parameters) - 2)]
    expected = sum(
        w * rows @ rows.T for w, rows in zip(factor, J.split([p.numel() for p in parameters], 1), strict=True)
    )
    found = gram(Jacobian(z, parameters), factor)
    torch.testing.assert_close(found.matrix, expected, rtol=TOLERANCE, atol=1e-12)
    assert found.forms[0] == "none"
    assert gram(Jacobian(z, parameters), [0.0] * len(parameters)).forms == ("none",) * len(parameters)


def test_an_output_that_is_a_parameter():
    w = nn.Parameter(normal(4))
    check((w.view(4), w * 2), [w], "r")


COMPUTED = {
    "weight norm": lambda x, w, s: F.linear(x, torch._weight_norm(w, s, 0)),
    "by hand": lambda x, w, s: F.linear(x, w * (s / w.norm(dim=1, keepdim=True))),
    "factorised": lambda x, w, s: F.linear(x, s.exp() * w).tanh() @ (s.exp() * w)[:, 1:],
    "sum of two": lambda x, w, s: x @ (w + s @ w[:1]),
    "low rank": lambda x, w, s: (x @ (s @ w[:1])).tanh() @ w,
    "of what is computed": lambda x, w, s: x @ (w.exp() + w.exp().cos() * s.square()) + x * w.exp().sum(1),
    "scale": lambda x, w, s: (x @ w) * s.exp().sum() + s[0],
    "piece": lambda x, w, s: x @ w.exp()[1:].T + x[:, 1:] * (s.square()[1:, 0]),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_from_parameters_alone(name, route):
    """Rows are of the parameters, not of what is computed of them."""
    w, s = nn.Parameter(normal(5, 5)), nn.Parameter(1 + normal(5, 1).square())
    outputs = COMPUTED[name](normal(6, 5), w, s)
    found = check((outputs[:, :2], outputs[:3, 2].tanh()), [w, s])
    assert "rows" in found.forms
    assert "samples mix" not in found.why
    assert "not known" not in found.why


LOOKED_UP = {
    "bag": lambda table: F.embedding_bag(torch.randint(9, (6, 3)), table),
    "indexed": lambda table: table[torch.randint(9, (6,))],
    "selected": lambda table: table.index_select(0, torch.randint(9, (6,))),
    "one for each sample": lambda table: table[:6],
}


@pytest.mark.parametrize("name", LOOKED_UP)
def test_layers_of_what_is_looked_up_in_a_parameter(name):
    """Samples among the parameters, or in indices: the layers behind are not taken for parameters."""
    table, model = (
        nn.Parameter(normal(9, 5)),
        network(nn.Tanh(), nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 4)),
    )
    check(model(LOOKED_UP[name](table)), [table, *model.parameters()], "rgggg")


def test_a_node_that_is_not_known():
    """With samples in it: the parameter has its rows by backward passes, and others have not."""
    layer, readout = nn.Bilinear(5, 5, 4).to(zoo.DOUBLE), network(nn.Linear(4, 9))
    x = normal(6, 5)
    z = readout(layer(x, x).tanh())
    check(
        z, [*layer.parameters(), *readout.parameters()], why="TrilinearBackward0 is not known (parameters 0)"
    )


def test_a_hook_that_changes_a_gradient_is_seen():
    model = network(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3))
    model[0].weight.register_hook(lambda grad: 2 * grad)
    z, parameters = model(normal(6, 5)), list(model.parameters())
    J = rows_of([z], parameters)
    found = gram(Jacobian(z, parameters))
    torch.testing.assert_close(found.matrix, J @ J.T, rtol=TOLERANCE, atol=1e-12)


def test_checkpointed_layers():
    model = network(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 30))
    z = torch.utils.checkpoint.checkpoint(model, normal(6, 5), use_reentrant=False)[:, :3]
    check(z, model.parameters(), "gggg")


SIZES = st.integers(1, 6)


@given(st.integers(1, 9), st.lists(SIZES, min_size=2, max_size=4), st.booleans(), st.integers(0, 99))
def test_random_multilayer_perceptrons(samples, widths, bias, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, bias) for i, o in itertools.pairwise(widths)]
    model = network(*[layer for linear in layers for layer in (linear, nn.Tanh())])
    check(model(normal(samples, widths[0])), model.parameters())


@given(
    st.tuples(SIZES, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_convolutions(sizes, window, more, is_transposed, seed):
    samples, inputs, outputs, groups = sizes
    kernel, stride, padding, dilation = window
    torch.manual_seed(seed)
    layer = nn.ConvTranspose2d if is_transposed else nn.Conv2d
    least = dilation * (kernel - 1) + 1 + 2 * padding
    x = normal(samples, inputs * groups, least + more[0], least + more[1])
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    model = head(network(layer(inputs * groups, outputs * groups, kernel, **options), nn.Tanh()), x, 2)
    check(model(x), model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [True, False])
def test_single_and_half_precision(dtype, is_autocast):
    """At least float32, up to the rounding of rows."""
    model, x = network(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)), normal(6, 5)
    J = rows_of([model(x)], list(model.parameters()))
    model, x = (model.float(), x.float()) if is_autocast else (model.to(dtype), x.to(dtype))
    with torch.autocast("cpu", dtype, enabled=is_autocast and dtype is torch.bfloat16):
        z = model(x)
    found = gram(Jacobian(z, list(model.parameters())))
    assert found.matrix.dtype == torch.float32
    assert found.forms == ("ghost",) * 4
    eps = torch.finfo(dtype).eps
    assert torch.linalg.matrix_norm(found.matrix - J @ J.T) <= 4 * eps * torch.linalg.matrix_norm(J @ J.T)


def test_many_layers_in_single_precision_are_proved():
    """Rounding adds up over layers, but far below what mixing would do."""
    layers = [
        layer for _ in range(12) for layer in (nn.Conv1d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))
    found = gram(Jacobian(model(torch.randn(40, 8, 8)), list(model.parameters())))
    assert "samples mix" not in found.why


def test_nothing_is_changed():
    model = network(nn.Linear(5, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    jacobian = Jacobian(model(normal(6, 5)), list(model.parameters()))
    before = [x.clone() for x in model.state_dict().values()]
    state = torch.get_rng_state()
    gram(jacobian)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(p.grad is None for p in model.parameters())
    # The graph is still there.
    v = torch.ones(jacobian.shape[1], dtype=zoo.DOUBLE)
    assert (jacobian @ v).isfinite().all()


def test_a_gradient_that_is_not_finite_makes_the_matrix_so():
    model, x = network(nn.Linear(5, 30), nn.Linear(30, 3)), normal(6, 5)
    x[0, 0] = float("nan")
    found = gram(Jacobian(model(x), list(model.parameters())))
    assert not found.matrix.isfinite().all()
    assert found.forms == ("ghost",) * 4


def test_memory_bounds_what_is_held():
    """In groups of parameters, and columns of rows, where all does not fit; refused where nothing does."""
    model = network(nn.Conv1d(8, 8, 3), nn.Tanh(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(16 * 8, 2))
    jacobian = Jacobian(model(normal(12, 8, 20)), list(model.parameters()))
    whole = gram(jacobian)
    matrices = 3 * whole.matrix.numel() * 8
    assert whole.forms == tuple(SHORT[form] for form in "rgrggg")
    # The most that one layer's gradients ask for.
    least = matrices + 8 * 3 * (24 * 8 * 18 + 12 * 18 * 24)
    small = gram(jacobian, memory=least)
    torch.testing.assert_close(small.matrix, whole.matrix, rtol=TOLERANCE, atol=1e-12)
    assert small.forms == whole.forms
    assert peak_bytes(lambda: gram(jacobian, memory=least)) <= min(
        least, peak_bytes(lambda: gram(jacobian)) - 1
    )
    for memory, what in (
        (least - 1, r"the gradients at the layers of parameters\[0\]"),
        (matrices - 1, "24 x 24"),
    ):
        with pytest.raises(TooLargeError, match=what):
            gram(jacobian, memory=memory)


def test_1280_rows_of_670_thousand_parameters():
    """No more than five matrices of memory, a hundredth of the Jacobian; exact to rounding."""
    model = network(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
    jacobian = Jacobian(model(normal(128, 784)), list(model.parameters()))
    assert jacobian.shape == (1280, 669706)
    u = normal(1280)
    found = gram(jacobian)
    expected = jacobian @ (jacobian.T @ u)
    torch.testing.assert_close(found.matrix @ u, expected, rtol=0, atol=TOLERANCE * float(expected.norm()))
    assert found.forms == ("ghost",) * 6
    assert peak_bytes(lambda: gram(jacobian)) <= 5 * 8 * 1280**2 < 0.01 * 8 * 1280 * 669706


def test_one_host_read():
    model = network(nn.Linear(5, 30), nn.Tanh(), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(112, 3))
    jacobian = Jacobian(model(normal(6, 1, 5)), list(model.parameters()))
    with Reads() as reads:
        gram(jacobian)
    assert reads.count == 1


class Reads(TorchFunctionMode):
    """Counts what waits for a device."""

    NAMES = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def test_tensors_are_made_on_the_device_of_the_outputs():
    model = network(nn.Embedding(9, 5), nn.Linear(5, 30), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(120, 3))
    jacobian = Jacobian(model(torch.randint(9, (6, 4))), list(model.parameters()))
    expected = gram(jacobian)
    with torch.device("meta"):
        found = gram(jacobian)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=TOLERANCE, atol=TOLERANCE)


def test_rows_by_backward_passes_have_to_fit():
    model = network(nn.Linear(5, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    jacobian = Jacobian(model(normal(6, 5)), list(model.parameters()))
    whole = gram(jacobian)
    least = 8 * (3 * 18 * 18 + 2 * 18 * 150)
    torch.testing.assert_close(gram(jacobian, memory=least).matrix, whole.matrix, rtol=TOLERANCE, atol=1e-12)
    with pytest.raises(TooLargeError, match=r"the rows of parameters\[0\]"):
        gram(jacobian, memory=least - 1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(weights=[1.0]), ValueError, "weights must hold one number for each of 2 parameters, got 1"),
        (dict(weights=[1.0, -1.0]), ValueError, r"weights\[1\] must be non-negative and finite, got -1.0"),
        (dict(weights=[float("nan"), 1.0]), ValueError, r"weights\[0\] must be non-negative"),
        (dict(memory=0.0), ValueError, "memory must be positive"),
        (dict(memory=10.0), TooLargeError, "memory must be at least"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    model = network(nn.Linear(5, 3))
    with pytest.raises(error, match=text):
        gram(Jacobian(model(normal(6, 5)), list(model.parameters())), **arguments)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="jacobian must be a Jacobian, got Tensor"):
        gram(torch.eye(3))
    w = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match="jacobian must be real"):
        gram(Jacobian(w * 2, [w]))
