"""``secondorder.optim`` is ours, whatever else has the name ``optim``."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
TRAIN = """
import copy, pickle, sys
import torch
import secondorder
assert "optim" in dir(secondorder) and callable(secondorder.optim.minimize)
from secondorder.optim import HessianFree, minimize
from secondorder import optim as ours
assert ours is secondorder.optim is sys.modules["secondorder.optim"]
model = torch.nn.Linear(2, 1)
optimizer = HessianFree(model.parameters())
x = torch.randn(20, 2)
loss = optimizer.step(lambda: (model(x) - 1).square().mean())
assert isinstance(optimizer, torch.optim.Optimizer) and loss.isfinite()
optimizer.load_state_dict(optimizer.state_dict())
assert type(copy.deepcopy(optimizer)) is type(optimizer)
result = minimize(lambda x: (x - 1).square().sum(), torch.zeros(2))
assert result.success and type(pickle.loads(pickle.dumps(result))) is type(result)
"""


def run(code: str, folder: Path, *paths: Path) -> str:
    """In a fresh process, as a script of that folder; further entries of the path come before ours."""
    path = f"import sys; sys.path[1:1] = {[str(p) for p in (*paths, ROOT)]}\n"
    script = folder / "script.py"
    script.write_text(path + textwrap.dedent(code), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alone_it_is_optim(tmp_path):
    run(TRAIN + "import optim\nassert optim is ours\nassert ours.__name__ == 'optim'", tmp_path)
    run("import optim\n" + TRAIN + "assert optim is ours", tmp_path)


SHADOWS = {"file": "optim.py", "folder": "optim/__init__.py"}


@pytest.mark.parametrize(("kind", "is_imported_first"), [("file", True), ("folder", False)])
def test_beside_a_users_own_optim(tmp_path, kind, is_imported_first):
    own = tmp_path / SHADOWS[kind]
    own.parent.mkdir(exist_ok=True)
    own.write_text("print('run')\nMINE = 1\n", encoding="utf-8")
    first, last = ("import optim\n", "") if is_imported_first else ("", "print('ours')\nimport optim\n")
    check = "assert optim.MINE == 1 and not hasattr(optim, 'minimize') and optim is not ours"
    # Their file runs once, when they import it.
    assert run(first + TRAIN + last + check, tmp_path) == ("run\n" if is_imported_first else "ours\nrun\n")


def test_beside_a_folder_without_init(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "schedules.py").write_text("MINE = 1\n", encoding="utf-8")
    run(TRAIN, tmp_path)


def test_beside_a_distribution_of_that_name(tmp_path):
    """It comes before ours on the path."""
    site = tmp_path / "site"
    (site / "optim").mkdir(parents=True)
    (site / "optim" / "__init__.py").write_text("from optim.core import THEIRS\n", encoding="utf-8")
    (site / "optim" / "core.py").write_text("THEIRS = 1\n", encoding="utf-8")
    run(TRAIN + "import optim\nassert optim.THEIRS == 1", tmp_path, site)


def test_a_missing_package_is_named(tmp_path):
    code = f"""
    import shutil, sys
    shutil.copytree({str(ROOT / "secondorder")!r}, "copy/secondorder")
    sys.path.remove({str(ROOT)!r})
    sys.path.insert(0, "copy")
    try:
        import secondorder.optim
    except ModuleNotFoundError as error:
        print(error)
    """
    assert "Reinstall secondorder" in run(code, tmp_path)
