"""``python -m secondorder``: versions, and a check of products and optimizers on every device there is."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optim import GaussNewton, HessianFree, Newton
from secondorder import GaussNewton as GaussNewtonMatrix
from secondorder import Hessian, cg, hvp

# Relative differences that are rounding: of products and differences of gradients, and of steps on two
# devices.
TOLERANCES = {torch.float64: (1e-6, 1e-6), torch.float32: (2e-2, 1e-2)}
# Of differences, relative to the parameters.
STEP = {torch.float64: 1e-5, torch.float32: 1e-2}


class Network:
    """A network and its loss on a device: the same numbers on each, from the CPU's generator."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.device("cpu"):
            self.model = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)
            )
        for p in self.model.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator, device="cpu")
        self.model.to(device, dtype)
        self.x = torch.randn(32, 1, 6, 6, generator=generator, device="cpu").to(device, dtype)
        self.y = torch.randint(3, (32,), generator=generator, device="cpu").to(device)
        self.parameters = list(self.model.parameters())
        n = sum(p.numel() for p in self.parameters)
        self.direction = torch.randn(n, generator=generator, device="cpu").to(device, dtype)

    def loss(self) -> Tensor:
        """Cross entropy of all samples."""
        return F.cross_entropy(self.model(self.x), self.y)

    def gradient(self, moved: float = 0.0) -> Tensor:
        """After ``moved`` times the direction, flat."""
        parts = self.direction.split([p.numel() for p in self.parameters])
        before = [p.detach().clone() for p in self.parameters]
        for p, part in zip(self.parameters, parts, strict=True):
            p.data.add_(part.view_as(p), alpha=moved)
        grads = torch.autograd.grad(self.loss(), self.parameters)
        for p, old in zip(self.parameters, before, strict=True):
            p.data.copy_(old)
        return torch.cat([g.flatten() for g in grads])

    def weights(self) -> Tensor:
        """The parameters, flat, on the CPU."""
        return torch.cat([p.detach().flatten() for p in self.parameters]).cpu()


def differs(found: Tensor, expected: Tensor) -> float:
    """Relative to what is expected."""
    return float((found - expected).norm() / expected.norm())


def hessian_product(device: torch.device, dtype: torch.dtype) -> float:
    """Against central differences of gradients."""
    network = Network(device, dtype)
    h = STEP[dtype] / float(network.direction.norm())
    expected = (network.gradient(h) - network.gradient(-h)) / (2 * h)
    return differs(Hessian(network.loss(), network.parameters) @ network.direction, expected)


def functional_product(device: torch.device, dtype: torch.dtype) -> float:
    """``hvp`` against the operator."""
    x = torch.linspace(0.1, 1.0, 20, dtype=torch.float64, device="cpu").to(device, dtype)
    found = hvp(lambda t: (t.sin() * t.cumsum(0)).sum(), x, torch.ones_like(x))[1]

    def slope(t: Tensor) -> Tensor:
        return torch.func.grad(lambda t: (t.sin() * t.cumsum(0)).sum())(t)

    h = STEP[dtype]
    return differs(found, (slope(x + h) - slope(x - h)) / (2 * h))


def gauss_newton_product(device: torch.device, dtype: torch.dtype) -> float:
    """Against the CPU's."""
    products = []
    for where in (device, torch.device("cpu")):
        network = Network(where, dtype)
        outputs = network.model(network.x)
        loss = F.cross_entropy(outputs, network.y)
        operator = GaussNewtonMatrix(loss, outputs, network.parameters)
        products.append((operator @ network.direction).cpu())
    return differs(*products)


def solution(device: torch.device, dtype: torch.dtype) -> float:
    """Of a system, by its residual."""
    network = Network(device, dtype)
    outputs = network.model(network.x)
    loss = F.cross_entropy(outputs, network.y)
    damped = GaussNewtonMatrix(loss, outputs, network.parameters) + 0.1
    x = cg(damped, network.direction, rtol=0.1 * TOLERANCES[dtype][0]).x
    return differs(damped @ x, network.direction)


def step_of(kind: Callable[..., torch.optim.Optimizer]) -> Callable[[torch.device, torch.dtype], float]:
    """A check of one step: the loss falls, and the parameters are those of the same step on the CPU."""

    def check(device: torch.device, dtype: torch.dtype) -> float:
        weights = []
        for where in (device, torch.device("cpu")):
            network = Network(where, dtype)
            before = float(network.loss().detach())
            kind(network.parameters).step(network.loss)  # type: ignore[arg-type]
            if not float(network.loss().detach()) < before:
                raise RuntimeError(f"the loss did not fall from {before:.6g}")
            weights.append(network.weights())
        return differs(*weights)

    return check


# Each gives a relative error; the flag says whether it is one of a step.
CHECKS: dict[str, tuple[Callable[[torch.device, torch.dtype], float], bool]] = {
    "Hessian product": (hessian_product, False),
    "hvp": (functional_product, False),
    "Gauss-Newton product": (gauss_newton_product, False),
    "cg": (solution, False),
    **{f"step of {kind.__name__}": (step_of(kind), True) for kind in (Newton, HessianFree, GaussNewton)},
}


def devices() -> list[tuple[torch.device, torch.dtype]]:
    """The CPU and every accelerator, each with the highest precision that it has."""
    found = [(torch.device("cpu"), torch.float64)]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return found
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        try:
            dtype = torch.zeros((), dtype=torch.float64, device=device).dtype
        except TypeError:
            # As Apple's.
            dtype = torch.float32
        found.append((device, dtype))
    return found


def checked(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, bool, str]]:
    """For each check its name, whether it passed, and what it found."""
    for name, (check, is_step) in CHECKS.items():
        start = time.perf_counter()
        try:
            error = check(device, dtype)
        except (RuntimeError, TypeError, ValueError) as failure:
            # The others may tell more.
            yield name, False, f"{type(failure).__name__}: {failure}"
            continue
        passed = error <= TOLERANCES[dtype][is_step]
        yield name, passed, f"relative error {error:.1e}, {time.perf_counter() - start:.2f} s"


def main() -> int:
    """Print versions and the outcome of each check; the number of those that failed."""
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in ("secondorder", "torch", "numpy", "scipy"):
        try:
            print(package, version(package))
        except PackageNotFoundError:
            print(package, "not installed as a package")
    failed = 0
    for device, dtype in devices():
        print(f"\n{device}, {dtype}")
        for name, passed, text in checked(device, dtype):
            failed += not passed
            print(f"  {'ok  ' if passed else 'FAIL'} {name}: {text}")
    print("\nall checks passed" if not failed else f"\n{failed} checks failed")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
