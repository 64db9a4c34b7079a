"""A user's program under ``mypy --strict``: what it needs no cast for, and the slips that are caught."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed"),
]

ROOT = Path(__file__).parent.parent.parent
# Of an installed package mypy reports nothing, of one on its path it does.
CONFIG = """
[mypy]
strict = True
[mypy-optim.*,secondorder.*]
follow_imports = silent
"""
# What is wrong ends in the code of the error that is expected there.
PROGRAM = """
from typing import Any

import torch
from torch import Tensor, nn

import optim
import secondorder
from optim import GaussNewton, HessianFree, Newton, StepReport

model = nn.Linear(2, 1)
inputs = torch.ones(5, 2)


def closure() -> Tensor:
    outputs: Tensor = model(inputs)
    return outputs.square().mean()


def show(report: StepReport) -> None:
    print(report.rho)


optimizer = HessianFree(model.parameters(), lr=0.5, history=True, callback=show)
loss: Tensor = optimizer.step(closure)
print(float(optimizer.step(closure)), optimizer.step(lambda: (closure(), inputs)).item())
nothing: Tensor | None = optimizer.step()
optimizer.step().item()  # union-attr
ratio: float = optimizer.report.rho
losses = optimizer.history.columns()["loss"]
optimizer.report.roh  # union-attr
if optimizer.report is not None:
    print(optimizer.report)
Newton(model.parameters(), radius=0.1).step(closure).item()
GaussNewton([{"params": list(model.parameters()), "lr": 0.1}]).step(closure).item()
HessianFree(model.parameters(), dampng=1.0)  # arg-type
GaussNewton(model.parameters(), momentum=0.9)  # arg-type
Newton(model.parameters(), radius="small")  # arg-type
options: dict[str, Any] = {"memory": 1e9, "gain": 0.5}
optim.GaussNewton(model.parameters(), **options)


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def decay(t: Tensor, amplitude: Tensor, rate: Tensor) -> Tensor:
    return amplitude * torch.exp(-rate * t)


def error(p: Tensor, t: Tensor) -> Tensor:
    return decay(t, p[0], p[1]) - t


t = torch.linspace(0, 1, 20)
optim.minimize(rosenbrock, [0.0, 0.0], bounds=(-2, 2)).x
optim.minimize(rosenbrock, [0.0, 0.0], tol=1e-8)  # arg-type
fit = optim.least_squares(error, [1.0, 1.0], (t,), loss="huber")
errors: Tensor = fit.standard_errors()
cost: float = fit.cost
optim.least_squares(error, [1.0, 1.0], (t,), wieghts=t)  # arg-type
optim.root(error, [1.0, 1.0], (t[:2],)).success
optim.root(error, [1.0, 1.0], (t[:2],), xtol=1e-8)  # arg-type
popt, pcov = optim.curve_fit(decay, t, t, bounds=(0, 9), loss="soft_l1")
popt.tolist()
popt, pcov, result = optim.curve_fit(decay, t, t, full_output=True)
print(result.rank, result.covariance(absolute_sigma=True))
optim.curve_fit(decay, t, t, maxfev=9)  # call-overload

H = secondorder.Hessian.of(rosenbrock, torch.zeros(2))
product: Tensor = H @ torch.ones(2)
solved = (H + 1.0).solve(product, rtol=1e-6)
print(solved.x, solved.status, secondorder.cg(H, product).iterations)
value, gradient = secondorder.hvp(rosenbrock, torch.zeros(2), torch.ones(2))
"""


def test_a_strict_program(tmp_path):
    program, config = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM, encoding="utf-8")
    config.write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", f"--config-file={config}", f"--cache-dir={tmp_path}", program]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}
    )
    lines = PROGRAM.splitlines()
    expected = {(n, line.split("  # ")[1]) for n, line in enumerate(lines, 1) if "  # " in line}
    found = re.findall(r"program\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)
    assert {(int(line), code) for line, code in found} == expected, done.stdout + done.stderr
