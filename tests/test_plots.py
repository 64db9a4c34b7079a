"""Pictures of runs: what is drawn, from what, and what cannot be."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

import optim
import secondorder

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    matplotlib.pyplot.close("all")


def trained(cls, steps=4, **options):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 30).unsqueeze(1)
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = cls(model.parameters(), history=True, **options)
    for _ in range(steps):
        optimizer.step(lambda: F.mse_loss(model(x), x.sin()))
    return optimizer


@pytest.mark.parametrize(
    ("cls", "options", "bound"),
    [
        (optim.GaussNewton, {}, "damping"),
        (optim.HessianFree, {}, "damping"),
        (optim.Newton, {}, "radius"),
        (optim.Newton, {"bound": "cubic"}, "cubic weight"),
    ],
)
def test_steps_of_an_optimizer(cls, options, bound):
    optimizer = trained(cls, **options)
    history = optimizer.history
    for run in (optimizer, history, history.columns()):
        loss, norms, rho, size, work = secondorder.plot(run).axes
        assert loss.lines[0].get_ydata().tolist() == [report.loss for report in history]
        assert loss.get_yscale() == "log"
        assert [line.get_label() for line in norms.lines] == ["gradient", "step"]
        assert rho.lines[0].get_ydata().tolist() == [report.rho for report in history]
        assert size.get_ylabel() == bound
        totals = [sum(report.products for report in history[: i + 1]) for i in range(len(history))]
        assert work.lines[0].get_ydata().tolist() == totals
        assert all(axes.get_xlabel() == "step" for axes in (loss, norms, rho, size, work))


def test_points_of_a_minimisation():
    for result in (
        optim.minimize(lambda x: (x - 1).square().sum(), torch.zeros(2)),
        optim.least_squares(lambda x: x.exp() - 2, torch.zeros(2)),
        optim.root(lambda x: x.exp() - 2, torch.zeros(2)),
    ):
        values, sizes, _ = secondorder.plot(result).axes
        assert values.lines[0].get_ydata().tolist() == [record.fun for record in result.history]
        assert sizes.lines[0].get_label().startswith("gradient")


def test_numbers_that_are_not_finite_leave_gaps():
    columns = {"loss": [1.0, math.inf, -2.0], "rho": [math.nan] * 3, "damping": [0.0] * 3}
    (loss,) = secondorder.plot(columns).axes
    assert loss.get_yscale() == "linear"
    assert math.isnan(loss.lines[0].get_ydata()[1])


def test_a_figure_of_the_users_own_and_noise():
    columns = {"loss": [1.0, 2.0], "noisy": [False, True]}
    figure = matplotlib.figure.Figure()
    assert secondorder.plot(columns, figure) is figure
    assert figure.axes[0].get_title() == "samples change from step to step"


@pytest.mark.parametrize(
    ("run", "error", "text"),
    [
        (3, TypeError, "got int"),
        (optim.Newton([torch.nn.Parameter(torch.ones(1))]), TypeError, "got Newton without a history"),
        (optim.Newton([torch.nn.Parameter(torch.ones(1))], history=True), ValueError, "must have steps"),
        ({"loss": 1.0}, TypeError, "got dict"),
    ],
)
def test_what_is_no_run(run, error, text):
    with pytest.raises(error, match=text):
        secondorder.plot(run)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        secondorder.plot({"loss": [1.0]})
