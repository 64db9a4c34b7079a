"""README and guide blocks, docstring examples and example scripts run, and public names are documented."""

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nist
import pytest
import torch

import optim
import secondorder
import secondorder.functional

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE_FOLDER = ROOT / "examples" / "guide"
GUIDE = sorted(GUIDE_FOLDER.glob("*.md"))
PACKAGES = (secondorder, optim)
MODULES = sorted(
    {package.__name__ for package in PACKAGES}
    | {
        m.name
        for package in PACKAGES
        for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    }
)
PUBLIC = [(package, name) for package in (*PACKAGES, secondorder.functional) for name in package.__all__]


def blocks_of(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


BLOCKS = blocks_of(README)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def check_swap_in(names):
    assert float(names["loss"]) < 0.2
    assert names["optimizer"].report.rho > 0


def check_small_problems(names):
    assert names["popt"].tolist() == pytest.approx([2.0, 1.3], abs=0.05)
    assert names["fits"].message == "1000 of 1000 problems converged"
    # Of the six-hump camel, as published.
    assert names["best"].fun == pytest.approx(-1.031628453, abs=1e-8)


def check_mini_batches(names):
    assert names["columns"]["noisy"][-1]


def check_trust(names):
    assert names["optimizer"].converged
    assert names["step"] < 30


def check_extending(names):
    assert float(names["loss"]) < 0.1
    assert names["optimizer"].report.curvature == "diagonal"
    torch.testing.assert_close(names["solution"], torch.ones(10, dtype=torch.float64))
    expected = torch.linalg.eigvalsh(names["scale"].diag() + 1)[-1:]
    torch.testing.assert_close(names["secondorder"].eigsh(names["A"], 1).values, expected)


# What text and comments say beside the code.
PROMISES = {
    "swap_in": check_swap_in,
    "small_problems": check_small_problems,
    "mini_batches": check_mini_batches,
    "extending": check_extending,
    "trust": check_trust,
}


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_guide_page_runs(page, capsys):
    """From top to bottom: its blocks share their names."""
    names = {"__name__": "guide"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), names)
        # A block that prints nothing is continued.
        assert capsys.readouterr().out or "print(" not in block
    PROMISES.get(page.stem, bool)(names)


def test_the_new_optimizer_is_one(tmp_path):
    """Of the guide: refusals, resumed runs and groups are those of the base."""
    names = {}
    for block in blocks_of((GUIDE_FOLDER / "extending.md").read_text(encoding="utf-8"))[:1]:
        exec(block, names)
    make = names["DiagonalNewton"]
    with pytest.raises(ValueError, match="damping must be a positive number"):
        make([torch.zeros(2, requires_grad=True)], damping=-1.0)

    def run(x, optimizer, count):
        for step in range(count):
            torch.manual_seed(step)
            optimizer.step(lambda: (x - 1).pow(4).sum() + x[0] * x[1])

    x = torch.zeros(2, requires_grad=True, dtype=torch.float64)
    optimizer = make([x])
    run(x, optimizer, 2)
    y = x.detach().clone().requires_grad_()
    other = make([y])
    other.load_state_dict(optimizer.state_dict())
    run(x, optimizer, 3)
    run(y, other, 3)
    assert torch.equal(x, y)
    assert optimizer.report == other.report


def test_readme_states_the_two_commands():
    assert "pip install -e '.[examples]' && python examples/digits.py" in README
    assert "pip install -e '.[test]' && pytest -n 2" in README


def test_readme_promises():
    names = {}
    exec(BLOCKS[0], names)
    assert float(names["loss"]) < 1e-6
    exec(next(block for block in BLOCKS if "minimize(" in block), names)
    assert names["result"].x.tolist() == pytest.approx([0.5, 0.25])
    assert names["result"].active_mask.tolist() == [1, 0]
    assert names["popt"].tolist() == pytest.approx([2.0, 1.3], abs=0.05)


def test_readme_is_short():
    assert len(README.splitlines()) < 250


@pytest.mark.slow
def test_guide_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(
        [*command, str(GUIDE_FOLDER), str(tmp_path / "html")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "reference.html").read_text(encoding="utf-8")
    for package, name in PUBLIC:
        assert re.search(rf'id="[\w.]*\b{name}"', reference), f"{package.__name__}.{name}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    # By full path: optim.minimize is also a function.
    importlib.import_module(name)
    module = sys.modules[name]
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(module, name, globs={**vars(module), "torch": torch}):
        torch.manual_seed(0)
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[f"{p.__name__}.{n}" for p, n in PUBLIC])
def test_public_name_is_documented(package, name):
    thing = getattr(package, name)
    assert inspect.getdoc(thing)
    if inspect.isroutine(thing):
        for section in ("Args:", "Returns:", "Raises:", "Cost:", "Example:"):
            assert section in thing.__doc__, f"{name} lacks {section}"


def test_digits_example(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "digits.py"))["main"]
    threads = torch.get_num_threads()
    runs = main(["--seconds", "0.3", "--plot", str(tmp_path / "digits.png")])
    torch.set_num_threads(threads)
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    assert {run.name.split()[0] for run in runs} == {
        "hessian-free",
        "gauss-newton",
        "newton",
        "lbfgs",
        "adam",
    }
    for run in runs:
        assert run.train_loss < run.curve[0][2]
    output = capsys.readouterr().out
    assert "best learning rate of Adam:" in output
    assert "hessian-free" in output


def test_curve_fitting_example(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "curve_fitting.py"))["main"]
    fits = main(["--plot", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    for data, _, found in fits:
        certified = nist.dataset(data.name)
        # The numbers in the example are those of the files.
        assert (data.x, data.y) == (certified.x.tolist(), certified.y.tolist())
        assert (data.certified, data.deviations) == (
            certified.certified.tolist(),
            certified.deviations.tolist(),
        )
        assert data.start == certified.starts[0].tolist()
        torch.testing.assert_close(found.popt, certified.certified, rtol=1e-6, atol=0)
        errors = found.pcov.diagonal().sqrt()
        torch.testing.assert_close(errors, certified.deviations, rtol=1e-4, atol=0)
    assert "certified" in capsys.readouterr().out


def test_ten_thousand_fits_example(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "ten_thousand_fits.py"))["main"]
    threads = torch.get_num_threads()
    true, result = main(["--size", "24", "--plot", str(tmp_path / "maps.png")])
    torch.set_num_threads(threads)
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    assert bool(result.success.all())
    assert float((result.x[:, 1] - true.t2).abs().median()) < 2.0
    assert "microseconds a fit" in capsys.readouterr().out


@pytest.mark.slow
def test_influence_digits_example(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "influence_digits.py"))["main"]
    plot = tmp_path / "influence.png"
    result = main(["--count", "120", "--refits", "8", "--plot", str(plot)])
    assert plot.stat().st_size > 10_000
    assert result.status == "converged"
    output = capsys.readouterr().out
    errors = [float(line.split()[-1]) for line in output.splitlines() if "relative error" in line]
    assert errors[1] < min(0.2, errors[0])
    assert "flipped labels" in output


def test_digits_example_refuses_an_unknown_optimizer():
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--optimizer", "sgd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'sgd'" in done.stderr
