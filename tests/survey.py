"""Operations whose second derivative is surveyed: name -> (function of one float64 tensor, start).

Starts are away from kinks and poles; every function is deterministic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def make(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape, seed=0):
    return make(*shape, seed=seed).abs() + 0.3


def fraction(*shape):
    return 0.1 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def frozen(build):
    torch.manual_seed(0)
    return build().double().requires_grad_(False)


def module(build, *shape):
    layer = frozen(build)
    return lambda x: layer(x.view(shape))


def first(function):
    return lambda *a: function(*a)[0]


def _assign(x):
    y = x.clone()
    y[0] = x[1] * x[2]
    y[:, 1] *= x[:, 0]
    return y


EYE, X, M = torch.eye(3, dtype=torch.float64), make(6), make(3, 3)
SPD = M @ M.T + 2 * EYE
CLASSES, IMAGE, SIGNAL = torch.tensor([0, 2, 1]), make(1, 2, 5, 5), make(1, 2, 7)
INDEX = torch.tensor([2, 0, 2])
ATTENTION = frozen(lambda: nn.MultiheadAttention(4, 2))
LSTM, GRU, RNN = (frozen(lambda build=build: build(4, 3)) for build in (nn.LSTM, nn.GRU, nn.RNN))
CELL = frozen(lambda: nn.LSTMCell(4, 3))

UNARY = """exp exp2 expm1 sin cos sinh cosh tanh atan asinh erf erfc sigmoid sinc abs neg square i0
    reciprocal softmax_0 log_softmax_0 cumsum_0 logcumsumexp_0 cumprod_0 flip_0 diff"""
POSITIVE = """log log2 log10 log1p sqrt rsqrt lgamma digamma polygamma_1 acosh_1 special.i0e special.i1
    special.entr special.erfcx special.log_ndtr"""
FRACTION = "tan asin acos atanh logit erfinv special.ndtri special.ndtr"
REDUCTIONS = """sum mean prod var std logsumexp_0 norm amax amin max min median std_mean_0 var_mean_0 nansum
    nanmean aminmax"""
ACTIVATIONS = """relu relu6 elu celu selu leaky_relu gelu silu mish softplus hardtanh hardswish hardsigmoid
    logsigmoid softsign tanhshrink softshrink hardshrink rrelu normalize"""


def _named(names, start, space=torch):
    """Functions by name; a trailing number is their dimension (of acosh a shift, of polygamma the order)."""
    table = {}
    for name in names.split():
        base, _, number = name.rpartition("_") if name[-1].isdigit() and "_" in name else (name, "", "")
        function = space
        for part in base.split("."):
            function = getattr(function, part)
        table[name] = (_with(base, function, int(number)) if number else function, start)
    return table


def _with(base, function, number):
    if base == "acosh":
        return lambda x: function(x + number)
    if base == "polygamma":
        return lambda x: function(number, x)
    if base == "flip":
        return lambda x: function(x, [number])
    return lambda x: function(x, dim=number)


OPERATIONS = {
    **_named(UNARY, X),
    **_named(POSITIVE, positive(6)),
    **_named(FRACTION, fraction(6)),
    **_named(REDUCTIONS, make(2, 5)),
    **{name: (function, make(2, 4) * 2) for name, (function, _) in _named(ACTIVATIONS, X, F).items()},
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), X),
    "glu": (F.glu, X),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.3]).double()), X),
    "threshold": (lambda x: F.threshold(x, 0.1, -1.0) * x, X),
    "gumbel_like": (lambda x: (x / 0.7).softmax(0).log(), X),
    "xlogy": (lambda x: torch.xlogy(x, x + 1), positive(6)),
    "atan2": (lambda x: torch.atan2(x, x.cos() + 2), X),
    "hypot": (lambda x: torch.hypot(x, x.cos() + 2), X),
    "pow_tensor": (lambda x: x ** (x + 1), positive(6)),
    "pow_half": (lambda x: x**1.5, positive(6)),
    "logaddexp": (lambda x: torch.logaddexp(x, 2 * x.sin()), X),
    "maximum": (lambda x: torch.maximum(x, x.sin() * 2), X),
    "clamp": (lambda x: x.clamp(-0.5, 0.8) * x, X),
    "lerp": (lambda x: torch.lerp(x, x.sin(), x.cos()), X),
    "addcmul": (lambda x: torch.addcmul(x, x, x.sin()), X),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x.cos() + 2), X),
    "polar": (lambda x: torch.view_as_real(torch.polar(x.exp(), x)), X),
    "complex_abs": (lambda x: torch.complex(x, x.sin() + 1).abs(), X),
    "remainder": (lambda x: torch.remainder(x, 0.95) * x, fraction(6)),
    "quantile": (lambda x: torch.quantile(x, 0.4), X),
    "kthvalue": (first(lambda x: torch.kthvalue(x, 2)), X),
    "topk": (first(lambda x: torch.topk(x, 3)), X),
    "sort": (first(torch.sort), X),
    "cummax": (first(lambda x: torch.cummax(x, 0)), X),
    "renorm": (lambda x: torch.renorm(x, 2, 0, 0.5), make(3, 3)),
    "norm_1": (lambda x: torch.linalg.vector_norm(x, 1), X),
    "norm_3": (lambda x: torch.linalg.vector_norm(x, 3), X),
    "norm_inf": (lambda x: torch.linalg.vector_norm(x, torch.inf), X),
    "norm_2": (lambda x: torch.linalg.vector_norm(x, 2, dim=0), make(3, 2)),
    "dist": (lambda x: torch.dist(x, x.sin() + 1, 3), X),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, x.sin() + 1, dim=0), X),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, x.sin() + 1), make(3, 2)),
    "cdist": (lambda x: torch.cdist(x, x.sin() + 1), make(3, 2)),
    "pdist": (F.pdist, make(4, 2)),
    # linear algebra
    "matmul": (lambda x: x @ x.T @ x, M),
    "einsum": (lambda x: torch.einsum("ij,jk,ki->i", x, x, x), M),
    "bilinear": (lambda x: F.bilinear(x, x.sin(), make(2, 3, 3)), M),
    "baddbmm": (lambda x: torch.baddbmm(x[None], x[None], x[None]), M),
    "kron": (lambda x: torch.kron(x, x), M),
    "cross": (lambda x: torch.linalg.cross(x, x.sin()), M),
    "trace": (lambda x: torch.trace(x @ x), M),
    "det": (torch.linalg.det, SPD),
    "slogdet": (lambda x: torch.linalg.slogdet(x)[1], SPD),
    "logdet": (torch.logdet, SPD),
    "inv": (torch.linalg.inv, SPD),
    "solve": (lambda x: torch.linalg.solve(x, x[:, 0].sin()), SPD),
    "solve_triangular": (lambda x: torch.linalg.solve_triangular(x.triu(), x, upper=True), SPD),
    "lu_solve": (lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x.sin()), SPD),
    "cholesky": (lambda x: torch.linalg.cholesky(x @ x.T + EYE), M),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(x @ x.T + EYE)), M),
    "cholesky_inverse": (lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x @ x.T + EYE)), M),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(x + x.T), M),
    "eigh_vectors": (lambda x: torch.linalg.eigh(x + x.T)[1].square(), M),
    "svdvals": (torch.linalg.svdvals, M),
    "qr": (lambda x: torch.linalg.qr(x)[1].abs(), M),
    "pinv": (torch.linalg.pinv, make(4, 3)),
    "lstsq": (lambda x: torch.linalg.lstsq(x, x[:, :1].sin()).solution, make(4, 3)),
    "matrix_exp": (torch.linalg.matrix_exp, M),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, 3), M),
    "nuclear": (lambda x: torch.linalg.matrix_norm(x, "nuc"), M),
    "spectral": (lambda x: torch.linalg.matrix_norm(x, 2), M),
    "multi_dot": (lambda x: torch.linalg.multi_dot([x, x.sin(), x]), M),
    "householder": (lambda x: torch.linalg.householder_product(x, x[0].sin()), make(4, 3)),
    "tensorinv": (lambda x: torch.linalg.tensorinv(x.view(3, 3), ind=1), SPD),
    # fourier
    "fft": (lambda x: torch.fft.fft(x).abs().square(), X),
    "rfft": (lambda x: torch.view_as_real(torch.fft.rfft(x)), X),
    "irfft": (lambda x: torch.fft.irfft(torch.complex(x, x.sin())), X),
    "fft2": (lambda x: torch.fft.fft2(x).abs().square(), M),
    "stft": (
        lambda x: torch.view_as_real(torch.stft(x, 4, window=torch.ones(4).double(), return_complex=True)),
        make(12),
    ),
    # convolution, pooling, resampling
    "conv1d": (lambda x: F.conv1d(x, x[:, :, :3].repeat(3, 1, 1)), SIGNAL),
    "conv2d": (lambda x: F.conv2d(x, x[:, :, :3, :3].repeat(2, 1, 1, 1), stride=2, padding=1), IMAGE),
    "conv3d": (lambda x: F.conv3d(x, x[:, :, :2, :2, :2]), make(1, 1, 3, 3, 3)),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, x[:, :, :2, :2].transpose(0, 1)), IMAGE),
    "grouped_conv": (lambda x: F.conv2d(x, x[0, :, None, :3, :3], groups=2), IMAGE),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), IMAGE),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), IMAGE),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), IMAGE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 3, 2), IMAGE.abs() + 0.5),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), SIGNAL),
    "interpolate_bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE),
    "interpolate_bicubic": (lambda x: F.interpolate(x, size=7, mode="bicubic"), IMAGE),
    "interpolate_nearest": (lambda x: F.interpolate(x, size=7), IMAGE),
    "grid_sample": (
        lambda x: F.grid_sample(x, x[:, :, :3, :3].permute(0, 2, 3, 1).tanh() * 0.8, align_corners=False),
        IMAGE,
    ),
    "affine_grid": (lambda x: F.affine_grid(x.view(1, 2, 3), (1, 1, 3, 3), align_corners=False), X),
    "pad_reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), IMAGE),
    "pad_replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), IMAGE),
    "pad_circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), IMAGE),
    "unfold": (lambda x: F.unfold(x, 2), IMAGE),
    "fold": (lambda x: F.fold(x.view(1, 4, 4), 3, 2), make(16)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x.view(1, 4, 2, 2), 2), make(16)),
    # normalisation
    "batch_norm_train": (module(lambda: nn.BatchNorm1d(3), 4, 3), make(12)),
    "batch_norm_eval": (module(lambda: nn.BatchNorm1d(3).eval(), 4, 3), make(12)),
    "layer_norm": (module(lambda: nn.LayerNorm(3), 4, 3), make(12)),
    "group_norm": (module(lambda: nn.GroupNorm(2, 4), 1, 4, 3), make(12)),
    "instance_norm": (module(lambda: nn.InstanceNorm1d(2), 1, 2, 6), make(12)),
    "rms_norm": (module(lambda: nn.RMSNorm(3), 4, 3), make(12)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), IMAGE),
    "weight_norm": (lambda v: make(5, 3) @ torch._weight_norm(v, positive(4, 1), 0).T, make(4, 3)),
    "weight_norm_magnitude": (lambda g: torch._weight_norm(make(4, 3), g, 0), positive(4, 1)),
    # lookup
    "embedding": (lambda w: F.embedding(INDEX, w), M),
    "bag_sum": (lambda w: F.embedding_bag(INDEX[None], w, mode="sum"), M),
    "bag_mean": (lambda w: F.embedding_bag(INDEX[None], w, mode="mean"), M),
    "bag_max": (lambda w: F.embedding_bag(INDEX[None], w, mode="max"), M),
    "gather": (lambda x: x.gather(0, INDEX[None]), M),
    "index_select": (lambda x: x.index_select(0, INDEX), M),
    "take_along_dim": (lambda x: torch.take_along_dim(x, INDEX[None], 0), M),
    "scatter_add": (lambda x: torch.zeros(3, 3).double().scatter_add(0, INDEX.expand(3, 3), x), M),
    "scatter_reduce": (lambda x: x.scatter_reduce(0, INDEX.expand(3, 3), x.sin(), "prod"), M),
    "index_add": (lambda x: x.index_add(0, INDEX, x.sin()), M),
    "index_put": (lambda x: x.index_put((INDEX,), x.sin(), accumulate=True), M),
    "masked_fill": (lambda x: x.masked_fill(M > 0, 1.0) * x, M),
    "masked_select": (lambda x: x.masked_select(M > 0), M),
    "where": (lambda x: torch.where(M > 0, x.sin(), x.cos()), M),
    "roll": (lambda x: x.roll(1, 0) * x, M),
    "tril": (lambda x: x.tril() @ x, M),
    "diag_embed": (torch.diag_embed, M),
    "cat_stack": (lambda x: torch.stack([torch.cat([x, x.sin()]), torch.cat([x.cos(), x])]), M),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), M),
    "unbind": (lambda x: x.unbind()[0] * x.unbind()[1], M),
    "as_strided": (lambda x: x.as_strided((2, 2), (3, 1)), M),
    "in_place": (lambda x: x.clone().mul_(x).sin_().add_(x), M),
    "slice_assignment": (_assign, M),
    # losses
    "cross_entropy": (lambda x: F.cross_entropy(x, CLASSES), M),
    "cross_entropy_smoothed": (
        lambda x: F.cross_entropy(x, CLASSES, weight=positive(3), label_smoothing=0.1),
        M,
    ),
    "soft_cross_entropy": (lambda x: F.cross_entropy(x, M.softmax(1)), M),
    "nll": (lambda x: F.nll_loss(x.log_softmax(1), CLASSES), M),
    "mse": (lambda x: F.mse_loss(x, M.sin()), M),
    "l1": (lambda x: F.l1_loss(x, M.sin() + 3) * x.sum(), M),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, M.sin()), M),
    "huber": (lambda x: F.huber_loss(x, M.sin(), delta=0.3), M),
    "bce": (lambda x: F.binary_cross_entropy(x, fraction(6).round()), fraction(6)),
    "bce_logits": (lambda x: F.binary_cross_entropy_with_logits(x, fraction(6).round()), X),
    "kl_div": (lambda x: F.kl_div(x.log_softmax(1), M.softmax(1), reduction="batchmean"), M),
    "poisson_nll": (lambda x: F.poisson_nll_loss(x, M.abs()), M),
    "gaussian_nll": (lambda x: F.gaussian_nll_loss(x, M.sin(), x.exp()), M),
    "hinge_embedding": (lambda x: F.hinge_embedding_loss(x.sin(), M.sign()) * x.sum(), M),
    "margin_ranking": (lambda x: F.margin_ranking_loss(x, x.sin() - 3, X.sign()) * x.sum(), X),
    "multi_margin": (lambda x: F.multi_margin_loss(x, CLASSES, p=2), M),
    "multilabel_soft_margin": (lambda x: F.multilabel_soft_margin_loss(x, (M > 0).double()), M),
    "soft_margin": (lambda x: F.soft_margin_loss(x, M.sign()), M),
    "triplet_margin": (lambda x: F.triplet_margin_loss(x, x.sin() + 1, x.cos() - 1), M),
    "cosine_embedding": (lambda x: F.cosine_embedding_loss(x, x.sin() + 1, torch.ones(3)), M),
    "ctc": (
        lambda x: F.ctc_loss(
            x.view(4, 1, 3).log_softmax(2), torch.tensor([[1]]), torch.tensor([4]), torch.tensor([1])
        ),
        make(12),
    ),
    # blocks
    "attention": (lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()), make(1, 2, 3, 4)),
    "multihead": (
        lambda x: ATTENTION(*3 * [x.view(3, 1, 4)])[0],
        make(12),
    ),
    "encoder_train": (
        module(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True), 1, 3, 4),
        make(12),
    ),
    "encoder_eval": (
        module(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True).eval(), 1, 3, 4),
        make(12),
    ),
    "lstm": (lambda x: LSTM(x.view(3, 1, 4))[0], make(12)),
    "gru": (lambda x: GRU(x.view(3, 1, 4))[0], make(12)),
    "rnn": (lambda x: RNN(x.view(3, 1, 4))[0], make(12)),
    "lstm_cell": (lambda x: CELL(x.view(3, 4))[1], make(12)),
    "checkpoint": (lambda x: checkpoint(lambda y: (y @ y).tanh(), x, use_reentrant=False), M),
    "reentrant_checkpoint": (lambda x: checkpoint(lambda y: (y @ y).tanh(), x, use_reentrant=True), M),
    "dropout": (lambda x: (torch.manual_seed(0), F.dropout(x, 0.4))[1] * x, M),
    "sparse_times_dense": (lambda x: torch.sparse.mm((M * (M > 0)).to_sparse(), x) ** 2, M),
    "sparse_values": (
        lambda x: torch.sparse.mm(
            torch.sparse_coo_tensor(torch.tensor([[0, 1, 2], [2, 0, 2]]), x, (3, 3), check_invariants=True), M
        ),
        make(3),
    ),
}


def objective(function):
    """A smooth nonlinear number from the outputs of an operation."""

    def scalar(x):
        outputs = function(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [t for t in outputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return sum(((t * make(*t.shape, seed=9)).sin() + 0.1 * t.square()).sum() for t in outputs)

    return scalar
