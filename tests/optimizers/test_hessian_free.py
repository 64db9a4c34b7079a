"""What ``HessianFree`` takes by name: curvature, and the preconditioner of CG; against dense matrices."""

import io

import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo

import optim
from secondorder import Fisher

DOUBLE = torch.float64
EXACT = dict(rtol=1e-12, max_trials=1, max_extension=1.0)


def flat(parameters):
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def gradient_of(loss, parameters):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])


def stepped(loss, parameters, **options):
    """The step that is taken, and the report."""
    before = flat(parameters)
    optimizer = optim.HessianFree(parameters, **options)
    optimizer.step(loss)
    return flat(parameters) - before, optimizer.report


# By name: the loss of outputs (N, 3), the likelihood, its factor, and the targets.
LIKELIHOODS = {
    "cross_entropy": (F.cross_entropy, "categorical", 1.0, torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0])),
    "by hand": (
        lambda z, t: -z.log_softmax(1)[torch.arange(9), t].mean(),
        "categorical",
        1.0,
        torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0]),
    ),
    # Means over the entries of the outputs; a half of squares is the negative log-likelihood.
    "binary": (F.binary_cross_entropy_with_logits, "bernoulli", 1 / 3, torch.rand(9, 3, dtype=DOUBLE)),
    "mse": (F.mse_loss, "normal", 2 / 3, torch.randn(9, 3, dtype=DOUBLE)),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_fisher_is_the_expectation_over_the_model_s_own_targets(name):
    loss, likelihood, factor, targets = LIKELIHOODS[name]
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    parameters, inputs = list(net.parameters()), torch.randn(9, 4, dtype=DOUBLE)
    F_ = factor * Fisher(net(inputs), parameters, likelihood=likelihood).dense()
    g = gradient_of(loss(net(inputs), targets), parameters)
    expected = -torch.linalg.solve(F_ + 0.7 * torch.eye(len(g), dtype=DOUBLE), g)
    step, report = stepped(
        lambda: loss(net(inputs), targets), parameters, curvature="fisher", damping=0.7, strict=True, **EXACT
    )
    assert report.curvature.startswith("fisher (")
    torch.testing.assert_close(step, expected, rtol=1e-6, atol=1e-9)


def test_fisher_of_counts():
    """Poisson with log-rates: the variance is the rate. Of rates themselves it is another matrix."""
    w, inputs = torch.zeros(3, dtype=DOUBLE, requires_grad=True), torch.randn(20, 3, dtype=DOUBLE)
    counts = torch.randint(4, (20,)).double()
    g = gradient_of(F.poisson_nll_loss(inputs @ w, counts), [w])
    matrix = inputs.T @ torch.diag((inputs @ w).detach().exp()) @ inputs / 20
    expected = -torch.linalg.solve(matrix + 0.7 * torch.eye(3, dtype=DOUBLE), g)
    step, report = stepped(
        lambda: F.poisson_nll_loss(inputs @ w, counts), [w], curvature="fisher", damping=0.7, **EXACT
    )
    assert report.curvature == "fisher (poisson_nll_loss)"
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-10)

    def of_rates():
        return F.poisson_nll_loss((inputs @ w).exp(), counts, log_input=False)

    with pytest.raises(RuntimeError, match="knows the Fisher matrix: poisson_nll_loss of rates"):
        stepped(of_rates, [w], curvature="fisher", strict=True)


@pytest.mark.parametrize("kind", ["huber", "outputs"])
def test_a_loss_that_is_no_likelihood_is_said(kind):
    w, x = torch.ones(3, dtype=DOUBLE, requires_grad=True), torch.randn(20, 3, dtype=DOUBLE)

    def loss():
        outputs = x @ w
        value = F.huber_loss(outputs, torch.zeros(20, dtype=DOUBLE))
        return (value, outputs) if kind == "outputs" else value

    with pytest.raises(RuntimeError, match="HessianFree found no log-likelihood.* Let the closure return"):
        stepped(loss, [w], curvature="fisher", strict=True)
    with pytest.warns(UserWarning, match="The Gauss-Newton matrix is used instead"):
        report = stepped(loss, [w], curvature="fisher")[1]
    assert report.curvature.startswith("gauss-newton (")
    assert report.accepted


@pytest.mark.parametrize("name", ["mlp_mse", "mlp_cross_entropy"])
def test_hessian_steps_downhill_along_negative_curvature(name):
    case = zoo.network(name)
    parameters = list(case.model.parameters())
    values, vectors = torch.linalg.eigh(oracles.dense_hessian(case.loss_of, parameters))
    assert float(values[0]) < -1e-3
    g = vectors.T @ gradient_of(case.value(), parameters)
    step, report = stepped(case.value, parameters, curvature="hessian", damping=3.0, **EXACT)
    assert report.accepted
    torch.testing.assert_close(step, vectors @ (-g / (values.abs() + 3.0)), rtol=1e-6, atol=1e-8)
    assert report.curvature == "hessian"


@pytest.mark.parametrize("curvature", ["gauss-newton", "fisher", "hessian"])
@pytest.mark.parametrize("solver", ["subspace", "cg"])
def test_each_curvature_trains(curvature, solver):
    case = zoo.network("mlp_cross_entropy")
    optimizer = optim.HessianFree(case.model.parameters(), curvature=curvature, solver=solver)
    start = case.value().item()
    for _ in range(25):
        optimizer.step(case.value)
        assert optimizer.report.new_loss <= optimizer.report.loss * (1 + 1e-13)
    assert optimizer.report.new_loss < 0.1 * start


class Ridge:
    """Least squares whose eigenvalues decay like ``1 / k^3``, in random directions."""

    def __init__(self, n=100, dtype=DOUBLE):
        generator = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0]
        roots = torch.arange(1, n + 1, dtype=DOUBLE) ** -1.5
        self.inputs = (roots[:, None] * Q).to(dtype)
        self.targets = torch.randn(n, generator=generator, dtype=DOUBLE).to(dtype)
        self.w = torch.zeros(n, dtype=dtype, requires_grad=True)

    def __call__(self):
        return 0.5 * F.mse_loss(self.inputs @ self.w, self.targets, reduction="sum")


def sketched(problem, **options):
    options = {"solver": "cg", "preconditioner": "nystrom", **options}
    return optim.HessianFree([problem.w], **options)


def test_the_preconditioned_solution_is_the_same_in_fewer_iterations():
    damping, iterations = 1e-5, {}
    for preconditioner in ("none", "nystrom"):
        ridge = Ridge()
        A, b = ridge.inputs, ridge.targets
        expected = torch.linalg.solve(A.T @ A + damping * torch.eye(100, dtype=DOUBLE), A.T @ b)
        optimizer = sketched(
            ridge, preconditioner=preconditioner, damping=damping, progress=1e-15, max_iter=2000, max_trials=1
        )
        optimizer.step(ridge)
        # CG ends at a residual of 1e-10, of a system of condition 1e5.
        assert float((ridge.w.detach() - expected).norm()) <= 1e-5 * float(expected.norm())
        iterations[preconditioner] = optimizer.report.iterations
    assert iterations["nystrom"] < 0.4 * iterations["none"]


def test_a_sketch_serves_several_steps_and_every_damping():
    ridge = Ridge()
    optimizer = sketched(ridge, damping=1e-3, preconditioner_rank=15, preconditioner_steps=3)
    extra, dampings = [], []
    for _ in range(7):
        optimizer.step(ridge)
        report = optimizer.report
        extra.append(report.products - report.iterations)
        dampings.append(report.damping)
        assert optimizer.state[ridge.w]["sketch_vectors"].shape == (15, 100)
    assert len(set(dampings)) > 3
    # One for the true residual and, but in the first step, one for the start; 16 for a sketch.
    assert [e >= 16 for e in extra] == [True, False, False] * 2 + [True]
    assert max(extra[1:3] + extra[4:6]) <= 3


def test_a_refused_damping_costs_no_sketch():
    """A loss that falls less than its model: dampings are tried, one after another."""
    x = torch.full((4,), 2.0, dtype=DOUBLE, requires_grad=True)
    optimizer = optim.HessianFree(
        [x],
        solver="cg",
        preconditioner="nystrom",
        preconditioner_rank=2,
        damping=1e-6,
    )
    optimizer.step(lambda: F.mse_loss(x.atan(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)))
    report = optimizer.report
    assert report.accepted
    assert report.products - report.iterations <= 3 + 2 * report.trials


def test_random_numbers_are_left_alone():
    ridge = Ridge()
    optimizer, state = sketched(ridge), torch.get_rng_state()
    optimizer.step(ridge)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_is_the_uninterrupted_one():
    ridge = Ridge()
    optimizer = sketched(ridge, preconditioner_steps=4)
    for _ in range(2):
        optimizer.step(ridge)
    file = io.BytesIO()
    torch.save((ridge.w.detach(), optimizer.state_dict()), file)
    file.seek(0)
    w, state = torch.load(file, weights_only=True)
    again = Ridge()
    with torch.no_grad():
        again.w.copy_(w)
    resumed = sketched(again)
    resumed.load_state_dict(state)
    for _ in range(4):
        optimizer.step(ridge)
        resumed.step(again)
        assert resumed.report.products == optimizer.report.products
        assert resumed.report.new_loss == pytest.approx(optimizer.report.new_loss, rel=1e-10)
    # A matrix product rounds by where its operands lie in memory.
    torch.testing.assert_close(ridge.w, again.w, rtol=1e-8, atol=1e-10)


def test_a_parameter_that_came_since_gets_a_new_sketch():
    ridge, other = Ridge(), torch.ones(3, dtype=DOUBLE, requires_grad=True)
    optimizer = sketched(ridge, preconditioner_rank=10)
    optimizer.step(ridge)
    optimizer.add_param_group({"params": [other]})
    optimizer.step(lambda: ridge() + 0.5 * F.mse_loss(other, torch.zeros_like(other), reduction="sum"))
    assert optimizer.report.accepted
    assert optimizer.state[other]["sketch_vectors"].shape == (10, 3)


def test_a_rank_above_the_dimension_is_the_dimension():
    ridge = Ridge(n=6, dtype=torch.float32)
    optimizer = sketched(ridge, preconditioner_rank=50)
    for _ in range(3):
        optimizer.step(ridge)
    assert optimizer.state[ridge.w]["sketch_vectors"].shape == (6, 6)
    assert optimizer.report.new_loss < optimizer.report.loss


def test_products_that_are_not_finite_are_reported():
    x = torch.tensor([1e-10], dtype=torch.float32, requires_grad=True)
    optimizer = optim.HessianFree([x], solver="cg", preconditioner="nystrom", damping=1.0)
    # The square of the derivative is beyond single precision.
    optimizer.step(lambda: F.mse_loss(1e22 * x, torch.zeros(1), reduction="sum"))
    assert optimizer.report.status == "non_finite"
    assert x.item() == pytest.approx(1e-10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"curvature": "ggn"}, "curvature must be one of 'gauss-newton', 'fisher', 'hessian', got 'ggn'"),
        (
            {"preconditioner": "jacobi", "solver": "cg"},
            "preconditioner must be one of 'none', 'nystrom', got",
        ),
        ({"preconditioner": "nystrom"}, "preconditioner='nystrom' needs solver='cg', got 'auto'"),
        ({"preconditioner_rank": 0}, "preconditioner_rank must be a positive integer, got 0"),
        ({"preconditioner_steps": 1.5}, "preconditioner_steps must be a positive integer, got 1.5"),
    ],
)
def test_misuse_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        optim.HessianFree([torch.ones(2, requires_grad=True)], **options)
