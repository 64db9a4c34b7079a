"""Replacements against torch's values, and their derivatives against finite differences."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secondorder import functional
from secondorder.autodiff.decompose import decompose


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(build, *shape):
    torch.manual_seed(0)
    layer = build().double()
    for p in layer.parameters():
        p.requires_grad_(False)
    return lambda x: layer(x.view(shape))


INDICES, OFFSETS = torch.tensor([0, 2, 1, 1, 3, 0]), torch.tensor([0, 2, 2])
CLASSES = torch.tensor([0, 2, 1])


torch.manual_seed(0)
ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True).double().requires_grad_(False)


def weight_normed(v):
    g, x = make(4, 1, seed=1).abs() + 1, make(5, 3, seed=2)
    return x @ torch._weight_norm(v.view(4, 3), g, 0).T


OPERATIONS = {
    "attention": (lambda x: F.scaled_dot_product_attention(x, x * 2, x.sin()), make(1, 2, 4, 3)),
    "causal_attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        make(1, 1, 4, 3),
    ),
    "multihead": (lambda x: ATTENTION(*3 * [x.view(1, 3, 4)])[0], make(12)),
    "encoder": (
        module(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, nn.Tanh(), batch_first=True), 1, 3, 4),
        make(12),
    ),
    "weight_norm": (weight_normed, make(12)),
    "weight_norm_negative_dimension": (
        lambda v: torch._weight_norm(v, make(4, 1, seed=1).abs() + 1, -2),
        make(4, 3),
    ),
    "batch_norm_train": (module(lambda: nn.BatchNorm1d(3), 5, 3), make(15)),
    "batch_norm_eval": (module(lambda: nn.BatchNorm2d(2).eval(), 2, 2, 2, 2), make(16)),
    "layer_norm": (module(lambda: nn.LayerNorm([2, 3]), 4, 2, 3), make(24)),
    "group_norm": (module(lambda: nn.GroupNorm(2, 4), 2, 4, 3), make(24)),
    "instance_norm": (module(lambda: nn.InstanceNorm1d(3, affine=True), 2, 3, 4), make(24)),
    "bag_sum": (lambda w: F.embedding_bag(INDICES, w, OFFSETS, mode="sum"), make(4, 2)),
    "bag_mean": (lambda w: F.embedding_bag(INDICES, w, OFFSETS, mode="mean", padding_idx=1), make(4, 2)),
    "bag_negative_padding": (
        lambda w: F.embedding_bag(INDICES, w, OFFSETS, mode="sum", padding_idx=-4),
        make(4, 2),
    ),
    "bag_max": (lambda w: F.embedding_bag(INDICES.view(2, 3), w, mode="max"), make(4, 2)),
    "bag_weighted": (
        lambda s: F.embedding_bag(INDICES, make(4, 2), OFFSETS, mode="sum", per_sample_weights=s),
        make(6),
    ),
    "mse": (lambda x: F.mse_loss(x, make(6, seed=3), reduction="none"), make(6)),
    "mse_weighted": (lambda x: F.mse_loss(x, make(6, seed=3), weight=make(6, seed=4).abs()), make(6)),
    "huber": (lambda x: F.huber_loss(x, make(6, seed=3), delta=0.7), make(6)),
    "huber_weighted": (lambda x: F.huber_loss(x, make(6, seed=3), weight=make(6, seed=4).abs()), make(6)),
    "soft_margin": (lambda x: F.soft_margin_loss(x, make(6, seed=3).sign()), make(6)),
    "multi_margin": (lambda x: F.multi_margin_loss(x, CLASSES, p=2, weight=make(4).abs()), make(3, 4)),
    "hardsigmoid": (lambda x: F.hardsigmoid(x) ** 2, make(6) * 3),
    "cdist": (lambda x: torch.cdist(x, x.sin() + 1), make(3, 2)),
    "cdist_3": (lambda x: torch.cdist(x, x.sin() + 1, p=3), make(3, 2)),
    "pdist": (F.pdist, make(4, 2)),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), make(2, 4)),
    "torch_batch_norm": (
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        make(5, 3),
    ),
    "torch_instance_norm": (
        lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        make(2, 3, 4),
    ),
    "cholesky_inverse": (
        lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x @ x.T + 3 * torch.eye(3).double())),
        make(3, 3),
    ),
}


def scalar(operation, x):
    out = operation(x)
    out = out[0] if isinstance(out, tuple) else out
    w = make(*out.shape, seed=9)
    return (out * w).sin().sum() + (out.square() * w).sum()


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_torchs(name):
    operation, x = OPERATIONS[name]
    expected = operation(x)
    with decompose():
        got = operation(x)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_and_third_derivatives_by_finite_differences(name):
    operation, x = OPERATIONS[name]
    u, v = make(*x.shape, seed=5), make(*x.shape, seed=6)

    def gradient_along(point):
        return functional.vjp(lambda x: scalar(operation, x), point)[1].mul(u).sum()

    def curvature_along(point):
        return functional.vhp(lambda x: scalar(operation, x), point, v)[1].mul(u).sum()

    point = x.clone().requires_grad_()
    with decompose():
        second = functional.vhp(lambda x: scalar(operation, x), x, u)[1]
        product = functional.vhp(lambda x: scalar(operation, x), point, v, create_graph=True)[1]
        (third,) = torch.autograd.grad(product.mul(u).sum(), point)
        expected_third = oracles.central_gradient(curvature_along, x)
    expected_second = oracles.central_gradient(gradient_along, x)
    # Fourth-order central differences with steps of 1e-4: 1e-8 of the derivatives' scale.
    torch.testing.assert_close(second, expected_second, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(third, expected_third, rtol=1e-5, atol=1e-5)


def test_signatures_and_edges_are_torchs():
    x, L = make(3, 8), torch.linalg.cholesky(torch.eye(3).double() * 2)
    rows = torch.zeros(2, 0, dtype=torch.float64)
    calls = [
        lambda: torch.layer_norm(x, (8,), None, None, 1e-5, False),
        lambda: torch.layer_norm(x, (8,), cudnn_enable=False),
        lambda: torch.cholesky_inverse(L, out=torch.empty(3, 3).double()),
        lambda: F.group_norm(torch.zeros(0, 4, 2), 2),
        lambda: torch.cdist(rows, rows, p=float("inf")),
        lambda: F.multi_margin_loss(x[0], torch.tensor([2]), reduction="none"),
        lambda: F.multi_margin_loss(x[0], torch.tensor(2), reduction="none"),
        lambda: F.embedding_bag(INDICES, make(4, 2), OFFSETS, max_norm=0.5),
        lambda: F.embedding_bag(INDICES, make(4, 2), OFFSETS, mode="sum", sparse=True),
    ]
    for call in calls:
        expected = call()
        with decompose():
            torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize(
    "build", [lambda: nn.LayerNorm(8), lambda: nn.GroupNorm(2, 8), lambda: nn.BatchNorm1d(8)]
)
def test_half_precision_is_torchs(build):
    """Statistics in single precision, the result in the input's."""
    layer, x = build().float(), (make(4, 8) * 100 + 1000).bfloat16()
    if not isinstance(layer, nn.BatchNorm1d):
        layer = layer.bfloat16()
    expected = layer(x)
    with decompose():
        got = layer(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


# torch 2.11 and 2.12 say so also where checks are asked for.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_tensors_of_differentiated_values():
    indices, dense, x = torch.tensor([[0, 1, 1], [2, 0, 2]]), make(3, 2), make(3)
    eye = torch.eye(3, dtype=torch.float64)

    def strided(x):
        return torch.stack([x[0] ** 2 * dense[2], x[1] ** 2 * dense[0] + x[2] ** 2 * dense[2]])

    for build in (
        lambda x: torch.sparse_coo_tensor(indices, x**2, (2, 3), check_invariants=True),
        lambda x: torch.sparse_coo_tensor(indices.tolist(), x**2, (2, 3), check_invariants=True).coalesce(),
    ):

        def func(x, build=build):
            return torch.sparse.mm(build(x), dense)

        expected = oracles.dense_jacobian(lambda x: strided(x) ** 2, [x])
        _, push = functional.linearize(lambda x: func(x) ** 2, x)
        torch.testing.assert_close(torch.stack([push(e).reshape(-1) for e in eye], dim=1), expected)
        hessian = oracles.dense_hessian(lambda x: strided(x).pow(3).sum(), [x])
        got = functional.hvp(lambda x: func(x).pow(3).sum(), x, x)[1]
        torch.testing.assert_close(got, hessian @ x)
    total = functional.hvp(
        lambda x: torch.sparse.sum(torch.sparse_coo_tensor(indices, x**3, (2, 3), check_invariants=True)),
        x,
        x,
    )[1]
    torch.testing.assert_close(total, 6 * x * x)


def test_running_statistics_move_as_torchs():
    for build, shape in ((nn.BatchNorm1d, (6, 3)), (nn.InstanceNorm1d, (2, 3, 5))):
        layers = [build(3, track_running_stats=True).double() for _ in range(2)]
        for seed in range(3):
            x = make(*shape, seed=seed)
            layers[0](x)
            with decompose():
                layers[1](x)
        for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_both_weight_norms_have_the_right_hessian():
    """Torch's is more than half off."""
    x = make(5, 3)
    for wrap in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        with pytest.warns(FutureWarning) if wrap is nn.utils.weight_norm else decompose():
            model = wrap(nn.Linear(3, 2).double())
        function, parameters = functional.module_function(model, F.mse_loss, x, make(5, 2, seed=1))
        values = {name: p + 0.3 * make(*p.shape, seed=7) for name, p in parameters.items()}
        v = {name: make(*p.shape, seed=8) for name, p in values.items()}
        with decompose():
            _, _, hvp_fn = functional.linearize_grad(function, values)
            product = hvp_fn(v)

        def slope(t, values=values, v=v, function=function):
            moved = {name: p + t * v[name] for name, p in values.items()}
            return functional.value_and_grad(function, moved)[1]

        h = 1e-4
        for name in values:
            difference = (slope(h)[name] - slope(-h)[name]) / (2 * h)
            torch.testing.assert_close(product[name], difference, rtol=1e-5, atol=1e-6)


def test_settings_are_restored():
    fast_path = torch.backends.mha.get_fastpath_enabled()
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled

    def fail():
        with decompose():
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled) == flags


def test_forward_mode_through_losses():
    x, t, v = make(4), make(4, seed=1), make(4, seed=2)
    for loss in (F.mse_loss, F.huber_loss, F.soft_margin_loss):
        of_x = partial(loss, target=t)
        with decompose():
            got = functional.hvp(of_x, x, v, strategy="forward-over-reverse")[1]
        torch.testing.assert_close(got, torch.autograd.functional.hvp(of_x, x, v)[1])


def test_options_without_a_second_derivative():
    with pytest.raises(RuntimeError, match="_embedding_bag.* has no second derivative in torch"):
        functional.hvp(
            lambda w: F.embedding_bag(INDICES, w, OFFSETS, scale_grad_by_freq=True, mode="sum").pow(3).sum(),
            make(4, 2),
            make(4, 2),
        )
    with decompose(), pytest.raises(ValueError, match="offsets must be given"):
        F.embedding_bag(INDICES, make(4, 2))


def test_a_long_cumulative_sum_takes_no_square_of_memory():
    x = make(100_000)
    with decompose():
        got = x.logcumsumexp(0)
    torch.testing.assert_close(got, x.logcumsumexp(0), rtol=1e-12, atol=1e-12)
