"""Optimizers under one clock: the errors of a task against CPU seconds, gradients and evaluations.

An optimizer is named as in ``training.py``, with options of ours after it, "HessianFree,weight_decay=1e-4".
"Adam1e-3+LBFGS" changes from the first to the second after a quarter of the budget.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from frontier import Task
from nncg import NNCG
from solvers import SOLVERS
from torch import Tensor, nn
from training import OURS, make

import optim

# How often errors are measured in a run.
POINTS = 40
# Part of the budget after which an optimizer but the last gives way to the next.
SHARE = 0.25
# A function of a loss that makes one step and returns what that cost in gradients.
Step = Callable[[Callable[[], Tensor]], float]


class Budget(NamedTuple):
    """What a run may spend, and the error at which it is done."""

    seconds: float = math.inf
    gradients: float = math.inf
    evaluations: float = math.inf
    target: float = -math.inf


class Point(NamedTuple):
    """Where a run was at some time."""

    seconds: float
    gradients: float
    evaluations: int
    steps: int
    errors: tuple[float, ...]


def muon(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """torch's for matrices between layers, Adam at a tenth of its rate for the rest."""
    named = [(p, p.ndim == 2 and "blocks" in name) for name, p in net.named_parameters()]
    matrices, others = ([p for p, is_matrix in named if is_matrix == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), torch.optim.Adam(others, lr=lr / 10)]


def optimizers(name: str, net: nn.Module) -> list[torch.optim.Optimizer]:
    """The named one, in parts; ImportError where a package is missing."""
    parameters = list(net.parameters())
    if name.startswith("Muon"):
        return muon(net, float(name.removeprefix("Muon")))
    if name.startswith("SOAP"):
        package = importlib.import_module("pytorch_optimizer")
        return [package.SOAP(parameters, lr=float(name.removeprefix("SOAP")), weight_decay=0.0)]
    if name.startswith("SGD"):
        rate = float(name.removeprefix("SGD"))
        return [torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True)]
    plain, *options = name.split(",")
    if options:
        pairs = (option.split("=") for option in options)
        return [getattr(optim, plain)(parameters, **{key: float(value) for key, value in pairs})]
    return [make(name, parameters)]


class Race:
    """One run of a task."""

    def __init__(self, task: Task, budget: Budget) -> None:
        self._task, self._budget = task, budget
        self._steps, self._gradients, self._evaluations = 0, 0.0, 0
        self._start = time.process_time()
        self.points: list[Point] = []
        self._note()

    def spent(self) -> float:
        """The part of the budget that is; one where the target is reached."""
        if self.points[-1].errors[0] <= self._budget.target:
            return 1.0
        seconds, gradients, evaluations, _ = self._budget
        now = time.process_time() - self._start
        return max(now / seconds, self._gradients / gradients, self._evaluations / evaluations)

    def go(self, name: str, until: float) -> None:
        """With one optimizer until this part of the budget is spent."""

        def is_over() -> bool:
            return self.spent() >= until

        if name in SOLVERS:
            SOLVERS[name](self._task, self._noted(self._task.residual), is_over)
            self._note()
            return
        step = self._step(name, is_over)
        while not is_over():
            self._note_if_due()
            self._gradients += step(self._counted(self._task.loss))
            self._steps += 1
            if self._task.draw is not None:
                self._task.draw()
        self._note()

    def _counted(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self._evaluations += 1
            return function()

        return run

    def _noted(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Counted, and errors measured where a solver tries: it does not say where it is."""
        counted = self._counted(function)

        def run() -> Tensor:
            self._note_if_due()
            return counted()

        return run

    def _note_if_due(self) -> None:
        if self.spent() * POINTS >= len(self.points):
            self._note()

    def _step(self, name: str, is_over: Callable[[], bool]) -> Step:
        if name == "NNCG":
            return NNCG(list(self._task.net.parameters()), is_over).step
        first, *others = optimizers(name, self._task.net)

        def step(loss: Callable[[], Tensor]) -> float:
            calls = 0

            def closure() -> Tensor:
                nonlocal calls
                calls += 1
                self._task.net.zero_grad()
                value = loss()
                value.backward()
                return value

            first.step(closure)
            for other in others:
                other.step()
            return first.report.gradient_equivalents if type(first).__name__ in OURS else calls

        return step

    def _note(self) -> None:
        start = time.process_time()
        with torch.no_grad():
            errors = self._task.errors()
        seconds = start - self._start
        self.points.append(Point(seconds, self._gradients, self._evaluations, self._steps, errors))
        self._start += time.process_time() - start


def race(task: Task, names: str, budget: Budget) -> list[Point]:
    """Train until the budget is spent or the target reached."""
    run = Race(task, budget)
    *first, last = names.split("+")
    for number, name in enumerate(first, 1):
        run.go(name, until=number * SHARE)
    run.go(last, until=1.0)
    return run.points
