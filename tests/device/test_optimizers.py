"""Optimizers on a device: the steps of the CPU, and as few reads as they say."""

from __future__ import annotations

import pytest
import simulated
import torch
from networks import Case

from optim import GaussNewton, HessianFree, Newton

OPTIMIZERS = {
    "Newton": (Newton, {}),
    "Newton with CG": (Newton, {"solver": "cg"}),
    "Newton, formed": (Newton, {"solver": "direct"}),
    "Newton, cubic": (Newton, {"bound": "cubic"}),
    "HessianFree": (HessianFree, {}),
    "HessianFree with CG": (HessianFree, {"solver": "cg"}),
    "HessianFree with Nyström": (HessianFree, {"solver": "cg", "preconditioner": "nystrom"}),
    "HessianFree, decay and scales": (HessianFree, {"weight_decay": 1e-2, "damping_scale": 2.0}),
    "GaussNewton": (GaussNewton, {}),
    "GaussNewton with CG": (GaussNewton, {"solver": "cg"}),
    "GaussNewton, grown": (GaussNewton, {"solver": "subspace"}),
    "GaussNewton, Nielsen": (GaussNewton, {"rule": "nielsen", "weight_decay": 1e-2}),
}


# Convolutions of blocks of vectors round by how many there are, and that is whatever is fastest.
BY_BLOCKS = ("Newton, formed", "HessianFree with Nyström")


def taken(name, case, steps=3):
    kind, options = OPTIMIZERS[name]
    optimizer = kind(case.parameters, history=True, **options)
    for _ in range(steps):
        optimizer.step(case.loss)
    return optimizer


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_cpu(device, same, name, model, loss):
    here, there = Case(model, loss=loss), Case(model, device, loss=loss)
    by_blocks = model == "cnn" and name in BY_BLOCKS
    first, second = (taken(name, case, 1 if by_blocks else 3) for case in (here, there))
    if by_blocks:
        torch.testing.assert_close(there.weights().cpu(), here.weights(), rtol=1e-3, atol=1e-5)
        return
    same(there.weights(), here.weights())
    for one, other in zip(second.history, first.history, strict=True):
        assert one.host_reads > 0
        if device.type == "simulated":
            assert one._replace(host_reads=0) == other


@pytest.mark.parametrize("name", ["Newton", "HessianFree", "GaussNewton, grown"])
def test_steps_of_a_recurrent_network(device, name):
    """Its cell is one kernel there, which adds in another order."""
    here, there = Case("gru", dtype=torch.float64), Case("gru", device, torch.float64)
    taken(name, here, 2)
    taken(name, there, 2)
    torch.testing.assert_close(there.weights().cpu(), here.weights(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_host_reads_of_a_step(counted, name, model, loss):
    """One a product, one a run of the closure, three more; the report knows them all.

    A trial by CG is another solve, with one for its length; residuals that are no squares have one for the
    Hessian of the loss; and a trial that the loss refuses, one for the rounding of the loss.
    """
    case = Case(model, counted, loss=loss)
    optimizer = taken(name, case, 1)
    for _ in range(4):
        case.calls, counter = 0, simulated.Counter()
        optimizer.step(case.loss)
        report, reads = optimizer.report, counter.counts.reads
        assert report.host_reads == reads, counter.why
        more = report.trials if report.form.startswith("cg") else 0
        more += report.form.startswith("residual") and loss != "mse_loss"
        more += report.trials > 1 or report.rho < 0.5
        assert reads <= report.products + case.calls - 1 + 3 + more, (report, counter.why)


def test_a_step_draws_the_same_dropout_in_each_trial(device):
    """The random state of the device is replayed, as that of the CPU."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)).to(
        device
    )
    x, y = torch.randn(24, 5, device=device), torch.randint(3, (24,), device=device)
    losses = []

    def closure():
        loss = torch.nn.functional.cross_entropy(model(x), y)
        losses.append(float(loss))
        return loss

    optimizer = HessianFree(model.parameters())
    optimizer.step(closure)
    # The second run of the first step is at the same parameters.
    assert losses[0] == losses[1]
