"""The closure in record and value mode; the Gauss-Newton matrix it finds against dense float64."""

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo

from optim.closure.evaluate import ClosureEvaluator
from optim.closure.setting import trial
from secondorder import GaussNewton, Hessian
from secondorder.vectors.flat import flatten

TOLERANCE = dict(rtol=1e-12, atol=1e-12)


def evaluator(case, closure):
    return ClosureEvaluator(closure, list(case.model.parameters()))


def closures(case, weight=1.0):
    """The three kinds of closure that ``step`` takes."""

    def zero_grad():
        for parameter in case.model.parameters():
            parameter.grad = None

    def lbfgs_style():
        zero_grad()
        loss = weight * case.value()
        loss.backward()
        return loss

    def explicit():
        outputs = case.outputs()
        return weight * case.loss(outputs, case.targets), outputs

    return {"backward": lbfgs_style, "loss": lambda: weight * case.value(), "loss_outputs": explicit}


KINDS = ["backward", "loss", "loss_outputs"]


@pytest.mark.parametrize("kind", KINDS)
def test_record_finds_gradient_and_gauss_newton(network_case, kind):
    parameters = list(network_case.model.parameters())
    evaluation = evaluator(network_case, closures(network_case, 3.0)[kind]).record()
    used = torch.autograd.grad(3 * network_case.value(), parameters, allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, used, strict=True)]
    torch.testing.assert_close(evaluation.gradient, flatten(expected), **TOLERANCE)
    for parameter, gradient in zip(parameters, used, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **TOLERANCE)
    assert not evaluation.loss.requires_grad
    assert evaluation.value == pytest.approx(3 * network_case.value().item(), rel=1e-13)
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, parameters).dense()
    torch.testing.assert_close(dense, 3 * oracles.dense_gauss_newton(network_case), **TOLERANCE)


LOSSES = {
    "cross_entropy": (F.cross_entropy, "classes"),
    "cross_entropy_weighted_smoothed": (
        lambda z, t: F.cross_entropy(
            z, t, weight=torch.tensor([1.0, 2.0, 0.5], dtype=z.dtype), label_smoothing=0.1, ignore_index=1
        ),
        "classes",
    ),
    "log_softmax_nll": (lambda z, t: F.nll_loss(F.log_softmax(z, dim=1), t), "classes"),
    "method_log_softmax_nll": (lambda z, t: F.nll_loss(z.log_softmax(1), t), "classes"),
    "module_nll": (lambda z, t: torch.nn.NLLLoss()(torch.nn.LogSoftmax(dim=1)(z), t), "classes"),
    "unreduced": (lambda z, t: F.cross_entropy(z, t, reduction="none").mean(), "classes"),
    "sum": (lambda z, t: F.cross_entropy(z, t, reduction="sum") / 9, "classes"),
    "mse": (F.mse_loss, "values"),
    "huber": (lambda z, t: F.huber_loss(z, t, delta=0.5), "values"),
    "poisson": (lambda z, t: F.poisson_nll_loss(z, t.abs()), "values"),
    "two_losses": (lambda z, t: F.mse_loss(z, t) + 2 * F.huber_loss(z, t), "values"),
    "bce_logits": (F.binary_cross_entropy_with_logits, "binary"),
    "sigmoid_bce": (lambda z, t: F.binary_cross_entropy(torch.sigmoid(z), t), "binary"),
    "keyword": (lambda z, t: F.mse_loss(input=z, target=t), "values"),
    "kl_div": (
        lambda z, t: F.kl_div(F.log_softmax(z, dim=1), t.softmax(1), reduction="batchmean"),
        "values3",
    ),
}


def case_with(loss, kind):
    base = zoo.network({"classes": "mlp_cross_entropy", "binary": "mlp_bce"}.get(kind, "mlp_mse"))
    if kind == "values3":
        base = zoo.network("mlp_cross_entropy")
        base = base._replace(targets=zoo.vector(27, 5).view(9, 3))
    return base._replace(loss=loss)


@pytest.mark.parametrize("name", LOSSES)
def test_known_losses(name):
    case = case_with(*LOSSES[name])
    evaluation = evaluator(case, closures(case)["backward"]).record()
    assert evaluation.coverage.blocks, evaluation.coverage.description
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


def penalty(case):
    return sum(p.square().sum() for p in case.model.parameters())


NOT_COVERED = {
    "penalty_of_another_kind": (
        lambda c: c.value() + sum(p.abs().sum() for p in c.model.parameters()),
        "also enter the objective",
    ),
    "unknown_loss": (lambda c: c.outputs().cosh().sum(), "no known loss"),
    "root_of_squares": (lambda c: c.outputs().square().sum().sqrt(), "does not depend on a known loss"),
    "negative_squares": (lambda c: -c.outputs().square().sum(), "does not depend on a known loss"),
    "squares_inside": (lambda c: c.outputs().square().tanh().sum(), "does not depend on a known loss"),
    "hand_written_with_a_linear_part": (
        lambda c: (c.outputs().logsumexp(1) - c.outputs()[:, 0]).mean(),
        "no known loss",
    ),
    "not_linear": (lambda c: c.value().exp(), "not linear"),
    "negative": (lambda c: -c.value(), "negative weight"),
    "unused": (lambda c: c.outputs().cosh().sum() + 0 * c.value().item(), "does not depend"),
    "bare_nll": (lambda c: F.nll_loss(c.outputs().softmax(1).log(), c.targets), "no known loss"),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_is_not_called_gauss_newton(name):
    objective, reason = NOT_COVERED[name]
    case = zoo.network("mlp_cross_entropy")
    coverage = evaluator(case, lambda: objective(case)).record().coverage
    assert coverage.blocks == ()
    assert reason in coverage.description


HAND_WRITTEN = {
    "squares": (lambda z, t: ((z - t) ** 2).mean(), "values"),
    "square": (lambda z, t: (z - t).square().sum(), "values"),
    "product": (lambda z, t: (lambda r: r * r)(z - t).sum(1).mean(), "values"),
    "dot": (lambda z, t: (lambda r: torch.dot(r, r))((z - t).reshape(-1)), "values"),
    "pow": (lambda z, t: torch.pow(z - t, 2).mean() / 2, "values"),
    "at": (lambda z, t: (lambda r: r @ r)((z - t).reshape(-1)), "values"),
    "einsum": (lambda z, t: (lambda r: torch.einsum("ij, ij -> i", r, r).mean())(z - t), "values"),
    "norm": (lambda z, t: torch.linalg.vector_norm(z - t) ** 2, "values"),
    "norms": (lambda z, t: (z - t).norm(dim=1).pow(2).mean(), "values"),
    "cross_entropy": (lambda z, t: -z.log_softmax(1)[torch.arange(9), t].mean(), "classes"),
    "soft_targets": (lambda z, t: -(t.softmax(1) * F.log_softmax(z, dim=1)).sum(1).mean(), "values3"),
    "bernoulli": (lambda z, t: -(t * F.logsigmoid(z) + (1 - t) * F.logsigmoid(-z)).mean(), "binary"),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_losses(name):
    loss, kind = HAND_WRITTEN[name]
    case = case_with(loss, kind)
    evaluation = evaluator(case, closures(case)["backward"]).record()
    assert evaluation.coverage.blocks, evaluation.coverage.description
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


def test_explicit_l2_is_a_residual_too():
    case = zoo.network("mlp_cross_entropy")
    evaluation = evaluator(case, lambda: case.value() + 0.05 * penalty(case)).record()
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, list(case.model.parameters())).dense()
    expected = oracles.dense_gauss_newton(case) + 0.1 * torch.eye(len(dense), dtype=dense.dtype)
    torch.testing.assert_close(dense, expected, **TOLERANCE)


def test_squares_inside_a_network_are_not_losses():
    """A norm layer written by hand, and an activation that is a square."""
    case = zoo.network("mlp_mse")
    base = case.model

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = base

        def forward(self, x):
            z = self.base(x).square()
            return z / (z.pow(2).mean(1, keepdim=True) + 1).sqrt()

    case = case._replace(model=Normed())
    blocks = evaluator(case, case.value).record().coverage.blocks
    assert len(blocks) == 1
    dense = GaussNewton.of_blocks(blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


def test_a_physics_informed_closure_is_least_squares():
    """Residuals of a differential equation, whose closure differentiates with respect to inputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    parameters = list(model.parameters())
    x = torch.linspace(0, 1, 7, dtype=torch.float64).unsqueeze(1)

    def residuals(*values):
        names = [name for name, _ in model.named_parameters()]
        point = x.clone().requires_grad_()
        u = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (point,))
        (slope,) = torch.autograd.grad(u.sum(), point, create_graph=True)
        return torch.cat([(slope + u - 1).reshape(-1), u[0]])

    def closure():
        return (residuals(*parameters) ** 2).mean()

    blocks = ClosureEvaluator(closure, parameters).record().coverage.blocks
    dense = GaussNewton.of_blocks(blocks, parameters).dense()
    J = oracles.dense_jacobian(residuals, parameters)
    torch.testing.assert_close(dense, 2 / len(J) * J.T @ J, **TOLERANCE)


def test_several_backward_calls_add_up():
    case = zoo.network("mlp_cross_entropy")

    def closure():
        case.model.zero_grad()
        total = 0.0
        for x, t in zip(case.inputs.split(3), case.targets.split(3), strict=True):
            loss = F.cross_entropy(case.model(x), t) / 3
            loss.backward()
            total += loss.item()
        return total

    evaluation = evaluator(case, closure).record()
    assert evaluation.value == pytest.approx(case.value().item(), rel=1e-13)
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


def test_backward_with_a_gradient_and_through_the_function():
    case = zoo.network("mlp_cross_entropy")
    weights = torch.linspace(0.5, 2, 9, dtype=torch.float64)

    def closure():
        case.model.zero_grad()
        losses = F.cross_entropy(case.outputs(), case.targets, reduction="none")
        torch.autograd.backward([losses], [weights])
        return losses.detach() @ weights

    weighted = case._replace(loss=lambda z, t: F.cross_entropy(z, t, reduction="none") @ weights)
    dense = GaussNewton.of_blocks(
        evaluator(case, closure).record().coverage.blocks, list(case.model.parameters())
    ).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(weighted), **TOLERANCE)


def test_clipping_inside_the_closure_is_the_gradient_of_the_model():
    case = zoo.network("mlp_mse")

    def closure():
        case.model.zero_grad()
        loss = case.value()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1e-3)
        return loss

    assert float(evaluator(case, closure).record().gradient.norm()) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_value_mode_evaluates_without_a_trace(network_case, kind):
    parameters = list(network_case.model.parameters())
    run = evaluator(network_case, closures(network_case)[kind])
    run.record()
    grads = [p.grad for p in parameters]
    copies = [None if g is None else g.clone() for g in grads]
    step = 0.1 * zoo.vector(sum(p.numel() for p in parameters), 7)
    before = [p.detach().clone() for p in parameters]
    versions = [p._version for p in parameters]
    with trial(parameters, step):
        value = run.value()
        expected = network_case.value().item()
    assert value == pytest.approx(expected, rel=1e-13)
    assert value != network_case.value().item()
    assert all(p.grad is g for p, g in zip(parameters, grads, strict=True))
    assert all(g is c is None or torch.equal(g, c) for g, c in zip(grads, copies, strict=True))
    assert all(map(torch.equal, parameters, before))
    assert [p._version for p in parameters] == versions


def test_no_graph_is_built_in_value_mode():
    case, seen = zoo.network("mlp_mse"), []

    def closure():
        with torch.enable_grad():
            loss = case.value()
        seen.append(loss.requires_grad)
        loss.backward()
        return loss

    run = evaluator(case, closure)
    run.record()
    run.value()
    assert seen == [True, False]


def test_closure_that_differentiates_with_respect_to_its_inputs():
    """A physics-informed loss: gradients stay on in value mode."""
    model = zoo.network("mlp_mse").model
    points = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None].repeat(1, 4).requires_grad_()

    def closure():
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return F.mse_loss(slope, torch.ones_like(slope))

    run = ClosureEvaluator(closure, list(model.parameters()))
    assert run.record().value == pytest.approx(run.value(), rel=1e-13)


def test_dropout_is_one_function_within_a_step():
    case = zoo.network("mlp_mse")
    case = case._replace(model=torch.nn.Sequential(case.model, torch.nn.Dropout(0.5)))
    run = evaluator(case, closures(case)["backward"])
    torch.manual_seed(3)
    value = run.record().value
    after = torch.get_rng_state()
    assert run.value() == value
    assert run.value() == value
    torch.testing.assert_close(run.gradient(), flatten([p.grad for p in case.model.parameters()]))
    assert torch.equal(torch.get_rng_state(), after)
    assert evaluator(case, closures(case)["backward"]).record().value != value


BAD_CLOSURES = {
    "none": (lambda c: None, TypeError, "closure must return the loss.*got NoneType"),
    "detached": (lambda c: c.value().detach(), RuntimeError, "carries a graph, got a detached one"),
    "vector": (lambda c: c.outputs(), RuntimeError, r"must be a scalar, got shape \(9, 3\)"),
    "nan": (lambda c: c.value() * float("nan"), RuntimeError, "must be finite, got nan"),
    "infinite": (lambda c: c.value() / 0, RuntimeError, "must be finite, got inf"),
    "nan_gradient": (
        lambda c: c.value() + c.outputs().sum() * 0 * torch.sqrt(0 * c.value()),
        RuntimeError,
        "finite",
    ),
    "no_parameter": (
        lambda c: torch.ones((), requires_grad=True) * 2,
        RuntimeError,
        "at least one parameter",
    ),
    "triple": (lambda c: (c.value(), 1, 2), TypeError, "got a tuple of 3"),
    "bad_outputs": (lambda c: (c.value(), "outputs"), TypeError, "tuple of tensors, got str"),
    "detached_outputs": (lambda c: (c.value(), c.outputs().detach()), RuntimeError, "got a detached tensor"),
    "raises": (lambda c: 1 / 0, ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("name", BAD_CLOSURES)
def test_bad_closures_leave_everything_as_it_was(name):
    closure, error, text = BAD_CLOSURES[name]
    case = zoo.network("mlp_cross_entropy")
    parameters = list(case.model.parameters())
    case.value().backward()
    grads, copies = [p.grad for p in parameters], [p.grad.clone() for p in parameters]
    before = [p.detach().clone() for p in parameters]

    def dirty():
        case.model.zero_grad(set_to_none=False)
        torch.rand(3)
        return closure(case)

    run, state = evaluator(case, dirty), torch.get_rng_state()
    with pytest.raises(error, match=text), run.restored_on_error():
        run.record()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(parameters, grads, copies, strict=True))
    assert all(map(torch.equal, parameters, before))


class Counting(torch.nn.Module):
    """Writes to buffers in the ways that layers do: in place, by index, through out=."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("table", torch.zeros(2, 4, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.table[0] = self.mean
        torch.add(self.mean, 1.0, out=self.table[1])
        return (x + 0.0).relu_()


def test_buffers_move_once_in_record_and_not_in_value_mode():
    case = zoo.network("mlp_mse")
    norm = torch.nn.BatchNorm1d(4).double()
    case = case._replace(model=torch.nn.Sequential(Counting(), norm, *case.model))
    run = evaluator(case, closures(case)["backward"])
    run.record()
    assert norm.num_batches_tracked == 1
    assert case.model[0].calls == 1
    buffers = [b.clone() for b in case.model.buffers()]
    assert all(bool((b != 0).any()) for b in buffers)
    first = run.value()
    run.gradient()
    assert run.value() == first
    assert all(map(torch.equal, case.model.buffers(), buffers))


def test_buffers_are_restored_when_a_trial_raises():
    case, calls = zoo.network("mlp_mse"), []
    case = case._replace(model=torch.nn.Sequential(Counting(), *case.model))

    def closure():
        calls.append(1)
        value = case.value()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return value

    run = evaluator(case, closure)
    run.record()
    buffers = [b.clone() for b in case.model.buffers()]
    with pytest.raises(KeyboardInterrupt):
        run.value()
    assert all(map(torch.equal, case.model.buffers(), buffers))


def l2(case):
    return sum(p.square().sum() for p in case.model.parameters())


def hidden_paths(case):
    """Objectives in which a known loss is only a part: each once passed as the whole."""
    z, t = case.outputs(), case.targets
    w = case.model[0].weight
    return {
        "penalty_on_outputs": F.cross_entropy(z, t) + 0.5 * z.cosh().mean(),
        "logsumexp": F.cross_entropy(z, t) + z.logsumexp(1).mean(),
        "loss_between_outputs": F.cross_entropy(z, t) + F.mse_loss(z[:3], z[3:6]),
        "loss_of_a_parameter": F.cross_entropy(z, t) + F.mse_loss(w, 0 * w.detach()) + 5 * (w**4).sum(),
        "soft_target_of_itself": F.cross_entropy(z, z.softmax(1)),
        "negative_class_weight": F.cross_entropy(z, t, weight=torch.tensor([1.0, -3, 1], dtype=z.dtype)),
    }


HIDDEN = [
    "penalty_on_outputs",
    "logsumexp",
    "loss_between_outputs",
    "loss_of_a_parameter",
    "soft_target_of_itself",
    "negative_class_weight",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_part_is_not_taken_for_the_whole(name):
    case = zoo.network("mlp_cross_entropy")
    assert evaluator(case, lambda: hidden_paths(case)[name]).record().coverage.blocks == ()


def test_squares_beside_a_loss_are_part_of_the_matrix():
    """A penalty on the logits, and the z-loss of language models."""
    case = zoo.network("mlp_cross_entropy")
    parameters = list(case.model.parameters())

    def matrix(penalty):
        closure = lambda: case.value() + penalty(case.outputs())  # noqa: E731
        return GaussNewton.of_blocks(evaluator(case, closure).record().coverage.blocks, parameters).dense()

    plain = oracles.dense_gauss_newton(case)
    J = oracles.dense_jacobian(case.outputs_of, parameters)
    torch.testing.assert_close(matrix(lambda z: z.square().mean()), plain + 2 / len(J) * J.T @ J, **TOLERANCE)
    J = oracles.dense_jacobian(lambda *values: case.outputs_of(*values).logsumexp(1), parameters)
    got = matrix(lambda z: z.logsumexp(1).square().mean())
    torch.testing.assert_close(got, plain + 2 / len(J) * J.T @ J, **TOLERANCE)


def test_two_losses_of_the_same_outputs():
    case = zoo.network("mlp_cross_entropy")
    loss = case._replace(loss=lambda z, t: F.cross_entropy(z, t) + F.mse_loss(z, torch.ones_like(z)))
    blocks = evaluator(loss, loss.value).record().coverage.blocks
    dense = GaussNewton.of_blocks(blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(loss), **TOLERANCE)


def test_a_loss_added_to_in_place():
    case = zoo.network("mlp_mse")

    def total(z, t):
        loss = F.mse_loss(z, t)
        loss += 2 * F.huber_loss(z, t)
        return loss

    case = case._replace(loss=total)
    blocks = evaluator(case, case.value).record().coverage.blocks
    dense = GaussNewton.of_blocks(blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_backward_that_was_thrown_away_does_not_count(set_to_none):
    case = zoo.network("mlp_mse")

    def closure():
        case.model.zero_grad(set_to_none)
        (100 * case.value()).backward()
        case.model.zero_grad(set_to_none)
        loss = case.value()
        loss.backward()
        return loss

    evaluation = evaluator(case, closure).record()
    dense = GaussNewton.of_blocks(evaluation.coverage.blocks, list(case.model.parameters())).dense()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


def test_explicit_outputs_that_do_not_carry_the_whole_loss():
    case = zoo.network("mlp_mse")
    outputs = case.outputs()
    coverage = (
        evaluator(case, lambda: (case.loss(outputs, case.targets) + l2(case), outputs)).record().coverage
    )
    assert not coverage.is_whole
    assert "past the outputs" in coverage.description
    hidden = case.model[:2](case.inputs)
    outputs = case.model[2](hidden)
    with pytest.raises(RuntimeError, match=r"must not depend on one another, but outputs\[1\] does"):
        evaluator(case, lambda: (case.loss(outputs, case.targets), (hidden, outputs))).record()


def test_reentrant_checkpoint_is_refused():
    case = zoo.network("mlp_mse")
    inputs = case.inputs.clone().requires_grad_()

    def closure(reentrant):
        z = torch.utils.checkpoint.checkpoint(case.model, inputs, use_reentrant=reentrant)
        return case.loss(z, case.targets) + case.value()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        evaluator(case, lambda: closure(True)).record()
    assert evaluator(case, lambda: closure(False)).record().coverage.blocks


def test_a_closure_may_read_its_gradients_in_a_trial():
    case = zoo.network("mlp_mse")
    parameters = list(case.model.parameters())

    def closure():
        case.model.zero_grad()
        loss = case.value()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        assert norm > 0
        return loss + 0 * sum(p.grad.norm() for p in parameters)

    run = evaluator(case, closure)
    evaluation = run.record()
    assert run.value() == evaluation.value
    assert float(flatten([p.grad for p in parameters]).norm()) == pytest.approx(0.1, rel=1e-4)


def test_no_grad_blocks_and_transforms_inside_a_closure_that_differentiates():
    model = zoo.network("mlp_mse").model
    points = torch.linspace(0, 1, 20, dtype=torch.float64).view(5, 4).requires_grad_()

    def by_autograd():
        with torch.no_grad():
            scale = points.abs().max()
        (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return F.mse_loss(slope * scale, torch.ones_like(slope))

    def by_transform():
        slope = torch.vmap(torch.func.grad(lambda x: model(x).sum()))(points)
        return F.mse_loss(slope, torch.ones_like(slope))

    for closure in (by_autograd, by_transform):
        run = ClosureEvaluator(closure, list(model.parameters()))
        assert run.record().value == pytest.approx(run.value(), rel=1e-13)


def test_attention_is_recorded_with_the_math_kernel():
    """The default kernels have no second derivative on CPU."""
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)

    def closure():
        return F.mse_loss(F.scaled_dot_product_attention(q, q, q), torch.ones_like(q))

    evaluation = ClosureEvaluator(closure, [q]).record()
    dense = Hessian(evaluation.objective, [q]).dense()
    assert dense.abs().max() > 0
    torch.testing.assert_close(dense, dense.T, **TOLERANCE)


def test_weight_norm_is_decomposed_while_recording():
    """Torch's own second derivative of it is more than half off."""
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 2).double())
    case = zoo.network("mlp_mse")._replace(model=model)
    parameters = list(model.parameters())
    evaluation = evaluator(case, closures(case)["backward"]).record()
    product = Hessian(evaluation.objective, parameters) @ (v := zoo.vector(parameters_size(parameters), 3))
    slopes = []
    for step in (1e-5, -1e-5):
        with trial(parameters, step * v):
            slopes.append(flatten(torch.autograd.grad(case.value(), parameters)))
    torch.testing.assert_close(product, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-6, atol=1e-7)
    with pytest.raises(
        RuntimeError, match="second derivative of weight_norm is wrong in torch; compute the loss"
    ):
        Hessian(case.value(), parameters)


def parameters_size(parameters):
    return sum(p.numel() for p in parameters)


def test_gradients_of_other_parameters_are_those_of_the_closure():
    """Their optimizer is stepped next."""
    case = zoo.network("mlp_mse")
    own, others = list(case.model[2].parameters()), list(case.model[0].parameters())

    def closure():
        case.model.zero_grad()
        loss = case.value()
        loss.backward()
        return loss

    run = ClosureEvaluator(closure, own)
    run.record()
    expected = torch.autograd.grad(case.value(), others)
    for _ in range(2):
        run.value()
        run.gradient()
    for parameter, gradient in zip(others, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **TOLERANCE)


def test_hooks_on_parameters_act_on_the_gradient_not_on_products():
    case, calls = zoo.network("mlp_mse"), []
    parameters = list(case.model.parameters())
    for parameter in parameters:
        parameter.register_hook(lambda g: calls.append(1) or g.clamp(-1e-3, 1e-3))
    run = evaluator(case, closures(case)["backward"])
    evaluation = run.record()
    assert float(evaluation.gradient.abs().max()) == 1e-3
    assert len(calls) == len(parameters)
    with run.differentiating():
        dense = GaussNewton.of_blocks(evaluation.coverage.blocks, parameters).dense()
    assert len(calls) == len(parameters)
    for parameter in parameters:
        assert len(parameter._backward_hooks) == 1
    case.value().backward()
    assert len(calls) == 2 * len(parameters)
    for parameter in parameters:
        parameter._backward_hooks.clear()
    torch.testing.assert_close(dense, oracles.dense_gauss_newton(case), **TOLERANCE)


def test_a_generator_of_its_own_is_replayed():
    case, generator = zoo.network("mlp_mse"), torch.Generator().manual_seed(5)

    def closure():
        noise = torch.randn(case.inputs.shape, generator=generator, dtype=torch.float64)
        return F.mse_loss(case.model(case.inputs + noise), case.targets)

    once = torch.Generator().manual_seed(5)
    torch.randn(case.inputs.shape, generator=once, dtype=torch.float64)
    run = evaluator(case, closure)
    value = run.record().value
    assert run.value() == value
    run.gradient()
    assert torch.equal(generator.get_state(), once.get_state())
    failing = evaluator(case, lambda: closure() / 0)
    with pytest.raises(RuntimeError, match="must be finite"), failing.restored_on_error():
        failing.record()
    assert torch.equal(generator.get_state(), once.get_state())
