"""Peak memory of products, relative to that of one gradient: what the docstrings state, counted in bytes."""

import gc

import pytest
import torch
import torch.nn.functional as F
from bench import BUILDERS
from memory import PeakMemory, peak_bytes

from secondorder import GaussNewton, Hessian

# What is held between products, and what a product adds to that, in peaks of a gradient: at most, over the
# three networks of the benchmarks.
LIMITS = {
    ("hessian", True): (2.2, 1.7),
    ("hessian", False): (1.05, 2.7),
    ("gauss_newton", True): (1.9, 1.2),
    ("gauss_newton", False): (0.9, 1.8),
}


@pytest.mark.parametrize(("name", "keep_graph"), LIMITS)
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
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
        gc.collect()
        held = memory.peak = memory.live
        A @ v
        added = memory.peak - held
    limits = LIMITS[name, keep_graph]
    assert held <= limits[0] * gradient
    assert added <= limits[1] * gradient
