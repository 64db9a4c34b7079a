"""What the last steps say together: finished, stalled, noisy; and the writers of reports."""

import copy
import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import optim
from optim.optimizers.progress import ENOUGH, RECENT, WASTED, Progress

OPTIMIZERS = [optim.Newton, optim.HessianFree, optim.GaussNewton]


@pytest.fixture(params=OPTIMIZERS, ids=lambda cls: cls.__name__)
def make(request):
    return request.param


def regression(dtype):
    """A logistic regression with a minimum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 5, generator=generator, dtype=dtype)
    y = (x[:, 0] + torch.randn(100, generator=generator, dtype=dtype) > 0).long()
    model = torch.nn.Linear(5, 2).to(dtype)
    return model, lambda: F.cross_entropy(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finished_run_says_so(make, dtype):
    """At the minimum, within the precision of the loss, and not long before."""
    model, closure = regression(dtype)
    optimizer = make(model.parameters(), weight_decay=1e-2)
    assert not optimizer.converged
    assert optimizer.explain().startswith("new: ")
    losses = []
    while not optimizer.converged:
        losses.append(float(optimizer.step(closure)))
        assert len(losses) < 30
    assert optimizer.explain().startswith(f"converged: the last {ENOUGH} steps")
    assert ("float64" in optimizer.explain()) == (dtype == torch.float32)
    decay = 0.005 * sum(p.square().sum() for p in model.parameters())
    gradient = torch.autograd.grad(closure() + decay, list(model.parameters()))
    slope = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    # What is left to gain is below the rounding of the loss; the curvature is at least 0.01.
    assert slope**2 / 0.02 <= 10 * torch.finfo(dtype).eps
    assert optimizer.converged == copy.deepcopy(optimizer).converged


def test_steps_past_the_end_are_told_of_once_and_change_no_damping(make):
    model, closure = regression(torch.float64)
    optimizer = make(model.parameters(), weight_decay=1e-2)
    while not optimizer.converged:
        optimizer.step(closure)
    for _ in range(WASTED - ENOUGH - 1):
        optimizer.step(closure)
    with pytest.warns(UserWarning, match=rf"converged: the last {WASTED} steps .* optimizer\.converged"):
        optimizer.step(closure)
    before = optimizer.report
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            optimizer.step(closure)
    for name in ("damping", "radius"):
        assert getattr(optimizer.report, name) == getattr(before, name)
    assert optimizer.report.damping <= 1.0


def test_refused_steps_are_stalled(make):
    """Reports of a closure that no step suits."""
    model, closure = regression(torch.float32)
    optimizer = make(model.parameters())
    optimizer.step(closure)
    refused = optimizer.report._replace(accepted=False, new_loss=optimizer.report.loss)
    progress = Progress()
    for _ in range(ENOUGH):
        assert progress.status in ("new", "running")
        progress = progress.after(refused, 1e-7)
    assert progress.explain().startswith(f"stalled: the last {ENOUGH} steps were refused")
    assert ("radius" if make is optim.Newton else "damping") in progress.explain()
    assert progress.wasted() == ""
    for _ in range(WASTED):
        progress = progress.after(refused, 1e-7)
    assert progress.wasted().startswith("stalled: ")
    progress = progress.after(optimizer.report, 1e-7)
    assert progress.status == "running"
    progress = progress.after(refused._replace(status="non_finite"), 1e-7)
    assert progress.status == "non_finite"


def test_batches_that_change_are_noisy_until_their_mean_loss_stays(make):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(5, 1)
    optimizer = make(model.parameters(), lr=0.1)

    def step():
        x = torch.randn(64, 5, generator=generator)
        y = x[:, :1] + 0.5 * torch.randn(64, 1, generator=generator)
        optimizer.step(lambda: F.mse_loss(model(x), y))

    for _ in range(RECENT):
        step()
        assert not optimizer.converged
    assert optimizer.explain().startswith("noisy: ")
    said = []
    for _ in range(3 * RECENT):
        step()
        said.append(optimizer.explain().partition(":")[0])
    # The mean falls by chance now and then.
    assert said[RECENT:].count("stalled") > RECENT
    assert set(said) == {"noisy", "stalled"}


def test_a_step_that_does_nothing_says_why(make):
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = make([x], lr=0.0)
    optimizer.step(lambda: x.square().sum())
    assert optimizer.explain().startswith("zero_lr")
    x.data.zero_()
    optimizer = make([x])
    optimizer.step(lambda: x.square().sum())
    assert optimizer.converged


def test_reports_go_to_a_logger(make, caplog):
    model, closure = regression(torch.float32)
    optimizer = make(model.parameters(), callback=optim.LogTo(logging.getLogger("training")))
    with caplog.at_level(logging.INFO, "training"):
        optimizer.step(closure)
        optimizer.step(closure)
    assert [record.name for record in caplog.records] == ["training"] * 2
    assert caplog.messages[1] == f"step 1: {optimizer.report}"


def test_reports_go_to_a_summary_writer(make):
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, name, value, step):
            self.scalars.setdefault(name, []).append((step, value))

    writer = Writer()
    model, closure = regression(torch.float32)
    optimizer = make(model.parameters(), history=True, callback=optim.LogTo(writer, prefix="newton/"))
    optimizer.step(closure)
    optimizer.step(closure)
    columns = optimizer.history.columns()
    for name in ("loss", "rho", "products", "gradient_equivalents", "accepted"):
        assert writer.scalars[f"newton/{name}"] == [
            (i, float(value)) for i, value in enumerate(columns[name])
        ]
    assert "newton/status" not in writer.scalars


def test_what_cannot_be_written_to():
    with pytest.raises(TypeError, match=r"target must be a logging\.Logger, or have add_scalar"):
        optim.LogTo(print)
