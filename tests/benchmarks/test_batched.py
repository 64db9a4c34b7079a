"""CPU seconds of ten thousand small problems beside vmapped optimistix, in one process; a table.

    python -m pytest tests/benchmarks/test_batched.py -s

One thread, float64, tolerances of 1e-8, compilation and first calls excluded. "By gradient" is the part of
the problems whose largest entry of the gradient, relative to one plus the value, is below 1e-6.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import pytest
import torch
from torch import Tensor

import optim

try:
    import jax
    import jax.numpy as jnp
    import optimistix
except ImportError:
    jax = None

COUNT, MAX_STEPS, TOLERANCE = 10_000, 300, 1e-8
DOUBLE = torch.float64
RAT43_TIMES = torch.arange(1.0, 16.0, dtype=DOUBLE)
LANCZOS_TIMES = torch.arange(24, dtype=DOUBLE) * 0.05


class Case(NamedTuple):
    """The same problem, written for a batch in torch and for one in jax.

    Attributes:
        residual: Whether the function is one of residuals, or a value to be minimised.
        wanted: Part of the problems to be solved by gradient.
    """

    name: str
    fun: Callable[..., Tensor]
    peer: Callable[..., Any]
    x0: Tensor
    args: tuple[Tensor, ...]
    residual: bool
    wanted: float


def rat43(p, y, times, exp):
    return p[..., 0:1] / (1 + exp(p[..., 1:2] - p[..., 2:3] * times)) ** (1 / p[..., 3:4]) - y


def exponentials(p, y, times, exp):
    first = p[..., 0:1] * exp(-p[..., 1:2] * times) + p[..., 2:3] * exp(-p[..., 3:4] * times)
    return first + p[..., 4:5] * exp(-p[..., 5:6] * times) - y


def cases() -> list[Case]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=DOUBLE)

    def around(center: list[float]) -> Tensor:
        near = 1 + 0.2 * (2 * torch.rand(COUNT, len(center), generator=g, dtype=DOUBLE) - 1)
        return torch.tensor(center, dtype=DOUBLE) * near

    growth = rat43(torch.tensor([700.0, 5.28, 0.76, 1.28], dtype=DOUBLE), 0.0, RAT43_TIMES, torch.exp)
    sums = torch.tensor([0.0951, 1.0, 0.8607, 3.0, 1.5576, 5.0], dtype=DOUBLE)
    decay = exponentials(sums, 0.0, LANCZOS_TIMES, torch.exp)
    X, w = normal(COUNT, 50, 5), normal(COUNT, 5)
    labels = torch.sign((X @ w.unsqueeze(2))[:, :, 0] + normal(COUNT, 50))
    return [
        Case(
            "logistic regression, 5",
            lambda w, X, y: (
                torch.nn.functional.softplus(-y * (X @ w.unsqueeze(2))[:, :, 0]).sum(1)
                + 0.05 * w.square().sum(1)
            ),
            lambda w, X, y: jnp.sum(jax.nn.softplus(-y * (X @ w))) + 0.05 * jnp.sum(w**2),
            torch.zeros(COUNT, 5, dtype=DOUBLE),
            (X, labels),
            residual=False,
            wanted=0.999,
        ),
        Case(
            "Rosenbrock, 2",
            lambda x: torch.stack([10 * (x[:, 1] - x[:, 0] ** 2), 1 - x[:, 0]], 1),
            lambda x: jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]),
            4 * torch.rand(COUNT, 2, generator=g, dtype=DOUBLE) - 2,
            (),
            residual=True,
            wanted=0.999,
        ),
        Case(
            "Rat43, 4",
            lambda p, y: rat43(p, y, RAT43_TIMES, torch.exp),
            lambda p, y: rat43(p, y, jnp.array(RAT43_TIMES.numpy()), jnp.exp),
            around([700.0, 4.0, 0.7, 1.1]),
            (growth + 10 * normal(COUNT, 15),),
            residual=True,
            wanted=0.999,
        ),
        Case(
            "Lanczos, 6",
            lambda p, y: exponentials(p, y, LANCZOS_TIMES, torch.exp),
            lambda p, y: exponentials(p, y, jnp.array(LANCZOS_TIMES.numpy()), jnp.exp),
            around([0.5, 0.7, 3.6, 4.2, 4.0, 6.3]),
            (decay * (1 + 1e-6 * normal(COUNT, 24)),),
            residual=True,
            wanted=0.95,
        ),
    ]


def ours(case: Case) -> Tensor:
    front = optim.least_squares if case.residual else optim.minimize
    return front(case.fun, case.x0, case.args, batched=True).x


def peers(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Of optimistix: its solvers for the kind of problem, compiled."""
    if jax is None:
        return {}
    jax.config.update("jax_enable_x64", True)
    tight = dict(rtol=TOLERANCE, atol=TOLERANCE)
    if case.residual:
        names = {name: getattr(optimistix, name)(**tight) for name in ("LevenbergMarquardt", "Dogleg")}
    else:
        names = {"BFGS": optimistix.BFGS(**tight), "Newton, of the gradient": optimistix.Newton(**tight)}

    def solver(name: str, method: Any) -> Callable[[], Tensor]:
        def one(x: Any, *args: Any) -> Any:
            options = dict(args=args, max_steps=MAX_STEPS, throw=False)
            if case.residual:
                return optimistix.least_squares(lambda x, a: case.peer(x, *a), method, x, **options).value
            if name == "BFGS":
                return optimistix.minimise(lambda x, a: case.peer(x, *a), method, x, **options).value
            gradient = jax.grad(case.peer)
            return optimistix.root_find(lambda x, a: gradient(x, *a), method, x, **options).value

        compiled = jax.jit(jax.vmap(one))
        data = [jnp.array(part.numpy()) for part in (case.x0, *case.args)]
        return lambda: torch.from_numpy(np.array(compiled(*data).block_until_ready()))

    return {f"optimistix {name}": solver(name, method) for name, method in names.items()}


def by_gradient(case: Case, x: Tensor) -> float:
    x = x.clone().requires_grad_()
    value = case.fun(x, *case.args)
    value = 0.5 * value.square().sum(1) if case.residual else value
    (g,) = torch.autograd.grad(value.sum(), x)
    return float((g.abs().amax(1) / (1 + value.detach().abs()) < 1e-6).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ten_thousand(case, one_thread):
    solvers = {"ours": lambda: ours(case), **peers(case)}
    seconds = {name: [] for name in solvers}
    found = {name: solve() for name, solve in solvers.items()}
    for _ in range(3):
        for name, solve in solvers.items():
            start = time.process_time()
            solve()
            seconds[name].append(time.process_time() - start)
    print(f"\n{COUNT} problems: {case.name}")
    for name, times in seconds.items():
        print(f"{name:40}{sorted(times)[1]:8.3f} s{100 * by_gradient(case, found[name]):9.2f} % by gradient")
    assert by_gradient(case, found["ours"]) >= case.wanted
