"""Cost of Hessian products beside torch's, in one process, interleaved; medians.

python -m pytest tests/benchmarks/test_functional.py -s
"""

import pytest
import torch
import torch.nn.functional as F
from bench import BUILDERS, interleaved

import secondorder.functional as ours


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_hessian_products(build):
    model, inputs, targets = build()
    function, parameters = ours.module_function(model, F.cross_entropy, inputs, targets)
    names = list(parameters)

    def of_tuple(*values):
        return function(dict(zip(names, values, strict=True)))

    point = tuple(parameters.values())
    v = tuple(torch.randn_like(p) for p in point)
    _, _, hvp_fn = ours.linearize_grad(of_tuple, point)
    functions = {
        "gradient": lambda: ours.value_and_grad(of_tuple, point),
        "torch hvp": lambda: torch.autograd.functional.hvp(of_tuple, point, v),
        "torch vhp": lambda: torch.autograd.functional.vhp(of_tuple, point, v),
        "hvp": lambda: ours.hvp(of_tuple, point, v),
        "kept": lambda: hvp_fn(v),
    }
    # A burst of other work on the machine can spoil a measurement: up to three are made.
    for _ in range(3):
        seconds = interleaved(functions)
        costs = {name: value / seconds["gradient"] for name, value in seconds.items()}
        ratio, kept = seconds["hvp"] / seconds["torch hvp"], seconds["kept"] / seconds["torch hvp"]
        print(f"\n{build.__name__:<12}" + "  ".join(f"{name} {cost:.2f}" for name, cost in costs.items()))
        print(f"{'':<12}hvp / torch hvp {ratio:.2f}  kept / torch hvp {kept:.2f}")
        if ratio <= 0.65 and kept <= 0.5:
            break
    assert ratio <= 0.65
    assert kept <= 0.5
