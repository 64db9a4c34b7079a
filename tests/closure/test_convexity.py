"""Losses without a name: proved convex in the outputs on the graph, or not; against dense float64."""

import itertools
import random
import re
import warnings

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.utils import parameters_to_vector

import optim
from optim.closure.evaluate import ClosureEvaluator
from optim.closure.semidefinite import is_semidefinite
from secondorder import GaussNewton
from secondorder.operators.output_blocks import Blocks
from secondorder.vectors.flat import flatten

TOLERANCE = dict(rtol=1e-12, atol=1e-12)
DOUBLE = torch.float64
OPTIMIZERS = {
    "hessian_free": optim.HessianFree,
    "gauss_newton": optim.GaussNewton,
    "gauss_newton_cg": lambda p, **k: optim.GaussNewton(p, solver="cg", **k),
}


def coverage_of(closure, parameters):
    return ClosureEvaluator(closure, list(parameters)).record().coverage.proved()


def dense_of(coverage, parameters):
    assert coverage.blocks, coverage.description
    return GaussNewton.of_blocks(coverage.blocks, list(parameters)).dense()


def jacobian(outputs, parameters):
    """One entry at a time."""
    rows = [
        torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for z in outputs.reshape(-1)
    ]
    return torch.stack([flatten(row) for row in rows])


def one_hot(z, t):
    return F.one_hot(t, z.shape[1]).to(z.dtype)


# Losses of samples or entries, and what the targets are.
SEPARABLE = {
    "logsumexp": ("classes", lambda z, t: z.logsumexp(1) - z[range(len(t)), t]),
    "logsumexp_gather": ("classes", lambda z, t: z.logsumexp(1) - z.gather(1, t[:, None]).squeeze(1)),
    "log_of_softmax": ("classes", lambda z, t: -torch.log(z.softmax(1)[range(len(t)), t])),
    "log_of_softmax_later": ("classes", lambda z, t: -(z.softmax(1).log() * one_hot(z, t)).sum(1)),
    "softmax_by_hand": (
        "classes",
        lambda z, t: -(z.exp() / z.exp().sum(1, keepdim=True))[range(len(t)), t].log(),
    ),
    "nll_of_log_of_softmax": ("classes", lambda z, t: F.nll_loss(z.softmax(1).log(), t, reduction="none")),
    "beside_a_known_loss": (
        "classes",
        lambda z, t: F.cross_entropy(z, t, reduction="none") + z.cosh().sum(1),
    ),
    "linear_beside_a_known_loss": ("classes", lambda z, t: F.cross_entropy(z, t, reduction="none") + z[:, 0]),
    "function_of_a_known_loss": ("classes", lambda z, t: F.cross_entropy(z, t, reduction="none").exp()),
    "focal": (
        "classes",
        lambda z, t: (lambda p: -((1 - p) ** 2) * p.log())((z / 4).softmax(1)[range(len(t)), t]),
    ),
    "square_of_a_norm": ("values", lambda z, t: torch.linalg.vector_norm(z - t, dim=1) ** 2),
    "square_of_a_method_norm": ("values", lambda z, t: (z - t).norm(dim=1).square()),
    "norm": ("values", lambda z, t: (z - t).norm(dim=1)),
    "einsum": ("values", lambda z, t: (lambda r: torch.einsum("ij,ij->i", r, r))(z - t)),
    "einsum_of_two": ("values", lambda z, t: torch.einsum("ij,ij->i", z - t, z - t)),
    "bmm": ("values", lambda z, t: (lambda r: (r[:, None] @ r[:, :, None]).squeeze())(z - t)),
    "vecdot": ("values", lambda z, t: (lambda r: torch.linalg.vecdot(r, r))(z - t)),
    "weighted_norm": (
        "values",
        lambda z, t: torch.einsum("bi,ij,bj->b", z - t, torch.eye(z.shape[1]).to(z) + 0.2, z - t),
    ),
    "log_cosh": ("values", lambda z, t: (z - t).cosh().log()),
    "log_cosh_stable": ("values", lambda z, t: z - t + F.softplus(-2 * (z - t))),
    "huber": (
        "values",
        lambda z, t: (lambda r: torch.where(r.abs() < 0.5, r**2 / 2, r.abs() / 2 - 0.125))(z - t),
    ),
    "charbonnier": ("values", lambda z, t: ((z - t) ** 2 + 0.01).sqrt()),
    "quartic": ("values", lambda z, t: (z - t) ** 4),
    "poisson": ("values", lambda z, t: z.exp() - t.abs() * z),
    "bernoulli": ("values", lambda z, t: -(z.sigmoid().log() + t.abs() * (1 - z.sigmoid()).log())),
    "bernoulli_stable": ("values", lambda z, t: z.clamp(min=0) - z * t + (1 + (-z.abs()).exp()).log()),
}
REDUCTIONS = {
    "mean": lambda losses: losses.mean(),
    "sum": lambda losses: losses.sum(),
    "weighted": lambda losses: (
        losses * torch.linspace(0.1, 2, losses.numel()).view_as(losses).to(losses)
    ).sum(),
    "by_hand": lambda losses: sum(losses.unbind()).sum() / len(losses),
}
MODELS = {"classes": ("mlp_cross_entropy", "cnn"), "values": ("mlp_mse", "scalar_and_unused")}
# Those that couple all samples.
WHOLE = {
    "dot": lambda z, t: (lambda r: r @ r)((z - t).flatten()),
    "transposed_product": lambda z, t: (lambda r: (r.T @ r).trace())(z - t),
    "column": lambda z, t: (lambda r: (r.T @ r).squeeze())((z - t).reshape(-1, 1)),
    "einsum": lambda z, t: torch.einsum("ij,ij->", z - t, z - t),
    "square_of_a_norm": lambda z, t: torch.norm(z - t) ** 2,
    "norm": lambda z, t: torch.linalg.norm(z - t),
    "root_mean_square": lambda z, t: torch.sqrt(torch.mean((z - t) ** 2)),
    "root_of_a_known_loss": lambda z, t: F.mse_loss(z, t) ** 0.5,
    "root_with_a_constant": lambda z, t: torch.sqrt(F.mse_loss(z, t) + 1e-3),
    "two_on_one": lambda z, t: (z - t).cosh().log().mean() + torch.sqrt(F.mse_loss(z, t)),
    "exponential": lambda z, t: F.mse_loss(z, t).exp(),
    "square_of_a_number": lambda z, t: (z - t).cosh().log().mean() ** 3,
    "between_samples": lambda z, t: F.mse_loss(z, t) + F.mse_loss(z[:3], z[3:6]),
    "cox": lambda z, t: (torch.logcumsumexp(z, 0) - z).mean(),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", SEPARABLE)
def test_a_sum_over_samples_that_is_convex_is_proved(name, number, reduction):
    kind, losses = SEPARABLE[name]
    case = zoo.network(MODELS[kind][number])
    case = case._replace(loss=lambda z, t: REDUCTIONS[reduction](losses(z, t)))
    parameters = list(case.model.parameters())
    dense = dense_of(coverage_of(case.value, parameters), parameters)
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", WHOLE)
def test_a_convex_function_of_all_samples_is_proved(name, number):
    case = zoo.network(MODELS["values"][number])._replace(loss=WHOLE[name])
    parameters = list(case.model.parameters())
    dense = dense_of(coverage_of(case.value, parameters), parameters)
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


PENALTIES = {
    "lasso": lambda p: sum(x.abs().sum() for x in p),
    "group_lasso": lambda p: sum(x.norm(dim=-1).sum() for x in p),
    "elastic_weights": lambda p: sum(
        ((x - 0.3) ** 4 * torch.linspace(0, 1, x.numel()).view_as(x)).sum() for x in p
    ),
    "two_vectors": lambda p: parameters_to_vector(p).dot(parameters_to_vector(p)),
    "product": lambda p: parameters_to_vector(p) @ parameters_to_vector(p),
    "one_vector": lambda p: (lambda v: v.dot(v))(parameters_to_vector(p)),
    "norm": lambda p: parameters_to_vector(p).norm(),
    "coupled": lambda p: (p[0].T @ p[0]).cosh().mean(),
    "log_determinant": lambda p: -torch.logdet(p[0].T @ p[0] + torch.eye(4).to(p[0])),
    "concave": lambda p: sum((x.abs() + 0.1).sqrt().sum() for x in p),
    "linear": lambda p: sum(x.sum() for x in p),
}
BASES = {
    "known": F.cross_entropy,
    "proved": lambda z, t: (z.logsumexp(1) - z[range(len(t)), t]).mean(),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_term_of_parameters_alone_keeps_its_hessian(name, base):
    case = zoo.network("mlp_cross_entropy")._replace(loss=BASES[base])
    parameters = list(case.model.parameters())
    term = lambda p: 0.05 * PENALTIES[name](p)  # noqa: E731
    dense = dense_of(coverage_of(lambda: case.value() + term(parameters), parameters), parameters)
    own = oracles.dense_hessian(lambda *p: term(p) + 0 * parameters_to_vector(p).sum(), parameters)
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case) + own, **TOLERANCE)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["lasso", "concave"])
def test_a_penalty_gives_no_warning_and_is_minimised(make, kind):
    """Also where its Hessian is indefinite, as a concave penalty's is; and in strict mode."""
    case = zoo.network("mlp_cross_entropy")
    parameters = list(case.model.parameters())
    optimizer = OPTIMIZERS[make](parameters, strict=True)
    losses = [
        float(optimizer.step(lambda: case.value() + 1e-2 * PENALTIES[kind](parameters))) for _ in range(25)
    ]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.7 * losses[0]
    expected = "gauss-newton (cross_entropy) + hessian of a term of the parameters"
    assert optimizer.report.curvature == expected


def test_explicit_outputs_with_a_penalty_past_them():
    case = zoo.network("mlp_cross_entropy")
    parameters = list(case.model.parameters())

    def closure(penalty):
        outputs = case.outputs()
        return case.loss(outputs, case.targets) + penalty(parameters), outputs

    for name in ("lasso", "concave", "linear", "one_vector"):
        term = lambda p, name=name: 0.05 * PENALTIES[name](p)  # noqa: E731
        dense = dense_of(coverage_of(lambda: closure(term), parameters), parameters)  # noqa: B023
        own = oracles.dense_hessian(lambda *p: term(p) + 0 * parameters_to_vector(p).sum(), parameters)  # noqa: B023
        torch.testing.assert_close(dense, oracles.dense_gauss_newton(case) + own, **TOLERANCE)
    optimizer = optim.GaussNewton(parameters, strict=True)
    optimizer.step(lambda: closure(PENALTIES["lasso"]))
    assert optimizer.report.curvature == (
        "gauss-newton (explicit outputs) + hessian of a term of the parameters"
    )


@pytest.mark.parametrize("kind", ["network", "mixed"])
def test_more_than_parameters_past_explicit_outputs_is_left_out_with_a_warning(kind):
    case, other = zoo.network("mlp_cross_entropy"), nn.Linear(4, 3).double()
    parameters = [*case.model.parameters(), *other.parameters()]

    def closure():
        outputs = case.outputs()
        loss = case.loss(outputs, case.targets)
        past = F.cross_entropy(other(case.inputs), case.targets)
        return (loss + past if kind == "network" else loss * parameters[0].norm()), outputs

    optimizer = optim.GaussNewton(parameters)
    with pytest.warns(UserWarning, match="do not carry the whole loss"):
        optimizer.step(closure)


def test_log_probabilities_with_a_penalty_past_them_have_no_curvature():
    case = zoo.network("mlp_cross_entropy")
    parameters = list(case.model.parameters())

    def closure():
        outputs = case.outputs().log_softmax(1)
        return F.nll_loss(outputs, case.targets) + PENALTIES["one_vector"](parameters), outputs

    optimizer = optim.GaussNewton(parameters)
    with pytest.warns(UserWarning, match="linear in the outputs that were returned"):
        optimizer.step(closure)


def two_heads():
    torch.manual_seed(0)
    body, first, second = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 2), nn.Linear(5, 2)
    model = nn.ModuleList([body, first, second]).double()
    return model, lambda x: (first(body(x)), second(body(x)))


def gaussian(z, t):
    mean, scale = z.unbind(1)
    return F.gaussian_nll_loss(mean, t[:, 0], (2 * scale).exp())


def changed_in_place(case):
    z = case.outputs()
    loss = F.cross_entropy(z, case.targets.softmax(1))
    z.mul_(2)
    return loss


NOT_PROVED = {
    "concave": lambda c: -c.outputs().logsumexp(1).mean(),
    "negative_squares": lambda c: -(c.outputs() - c.targets).square().sum(),
    "negative_loss": lambda c: -F.mse_loss(c.outputs(), c.targets),
    "negative_weight": lambda c: (
        F.mse_loss(c.outputs(), c.targets, reduction="none") * torch.tensor([1.0, -0.1])
    ).mean(),
    "negative_weight_of_one_sample": lambda c: (
        c.outputs().logsumexp(1) * torch.tensor([1.0] * 8 + [-0.01], dtype=DOUBLE)
    ).sum(),
    "not_convex_at_the_point": lambda c: (3 * (c.outputs() - c.targets)).square().tanh().sum(),
    "sine": lambda c: c.outputs().sin().sum(),
    "sine_beside_a_known_loss": lambda c: F.mse_loss(c.outputs(), c.targets) + c.outputs().sin().sum(),
    "logarithm_of_squares": lambda c: (c.outputs() - c.targets).square().sum().log(),
    "product_of_outputs": lambda c: (c.outputs()[:, 0] * c.outputs()[:, 1]).mean(),
    "variance_minus": lambda c: c.outputs().square().mean() - 2 * c.outputs().mean() ** 2,
    "learned_scale_in_the_outputs": lambda c: gaussian(c.outputs(), c.targets),
    "square_matrix": lambda c: (lambda r: r @ r)(c.outputs()[:2]).sum(),
    "trace_of_a_square": lambda c: (lambda r: torch.einsum("ij,ji->", r, r))(c.outputs()[:2]),
    "quotient": lambda c: -(c.targets.abs() / (1 + (4 * c.outputs()).square())).mean(),
    "no_norm": lambda c: torch.linalg.vector_norm(c.outputs(), 0.5, dim=1).mean(),
    "curve_of_two_parameters": lambda c: (
        c.value() + (c.model[0].bias[0] + c.model[0].bias[1] * c.inputs).sin().mean()
    ),
    "target_of_itself": lambda c: F.cross_entropy(c.outputs(), c.outputs().softmax(1)),
    "linear": lambda c: c.outputs().mean(),
    "linear_in_other_outputs": lambda c: c.value() + c.model(c.inputs + 1).mean(),
    "hinge": lambda c: F.relu(1 - c.outputs() * c.targets).mean(),
    "two_calls_multiplied": lambda c: (c.outputs() * c.model(c.inputs + 1)).mean(),
    "penalty_times_loss": lambda c: c.value() * (1 + sum(p.square().sum() for p in c.model.parameters())),
    "focal_far_away": lambda c: (lambda lp: (-((1 - lp.exp()) ** 2) * lp).mean())(
        (c.outputs() + torch.tensor([-6.0, 0.0])).log_softmax(1)[:, 0]
    ),
    "parameters_only": lambda c: sum(p.cosh().sum() for p in c.model.parameters()),
    "penalty_on_squares_only": lambda c: sum(p.square().sum() + p.cosh().sum() for p in c.model.parameters()),
    "changed_in_place": changed_in_place,
}


@pytest.mark.parametrize("name", NOT_PROVED)
def test_what_is_not_proved_falls_to_the_hessian_with_a_warning(name):
    for make in (optim.HessianFree, optim.GaussNewton):
        case = zoo.network("mlp_mse")
        objective = lambda: NOT_PROVED[name](case)  # noqa: B023, E731
        parameters = list(case.model.parameters())
        assert coverage_of(objective, parameters).blocks == ()
        with pytest.raises(RuntimeError, match="found no Gauss-Newton matrix"):
            make(parameters, strict=True).step(objective)
        optimizer = make(parameters)
        with pytest.warns(UserWarning, match="found no Gauss-Newton matrix.*The exact Hessian is used"):
            optimizer.step(objective)
        assert optimizer.report.curvature.startswith("hessian (")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(objective)


REASONS = {
    "concave": r"no known loss was called; .* outputs of shape \(9, 2\) is not positive semidefinite",
    "linear": "it has no curvature in outputs",
    "linear_in_other_outputs": r"outside a known loss; it is linear in outputs of shape \(9, 2\)",
    "sine_beside_a_known_loss": "outside a known loss; its Hessian .* is not positive semidefinite",
    "changed_in_place": "the outputs were changed in place after the loss was computed$",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_said(name):
    case = zoo.network("mlp_mse")
    text = coverage_of(lambda: NOT_PROVED[name](case), case.model.parameters()).description
    assert re.search(REASONS[name], text), text


def test_a_learned_scale_is_not_convex():
    """In the mean and the scale together, a second head or one parameter."""
    model, heads = two_heads()
    case, scale = zoo.network("mlp_mse"), torch.zeros((), dtype=DOUBLE, requires_grad=True)

    def of_heads():
        mean, log_scale = heads(case.inputs)
        return ((mean - case.targets).square() * (-2 * log_scale).exp() / 2 + log_scale).mean()

    def of_one():
        return ((case.outputs() - case.targets).square() * (-2 * scale).exp() / 2 + scale).mean()

    assert coverage_of(of_heads, model.parameters()).blocks == ()
    assert coverage_of(of_one, [*case.model.parameters(), scale]).blocks == ()


@pytest.mark.parametrize("is_shared", [False, True])
def test_the_terms_of_an_autoencoder_have_outputs_of_their_own(is_shared):
    """The decoder's outputs depend on those of the encoder, of which the divergence is a convex function."""
    model, heads = two_heads()
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    parameters = [*model.parameters(), *decoder.parameters()]
    inputs, noise = zoo.vector(36, 1).view(9, 4), zoo.vector(18, 2).view(9, 2)
    targets = (inputs > 0).double()

    def outputs():
        mean, log_variance = heads(inputs)
        variance = log_variance.exp()
        deviation = variance.sqrt() if is_shared else (log_variance / 2).exp()
        return mean, log_variance, decoder(mean + noise * deviation), variance

    def closure():
        mean, log_variance, decoded, variance = outputs()
        divergence = -(1 + log_variance - mean.pow(2) - variance).sum() / 2
        return F.binary_cross_entropy_with_logits(decoded, targets, reduction="sum") + divergence

    def block(position, loss):
        z = outputs()[position]
        J = jacobian(z, parameters)
        H = torch.autograd.functional.hessian(loss, z.detach()).reshape(J.shape[0], J.shape[0])
        return J.T @ H @ J

    expected = (
        block(0, lambda z: z.square().sum() / 2)
        + block(1, lambda z: z.exp().sum() / 2)
        + block(2, lambda z: F.binary_cross_entropy_with_logits(z, targets, reduction="sum"))
    )
    dense = dense_of(coverage_of(closure, parameters), parameters)
    torch.testing.assert_close(dense, expected, **TOLERANCE)


def test_a_gradient_penalty_beside_a_loss_that_is_proved():
    model, x = zoo.network("mlp_mse").model, zoo.vector(20, 3).view(5, 4).requires_grad_()
    parameters = list(model.parameters())

    def parts():
        outputs = model(x)
        (slopes,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return outputs, slopes

    def closure():
        outputs, slopes = parts()
        return outputs.cosh().log().mean() + 3 * torch.einsum("ij,ij->i", slopes, slopes).mean()

    outputs, slopes = parts()
    J, K = jacobian(outputs, parameters), jacobian(slopes, parameters)
    curvature = (1 - outputs.detach().tanh().square()).reshape(-1) / outputs.numel()
    expected = J.T @ (curvature[:, None] * J) + 6 / len(x) * K.T @ K
    torch.testing.assert_close(dense_of(coverage_of(closure, parameters), parameters), expected, **TOLERANCE)


@pytest.mark.parametrize("loss", ["logsumexp", "log_of_softmax", "softmax_by_hand"])
def test_the_outputs_of_a_frozen_head_are_outputs(loss):
    """The last tensor that all ways pass is a hidden layer, in which the loss is not convex."""
    losses = SEPARABLE[loss][1]
    case = zoo.network("mlp_cross_entropy")._replace(loss=lambda z, t: losses(z, t).mean())
    case.model[2].requires_grad_(False)
    parameters = list(case.model[0].parameters())
    J, z = jacobian(case.outputs(), parameters), case.outputs().detach()
    H = torch.autograd.functional.hessian(lambda z: case.loss(z, case.targets), z).reshape(len(J), len(J))
    dense = dense_of(coverage_of(case.value, parameters), parameters)
    torch.testing.assert_close(dense, J.T @ H @ J, **TOLERANCE)


@pytest.mark.parametrize("kind", ["contrastive", "bounded"])
def test_outputs_in_which_the_loss_is_linear_too_are_the_outputs(kind):
    """Below them it is not convex: similarities of embeddings, a model that ends in an activation."""
    case = zoo.network("mlp_mse")
    parameters = list(case.model.parameters())
    if kind == "contrastive":

        def outputs():
            first, second = case.model(torch.cat([case.inputs, case.inputs + 0.1])).chunk(2)
            return first @ second.T

        loss = lambda z: (z.logsumexp(1) - z.diagonal()).mean()  # noqa: E731
    else:
        outputs = lambda: 2 * (3 * case.outputs()).tanh()  # noqa: E731
        loss = lambda z: (F.softplus(z) - z * case.targets).mean()  # noqa: E731
    J, z = jacobian(outputs(), parameters), outputs().detach()
    H = torch.autograd.functional.hessian(loss, z).reshape(len(J), len(J))
    dense = dense_of(coverage_of(lambda: loss(outputs()), parameters), parameters)
    torch.testing.assert_close(dense, J.T @ H @ J, **TOLERANCE)


def test_several_backward_calls_and_a_loss_that_is_maximised():
    case = zoo.network("mlp_cross_entropy")
    parameters = list(case.model.parameters())
    losses = lambda z, t: z.logsumexp(1) - z[range(len(t)), t]  # noqa: E731

    def closure():
        case.model.zero_grad()
        for x, t in zip(case.inputs.split(4), case.targets.split(4), strict=True):
            losses(case.model(x), t).sum().backward()
        return losses(case.outputs(), case.targets).sum().detach()

    summed = case._replace(loss=lambda z, t: losses(z, t).sum())
    dense = dense_of(coverage_of(closure, parameters), parameters)
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(summed), **TOLERANCE)
    maximised = ClosureEvaluator(lambda: -summed.value(), parameters, sign=-1).record().coverage.proved()
    torch.testing.assert_close(dense_of(maximised, parameters), dense, **TOLERANCE)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_steps_on_a_loss_that_is_proved_are_those_on_the_known_one(make):
    ends = []
    for loss in (F.cross_entropy, lambda z, t: -z.softmax(1)[range(len(t)), t].log().mean()):
        case = zoo.network("mlp_cross_entropy")._replace(loss=loss)
        optimizer = OPTIMIZERS[make](case.model.parameters(), strict=True)
        for _ in range(5):
            optimizer.step(case.value)
        ends.append((flatten(list(case.model.parameters())).detach(), optimizer.report.curvature))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-8)
    assert [curvature for _, curvature in ends] == [
        "gauss-newton (cross_entropy)",
        "gauss-newton (convex in the outputs)",
    ]


def large(rows, columns, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Linear(6, columns).to(dtype)
    return model, torch.randn(rows, 6, dtype=dtype), torch.randint(columns, (rows,))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_outputs_of_any_size(dtype):
    """Blocks are formed where they are small; a sum of squares under a root and a vocabulary need none."""
    generator = torch.Generator().manual_seed(0)
    convex = {
        "rows": (
            200,
            40,
            lambda z, t: -(z.exp() / z.exp().sum(1, keepdim=True))[range(len(t)), t].log().mean(),
        ),
        "entries": (3000, 50, lambda z, t: z.cosh().log().mean()),
        "root": (3000, 50, lambda z, t: (z - 1).square().mean().sqrt()),
        "norm": (3000, 50, lambda z, t: torch.linalg.vector_norm(z - 1)),
        "vocabulary": (20, 5000, lambda z, t: (z.logsumexp(1) - z[range(len(t)), t]).mean()),
        "softmax": (20, 5000, lambda z, t: -z.softmax(1)[range(len(t)), t].log().mean()),
        "mixed_entries": (
            300,
            3,
            lambda z, t: (
                (torch.randn(900, 900, generator=generator).to(z) / 30 @ z.flatten()).cosh().log().mean()
            ),
        ),
        "images": (6, 30, lambda z, t: z.view(2, 3, 5, 6, 1).exp().sum((1, 4)).log().mul(2).exp().mean()),
    }
    not_convex = {
        "root": (3000, 50, lambda z, t: ((z - 1).square().mean() - 0.3).sqrt()),
        "logarithm": (3000, 50, lambda z, t: (z - 1).square().mean().log()),
        "one_entry": (3000, 50, lambda z, t: z.cosh().log().mean() - 1e-3 * z[7, 7].cosh()),
        "a_mean": (300, 50, lambda z, t: z.square().mean() - 1.5 * z.mean() ** 2),
        "too_large": (
            20,
            5000,
            lambda z, t: -(z.exp() / z.exp().sum(1, keepdim=True))[range(20), t].log().mean(),
        ),
    }
    for is_convex, cases in ((True, convex), (False, not_convex)):
        for name, (rows, columns, loss) in cases.items():
            model, x, t = large(rows, columns, dtype)
            coverage = coverage_of(lambda: loss(model(x), t), model.parameters())  # noqa: B023
            assert bool(coverage.blocks) == is_convex, (name, coverage.description)


def test_half_precision_proves_only_what_has_a_formula():
    model, x, _ = large(20, 3, torch.bfloat16)
    assert coverage_of(lambda: model(x).logsumexp(1).mean(), model.parameters()).blocks
    assert not coverage_of(lambda: model(x).cosh().log().mean(), model.parameters()).blocks


def test_the_square_of_what_is_no_norm_is_that_of_a_number():
    case = zoo.network("mlp_mse")
    parameters = list(case.model.parameters())
    numbers = lambda: torch.linalg.vector_norm(case.outputs(), 0.5, dim=1)  # noqa: E731
    J = jacobian(numbers(), parameters)
    dense = dense_of(coverage_of(lambda: numbers().square().sum(), parameters), parameters)
    torch.testing.assert_close(dense, 2 * J.T @ J, **TOLERANCE)


@pytest.mark.parametrize("seed", range(20))
def test_semidefinite_blocks_are_told_from_others(seed):
    generator = torch.Generator().manual_seed(seed)
    k, number = 1 + seed % 4, 5
    factors = torch.randn(number, k, max(1, k - seed % 2), generator=generator, dtype=DOUBLE)
    matrices = factors @ factors.mT
    for shift in (0.0, -1e-6):
        shifted = matrices.clone()
        shifted[3] += shift * torch.eye(k)
        expected = float(torch.linalg.eigvalsh(shifted).min()) >= -1e-14
        dims = (1,) if k > 1 else ()
        assert is_semidefinite(Blocks(shifted, dims)) == expected
        slope = torch.randn(number, k, generator=generator, dtype=DOUBLE)
        definite = Blocks(matrices + torch.eye(k), dims)
        dense = torch.block_diag(*definite.matrices)
        vector = slope.reshape(-1)
        bend = -1 / float(vector @ torch.linalg.solve(dense, vector))
        for factor in (0.99, 1.01):
            rank_one = dense + factor * bend * torch.outer(vector, vector)
            assert (float(torch.linalg.eigvalsh(rank_one).min()) > 0) == (factor < 1)
            given = slope if k > 1 else slope[:, 0]
            assert is_semidefinite(definite, factor * bend, given) == (factor < 1)
    skew = matrices.clone()
    skew[0] += torch.triu(torch.ones(k, k, dtype=DOUBLE), 1)
    assert is_semidefinite(Blocks(skew, (1,))) == (k == 1)


ELEMENTWISE = [
    torch.exp,
    torch.tanh,
    torch.square,
    torch.sigmoid,
    F.softplus,
    torch.cosh,
    torch.abs,
    torch.sin,
    torch.neg,
    F.relu,
    lambda a: (a.square() + 1).sqrt(),
    lambda a: (a.square() + 1.1).log(),
    lambda a: a**3,
    lambda a: a.log_softmax(-1),
    lambda a: a.softmax(-1),
]
REDUCING = [
    torch.mean,
    torch.sum,
    torch.norm,
    torch.var,
    lambda a: (a.square().mean() + 0.1).sqrt(),
    lambda a: a.logsumexp(-1).mean(),
    lambda a: a.max(-1)[0].sum(),
    lambda a: a.flatten() @ a.flatten(),
    lambda a: torch.einsum("ij,ij->", a, a),
    lambda a: a[:, 0].mean(),
    lambda a: (a[:, 0] * a[:, 1]).mean(),
    lambda a: F.cross_entropy(a, torch.tensor([0, 1, 1, 0])),
    lambda a: a.norm(dim=1).square().sum(),
]
OF_NUMBERS = [torch.exp, torch.square, torch.neg, torch.tanh, lambda s: (s.square() + 1).sqrt()]


def random_objective(seed):
    """Of outputs that are linear in the parameters, where nothing is left out of a matrix that is right."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator, dtype=DOUBLE)
    shapes = ((3, 2), (2,), (3, 2))
    parameters = [torch.randn(s, generator=generator, dtype=DOUBLE).requires_grad_() for s in shapes]
    terms = []
    for _ in range(draw.randint(1, 3)):
        functions = [draw.choice(ELEMENTWISE) for _ in range(draw.randint(0, 2))] + [draw.choice(REDUCING)]
        functions += [draw.choice(OF_NUMBERS)] * (draw.random() < 0.3)
        terms.append((draw.random() < 0.75, functions, draw.choice([1, 0.5, 0.3, -0.2])))
    penalty = draw.choice([None, *PENALTIES])

    def objective(*p):
        total = 0 * parameters_to_vector(p).sum()
        for is_first, functions, weight in terms:
            value = x @ p[0] + p[1] if is_first else x @ p[2]
            for function in functions:
                value = function(value)
            total = total + weight * value
        known = penalty in ("lasso", "norm", "concave", "product")
        return total + 0.1 * PENALTIES[penalty](p) if known else total

    return objective, parameters


def test_a_matrix_of_random_objectives_is_their_whole_hessian():
    proved = 0
    for seed in range(400):
        objective, parameters = random_objective(seed)
        if not objective(*parameters).isfinite():
            continue
        coverage = coverage_of(lambda: objective(*parameters), parameters)  # noqa: B023
        # Known losses of outputs that are not linear are Gauss-Newton's.
        if coverage.blocks and coverage.description == "convex in the outputs":
            proved += 1
            dense, exact = dense_of(coverage, parameters), oracles.dense_hessian(objective, parameters)
            scale = float(exact.abs().max())
            torch.testing.assert_close(dense, exact, rtol=0, atol=1e-9 * scale + 1e-12, msg=str(seed))
            if not coverage.has_own_terms:
                assert float(torch.linalg.eigvalsh(dense).min()) >= -1e-9 * scale - 1e-12, seed
    assert proved > 40
