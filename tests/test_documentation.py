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
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
GUIDE = sorted((ROOT / "examples" / "guide").glob("*.md"))
EXTENDING = ROOT / "examples" / "guide" / "extending.md"
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


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_block_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_guide_page_runs(page, capsys):
    """From top to bottom: its blocks share their names."""
    names = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
        # A block that prints nothing is continued.
        assert capsys.readouterr().out or "print(" not in block


def test_guide_promises():
    """What its comments say of the new optimizer and the new method."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, names)
    assert float(names["loss"]) < 0.1
    assert names["optimizer"].report.curvature == "diagonal"
    # Of each step the estimate, ten Hessian products, and what the loop costs.
    assert names["optimizer"].report.gradient_equivalents > 20
    torch.testing.assert_close(names["solution"], torch.ones(10, dtype=torch.float64))
    diagonal = names["scale"].diag() + 1
    expected = torch.linalg.eigvalsh(diagonal)
    assert float(names["secondorder"].eigsh(names["A"], 1).values) == pytest.approx(float(expected[-1]))


@pytest.mark.slow
def test_guide_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(
        [*command, str(EXTENDING.parent), str(tmp_path / "html")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "reference.html").read_text(encoding="utf-8")
    for package, name in PUBLIC:
        assert re.search(rf'id="[\w.]*\b{name}"', reference), f"{package.__name__}.{name}"


def test_readme_states_the_two_commands():
    assert "pip install -e '.[examples]' && python examples/digits.py" in README
    assert "pip install -e '.[test]' && pytest" in README


def test_readme_training_block_keeps_its_promise():
    names = {}
    exec(BLOCKS[0], names)
    assert float(names["loss"]) < 1e-6
    exec(next(block for block in BLOCKS if "model=model" in block), names)
    assert float(names["loss"]) < 0.2
    assert names["optimizer"].report.rho > 0
    exec(next(block for block in BLOCKS if "minimize(" in block), names)
    assert names["result"].x.tolist() == pytest.approx([0.5, 0.25])
    assert names["result"].active_mask.tolist() == [1, 0]
    exec(next(block for block in BLOCKS if "curve_fit(" in block), names)
    assert names["popt"].tolist() == pytest.approx([2.0, 1.3], abs=0.05)
    exec(next(block for block in BLOCKS if "batched=True" in block), names)
    assert names["fits"].message == "1000 of 1000 problems converged"


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


def test_digits_example_refuses_an_unknown_optimizer():
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--optimizer", "sgd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'sgd'" in done.stderr
