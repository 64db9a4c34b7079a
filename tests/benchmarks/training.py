"""Work and time of an optimizer on a problem of ``problems.py``, and how they are written in a table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from problems import PROBLEMS, TRAINING_DIGITS, digits, digits_network, logistic
from torch import Tensor

import optim

PEERS = ("LBFGS", "Adam1e-3", "Adam1e-2")
OURS = ("HessianFree", "GaussNewton", "Newton")
MAX_SECONDS = 10.0
BATCH, EPOCHS = 128, 5


def make(name: str, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Ours at their defaults; Adam with the rate in its name; LBFGS as one uses it for precision.

    "HessianFree all": with the curvature of all samples.
    """
    if name == "LBFGS":
        return torch.optim.LBFGS(
            parameters,
            history_size=100,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )
    if name.startswith("Adam"):
        return torch.optim.Adam(parameters, lr=float(name.removeprefix("Adam")))
    kind, _, samples = name.partition(" ")
    # In the same form: the space of residuals is of all of them.
    options = {"curvature_batch": None, "solver": "subspace"} if samples == "all" else {}
    return getattr(optim, kind)(parameters, **options)


class Cost(NamedTuple):
    """Gradient-equivalents and CPU seconds."""

    gradients: float
    seconds: float


class Counter:
    """Steps of one optimizer with what they cost.

    Work is what ours report, and calls of the closure for the others, that make one gradient each.
    ``observe(loss)`` is called with each loss that the optimizer knows of.
    """

    def __init__(self, name: str, net: torch.nn.Module, observe: Callable[[float], None] | None = None):
        self.reports = name.partition(" ")[0] in OURS
        self.optimizer = make(name, list(net.parameters()))
        self.observe = observe or (lambda loss: None)
        self.gradients = 0.0
        self._start = time.process_time()

    def cost(self) -> Cost:
        return Cost(self.gradients, time.process_time() - self._start)

    def step(self, loss: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = loss()
            value.backward()
            if not self.reports:
                self.gradients += 1
                self.observe(value.item())
            return value

        self.optimizer.step(closure)
        if self.reports:
            self.gradients += self.optimizer.report.gradient_equivalents
            self.observe(self.optimizer.report.new_loss)


class Run(NamedTuple):
    """Of one seed: what each level cost that was reached, the least loss, and the cost of the whole run."""

    reached: dict[float, Cost]
    loss: float
    cost: Cost


def run(problem: str, name: str, seed: int, max_gradients: float | None = None) -> Run:
    """Train until the last level is reached or the work or the time is spent."""
    make_case, levels, limit = PROBLEMS[problem]
    torch.manual_seed(seed)
    net, loss = make_case()
    reached: dict[float, Cost] = {}
    least = math.inf

    def observe(value: float) -> None:
        nonlocal least
        least = min(least, value)
        for level in levels:
            if value <= level:
                reached.setdefault(level, counter.cost())

    counter = Counter(name, net, observe)
    limit = limit if max_gradients is None else max_gradients
    while counter.gradients < limit and counter.cost().seconds < MAX_SECONDS and len(reached) < len(levels):
        counter.step(loss)
    return Run(reached, least, counter.cost())


def runs(problem: str, name: str, seeds: Sequence[int]) -> list[Run]:
    """One run a seed. What a process pays once, imports and caches, is paid by a step before them."""
    run(problem, name, 0, max_gradients=1)
    return [run(problem, name, seed) for seed in seeds]


class Mean(NamedTuple):
    """Geometric means over the seeds that reached a level, and how many did not."""

    gradients: float
    seconds: float
    missed: int

    def __str__(self) -> str:
        if math.isinf(self.gradients):
            return "-"
        missed = f" ({self.missed} missed)" if self.missed else ""
        return f"{self.gradients:.0f} GE {self.seconds:.3f} s{missed}"


def mean(results: Sequence[Run], level: float) -> Mean:
    costs = [result.reached[level] for result in results if level in result.reached]
    if not costs:
        return Mean(math.inf, math.inf, len(results))
    gradients, seconds = (statistics.geometric_mean(values) for values in zip(*costs, strict=True))
    return Mean(gradients, seconds, len(results) - len(costs))


class MiniBatchRun(NamedTuple):
    """Test accuracy after each epoch."""

    accuracies: list[float]
    cost: Cost


def mini_batches(name: str, seed: int) -> MiniBatchRun:
    """The digits network by batches of 128, shuffled each epoch, the last and smaller batch included."""
    torch.manual_seed(seed)
    net, generator = digits_network(), torch.Generator().manual_seed(seed)
    images, labels = digits()
    counter, seconds, accuracies = Counter(name, net), 0.0, []
    for _ in range(EPOCHS):
        start = time.process_time()
        for rows in torch.randperm(TRAINING_DIGITS, generator=generator).split(BATCH):
            x, y = images[rows], labels[rows]
            counter.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
        seconds += time.process_time() - start
        with torch.no_grad():
            right = net(images[TRAINING_DIGITS:]).argmax(1) == labels[TRAINING_DIGITS:]
        accuracies.append(right.float().mean().item())
    return MiniBatchRun(accuracies, Cost(counter.gradients, seconds))


def steps_to_gradient(name: str, seed: int, norm: float, max_steps: int) -> int | None:
    """Steps until logistic regression in float64 has so small a gradient; None: not in ``max_steps``."""
    torch.manual_seed(seed)
    net, loss = logistic(torch.float64)
    counter, parameters = Counter(name, net), list(net.parameters())
    for count in range(1, max_steps + 1):
        counter.step(loss)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
        if gradient.norm() <= norm:
            return count
    return None
