"""Operations whose derivatives are surveyed: name -> (function of one float64 tensor, starts).

Each has at least three starts, of different shapes where the operation allows it, away from kinks and poles;
every function is deterministic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def make(*shape, seed=0):
    """Numbers that look random; not drawn, for functions run under ``torch.vmap``."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (
        1.4 * torch.special.ndtri(0.02 + 0.96 * (0.7548776662466927 * (n + 1) + 0.37 * seed + 0.11).frac())
    ).view(shape)


def positive(*shape, seed=0):
    return make(*shape, seed=seed).abs() + 0.3


def fraction(*shape, seed=1):
    return 0.1 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(n, seed=0):
    return make(n, n, seed=seed) @ make(n, n, seed=seed).T + 2 * torch.eye(n, dtype=torch.float64)


def at(*shapes, of=make):
    """A start of each shape."""
    return [of(*shape) for shape in shapes]


def like(x, seed=3):
    """A constant of the shape of ``x``."""
    return make(*x.shape, seed=seed)


def eye(x):
    return torch.eye(x.shape[-1], dtype=torch.float64)


def frozen(build):
    torch.manual_seed(0)
    return build().double().requires_grad_(False)


def first(function):
    return lambda *a: function(*a)[0]


def classes(x):
    """One class for each sample (and position): dimension 1 of ``x`` holds the classes."""
    shape = torch.Size((x.shape[0], *x.shape[2:]))
    return torch.arange(shape.numel()).view(shape) % x.shape[1]


def _rows(x):
    """Indices of rows, one of them twice."""
    return torch.tensor([len(x) - 1, 0, len(x) - 1])[: len(x)]


def _places(x):
    """For each entry a row."""
    return (
        _rows(x).view(-1, *[1] * (x.ndim - 1)).expand(x.shape) if len(x) < 4 else torch.zeros_like(x).long()
    )


def _assign(x):
    y = x.clone()
    y[0] = x[-1] * x[0]
    y[:, 0] *= x[:, -1]
    return y


ATTENTION = frozen(lambda: nn.MultiheadAttention(4, 2))
LSTM, GRU, RNN = (frozen(lambda build=build: build(4, 3)) for build in (nn.LSTM, nn.GRU, nn.RNN))
CELL = frozen(lambda: nn.LSTMCell(4, 3))

UNARY = """exp exp2 expm1 sin cos sinh cosh tanh atan asinh erf erfc sigmoid sinc abs neg square i0
    reciprocal diff"""
ALONG = "softmax_0 log_softmax_0 cumsum_0 logcumsumexp_0 cumprod_0 flip_0 logsumexp_0 std_mean_0 var_mean_0"
POSITIVE = """log log2 log10 log1p sqrt rsqrt lgamma digamma polygamma_1 acosh_1 special.i0e special.i1
    special.entr special.erfcx special.log_ndtr"""
FRACTION = "tan asin acos atanh logit erfinv special.ndtri special.ndtr"
REDUCTIONS = "sum mean prod var std norm amax amin max min median nansum nanmean aminmax"
ACTIVATIONS = """relu relu6 elu celu selu leaky_relu gelu silu mish softplus hardtanh hardswish hardsigmoid
    logsigmoid softsign tanhshrink softshrink hardshrink rrelu normalize"""


def _named(names, starts, space=torch):
    """Functions by name; a trailing number is their dimension (of acosh a shift, of polygamma the order)."""
    table = {}
    for name in names.split():
        base, _, number = name.rpartition("_") if name[-1].isdigit() and "_" in name else (name, "", "")
        function = space
        for part in base.split("."):
            function = getattr(function, part)
        table[name] = (_with(base, function, int(number)) if number else function, starts)
    return table


def _with(base, function, number):
    if base == "acosh":
        return lambda x: function(x + number)
    if base == "polygamma":
        return lambda x: function(number, x)
    if base == "flip":
        return lambda x: function(x, [number])
    return lambda x: function(x, dim=number)


ANY = at((6,), (1,), (2, 3))
MATRICES = at((3, 3), (1, 1), (4, 4))
# Eigenvalues that are far apart.
DISTINCT = [make(n, n) + 3 * torch.diag(torch.arange(n).double()) for n in (3, 2, 4)]
DEFINITE = [definite(3), definite(1), definite(4)]
IMAGES = at((1, 2, 5, 5), (2, 2, 4, 6), (1, 2, 5, 4))
SIGNALS = at((1, 2, 7), (3, 2, 5), (1, 2, 6))
SAMPLES = at((3, 3), (1, 4), (2, 3, 2))

OPERATIONS = {
    **_named(UNARY, at((6,), (2,), (2, 3))),
    **_named(ALONG, at((6,), (2, 3), (3, 1))),
    **_named(POSITIVE, at((6,), (1,), (2, 3), of=positive)),
    **_named(FRACTION, at((6,), (1,), (2, 3), of=fraction)),
    **_named(REDUCTIONS, at((2, 5), (3,), (4, 1))),
    **{
        name: (function, [2 * x for x in at((2, 4), (1, 3), (5, 1))])
        for name, (function, _) in _named(ACTIVATIONS, [], F).items()
    },
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ANY),
    "glu": (F.glu, at((6,), (2, 4), (1, 2))),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.3]).double()), ANY),
    "threshold": (lambda x: F.threshold(x, 0.1, -1.0) * x, ANY),
    "gumbel_like": (lambda x: (x / 0.7).softmax(0).log(), ANY),
    "xlogy": (lambda x: torch.xlogy(x, x + 1), at((6,), (1,), (2, 3), of=positive)),
    "atan2": (lambda x: torch.atan2(x, x.cos() + 2), ANY),
    "hypot": (lambda x: torch.hypot(x, x.cos() + 2), ANY),
    "pow_tensor": (lambda x: x ** (x + 1), at((6,), (1,), (2, 3), of=positive)),
    "pow_half": (lambda x: x**1.5, at((6,), (1,), (2, 3), of=positive)),
    "logaddexp": (lambda x: torch.logaddexp(x, 2 * x.sin()), ANY),
    "maximum": (lambda x: torch.maximum(x, x.sin() * 2), ANY),
    "clamp": (lambda x: x.clamp(-0.5, 0.8) * x, ANY),
    "lerp": (lambda x: torch.lerp(x, x.sin(), x.cos()), ANY),
    "addcmul": (lambda x: torch.addcmul(x, x, x.sin()), ANY),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x.cos() + 2), ANY),
    "polar": (lambda x: torch.view_as_real(torch.polar(x.exp(), x)), ANY),
    "complex_abs": (lambda x: torch.complex(x, x.sin() + 1).abs(), ANY),
    "remainder": (lambda x: torch.remainder(x, 0.95) * x, at((6,), (1,), (2, 3), of=fraction)),
    "quantile": (lambda x: torch.quantile(x, 0.4), ANY),
    "kthvalue": (first(lambda x: torch.kthvalue(x, 2)), at((6,), (2, 3), (3, 2))),
    "topk": (first(lambda x: torch.topk(x, 2)), at((6,), (2, 3), (3, 2))),
    "sort": (first(torch.sort), ANY),
    "cummax": (first(lambda x: torch.cummax(x, 0)), ANY),
    "renorm": (lambda x: torch.renorm(x, 2, 0, 0.5), at((3, 3), (1, 4), (2, 2, 2))),
    "norm_1": (lambda x: torch.linalg.vector_norm(x, 1), ANY),
    "norm_3": (lambda x: torch.linalg.vector_norm(x, 3), ANY),
    "norm_inf": (lambda x: torch.linalg.vector_norm(x, torch.inf), ANY),
    "norm_2": (lambda x: torch.linalg.vector_norm(x, 2, dim=0), at((3, 2), (4,), (2, 3, 1))),
    "dist": (lambda x: torch.dist(x, x.sin() + 1, 3), ANY),
    "cosine_similarity": (
        lambda x: F.cosine_similarity(x, x.sin() + 1, dim=0),
        at((6,), (3, 2), (2, 1, 3)),
    ),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, x.sin() + 1), at((3, 2), (1, 4), (4, 1))),
    "cdist": (lambda x: torch.cdist(x, x.sin() + 1), at((3, 2), (1, 3), (2, 2, 2))),
    "pdist": (F.pdist, at((4, 2), (2, 3), (3, 1))),
    # linear algebra
    "matmul": (lambda x: x @ x.mT @ x, at((3, 3), (1, 2), (2, 2, 3))),
    "einsum": (lambda x: torch.einsum("ij,jk,ki->i", x, x, x), MATRICES),
    "bilinear": (
        lambda x: F.bilinear(x, x.sin(), make(2, x.shape[-1], x.shape[-1])),
        at((3, 3), (1, 2), (2, 1, 3)),
    ),
    "baddbmm": (lambda x: torch.baddbmm(x[None], x[None], x[None]), MATRICES),
    "kron": (lambda x: torch.kron(x, x), at((3, 3), (1, 2), (2, 1))),
    "cross": (lambda x: torch.linalg.cross(x, x.sin()), at((3, 3), (1, 3), (2, 2, 3))),
    "trace": (lambda x: torch.trace(x @ x), MATRICES),
    "det": (torch.linalg.det, [*DEFINITE, make(2, 3, 3)]),
    "slogdet": (lambda x: torch.linalg.slogdet(x)[1], DEFINITE),
    "logdet": (torch.logdet, DEFINITE),
    "inv": (torch.linalg.inv, DEFINITE),
    "solve": (lambda x: torch.linalg.solve(x, x[:, 0].sin()), DEFINITE),
    "solve_triangular": (lambda x: torch.linalg.solve_triangular(x.triu(), x, upper=True), DEFINITE),
    "lu_solve": (lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x.sin()), DEFINITE),
    "cholesky": (lambda x: torch.linalg.cholesky(x @ x.T + eye(x)), MATRICES),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(x @ x.T + eye(x))), MATRICES),
    "cholesky_inverse": (lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x @ x.T + eye(x))), MATRICES),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(x + x.T), DISTINCT),
    "eigh_vectors": (lambda x: torch.linalg.eigh(x + x.T)[1].square(), DISTINCT),
    "svdvals": (torch.linalg.svdvals, at((3, 3), (2, 3), (3, 1))),
    "qr": (lambda x: torch.linalg.qr(x)[1].abs(), at((3, 3), (3, 2), (2, 1))),
    "pinv": (torch.linalg.pinv, at((4, 3), (2, 3), (3, 1))),
    "lstsq": (lambda x: torch.linalg.lstsq(x, x[:, :1].sin()).solution, at((4, 3), (3, 2), (3, 1))),
    "matrix_exp": (torch.linalg.matrix_exp, MATRICES),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, 3), MATRICES),
    "nuclear": (lambda x: torch.linalg.matrix_norm(x, "nuc"), at((3, 3), (2, 3), (3, 1))),
    "spectral": (lambda x: torch.linalg.matrix_norm(x, 2), at((3, 3), (2, 3), (3, 1))),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x, x.sin(), x]), MATRICES),
    "householder": (
        lambda x: torch.linalg.householder_product(x, x[0].sin()),
        at((4, 3), (3, 2), (2, 1)),
    ),
    "tensorinv": (
        lambda x: torch.linalg.tensorinv(x.view(-1, x.shape[-1]), ind=1),
        DEFINITE,
    ),
    # fourier
    "fft": (lambda x: torch.fft.fft(x).abs().square(), ANY),
    "rfft": (lambda x: torch.view_as_real(torch.fft.rfft(x)), ANY),
    "irfft": (lambda x: torch.fft.irfft(torch.complex(x, x.sin())), at((6,), (2, 3), (3, 2))),
    "fft2": (lambda x: torch.fft.fft2(x).abs().square(), at((3, 3), (1, 2), (2, 2, 2))),
    "stft": (
        lambda x: torch.view_as_real(torch.stft(x, 4, window=torch.ones(4).double(), return_complex=True)),
        at((12,), (2, 8), (5,)),
    ),
    # convolution, pooling, resampling
    "conv1d": (lambda x: F.conv1d(x, x[:1, :, :3].repeat(3, 1, 1)), SIGNALS),
    "conv2d": (lambda x: F.conv2d(x, x[:1, :, :3, :3].repeat(2, 1, 1, 1), stride=2, padding=1), IMAGES),
    "conv3d": (
        lambda x: F.conv3d(x, x[:1, :, :2, :2, :2]),
        at((1, 1, 3, 3, 3), (2, 1, 2, 2, 3), (1, 2, 2, 2, 2)),
    ),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, x[:1, :, :2, :2].transpose(0, 1)), IMAGES),
    "grouped_conv": (lambda x: F.conv2d(x, x[0, :, None, :3, :3], groups=2), IMAGES),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), IMAGES),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), IMAGES),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), IMAGES),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGES),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 3, 2), [x.abs() + 0.5 for x in IMAGES]),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), SIGNALS),
    "interpolate_bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGES),
    "interpolate_bicubic": (lambda x: F.interpolate(x, size=7, mode="bicubic"), IMAGES),
    "interpolate_nearest": (lambda x: F.interpolate(x, size=7), IMAGES),
    "grid_sample": (
        lambda x: F.grid_sample(x, x[:, :, :3, :3].permute(0, 2, 3, 1).tanh() * 0.8, align_corners=False),
        IMAGES,
    ),
    "affine_grid": (
        lambda x: F.affine_grid(x.view(-1, 2, 3), (x.numel() // 6, 1, 3, 3), align_corners=False),
        at((6,), (2, 6), (1, 2, 3)),
    ),
    "pad_reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), IMAGES),
    "pad_replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), IMAGES),
    "pad_circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), IMAGES),
    "unfold": (lambda x: F.unfold(x, 2), IMAGES),
    "fold": (lambda x: F.fold(x.view(-1, 4, 4), 3, 2), at((16,), (2, 16), (1, 4, 4))),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x.view(-1, 4, 2, 2), 2), at((16,), (2, 16), (1, 4, 4))),
    # normalisation
    "batch_norm_train": (frozen(lambda: nn.BatchNorm1d(3)), at((4, 3), (2, 3), (2, 3, 2))),
    "batch_norm_eval": (frozen(lambda: nn.BatchNorm1d(3).eval()), at((4, 3), (1, 3), (2, 3, 2))),
    "layer_norm": (frozen(lambda: nn.LayerNorm(3)), at((4, 3), (1, 3), (2, 2, 3))),
    "layer_norm_two_dims": (frozen(lambda: nn.LayerNorm([2, 3])), at((4, 2, 3), (1, 2, 3), (2, 3))),
    "group_norm": (frozen(lambda: nn.GroupNorm(2, 4)), at((1, 4, 3), (2, 4, 2), (4, 4, 1), (2, 4))),
    "group_norm_of_four": (frozen(lambda: nn.GroupNorm(4, 16)), at((4, 16, 4), (1, 16, 2), (4, 16, 1))),
    "group_norm_one": (frozen(lambda: nn.GroupNorm(1, 4)), at((1, 4, 3), (4, 4, 2), (2, 4, 2, 2), (3, 4))),
    "group_norm_each": (frozen(lambda: nn.GroupNorm(4, 4)), at((1, 4, 3), (4, 4, 4), (2, 4, 2, 2))),
    "instance_norm": (frozen(lambda: nn.InstanceNorm1d(2)), at((1, 2, 6), (3, 2, 2), (2, 4))),
    "rms_norm": (frozen(lambda: nn.RMSNorm(3)), at((4, 3), (1, 3), (2, 2, 3))),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), IMAGES),
    "weight_norm": (
        lambda v: make(5, v.shape[1]) @ torch._weight_norm(v, positive(v.shape[0], 1), 0).T,
        at((4, 3), (1, 3), (3, 1)),
    ),
    "weight_norm_magnitude": (
        lambda g: torch._weight_norm(make(len(g), 3), g, 0),
        at((4, 1), (1, 1), (2, 1), of=positive),
    ),
    # lookup
    "embedding": (lambda w: F.embedding(_rows(w), w), at((3, 3), (1, 4), (4, 1))),
    "bag_sum": (lambda w: F.embedding_bag(_rows(w)[None], w, mode="sum"), at((3, 3), (1, 4), (4, 1))),
    "bag_mean": (lambda w: F.embedding_bag(_rows(w)[None], w, mode="mean"), at((3, 3), (1, 4), (4, 1))),
    "bag_max": (lambda w: F.embedding_bag(_rows(w)[None], w, mode="max"), at((3, 3), (1, 4), (4, 1))),
    "gather": (lambda x: x.gather(0, _rows(x)[:, None]), at((3, 3), (1, 4), (4, 1))),
    "index_select": (lambda x: x.index_select(0, _rows(x)), SAMPLES),
    "take_along_dim": (
        lambda x: torch.take_along_dim(x, _rows(x)[:, None], 0),
        at((3, 3), (1, 4), (4, 1)),
    ),
    "scatter_add": (lambda x: torch.zeros_like(x).scatter_add(0, _places(x), x), SAMPLES),
    "scatter_reduce": (lambda x: x.scatter_reduce(0, _places(x), x.sin(), "prod"), SAMPLES),
    "scatter_reduce_mean": (lambda x: x.scatter_reduce(0, _places(x), x.sin(), "mean"), SAMPLES),
    "scatter_reduce_amax": (lambda x: x.scatter_reduce(0, _places(x), x.sin(), "amax"), SAMPLES),
    "index_add": (lambda x: x.index_add(0, _rows(x), x.sin()), SAMPLES),
    "index_put": (lambda x: x.index_put((_rows(x),), x.sin(), accumulate=True), SAMPLES),
    "masked_fill": (lambda x: x.masked_fill(like(x) > 0, 1.0) * x, SAMPLES),
    "masked_select": (lambda x: x.masked_select(like(x) > 0), SAMPLES),
    "where": (lambda x: torch.where(like(x) > 0, x.sin(), x.cos()), SAMPLES),
    "roll": (lambda x: x.roll(1, 0) * x, SAMPLES),
    "roll_flat": (lambda x: x.roll(1) * x, at((), (3,), (2, 2))),
    "tril": (lambda x: x.tril() @ x, MATRICES),
    "diag_embed": (torch.diag_embed, SAMPLES),
    "cat_stack": (lambda x: torch.stack([torch.cat([x, x.sin()]), torch.cat([x.cos(), x])]), SAMPLES),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), SAMPLES),
    "unbind": (lambda x: x.unbind()[0] * x.unbind()[-1], SAMPLES),
    "as_strided": (lambda x: x.as_strided((2, 2), (2, 1)), at((3, 3), (1, 4), (2, 3, 2))),
    "in_place": (lambda x: x.clone().mul_(x).sin_().add_(x), SAMPLES),
    "slice_assignment": (_assign, at((3, 3), (2, 4), (4, 2))),
    # losses
    "cross_entropy": (lambda x: F.cross_entropy(x, classes(x)), SAMPLES),
    "cross_entropy_smoothed": (
        lambda x: F.cross_entropy(x, classes(x), weight=positive(x.shape[1]), label_smoothing=0.1),
        SAMPLES,
    ),
    "soft_cross_entropy": (lambda x: F.cross_entropy(x, like(x).softmax(1)), SAMPLES),
    "nll": (lambda x: F.nll_loss(x.log_softmax(1), classes(x)), SAMPLES),
    "mse": (lambda x: F.mse_loss(x, like(x).sin()), SAMPLES),
    "l1": (lambda x: F.l1_loss(x, like(x).sin() + 3) * x.sum(), SAMPLES),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, like(x).sin()), SAMPLES),
    "huber": (lambda x: F.huber_loss(x, like(x).sin(), delta=0.3), SAMPLES),
    "bce": (
        lambda x: F.binary_cross_entropy(x, fraction(*x.shape, seed=2).round()),
        at((6,), (1,), (2, 3), of=fraction),
    ),
    "bce_logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, fraction(*x.shape, seed=2).round()),
        ANY,
    ),
    "kl_div": (lambda x: F.kl_div(x.log_softmax(1), like(x).softmax(1), reduction="batchmean"), SAMPLES),
    "poisson_nll": (lambda x: F.poisson_nll_loss(x, like(x).abs()), SAMPLES),
    "gaussian_nll": (lambda x: F.gaussian_nll_loss(x, like(x).sin(), x.exp()), SAMPLES),
    "hinge_embedding": (lambda x: F.hinge_embedding_loss(x.sin(), like(x).sign()) * x.sum(), SAMPLES),
    "margin_ranking": (lambda x: F.margin_ranking_loss(x, x.sin() - 3, like(x).sign()) * x.sum(), ANY),
    "multi_margin": (lambda x: F.multi_margin_loss(x, classes(x), p=2), at((3, 3), (1, 4), (4, 2))),
    "multilabel_soft_margin": (
        lambda x: F.multilabel_soft_margin_loss(x, (like(x) > 0).double()),
        at((3, 3), (1, 4), (4, 2)),
    ),
    "soft_margin": (lambda x: F.soft_margin_loss(x, like(x).sign()), SAMPLES),
    "triplet_margin": (
        lambda x: F.triplet_margin_loss(x, x.sin() + 1, x.cos() - 1),
        at((3, 3), (1, 4), (4, 2)),
    ),
    "cosine_embedding": (
        lambda x: F.cosine_embedding_loss(x, x.sin() + 1, torch.ones(len(x))),
        at((3, 3), (1, 4), (4, 2)),
    ),
    "ctc": (
        lambda x: F.ctc_loss(
            x.view(-1, 1, 3).log_softmax(2),
            torch.tensor([[1]]),
            torch.tensor([x.numel() // 3]),
            torch.tensor([1]),
        ),
        at((12,), (6,), (9,)),
    ),
    # blocks
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
        at((1, 2, 3, 4), (2, 1, 2, 2), (3, 2)),
    ),
    "multihead": (lambda x: ATTENTION(x, x, x)[0], at((3, 1, 4), (2, 2, 4), (3, 4))),
    "encoder_train": (
        frozen(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True)),
        at((1, 3, 4), (2, 2, 4), (2, 4)),
    ),
    "encoder_eval": (
        frozen(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True).eval()),
        at((1, 3, 4), (2, 2, 4), (2, 4)),
    ),
    "lstm": (first(LSTM), at((3, 1, 4), (2, 2, 4), (3, 4))),
    "gru": (first(GRU), at((3, 1, 4), (2, 2, 4), (3, 4))),
    "rnn": (first(RNN), at((3, 1, 4), (2, 2, 4), (3, 4))),
    "lstm_cell": (lambda x: CELL(x)[1], at((3, 4), (1, 4), (4,))),
    "checkpoint": (lambda x: checkpoint(lambda y: (y @ y).tanh(), x, use_reentrant=False), MATRICES),
    "checkpointed_norm": (
        lambda x: checkpoint(lambda y: F.layer_norm(y, y.shape[-1:]).tanh(), x, use_reentrant=False),
        at((3, 3), (1, 4), (2, 2, 3)),
    ),
    "checkpointed_attention": (
        lambda x: checkpoint(lambda y: F.scaled_dot_product_attention(y, y, y.sin()), x, use_reentrant=False),
        at((1, 2, 3, 4), (2, 1, 2, 2), (3, 2)),
    ),
    "reentrant_checkpoint": (lambda x: checkpoint(lambda y: (y @ y).tanh(), x, use_reentrant=True), MATRICES),
    "dropout": (lambda x: (torch.manual_seed(0), F.dropout(x, 0.4))[1] * x, MATRICES),
    "sparse_times_dense": (
        lambda x: torch.sparse.mm((like(x) * (like(x) > 0)).to_sparse(), x) ** 2,
        MATRICES,
    ),
    "sparse_values": (
        lambda x: torch.sparse.mm(
            torch.sparse_coo_tensor(
                torch.stack([torch.arange(len(x)), torch.arange(len(x)).roll(1)]),
                x,
                (len(x), len(x)),
                check_invariants=True,
            ),
            make(len(x), 2),
        ),
        at((3,), (1,), (4,)),
    ),
}


def objective(function):
    """A smooth nonlinear number from the outputs of an operation."""

    def scalar(x):
        return sum(
            ((t * make(*t.shape, seed=9)).sin() + 0.1 * t.square()).sum() for t in outputs(function, x)
        )

    return scalar


def outputs(function, x):
    """The real outputs of an operation."""
    found = function(x)
    found = found if isinstance(found, tuple) else (found,)
    return tuple(t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point())
