"""What an ingredient is worth: work with it and without, all else at default, on one thread.

python -m pytest tests/benchmarks/test_ablations.py -s       prints the table and asserts the limits
python tests/benchmarks/test_ablations.py structural         prints the lines of one ingredient, or of all

Work is in gradient-equivalents as reports count it, to a level of the loss; geometric means over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from problems import Case, rnn, swap
from torch import Tensor, nn

import optim

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = (0, 1, 2)
MAX_GRADIENTS = 6000.0


class Ridge(nn.Module):
    """A linear map of 300 inputs whose standard deviations decay like ``1 / k^1.5``, in turned axes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(300, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def ridge() -> Case:
    generator = torch.Generator().manual_seed(torch.initial_seed())
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    deviations = torch.arange(1, 301, dtype=torch.float64) ** -1.5
    inputs = (draw(1000, 300) * deviations) @ torch.linalg.qr(draw(300, 300))[0]
    net, targets = Ridge(), draw(1000)
    return net, lambda: F.mse_loss(net(inputs), targets) + 0.5e-6 * net.w.square().sum()


class Ingredient(NamedTuple):
    """``without`` and ``options`` are those of ``optimizer``; ``levels`` of the loss, or of the gradient.

    ``at_most``: of the work without it to the last level; above one where it is no gain there.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    make: Callable[[], Case]
    levels: tuple[float, ...]
    options: dict[str, object]
    at_most: float
    without: dict[str, object] = {}  # noqa: RUF012 - never written to
    by_gradient: bool = False


# Solved to their last digits, where few large eigenvalues matter.
TIGHT = {"solver": "cg", "progress": 1e-7, "max_iter": 1000}
INGREDIENTS = {
    "cubic": Ingredient(optim.Newton, swap, (1e-1, 1e-2), {"bound": "cubic"}, 1.25),
    "saddle-free": Ingredient(optim.Newton, swap, (1e-1, 1e-2), {"bound": "saddle-free"}, 1.0),
    "fisher": Ingredient(optim.HessianFree, swap, (1e-1, 1e-2), {"curvature": "fisher"}, 1.0),
    "hessian": Ingredient(optim.HessianFree, swap, (1e-1, 1e-2), {"curvature": "hessian"}, 2.5),
    "structural": Ingredient(
        optim.HessianFree, partial(rnn, 50), (1e-1, 1e-2), {"structural_damping": 30.0}, 0.9
    ),
    "nystrom": Ingredient(
        optim.HessianFree,
        ridge,
        (1e-4, 1e-7),
        {**TIGHT, "preconditioner": "nystrom", "preconditioner_rank": 50},
        0.5,
        TIGHT,
        by_gradient=True,
    ),
}


def run(ingredient: Ingredient, options: dict[str, object], seed: int) -> list[float]:
    """Work to each level; what was spent in all where one is not reached."""
    torch.manual_seed(seed)
    net, loss = ingredient.make()
    optimizer = ingredient.optimizer(net.parameters(), **options)
    work, reached, first = 0.0, dict[float, float](), None
    while len(reached) < len(ingredient.levels) and work < MAX_GRADIENTS:
        optimizer.step(loss)
        report = optimizer.report
        work += report.gradient_equivalents
        first = first or report.gradient_norm
        value = report.gradient_norm / first if ingredient.by_gradient else report.new_loss
        for level in ingredient.levels:
            if value <= level:
                reached.setdefault(level, work)
    return [reached.get(level, work) for level in ingredient.levels]


def means(ingredient: Ingredient, options: dict[str, object], seeds: Sequence[int] = SEEDS) -> list[float]:
    runs = [run(ingredient, options, seed) for seed in seeds]
    return [statistics.geometric_mean(works) for works in zip(*runs, strict=True)]


def compared(name: str) -> tuple[str, float]:
    """A row of the table, and the work with over that without, to the last level."""
    ingredient = INGREDIENTS[name]
    before, after = means(ingredient, ingredient.without), means(ingredient, ingredient.options)
    triples = zip(ingredient.levels, before, after, strict=True)
    cells = "".join(f"{level:<8g}{a:7.0f} -> {b:<9.0f}" for level, a, b in triples)
    return f"{name:<14}{cells}", after[-1] / before[-1]


@pytest.fixture(scope="module")
def table():
    """Rows, printed together after the last test."""
    rows: list[str] = []
    yield rows
    print("\n\nGradients to a level, without and with\n" + "\n".join(rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", INGREDIENTS)
def test_ingredient(name, table):
    row, ratio = compared(name)
    table.append(row)
    assert ratio <= INGREDIENTS[name].at_most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(INGREDIENTS), help=", ".join(INGREDIENTS))
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        print(compared(name)[0], flush=True)


if __name__ == "__main__":
    main()
