"""CPU seconds of small fits and systems beside SciPy and pytorch-minimize, in one process; tables.

python -m pytest tests/benchmarks/test_small.py -s

All with their default tolerances and derivatives from torch. A set counts as solved with six digits in each
parameter; a wrong success is one that is reported without them. "Raised" counts errors, and starts that were
given up.
"""

import signal
import time
import warnings
from typing import NamedTuple

import nist
import numpy as np
import pytest
import scipy.optimize
import torch
import zoo

import optim

try:
    import torchmin
except ImportError:
    torchmin = None

# Of all 54 starts in CPU seconds, and of one: pytorch-minimize's trust-exact never returns from MGH10.
BUDGET, LIMIT = 2.0, 2.0


class Found(NamedTuple):
    x: torch.Tensor
    success: bool


def ours(data, start):
    result = optim.least_squares(data.residual, start)
    return Found(result.x, result.success)


def curve_fit(data, start):
    popt, _, result = optim.curve_fit(data.model, data.x, data.y, start, full_output=True)
    return Found(popt, result.success)


def minimize(data, start):
    result = optim.minimize(lambda b: data.residual(b).square().sum(), start)
    return Found(result.x, result.success)


def scipy_with(method):
    def solve(data, start):
        def jac(b):
            J = torch.autograd.functional.jacobian(data.residual, torch.tensor(b), vectorize=True)
            return J.numpy()

        with np.errstate(all="ignore"):
            result = scipy.optimize.least_squares(
                lambda b: data.residual(torch.tensor(b)).numpy(), start.numpy(), jac, method=method
            )
        return Found(torch.tensor(result.x), bool(result.success))

    return solve


def torchmin_with(method):
    def solve(data, start):
        result = torchmin.minimize(lambda b: data.residual(b).square().sum(), start, method=method)
        return Found(result.x, bool(result.success))

    return solve


def solvers():
    found = {
        "least_squares": ours,
        "curve_fit": curve_fit,
        "minimize": minimize,
        "scipy trf": scipy_with("trf"),
        "scipy lm": scipy_with("lm"),
    }
    if torchmin is not None:
        found["torchmin trust-exact"] = torchmin_with("trust-exact")
        found["torchmin newton-exact"] = torchmin_with("newton-exact")
    return found


class Tally:
    def __init__(self):
        self.solved = self.wrong = self.failed = 0
        self.seconds = 0.0

    def add(self, solve, data, start):
        begin, found = time.process_time(), None
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            found = solve(data, start)
        except (ValueError, RuntimeError, np.linalg.LinAlgError, TimeoutError):
            self.failed += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.seconds += time.process_time() - begin
        if found is None:
            return
        certified, _ = data.same_fit(found.x)
        is_solved = bool(((found.x - certified).abs() <= 1e-6 * certified.abs()).all())
        self.solved += is_solved
        self.wrong += found.success and not is_solved


def give_up(signum, frame):
    raise TimeoutError


@pytest.mark.slow
def test_nist(one_thread):
    tallies = {name: (solve, Tally()) for name, solve in solvers().items()}
    sets = [nist.dataset(name) for name in nist.MODELS]
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, give_up)
    for solve, _ in tallies.values():
        # What is done once in a process.
        Tally().add(solve, sets[0], sets[0].starts[1])
    for data in sets:
        for start in data.starts:
            for solve, tally in tallies.values():
                tally.add(solve, data, start)
    print(f"\n{'NIST, 54 starts':<24}{'solved':>8}{'wrong':>8}{'raised':>8}{'CPU s':>10}")
    for name, (_, tally) in tallies.items():
        print(f"{name:<24}{tally.solved:>8}{tally.wrong:>8}{tally.failed:>8}{tally.seconds:>10.2f}")
    best = tallies["least_squares"][1]
    assert (best.solved, best.wrong, best.failed) == (54, 0, 0)
    seconds = best.seconds
    # A burst of other work on the machine can spoil a measurement: up to three are made.
    for _ in range(2):
        if seconds <= BUDGET:
            break
        again = Tally()
        for data in sets:
            for start in data.starts:
                again.add(ours, data, start)
        seconds = min(seconds, again.seconds)
    print(f"least_squares at best {seconds:.2f} CPU s")
    assert seconds <= BUDGET


SYSTEMS = {
    **{one.name: one for one in zoo.EQUATIONS},
    "tridiagonal 1000": zoo.EQUATIONS[2]._replace(start=torch.full((1000,), -1.0, dtype=torch.float64)),
}


def scipy_root(method):
    def solve(system):
        def jac(x):
            return torch.autograd.functional.jacobian(
                system.residual, torch.tensor(x), vectorize=True
            ).numpy()

        result = scipy.optimize.root(
            lambda x: system.residual(torch.tensor(x)).numpy(), system.start.numpy(), jac=jac, method=method
        )
        return result.nfev, float(abs(result.fun).max())

    return solve


def our_root(system):
    result = optim.root(system.residual, system.start)
    return result.nfev, float(result.fun.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_root(name, one_thread):
    """Milliseconds, evaluations and the largest residual that is left."""
    peers = {"root": our_root, "scipy hybr": scipy_root("hybr"), "scipy lm": scipy_root("lm")}
    print(f"\n{name:<24}{'CPU ms':>10}{'nfev':>8}{'largest':>12}")
    for peer, solve in peers.items():
        solve(SYSTEMS[name])
        times = []
        for _ in range(3):
            begin = time.process_time()
            nfev, largest = solve(SYSTEMS[name])
            times.append(time.process_time() - begin)
        print(f"{peer:<24}{1e3 * min(times):>10.1f}{nfev:>8}{largest:>12.1e}")
    # Of residuals of order one, in some units of rounding.
    assert our_root(SYSTEMS[name])[1] < 1e-10
