"""Where second order is worth its price: ours at their defaults beside peers, under one clock.

python -m pytest tests/benchmarks/test_frontier.py -s [-k poisson]   prints a table and asserts the limits
python tests/benchmarks/test_frontier.py --problems heat --optimizers GaussNewton LBFGS --seeds 0 1 2
                                                                     prints a line a run

In CPU seconds of one thread, in gradient-equivalents (GE: as our reports count them; calls of the closure for
others, CG's products as two), or in evaluations: runs of the closure or of the residual. Of ours medians over
the seeds, of peers the first seed. What needs a package that is not installed is left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import frontier
import pytest
import torch
from frontier import Task
from racing import Budget, Point, race

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = (0, 1, 2)
# A tenth of the time, and one seed: what breaks, breaks; no limit holds.
QUICK = 0.1


class Row(NamedTuple):
    """A problem, what a run may spend, and who runs; a peer may have a batch size after its name."""

    make: Callable[..., Task]
    budget: Budget
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS


ROWS = {
    # Adam's rate and batch are the best of six rates.
    "autoencoder": Row(
        frontier.digits_autoencoder,
        Budget(seconds=25),
        ("HessianFree",),
        ("Adam1e-2/128", "LBFGS"),
    ),
    "poisson": Row(
        frontier.poisson, Budget(seconds=20), ("GaussNewton",), ("Adam3e-3", "LBFGS", "MINPACK", "torchmin")
    ),
    # Evaluations of ours are many and cheap, those of MINPACK come with a Jacobian of 20,000 rows.
    "sinc": Row(
        frontier.sinc,
        Budget(seconds=20, target=1.2e-6),
        ("GaussNewton",),
        ("LBFGS", "MINPACK"),
        (0, 1, 2, 3, 4),
    ),
    "burgers": Row(
        frontier.burgers,
        Budget(seconds=60),
        ("GaussNewton",),
        ("LBFGS", "Adam1e-3+LBFGS", "Adam1e-3+LBFGS+NNCG"),
        (0,),
    ),
    "heat": Row(
        frontier.heat,
        Budget(seconds=60),
        ("GaussNewton",),
        ("LBFGS", "Adam1e-3+LBFGS", "Adam1e-3+LBFGS+NNCG"),
        (0,),
    ),
    "adding": Row(
        frontier.adding,
        Budget(seconds=120, target=0.01),
        ("HessianFree",),
        ("SGD1e-2", "Adam1e-3"),
    ),
    "characters": Row(
        frontier.characters,
        Budget(gradients=400),
        ("HessianFree",),
        ("Adam3e-3", "Adam1e-2", "Muon1e-2", "Muon2e-2", "SOAP3e-3"),
        (0,),
    ),
}


@pytest.fixture(scope="module")
def table():
    """Lines, printed together after the last test."""
    lines: list[str] = []
    yield lines
    print("\n\n" + "\n".join(lines))


@cache
def run(problem: str, name: str, seed: int, part: float = 1.0) -> list[Point] | None:
    """The points of a run with this part of the budget; None where a package is missing."""
    row = ROWS[problem]
    name, _, size = name.partition("/")
    task = row.make(seed, int(size)) if size else row.make(seed)
    *limits, target = row.budget
    try:
        return race(task, name, Budget(*(part * limit for limit in limits), target))
    except ImportError:
        return None


def best(points: Sequence[Point]) -> Point:
    """That of least error."""
    return min(points, key=lambda point: math.inf if math.isnan(point.errors[0]) else point.errors[0])


def line(problem: str, name: str, seed: int, points: Sequence[Point] | None) -> str:
    start = f"{problem:<12}{name:<32}seed {seed}  "
    if points is None:
        return start + "not installed"
    errors = " / ".join(f"{error:.3g}" for error in best(points).errors)
    end = points[-1]
    spent = f"{end.seconds:.1f} s, {end.gradients:.0f} GE, {end.evaluations} evaluations, {end.steps} steps"
    return f"{start}{errors:<18}in {spent}"


def measured(problem: str, lines: list[str]) -> tuple[dict[str, list[list[Point]]], dict[str, list[Point]]]:
    """Runs of ours, one a seed, and of the peers."""
    row = ROWS[problem]
    ours, peers = {name: [run(problem, name, seed) for seed in row.seeds] for name in row.ours}, {}
    for name, runs in ours.items():
        lines += [line(problem, name, seed, points) for seed, points in zip(row.seeds, runs, strict=True)]
    for name in row.peers:
        points = run(problem, name, 0)
        lines.append(line(problem, name, 0, points))
        if points is not None:
            peers[name] = points
    return ours, peers


def least(runs: Sequence[Sequence[Point]], number: int = 0) -> float:
    """Median over runs of the least error."""
    return statistics.median(min(point.errors[number] for point in points) for points in runs)


def least_of(peers: dict[str, list[Point]]) -> float:
    return min(best(points).errors[0] for points in peers.values())


@pytest.mark.slow
def test_autoencoder(table):
    ours, peers = measured("autoencoder", table)
    runs = ours["HessianFree"]
    ends = [next(p.errors[1] for p in run if p.errors[0] <= 0.50) for run in runs]
    tests = {name: min(point.errors[1] for point in points) for name, points in peers.items()}
    table.append(
        f"{'':<12}least test errors: {least(runs, 1):.3g}, of peers {tests}; where .50 is reached {ends}"
    )
    assert least(runs) <= min(0.50, least_of(peers))
    # Of all of them the least on the way: each learns by heart in the end.
    assert least(runs, 1) <= min(0.974, *tests.values())


@pytest.mark.slow
def test_poisson(table):
    ours, peers = measured("poisson", table)
    assert least(ours["GaussNewton"]) <= min(2e-7, 0.5 * least_of(peers))


@pytest.mark.slow
def test_sinc(table):
    ours, peers = measured("sinc", table)
    assert least(ours["GaussNewton"]) <= min(1.2e-6, 0.1 * least_of(peers))


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["burgers", "heat"])
def test_evolution(problem, table):
    ours, peers = measured(problem, table)
    assert least(ours["GaussNewton"]) <= 0.1 * least_of(peers)


@pytest.mark.slow
def test_adding(table):
    ours, _ = measured("adding", table)
    assert all(points[-1].errors[0] <= 0.01 for points in ours["HessianFree"])


@pytest.mark.slow
def test_characters(table):
    ours, peers = measured("characters", table)
    (points,) = ours["HessianFree"]
    # Step for step ahead; at equal work it is not.
    steps = points[-1].steps
    assert least([points]) < min(
        point.errors[0] for others in peers.values() for point in others if point.steps <= 2 * steps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--optimizers", nargs="+", help="those of the problem where none are named")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the budget")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for problem in options.problems:
        for name in options.optimizers or (*ROWS[problem].ours, *ROWS[problem].peers):
            for seed in options.seeds:
                points = run(problem, name, seed, QUICK if options.quick else 1.0)
                print(line(problem, name, seed, points), flush=True)


if __name__ == "__main__":
    main()
