"""Peak memory of products, relative to that of one gradient: what the docstrings state, counted in bytes."""

import gc

import pytest
import torch
import torch.nn.functional as F
from bench import BUILDERS
from memory import PeakMemory, peak_bytes

from secondorder import GaussNewton, Hessian, functional, fvp, ggnvp

# What is held between products, and what a product adds to that, in peaks of a gradient: at most, over the
# three networks of the benchmarks.
LIMITS = {
    ("hessian", True): (2.2, 1.7),
    ("hessian", False): (1.05, 2.7),
    ("gauss_newton", True): (1.65, 1.2),
    ("gauss_newton", False): (0.95, 1.7),
}
# The same of a network whose parameters take more than what its layers hold for the batch.
WIDE_LIMITS = {
    ("hessian", True): (2.5, 1.9),
    ("hessian", False): (1.2, 1.9),
    ("gauss_newton", True): (0.6, 1.9),
    ("gauss_newton", False): (0.3, 1.9),
}


def wide():
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (torch.nn.Linear(256, 256), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))
    return model, torch.randn(64, 256), torch.randint(10, (64,))


@pytest.mark.parametrize(("name", "keep_graph"), LIMITS)
@pytest.mark.parametrize("build", [*BUILDERS, wide], ids=lambda build: build.__name__)
@pytest.mark.slow
def test_peak_memory_is_what_the_docstrings_state(build, name, keep_graph):
    model, x, targets = build()
    parameters = list(model.parameters())
    v = torch.ones(sum(p.numel() for p in parameters))
    gradient = peak_bytes(lambda: torch.autograd.grad(F.cross_entropy(model(x), targets), parameters))
    gc.collect()
    with PeakMemory() as memory:
        outputs = model(x)
        loss = F.cross_entropy(outputs, targets)
        if name == "hessian":
            A = Hessian(loss, parameters, keep_graph=keep_graph)
        else:
            A = GaussNewton(loss, outputs, parameters, keep_graph=keep_graph)
        # From the second product on, what products share is kept.
        A @ v, A @ v
        gc.collect()
        held = memory.peak = memory.live
        A @ v
        added = memory.peak - held
    limits = (WIDE_LIMITS if build is wide else LIMITS)[name, keep_graph]
    assert held <= limits[0] * gradient
    assert added <= limits[1] * gradient


# Peaks of one call, in peaks of a gradient.
FUNCTIONAL = {"hvp": 3.05, "vhp": 3.05, "jvp": 2.35, "ggnvp": 2.35, "fvp": 2.35}


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.slow
def test_peak_memory_of_one_call(build, name):
    model, x, targets = build()
    parameters = list(model.parameters())
    names = [key for key, _ in model.named_parameters()]
    values = tuple(p.detach() for p in parameters)
    v = tuple(map(torch.ones_like, values))

    def outputs(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    def loss(z):
        return F.cross_entropy(z, targets)

    calls = {
        "hvp": lambda: functional.hvp(lambda *w: loss(outputs(*w)), values, v),
        "vhp": lambda: functional.vhp(lambda *w: loss(outputs(*w)), values, v),
        "jvp": lambda: functional.jvp(outputs, values, v),
        "ggnvp": lambda: ggnvp(outputs, loss, values, v),
        "fvp": lambda: fvp(outputs, values, v),
    }
    gradient = peak_bytes(lambda: torch.autograd.grad(loss(model(x)), parameters))
    assert peak_bytes(calls[name]) <= FUNCTIONAL[name] * gradient
