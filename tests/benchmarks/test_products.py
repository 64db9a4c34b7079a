"""Cost of operator products in gradients of the same function, beside torch's and curvlinops'.

Interleaved, three calls in a row each, medians:

python -m pytest tests/benchmarks/test_products.py -s        (curvlinops: pip install -e ".[bench]")
"""

import pytest
import torch
import torch.nn.functional as F
from bench import BUILDERS, interleaved
from torch import nn

import secondorder.functional as functional
from secondorder import GaussNewton, Hessian

# In gradients: a product with the Hessian and with the Gauss-Newton matrix on the kept graph.
LIMITS = {"mlp": (1.35, 1.2), "cnn": (1.45, 1.25), "transformer": (2.2, 1.45)}
# ``functional.hvp`` in calls of torch's; of the MLP the products of matrices alone are .51.
PARTS_OF_TORCHS = {"mlp": 0.56, "cnn": 0.5, "transformer": 0.53}
WIDTH = 16
# Noise allowed between two measurements of the same arithmetic.
SAME = 1.1
LEAST_SPEEDUP = 1.7


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

    def one_by_one(A):
        return lambda: torch.stack([A @ v for v in V.unbind(1)], dim=1)

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
        f"H, {WIDTH} columns, one by one": one_by_one(H),
        "G fresh": lambda: G_fresh @ v,
        "G @ v": lambda: G @ v,
        f"G @ V, {WIDTH} columns": lambda: G @ V,
        f"G, {WIDTH} columns, one by one": one_by_one(G),
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
    # A burst of other work on the machine can spoil a measurement: up to three are made.
    for _ in range(3):
        seconds = interleaved(rows, rounds=7, calls=3)
        cost = {
            row: value / seconds["gradient"] / (WIDTH if "columns" in row else 1)
            for row, value in seconds.items()
        }
        print(f"\n{name}: gradients a product (a column)")
        for row, value in cost.items():
            print(f"  {row:<30}{value:6.2f}")
        speedup = {
            letter: cost[f"curvlinops {letter} @ v"] / cost[f"{letter} @ v"]
            for letter in "HG"
            if f"curvlinops {letter} @ v" in cost
        }
        print("  times curvlinops' speed: " + ", ".join(f"{k} {s:.2f}" for k, s in speedup.items()))
        failures = exceeded(cost, name, speedup)
        if not failures:
            break
    assert not failures


def exceeded(cost, name, speedup):
    """The criteria that a measurement misses; ``SAME`` where the same arithmetic is measured twice."""
    limits = {
        "H @ v": LIMITS[name][0],
        "G @ v": LIMITS[name][1],
        "H fresh": SAME * cost["double backward"],
        "hvp": PARTS_OF_TORCHS[name] * cost["torch hvp"],
    }
    for letter in "HG":
        limits[f"{letter} @ V, {WIDTH} columns"] = SAME * cost[f"{letter}, {WIDTH} columns, one by one"]
    failures = {row: (cost[row], limit) for row, limit in limits.items() if cost[row] > limit}
    slow = {
        f"times curvlinops' speed, {k}": (s, LEAST_SPEEDUP) for k, s in speedup.items() if s < LEAST_SPEEDUP
    }
    return failures | slow


# A block of vectors as it comes may be this much slower than by the best width of these.
WIDTHS = (1, 8, 16, 32, 64, 100)
SLOWER = 1.25


@pytest.mark.slow
@pytest.mark.parametrize("samples", [50, 1000])
def test_blocks_are_cut_to_the_width_that_is_best(samples):
    """With few samples a block of 100 is best whole; with many, one by one or in narrow pieces."""
    model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 32), nn.Tanh(), nn.Linear(32, 10))
    x, targets = torch.randn(samples, 64), torch.randint(10, (samples,))
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), targets)
    auto, whole, loop = (Hessian(loss, parameters, batched=batched) for batched in (None, True, False))
    V = torch.randn(auto.shape[0], 100)

    def pieces(width):
        A = loop if width == 1 else whole
        return lambda: torch.cat([A @ part for part in V.split(width, dim=1)], dim=1)

    # What is measured with the first block is remembered.
    torch.testing.assert_close(auto @ V, loop @ V, rtol=1e-3, atol=1e-4)
    rows = {width: pieces(width) for width in WIDTHS}
    for _ in range(3):
        seconds = interleaved({"as it comes": lambda: auto @ V, **rows}, rounds=7)
        best = min(seconds[width] for width in WIDTHS)
        print(f"\n{samples} samples, width {auto._pieces.width}, in times of the best one:")
        print("  " + ", ".join(f"{row} {value / best:.2f}" for row, value in seconds.items()))
        if seconds["as it comes"] <= SLOWER * best:
            return
    raise AssertionError(f"{seconds['as it comes'] / best:.2f} times as slow as the best width")
