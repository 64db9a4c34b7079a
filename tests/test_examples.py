"""The scripts of the gallery run with small sizes; what they print and return holds; their index is whole."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    """Call the ``main`` of a script with its picture in a folder of the test's own."""
    threads = torch.get_num_threads()

    def call(name, *arguments):
        picture = tmp_path / "picture.png"
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        returned = main([*arguments, "--plot", str(picture)])
        assert 5_000 < picture.stat().st_size < 100_000
        return returned

    yield call
    torch.set_num_threads(threads)


def test_main_job(run, capsys):
    runs = run("main_job", "--seconds", "0.2")
    assert [row.name for row in runs] == [
        "GaussNewton",
        "LBFGS",
        "Adam 1e-3",
        "HessianFree",
        "LBFGS",
        "Adam 1e-2",
    ]
    for row in runs:
        seconds, gradients, error = zip(*row.curve, strict=True)
        assert row.best < error[0]
        assert list(seconds) == sorted(seconds)
        assert list(gradients) == sorted(gradients)
    assert "HessianFree beside LBFGS: after" in capsys.readouterr().out


def test_adding_problem(run, capsys):
    runs = run("adding_problem", "--length", "10", "--sequences", "100", "--seconds", "0.3")
    # A constant has a sixth, the variance of a sum of two uniform numbers.
    assert all(row.curve[0][2] > 0.1 for row in runs)
    assert runs[0].curve[-1][2] < 0.1
    assert capsys.readouterr().out.count("solved") == len(runs)


def test_hyperparameters(run):
    result, losses = run("hyperparameters", "--grid", "4")
    assert result.success
    # No point of a grid is below a minimum.
    assert float(result.fun) <= float(losses.min()) + 1e-6


def test_hyperparameters_have_the_derivatives_of_differences():
    names = runpy.run_path(str(EXAMPLES / "hyperparameters.py"))
    outer = names["Outer"](*names["load"](0)[:2])
    logs = torch.tensor([-1.5, -1.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(outer(logs), logs)
    for k in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[k] = 1e-3
        with torch.no_grad():
            difference = float(outer(logs + step) - outer(logs - step)) / 2e-3
        # A fit ends within 1e-9 of the least loss or so.
        assert float(gradient[k]) == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_curvature_spectrum(run):
    (_, trained), exact = run("curvature_spectrum", "--hidden", "4", "--steps", "10")
    top = exact.flip(0)[: len(trained.top)]
    torch.testing.assert_close(trained.top, top, rtol=1e-8, atol=1e-8)
    mean, error = trained.density.mean(lambda values: values)
    assert abs(mean - float(exact.mean())) <= 5 * error + 1e-12


def test_robust_fit(run):
    fits, true = run("robust_fit", "--points", "15", "--wrong", "0.05")
    errors = {name: (fit.x["points"] - true["points"]).norm(dim=1).median() for name, fit in fits.items()}
    assert errors["cauchy"] < 0.2 * errors["squares"]
    assert fits["right matches alone"].status == "converged"
    # Squares of residuals in units of the noise: their expectation is the degrees of freedom.
    right = fits["right matches alone"].fun
    freedom = right.numel() - (6 * 6 - 7 + 3 * 15)
    assert float(right.square().sum()) == pytest.approx(freedom, abs=5 * math.sqrt(2 * freedom))


def test_batched_newton(run, capsys):
    true, result = run("batched_newton", "--curves", "300")
    assert bool(result.success.all())
    assert float((result.x[:, 1] - true[:, 1]).abs().median()) < 0.2
    assert "microseconds a curve" in capsys.readouterr().out


def test_gaussian_process(run, capsys):
    minima = run("gaussian_process", "--grid", "8")
    assert len(minima) == 2
    # The one of scikit-learn, which has its own likelihood and its own descent.
    *_, line = (text for text in capsys.readouterr().out.splitlines() if "scikit-learn" in text)
    theirs = float(line.split("starts: ")[1].split()[0])
    assert -float(minima[0].fun) == pytest.approx(theirs, abs=1e-3)


def test_index_names_every_script_and_picture():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    pictures = {f"pictures/{path.name}" for path in (EXAMPLES / "pictures").iterdir()}
    assert links == {path.name for path in EXAMPLES.glob("*.py")} | pictures
    for name in pictures:
        assert (EXAMPLES / name).stat().st_size < 100_000
