"""Cost of operator products in gradients of the same function, beside torch's and curvlinops', interleaved; medians.

python -m pytest tests/benchmarks/test_products.py -s        (curvlinops: pip install -e ".[bench]")
"""

import pytest
import torch
import torch.nn.functional as F
from bench import BUILDERS, interleaved

import secondorder.functional as functional
from secondorder import GaussNewton, Hessian

# In gradients: a product with the Hessian and with the Gauss-Newton matrix on the kept graph.
LIMITS = {"mlp": (1.35, 1.2), "cnn": (1.45, 1.25), "transformer": (2.4, 1.7)}
WIDTH = 16


def case(build):
    """The functions that are timed, by name; those of a block are divided by its width later."""
    model, inputs, targets = build()
    parameters = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in parameters)

    def loss_of(*values):
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))
        return F.cross_entropy(outputs, targets)

    outputs = model(inputs)
    loss = F.cross_entropy(outputs, targets)
    H, G = Hessian(loss, parameters), GaussNewton(loss, outputs, parameters)
    H_fresh = Hessian(loss, parameters, keep_graph=False)
    G_fresh = GaussNewton(loss, outputs, parameters, keep_graph=False)
    v = torch.randn(H.shape[0])
    V = torch.randn(H.shape[0], WIDTH)
    parts = tuple(
        part.view(p.shape)
        for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
    )
    H @ V, G @ V

    def gradient():
        torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)

    def double_backward():
        grads = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters, create_graph=True)
        torch.autograd.grad(grads, parameters, parts)

    rows = {
        "gradient": gradient,
        "torch hvp": lambda: torch.autograd.functional.hvp(loss_of, values, parts),
        "torch vhp": lambda: torch.autograd.functional.vhp(loss_of, values, parts),
        "torch.func jvp(grad)": lambda: torch.func.jvp(
            torch.func.grad(loss_of, tuple(range(len(values)))), values, parts
        ),
        "double backward": double_backward,
        "hvp": lambda: functional.hvp(loss_of, values, parts),
        "H fresh": lambda: H_fresh @ v,
        "H @ v": lambda: H @ v,
        f"H @ V, {WIDTH} columns": lambda: H @ V,
        "G fresh": lambda: G_fresh @ v,
        "G @ v": lambda: G @ v,
        f"G @ V, {WIDTH} columns": lambda: G @ V,
    }
    rows.update(curvlinops_rows(model, inputs, targets, parameters, v))
    return rows


def curvlinops_rows(model, inputs, targets, parameters, v):
    try:
        import curvlinops
    except ImportError:
        return {}
    options = dict(check_deterministic=False)
    arguments = (model, torch.nn.CrossEntropyLoss(), parameters, [(inputs, targets)])
    H = curvlinops.HessianLinearOperator(*arguments, **options)
    G = curvlinops.GGNLinearOperator(*arguments, **options)
    return {"curvlinops H @ v": lambda: H @ v, "curvlinops G @ v": lambda: G @ v}


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_operator_products(build):
    name = build.__name__
    rows = case(build)
    most_H, most_G = LIMITS[name]
    # A burst of other work on the machine can spoil a measurement: up to three are made.
    for _ in range(3):
        seconds = interleaved(rows, rounds=11)
        cost = {
            row: value / seconds["gradient"] / (WIDTH if "columns" in row else 1)
            for row, value in seconds.items()
        }
        print(f"\n{name}: gradients a product (a column)")
        for row, value in cost.items():
            print(f"  {row:<24}{value:6.2f}")
        block = {letter: cost[f"{letter} @ V, {WIDTH} columns"] for letter in "HG"}
        speedup = {
            letter: cost[f"curvlinops {letter} @ v"] / cost[f"{letter} @ v"]
            for letter in "HG"
            if f"curvlinops {letter} @ v" in cost
        }
        print("  times curvlinops' speed: " + ", ".join(f"{k} {s:.2f}" for k, s in speedup.items()))
        is_fine = (
            cost["H @ v"] <= most_H
            and cost["G @ v"] <= most_G
            and all(block[letter] <= 1.1 * cost[f"{letter} @ v"] for letter in "HG")
            and all(s >= 1.7 for s in speedup.values())
            and max(cost["H fresh"], cost["hvp"]) <= 1.1 * cost["double backward"]
        )
        if is_fine:
            break
    assert cost["H @ v"] <= most_H
    assert cost["G @ v"] <= most_G
    # Within a tenth: the same arithmetic, measured twice.
    assert all(block[letter] <= 1.1 * cost[f"{letter} @ v"] for letter in "HG")
    assert max(cost["H fresh"], cost["hvp"]) <= 1.1 * cost["double backward"]
    assert all(s >= 1.7 for s in speedup.values())
