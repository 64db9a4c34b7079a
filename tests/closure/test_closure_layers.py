"""The recorded closure against dense float64: layers, losses and reductions, ways to fill ``.grad``."""

import math
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import optim
from optim.closure.evaluate import ClosureEvaluator
from optim.closure.setting import trial
from secondorder import GaussNewton, Hessian
from secondorder.vectors.flat import flatten, unflatten

RTOL = 1e-12  # Of the largest entry.
DIFFERENCES_RTOL = 1e-9  # Of the fourth order with steps of 1e-3, which divide the rounding of the gradient.


def assert_matrix(actual, expected, rtol=RTOL):
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)


def assert_curvature(evaluation, case, factor=1, by_differences=False):
    parameters = list(case.model.parameters())
    assert evaluation.coverage.blocks, evaluation.coverage.description
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, parameters).dense()
    assert_matrix(dense, factor * oracles.dense_gauss_newton(case))
    dense = Hessian(evaluation.objective, parameters).dense()
    if by_differences:
        assert_matrix(dense, hessian_by_differences(case.loss_of, parameters), DIFFERENCES_RTOL)
    else:
        assert_matrix(dense, factor * oracles.dense_hessian(case.loss_of, parameters))


def hessian_by_differences(func, parameters):
    """Central differences of torch's gradient, which is right."""
    x = flatten([p.detach() for p in parameters])

    def slope(x):
        return torch.autograd.functional.vjp(lambda x: func(*unflatten(x, parameters)), x)[1]

    steps = 1e-3 * torch.eye(len(x), dtype=x.dtype)
    columns = [8 * (slope(x + e) - slope(x - e)) - slope(x + 2 * e) + slope(x - 2 * e) for e in steps]
    return torch.stack(columns, dim=1) / 12e-3


class Through(nn.Module):
    def __init__(self, call, layer):
        super().__init__()
        self.call, self.layer = call, layer

    def forward(self, x):
        return self.call(self.layer, x)


def mlp(*layers):
    """Between two linear ones: derivatives with respect to inputs count too."""
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 3))


def conv(*layers):
    return nn.Sequential(nn.Conv2d(1, 2, 2), *layers, nn.Tanh(), nn.Conv2d(2, 3, 1))


def checkpointed(layer):
    """Not in a functional call, which would be over when the checkpoint computes again."""
    own = next(layer.parameters())
    is_on = lambda f: next(f.parameters()) is own  # noqa: E731
    return Through(lambda f, x: checkpoint(f, x, use_reentrant=False) if is_on(f) else f(x), layer)


first = partial(Through, lambda layer, x: layer(x)[0])
transformer = partial(nn.TransformerEncoderLayer, 4, 2, 5, batch_first=True)
ROWS, LINES = zoo.vector(15, 1).view(5, 3), zoo.vector(30, 2).view(3, 2, 5)
IMAGES, SEQUENCE = zoo.vector(48, 3).view(3, 1, 4, 4), zoo.vector(24, 4).view(2, 3, 4)
WORDS = torch.tensor([[0, 1, 4], [2, 1, 0], [3, 2, 2]])

# A model, and its inputs.
LAYERS = {
    "linear": (lambda: mlp(nn.Tanh()), ROWS),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 2, 2, 2, groups=2)), LINES),
    "conv2d": (lambda: conv(nn.Tanh(), nn.Conv2d(2, 2, 2, 2, padding=1, groups=2)), IMAGES),
    "conv_transpose2d": (lambda: conv(nn.Tanh(), nn.ConvTranspose2d(2, 2, 2, stride=2)), IMAGES),
    "batch_norm1d": (lambda: mlp(nn.BatchNorm1d(4), nn.Tanh()), ROWS),
    "batch_norm1d_eval": (lambda: mlp(nn.BatchNorm1d(4), nn.Tanh()).eval(), ROWS),
    "batch_norm2d": (lambda: conv(nn.BatchNorm2d(2)), IMAGES),
    "batch_norm2d_eval": (lambda: conv(nn.BatchNorm2d(2)).eval(), IMAGES),
    "layer_norm": (lambda: mlp(nn.LayerNorm(4), nn.Tanh()), ROWS),
    "group_norm": (lambda: mlp(nn.GroupNorm(2, 4), nn.Tanh()), ROWS),
    "dropout": (lambda: mlp(nn.Tanh(), nn.Dropout(0.4)), ROWS),
    "lstm": (lambda: first(nn.LSTM(4, 2, batch_first=True)), SEQUENCE),
    "lstm_bidirectional": (lambda: first(nn.LSTM(4, 2, bidirectional=True, batch_first=True)), SEQUENCE),
    "gru": (lambda: first(nn.GRU(4, 2, batch_first=True)), SEQUENCE),
    "rnn": (lambda: first(nn.RNN(4, 2, num_layers=2, batch_first=True)), SEQUENCE),
    "transformer": (lambda: transformer(dropout=0.0), SEQUENCE),
    "transformer_norm_first": (lambda: transformer(dropout=0.0, norm_first=True), SEQUENCE),
    "transformer_dropout": (lambda: transformer(dropout=0.1), SEQUENCE),
    "transformer_dropout_norm_first": (lambda: transformer(dropout=0.1, norm_first=True), SEQUENCE),
    # Where gradients are off, as in value mode, torch has another path for it.
    "transformer_eval": (lambda: transformer().eval(), SEQUENCE),
    "attention": (lambda: Through(lambda f, x: f(x, x, x)[0], nn.MultiheadAttention(4, 2)), SEQUENCE),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=1), *mlp(nn.Tanh())), WORDS),
    "embedding_bag": (lambda: nn.Sequential(nn.EmbeddingBag(5, 3, padding_idx=1), *mlp(nn.Tanh())), WORDS),
    "embedding_bag_max": (lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="max"), *mlp(nn.Tanh())), WORDS),
    "weight_norm": (lambda: mlp(nn.Tanh(), weight_norm(nn.Linear(4, 4)), nn.Tanh()), ROWS),
    "spectral_norm": (lambda: mlp(nn.Tanh(), spectral_norm(nn.Linear(4, 4))), ROWS),
    "spectral_norm_eval": (lambda: mlp(nn.Tanh(), spectral_norm(nn.Linear(4, 4))).eval(), ROWS),
    "relu_in_place": (lambda: mlp(nn.ReLU(inplace=True)), ROWS),
    "tied": (lambda: Through(lambda f, x: f(x) @ f[2].weight, mlp(nn.Tanh())), ROWS),
    "checkpoint": (lambda: checkpointed(mlp(nn.Tanh(), nn.Linear(4, 4))), ROWS),
    "checkpoint_dropout": (lambda: checkpointed(mlp(nn.Tanh(), nn.Dropout(0.4))), ROWS),
    # Recorded by another kernel than torch's choice, which backward passes must repeat.
    "checkpoint_transformer": (lambda: checkpointed(transformer(dropout=0.0)), SEQUENCE),
    "activations": (lambda: mlp(nn.PReLU(4), nn.SiLU(), nn.GELU(), nn.Softmax(dim=-1)), ROWS),
    "pools": (lambda: conv(nn.MaxPool2d(2, stride=1), nn.AvgPool2d(2, stride=1)), IMAGES),
}
# Torch's own second derivative of the one is wrong, of the other missing. The older API of the one warns.
BY_DIFFERENCES = {name for name in LAYERS if "weight_norm" in name or "embedding_bag" in name}


class Case:
    """As ``zoo.NetworkCase``; its functions of the parameters see one mask and the first buffers."""

    def __init__(self, name):
        torch.manual_seed(0)
        build, self.inputs = LAYERS[name]
        self.model = build().double()
        self.parameters = list(self.model.parameters())
        for parameter in self.parameters:
            parameter.data += 0.3 * torch.randn_like(parameter)  # Those of norms are ones and zeros.
        self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        outputs = self.outputs_of(*self.parameters)
        self.targets = torch.arange(len(outputs)) % outputs[0].numel()

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs.flatten(1), targets)

    def outputs_of(self, *values):
        torch.manual_seed(1)
        state = {name: buffer.clone() for name, buffer in self._buffers.items()}
        state |= {name: value for (name, _), value in zip(self.model.named_parameters(), values, strict=True)}
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(self.model, state, (self.inputs,))

    def loss_of(self, *values):
        return self.loss(self.outputs_of(*values), self.targets)

    def closure(self):
        self.model.zero_grad()
        loss = self.loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.slow
def test_curvature_and_trials_of_layers(name):
    """A trial has the mask, and starts from the buffers, of the recorded run."""
    case = Case(name)
    run = ClosureEvaluator(case.closure, case.parameters)
    torch.manual_seed(1)
    evaluation = run.record()
    with run.differentiating():
        assert_curvature(evaluation, case, by_differences=name in BY_DIFFERENCES)
    assert evaluation.value == pytest.approx(case.loss_of(*case.parameters).item(), rel=RTOL)
    assert run.value() == pytest.approx(evaluation.value, rel=RTOL)
    with trial(case.parameters, 0.1 * zoo.vector(len(evaluation.gradient), 2)):
        moved, expected = run.value(), case.loss_of(*case.parameters).item()
    assert moved == pytest.approx(expected, rel=RTOL)
    assert moved != pytest.approx(evaluation.value, rel=1e-6)


@pytest.mark.parametrize("name", ["weight_norm", "embedding_bag"])
def test_a_checkpoint_cannot_repeat_a_decomposition(name):
    case = Case(name)
    case.model = checkpointed(case.model)
    with pytest.raises(RuntimeError, match=f"{name}.* keep it out of torch.utils.checkpoint"):
        ClosureEvaluator(case.closure, case.parameters).record()


CTC = dict(targets=torch.tensor([[1, 2], [3, 1]]), input_lengths=(5, 5), target_lengths=(2, 2))
REFUSED = {
    "checkpoint.* use_reentrant=False": lambda f, x: checkpoint(f, x, use_reentrant=True).square().mean(),
    # Not with the remedy of other operations: there is no decomposition.
    "^(?!.*decompose).*ctc_loss.* no second derivative": lambda f, x: F.ctc_loss(f(x).log_softmax(2), **CTC),
}


@pytest.mark.filterwarnings("ignore:.* found no Gauss-Newton matrix")  # They fall back to the Hessian.
@pytest.mark.parametrize("calls_backward", [True, False])
@pytest.mark.parametrize("make", [optim.HessianFree, optim.Newton, optim.GaussNewton])
@pytest.mark.parametrize("message", REFUSED, ids=["reentrant", "ctc_loss"])
def test_what_has_no_second_derivative_is_named_with_a_remedy(message, make, calls_backward):
    model, inputs = nn.Linear(3, 4).double(), zoo.vector(30, 1).view(5, 2, 3).requires_grad_()
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = REFUSED[message](model, inputs)
        if calls_backward:
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=message):
        optimizer.step(closure)


CLASSES = dict(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
BOTH = dict(CLASSES, label_smoothing=0.1)
ROW = torch.tensor([0.5, 2.0], dtype=torch.float64)
# What the targets are, and the loss of outputs and targets; without options they are in test_closure.py.
LOSSES = {
    "cross_entropy_weight": ("classes", partial(F.cross_entropy, **CLASSES)),
    "cross_entropy_smoothed": ("classes", partial(F.cross_entropy, label_smoothing=0.2)),
    "cross_entropy_ignored": ("classes", partial(F.cross_entropy, ignore_index=1)),
    "cross_entropy_soft": ("soft", lambda z, t, **o: F.cross_entropy(z, t.softmax(1), **BOTH, **o)),
    "cross_entropy_image": ("image", partial(F.cross_entropy, **BOTH, ignore_index=2)),
    "mse_weight": ("values", lambda z, t, **o: F.mse_loss(z, t, weight=ROW.expand_as(z), **o)),
    "bce_logits_pos_weight": ("binary", partial(F.binary_cross_entropy_with_logits, pos_weight=ROW)),
    "bce_logits_weight": ("binary", partial(F.binary_cross_entropy_with_logits, weight=ROW)),
    "huber_weight": ("values", lambda z, t, **o: F.huber_loss(z, t, weight=ROW.expand_as(z), **o)),
    "smooth_l1": ("values", partial(F.smooth_l1_loss, beta=0.7)),
    "poisson_full": ("values", lambda z, t, **o: F.poisson_nll_loss(z, 3 * t.abs(), full=True, **o)),
    "poisson_rates": ("rates", lambda z, t, **o: F.poisson_nll_loss(z, t.abs(), log_input=False, **o)),
    "kl_div": ("soft", lambda z, t, **o: F.kl_div(F.log_softmax(z, 1), t.softmax(1), **o)),
    "kl_log": ("soft", lambda z, t, **o: F.kl_div(z.log_softmax(1), t.log_softmax(1), log_target=True, **o)),
    "soft_margin": ("binary", lambda z, t, **o: F.soft_margin_loss(z, 2 * t - 1, **o)),
    "nll_weight": ("classes", lambda z, t, **o: F.nll_loss(torch.log_softmax(z, 1), t, **CLASSES, **o)),
    "bce_weight": ("binary", lambda z, t, **o: F.binary_cross_entropy(z.sigmoid(), t, weight=ROW, **o)),
}


def loss_case(kind, loss):
    if kind == "image":
        targets, model = torch.arange(20).view(5, 2, 2) % 3, nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh())
        return zoo.network("cnn")._replace(model=model.double(), loss=loss, targets=targets)
    case = zoo.network({"values": "mlp_mse", "binary": "mlp_bce"}.get(kind, "mlp_cross_entropy"))
    if kind in ("soft", "rates"):
        case = case._replace(targets=zoo.vector(27, 5).view(9, 3))
    if kind == "rates":
        case = case._replace(model=nn.Sequential(case.model, nn.Softplus()))
    return case._replace(loss=loss)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # of kl_div
@pytest.mark.parametrize("reduction", ["none", "weighted", "sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.slow
def test_curvature_of_losses_and_reductions(name, reduction):
    kind, func = LOSSES[name]

    def loss(z, t):
        if reduction in ("sum", "mean"):
            return func(z, t, reduction=reduction)
        losses = func(z, t, reduction="none").flatten()
        weights = torch.linspace(0.5, 2, len(losses), dtype=z.dtype)
        return weights @ losses if reduction == "weighted" else losses.mean()

    case = loss_case(kind, loss)
    assert_curvature(ClosureEvaluator(case.value, list(case.model.parameters())).record(), case)


NOT_CONVEX = {"soft": F.cross_entropy, "rates": partial(F.poisson_nll_loss, log_input=False)}


@pytest.mark.parametrize("kind", NOT_CONVEX)
def test_losses_of_negative_targets_are_not_called_convex(kind):
    case = loss_case(kind, NOT_CONVEX[kind])
    assert ClosureEvaluator(case.value, list(case.model.parameters())).record().coverage.blocks == ()


def assign(parameters, loss):
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient


WEIGHTS = torch.linspace(0.5, 2, 9, dtype=torch.float64)
# What is done with parameters, loss and losses; where it gives None the closure returns the loss.
FILLS = {
    "assigned": lambda p, loss, losses: assign(p, loss),
    "assigned_item": lambda p, loss, losses: assign(p, loss) or loss.item(),
    "retain_graph": lambda p, loss, losses: loss.backward(retain_graph=True),
    "inputs": lambda p, loss, losses: loss.backward(inputs=p),
    "gradient": lambda p, loss, losses: losses.backward(gradient=WEIGHTS),
    "clipped": lambda p, loss, losses: loss.backward() or nn.utils.clip_grad_value_(p, 1e-2),
}


@pytest.mark.parametrize("name", FILLS)
def test_ways_to_fill_grad(name):
    func = partial(F.cross_entropy, reduction="none")
    case = zoo.network("mlp_cross_entropy")._replace(loss=lambda z, t: WEIGHTS @ func(z, t))
    parameters = list(case.model.parameters())

    def closure():
        case.model.zero_grad()
        losses = func(case.outputs(), case.targets)
        loss = WEIGHTS @ losses
        returned = FILLS[name](parameters, loss, losses)
        return loss if returned is None else returned

    run = ClosureEvaluator(closure, parameters)
    evaluation = run.record()
    gradient = flatten(torch.autograd.grad(case.value(), parameters))
    if name == "clipped":
        assert gradient.abs().max() > 1e-2
        gradient = gradient.clamp(-1e-2, 1e-2)
    assert not evaluation.partial
    assert_matrix(evaluation.gradient, gradient)
    assert_curvature(evaluation, case)
    with trial(parameters, 0.1 * zoo.vector(len(gradient), 2)):
        assert run.value() == pytest.approx(case.value().item(), rel=RTOL)


@pytest.mark.parametrize("sizes", [[18], [5, 13]])
def test_explicit_outputs(sizes):
    """Of one, residuals, the matrix is ``J^T J``; two are coupled by the loss."""
    case = zoo.network("mlp_mse")
    parameters = list(case.model.parameters())

    def loss(z):
        return 0.5 * z.square().sum() + (len(sizes) - 1) * z.sum().exp()

    def outputs(*values):
        return (case.outputs_of(*values) - case.targets).sin().flatten()

    def closure():
        parts = outputs(*parameters).split(sizes)
        return loss(torch.cat(parts)), parts if len(parts) > 1 else parts[0]

    blocks = ClosureEvaluator(closure, parameters).record().coverage.blocks
    J = oracles.dense_jacobian(outputs, parameters)
    H = torch.autograd.functional.hessian(loss, outputs(*parameters).detach())
    assert_matrix(GaussNewton.of_blocks(blocks, parameters).dense(), J.T @ H @ J)


def micro_batches():
    case = zoo.network("mlp_cross_entropy")
    pairs = zip(case.inputs.split(3), case.targets.split(3), strict=True)
    return [case._replace(inputs=x, targets=t) for x, t in pairs], list(case.model.parameters())


def accumulate(case):
    loss = case.value()
    loss.backward()
    return loss


def accumulated(batches, parameters):
    """Two backward passes; gives the sum of the three gradients."""
    list(map(accumulate, batches[:2]))
    return flatten(torch.autograd.grad(sum(batch.value() for batch in batches), parameters))


def test_passes_before_the_closure_scale_the_curvature():
    batches, parameters = micro_batches()
    gradient = accumulated(batches, parameters)
    evaluation = ClosureEvaluator(partial(accumulate, batches[2]), parameters).record()
    assert_matrix(evaluation.gradient, gradient)
    assert r"2 backward pass(es) before the closure" in evaluation.partial
    assert_curvature(evaluation, batches[2], 3)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_after_passes_outside_is_damped_and_not_tried(set_to_none):
    batches, parameters = micro_batches()
    optimizer = optim.GaussNewton(parameters, damping=0.5, solver="direct")

    def step():
        optimizer.zero_grad(set_to_none)
        g, G = accumulated(batches, parameters), oracles.dense_gauss_newton(batches[2])
        before = flatten([p.detach().clone() for p in parameters])
        optimizer.step(partial(accumulate, batches[2]))
        moved = flatten([p.detach() for p in parameters]) - before
        # The condition of the matrix is below 100.
        assert_matrix(moved, torch.linalg.solve(3 * G + 0.5 * torch.eye(len(g)).to(g), -g), 100 * RTOL)
        assert all(map(math.isnan, (optimizer.report.rho, optimizer.report.new_loss)))
        assert optimizer.param_groups[0]["damping"] == 0.5

    with pytest.warns(UserWarning, match="took a damped step without trying it"):
        step()
    step()  # Warnings are errors: it is given once.


def test_a_stale_gradient_is_noticed():
    batches, parameters = micro_batches()
    optimizer = optim.GaussNewton(parameters)
    optimizer.step(partial(accumulate, batches[2]))
    assert optimizer.report.rho > 0
    with pytest.warns(UserWarning, match="added to that of an earlier step before the closure"):
        optimizer.step(partial(accumulate, batches[2]))
