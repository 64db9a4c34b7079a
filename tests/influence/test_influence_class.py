"""Influence against dense float64 formulas, refits and finite differences."""

import copy

import oracles
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

import optim
from secondorder import Influence, MatrixOperator, Objective

NAMES = ("logistic", "softmax", "poisson", "ridge")
# Refits stop at a gradient of 1e-13 or 1e-9 of a sample's, and curvatures are above 1e-3.
REFIT = 1e-8


def scalar_model(n):
    return torch.nn.Sequential(torch.nn.Linear(n, 1), torch.nn.Flatten(0)).double()


def convex(name):
    """Model, loss, training samples, test samples, L2 weight."""
    generator = torch.Generator().manual_seed(0)
    if name == "logistic":
        x, y = load_breast_cancer(return_X_y=True)
        x, y = torch.tensor(StandardScaler().fit_transform(x)), torch.tensor(y).double()
        loss = F.binary_cross_entropy_with_logits
        return scalar_model(30), loss, (x[:400], y[:400]), (x[400:420], y[400:420]), 1e-3
    if name == "softmax":
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x / 16), torch.tensor(y)
        model = torch.nn.Linear(64, 10).double()
        return model, F.cross_entropy, (x[:300], y[:300]), (x[400:420], y[400:420]), 1e-3
    x = torch.randn(200, 12, generator=generator).double()
    signal = x @ (0.4 * torch.randn(12, generator=generator).double())
    if name == "poisson":
        y = torch.poisson(signal.exp(), generator=generator)
        return scalar_model(12), F.poisson_nll_loss, (x[:180], y[:180]), (x[180:], y[180:]), 1e-3
    y = signal + 0.3 * torch.randn(200, generator=generator).double()
    return scalar_model(12), F.mse_loss, (x[:180], y[:180]), (x[180:], y[180:]), 1e-2


def fit(model, loss, data, l2, weights=None):
    """To a gradient of 1e-12, by another route than the refits of the library."""
    parameters = list(model.parameters())
    optimizer = optim.Newton(parameters)

    def closure():
        value = loss(model(data[0]), data[1])
        if weights is not None:
            value = (weights * per_sample(model, loss, data)).mean()
        return value + l2 / 2 * sum(p.square().sum() for p in parameters)

    for _ in range(60):
        optimizer.step(closure)
        if optimizer.report.gradient_norm < 1e-12:
            break
    assert optimizer.report.gradient_norm < 1e-11
    return model


def per_sample(model, loss, data):
    return loss(model(data[0]), data[1], reduction="none")


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    torch.manual_seed(0)
    model, loss, train, test, l2 = convex(request.param)
    fit(model, loss, train, l2)
    influence = Influence(Objective(model, loss, train, l2=l2))
    points = list(range(0, len(train[1]), len(train[1]) // 100))[:100]
    real = influence.scores(test, points, order="refit")
    return request.param, influence, points, real, (model, loss, train, test, l2)


def dense(model, loss, train, test, l2):
    """Order one by dense derivatives in float64, with functions of torch alone."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def losses(values, data):
        outputs = torch.func.functional_call(model, values, (data[0],))
        return loss(outputs, data[1], reduction="none").reshape(len(data[1]), -1).mean(1)

    def rows(data):
        found = torch.func.jacrev(losses)(parameters, data)
        return torch.cat([g.flatten(1) for g in found.values()], dim=1)

    sizes = [p.numel() for p in parameters.values()]

    def mean(flat):
        parts = zip(parameters.items(), flat.split(sizes), strict=True)
        return losses({name: part.view_as(p) for (name, p), part in parts}, train).mean()

    flat = torch.cat([p.reshape(-1) for p in parameters.values()])
    H = torch.autograd.functional.hessian(mean, flat) + l2 * torch.eye(len(flat)).double()
    return rows(test) @ torch.linalg.solve(H, rows(train).T) / len(train[1])


def quality(predicted, actual):
    p, a = predicted.flatten(), actual.flatten()
    return float(torch.corrcoef(torch.stack([p, a]))[0, 1]), float((p - a).abs().sum() / a.abs().sum())


def test_order_one_is_the_dense_formula(case):
    _, influence, _, _, problem = case
    found, expected = influence.scores(problem[3]), dense(*problem)
    assert found.status == "converged"
    torch.testing.assert_close(found.scores, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_a_refit_is_retraining(case):
    _, _, points, real, (model, loss, train, test, l2) = case
    assert set(real.statuses) <= {"converged", "stagnated"}
    base = per_sample(model, loss, test).detach()
    for j in range(0, 100, 10):
        weights = torch.ones(len(train[1])).double()
        weights[points[j]] = 0
        other = fit(copy.deepcopy(model), loss, train, l2, weights)
        change = per_sample(other, loss, test).detach() - base
        torch.testing.assert_close(real.scores[:, j], change, rtol=REFIT, atol=REFIT)


# Of each: least correlation and largest relative error of the Newton step, error with two chord steps.
BOUNDS = {
    "logistic": (0.98, 0.25, 0.06),
    "softmax": (0.995, 0.12, 0.03),
    "poisson": (0.995, 0.12, 0.03),
    "ridge": (0.9999, 1e-8, 1e-8),
}


def test_the_newton_step_is_right_in_size(case):
    name, influence, points, real, (*_, test, _) = case
    correlation, error, after_steps = BOUNDS[name]
    one = influence.scores(test, points, order="newton")
    found = quality(one.scores, real.scores)
    assert found[0] >= correlation
    assert found[1] <= error
    three = influence.scores(test, points, order="newton", steps=2)
    assert quality(three.scores, real.scores)[1] <= after_steps
    first = influence.scores(test, points)
    assert found[1] < quality(first.scores, real.scores)[1]


def test_groups_by_the_block_formula(case):
    _, influence, _, _, (_, _, train, test, _) = case
    n = len(train[1])
    groups = [torch.randperm(n)[: n // 20].tolist() for _ in range(25)]
    real = influence.group(groups, test, order="refit").scores
    assert quality(influence.group(groups, test, steps=2).scores, real)[0] >= 0.97
    assert quality(influence.group(groups, test).scores, real)[0] >= 0.96
    sums = influence.scores(test).scores
    expected = torch.stack([sums[:, group].sum(1) for group in groups], dim=1)
    torch.testing.assert_close(influence.group(groups, test, order=1).scores, expected)


@pytest.mark.slow
def test_leave_one_out_loss(case):
    _, influence, _, _, (_, _, train, *_) = case
    some = range(0, len(train[1]), 3)
    real, found = influence.loo_loss(some, order="refit"), influence.loo_loss(some, steps=2)
    assert abs(found.mean - real.mean) <= 0.03 * abs(real.mean)
    assert real.training.mean() < real.mean


def test_verification(case):
    _, influence, _, _, (*_, test, _) = case
    found = influence.verify(test, 10, steps=2)
    assert found.pearson > 0.99
    assert found.spearman > 0.9
    assert abs(found.slope - 1) < 0.06
    expected = spearmanr(found.predicted.flatten(), found.actual.flatten()).statistic
    assert found.spearman == pytest.approx(expected)
    assert len(repr(found)) < 200


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    x, y = torch.randn(40, 5).double(), torch.randint(3, (40,))
    model = torch.nn.Linear(5, 3).double()
    fit(model, F.cross_entropy, (x, y), 0.05)
    return model, x, y, x[:4] + 0.3, y[:4]


def of(small, data=None, **options):
    model, x, y, _, _ = small
    return Influence(Objective(model, F.cross_entropy, data or (x, y), l2=0.05, **options))


def test_scores_do_not_depend_on_batches(small):
    test = small[3], small[4]
    whole = of(small)
    for size in (1, 7, 64):
        other = of(small, batch_size=size)
        for order in (1, "newton"):
            expected = whole.scores(test, [3, 30, 7], order=order).scores
            found = other.scores(test, [3, 30, 7], order=order).scores
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)
        everything = other.scores(test)
        torch.testing.assert_close(everything.scores, whole.scores(test).scores, rtol=1e-6, atol=1e-10)
    best = whole.scores(test, top_k=3)
    for row, names, scores in zip(whole.scores(test).scores, best.train, best.scores, strict=True):
        assert set(names.tolist()) == set(row.abs().topk(3).indices.tolist())
        torch.testing.assert_close(row[names], scores)


@pytest.mark.parametrize("solver", ["dense", "dual", "block_cg", "minres"])
def test_solvers_agree(small, solver):
    model, x, y, *test = small
    objective = Objective(model, F.cross_entropy, (x, y), l2=0.05)
    expected = of(small).scores(tuple(test)).scores
    found = Influence(objective, solver=solver, rtol=1e-10).scores(tuple(test))
    assert found.status == "converged"
    torch.testing.assert_close(found.scores, expected, rtol=1e-6, atol=1e-10)


def test_loaders_in_order_and_shuffled(small):
    _, x, y, *test = small
    data = TensorDataset(x, y)
    expected = of(small).scores(tuple(test)).scores
    found = of(small, DataLoader(data, 16)).scores(tuple(test)).scores
    torch.testing.assert_close(found, expected)
    with pytest.raises(
        ValueError, match=r"fixed order, got a DataLoader with a RandomSampler; .*shuffle=False"
    ):
        of(small, DataLoader(data, 16, shuffle=True))


def test_perturbing_an_input_is_the_derivative_of_a_refit(small):
    model, x, y, *test = small
    found = of(small).perturbation(tuple(test), 7)
    assert found.shape == (4, 5)
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = x.clone()
        moved[7, 2] += sign * step
        other = fit(copy.deepcopy(model), F.cross_entropy, (moved, y), 0.05)
        values.append(per_sample(other, F.cross_entropy, tuple(test)).detach())
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(found[:, 2], slope, rtol=1e-4, atol=1e-8)


def after_newton_step(model, loss, test):
    """Test losses after a dense Newton step on ``loss``, a function of (weight, bias)."""
    parameters = tuple(p.detach() for p in model.parameters())
    H = oracles.dense_hessian(loss, list(parameters))
    grads = torch.autograd.functional.jacobian(loss, parameters)
    step = torch.linalg.solve(H, torch.cat([g.reshape(-1) for g in grads]))
    weight, bias = parameters[0] - step[:15].view(3, 5), parameters[1] - step[15:]
    return F.cross_entropy(test[0] @ weight.T + bias, test[1], reduction="none")


@pytest.mark.parametrize("edit", ["relabel", "reweight"])
def test_edits_are_newton_steps_and_refits(small, edit):
    model, x, y, *test = small
    influence, test = of(small), tuple(test)
    base = per_sample(model, F.cross_entropy, test).detach()
    labels, weights = y.clone(), torch.ones(40).double()
    if edit == "relabel":
        labels[5] = (y[5] + 1) % 3
    else:
        weights[5] = 3.0

    def loss(w, b):
        each = F.cross_entropy(x @ w.T + b, labels, reduction="none")
        return (weights * each).mean() + 0.025 * (w.square().sum() + b.square().sum())

    def found(order):
        if edit == "relabel":
            return influence.relabel(5, labels[5], test, order=order).scores[:, 0]
        return influence.reweight(5, 3.0, test, order=order).scores[:, 0]

    other = fit(copy.deepcopy(model), F.cross_entropy, (x, labels), 0.05, weights)
    change = per_sample(other, F.cross_entropy, test).detach() - base
    torch.testing.assert_close(found("refit"), change, rtol=REFIT, atol=REFIT)
    step = after_newton_step(model, loss, test) - base
    torch.testing.assert_close(found("newton"), step, rtol=REFIT, atol=REFIT)
    assert (found("newton") - change).norm() < (found(1) - change).norm()


def test_a_weight_of_zero_removes(small):
    test, influence = (small[3], small[4]), of(small)
    zero = influence.reweight(5, 0.0, test).scores
    torch.testing.assert_close(zero, influence.scores(test, [5], order="newton").scores)


def test_a_measure_of_each_test_sample_and_of_all(small):
    test = small[3], small[4]
    influence = of(small)
    each = influence.scores(test, measure=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(each.scores, influence.scores(test).scores)
    whole = influence.scores(test, measure=F.cross_entropy)
    torch.testing.assert_close(whole.scores, each.scores.mean(0, keepdim=True))


def test_self_influence_is_a_diagonal(small):
    _, x, y, *_ = small
    influence = of(small, batch_size=7)
    torch.testing.assert_close(influence.self_influence(), influence.scores((x, y)).scores.diagonal())


def test_tables_and_summaries(small):
    test = small[3], small[4]
    result = of(small).scores(test, order="newton")
    rows = result.top(1, 3, harmful=True)
    assert [row.change for row in rows] == result.scores[1].sort().values[:3].tolist()
    assert result.scores[1, rows[0].train] == rows[0].change
    assert rows[0].leverage is not None
    assert of(small).top(test, 2)[0][0].change == of(small).scores(test).scores[0].max()
    assert "\n" not in repr(result)
    assert len(repr(result)) < 600
    assert "indicator" in result.summary()
    assert "stationary" in repr(of(small))


def test_linear_datamodeling_score(small):
    result = of(small).scores((small[3], small[4]))
    subsets = [torch.randperm(40)[:20].tolist() for _ in range(12)]
    left_out = [[i for i in range(40) if i not in subset] for subset in subsets]
    values = torch.stack([result.scores[:, rest].sum(1) for rest in left_out]) + 1.0
    torch.testing.assert_close(result.lds(subsets, values), torch.ones(4).double())
    noise = torch.randn(12, 4).double()
    expected = [spearmanr(values[:, i], noise[:, i]).statistic for i in range(4)]
    torch.testing.assert_close(result.lds(subsets, noise), torch.tensor(expected))


def test_bad_input(small):
    model, x, y, *test = small
    influence, test = of(small), tuple(test)
    with pytest.raises(TypeError, match="objective must be an Objective, got Linear"):
        Influence(model)
    with pytest.raises(ValueError, match="train must hold indices from 0 to 39, got 40"):
        influence.scores(test, [40])
    with pytest.raises(TypeError, match=r"train must hold integer indices, got 1\.5"):
        influence.scores(test, [1.5])
    with pytest.raises(ValueError, match=r"groups\[1\] must hold at least one index, got none"):
        influence.group([[1], []], test)
    with pytest.raises(ValueError, match="order must be one of 1, 'newton', 'refit', got 2"):
        influence.scores(test, order=2)
    with pytest.raises(ValueError, match="measure must return one number, or one for each of 4 samples"):
        influence.scores(test, measure=lambda z, y: z)
    with pytest.raises(ValueError, match="test must give finite values"):
        influence.scores((test[0] * torch.nan, test[1]))
    with pytest.raises(ValueError, match=r"new_target must have shape \(\), got \(2,\)"):
        influence.relabel(1, [1, 2], test)
    matrix = MatrixOperator(torch.eye(3).double())
    with pytest.raises(ValueError, match=r"curvature must have shape \(18, 18\), got \(3, 3\)"):
        Influence(Objective(model, F.cross_entropy, (x, y)), curvature=matrix)
    fresh = torch.nn.Linear(5, 3).double()
    unfitted = Influence(Objective(fresh, F.cross_entropy, (x, y), l2=0.05))
    assert "not stationary" in repr(unfitted)
    assert "not stationary" in unfitted.scores(test).summary()
    with pytest.raises(ValueError, match=r"order 'newton' needs parameters that are stationary, got"):
        unfitted.scores(test, order="newton")
    with torch.no_grad():
        fresh.bias += 1
    with pytest.raises(RuntimeError, match="the parameters have changed since Influence was made"):
        unfitted.scores(test)


def test_a_leverage_of_one_is_named():
    """One sample alone determines a direction, and nothing else holds it."""
    x = torch.randn(20, 3).double()
    x[:, 2] = 0
    x[4, 2] = 1
    model, y = scalar_model(3), torch.randn(20).double()
    fit(model, F.mse_loss, (x, y), 0.0)
    result = Influence(Objective(model, F.mse_loss, (x, y))).scores((x[:2], y[:2]), [4, 5], order="newton")
    assert result.statuses == ("leverage", "converged")
    assert result.status == "leverage"
    assert result.leverage[0] == pytest.approx(1)
    assert result.scores[:, 0].isnan().all()
    assert "leverage is 1 or more" in result.summary()


def test_damping_lifts_an_indefinite_curvature():
    torch.manual_seed(1)
    x, y = torch.randn(30, 4).double(), torch.randint(2, (30,))
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    objective = Objective(model, F.cross_entropy, (x, y))
    lowest = torch.linalg.eigvalsh(objective.hessian().dense())[0]
    assert lowest < 0
    for solver in ("dense", "block_cg"):
        influence = Influence(objective, curvature="hessian", solver=solver)
        assert influence.scores((x[:2], y[:2])).status == "converged"
        assert influence.scores((x[:2], y[:2])).damping == pytest.approx(-float(lowest), rel=0.05)
        plain = Influence(objective, curvature="hessian", solver=solver, damping=0.0)
        assert plain.scores((x[:2], y[:2])).status == "negative_curvature"


def test_the_module_is_not_changed(small):
    model, _, _, *test = small
    test = tuple(test)
    model.train()
    model.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    influence = of(small)
    influence.scores(test, [1], order="newton")
    influence.scores(test, [1], order="refit")

    def fails(outputs, targets):
        if not torch.equal(model.weight, before["weight"]):
            raise KeyError("inside")
        return outputs[:, 0]

    with pytest.raises(KeyError, match="inside"):
        influence.scores(test, [1], order="newton", measure=fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert versions == [p._version for p in model.parameters()]
    assert model.training
    assert not model._forward_hooks
    assert all(p.grad is None for p in model.parameters())
