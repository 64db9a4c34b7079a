"""The size at which losses round, against the same losses in double precision."""

import pytest
import torch
import torch.nn.functional as F

from optim.closure.evaluate import ClosureEvaluator
from optim.closure.rounding import rounding

EPS = torch.finfo(torch.float32).eps
# The estimate is that of the largest numbers; errors of samples cancel each other.
EXCESS = 1e3
SAMPLES, CLASSES = 64, 10
DRAWS = 20
TARGETS = torch.arange(SAMPLES) % CLASSES
SIGNS = 1.0 - 2.0 * (torch.arange(SAMPLES) % 2)


def by_hand(z):
    return -F.log_softmax(z, 1)[range(SAMPLES), TARGETS].mean()


def binary(loss, squash=lambda z: z, **options):
    return lambda z: loss(squash(z[:, 0]), (SIGNS.to(z.dtype) + 1) / 2, **options)


CROSS_ENTROPIES = {
    "mean": lambda z: F.cross_entropy(z, TARGETS),
    "sum": lambda z: F.cross_entropy(z, TARGETS, reduction="sum"),
    "none": lambda z: F.cross_entropy(z, TARGETS, reduction="none").mean(),
    "smoothed": lambda z: F.cross_entropy(z, TARGETS, label_smoothing=0.1),
    "scaled": lambda z: 1e3 * F.cross_entropy(z, TARGETS),
    "nll": lambda z: F.nll_loss(F.log_softmax(z, 1), TARGETS),
    "kl": lambda z: F.kl_div(F.log_softmax(z, 1), F.one_hot(TARGETS).to(z.dtype), reduction="batchmean"),
    "by hand": by_hand,
    "binary": binary(F.binary_cross_entropy_with_logits),
    "binary sum": binary(F.binary_cross_entropy_with_logits, reduction="sum"),
    "binary by sigmoid": binary(F.binary_cross_entropy, torch.sigmoid),
}


def evaluated(loss, outputs):
    outputs = outputs.clone().requires_grad_()
    return ClosureEvaluator(lambda: loss(outputs), [outputs]).record()


def logits(margin, name):
    """Where the right class leads by about ``margin``."""
    z = torch.randn(SAMPLES, CLASSES)
    if name.startswith("binary"):
        return (z + margin) * SIGNS[:, None]
    return z + margin * F.one_hot(TARGETS, CLASSES)


def worst_error(loss, draws):
    return max(abs(float(loss(z)) - float(loss(z.double()))) for z in draws)


@pytest.mark.parametrize("margin", [0, 4, 8, 12, 16])
@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_rounding_of_cross_entropies(name, margin):
    loss, draws = CROSS_ENTROPIES[name], [logits(margin, name) for _ in range(DRAWS)]
    error, size = worst_error(loss, draws), rounding(evaluated(loss, draws[0]))
    assert error <= EPS * size <= EXCESS * error


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_a_squared_error_rounds_at_its_size(scale):
    y = torch.randn(SAMPLES, CLASSES)
    draws = [y + scale * torch.randn(SAMPLES, CLASSES) for _ in range(DRAWS)]

    def loss(z):
        return F.mse_loss(z, y.to(z.dtype))

    evaluation = evaluated(loss, draws[0])
    assert rounding(evaluation) == evaluation.value
    # The sum rounds once more, and the values differ.
    assert worst_error(loss, draws) <= 2 * EPS * evaluation.value


def test_what_is_reduced_with_weights():
    z, weight = logits(2, ""), torch.linspace(0.5, 20.0, CLASSES)
    plain = rounding(evaluated(CROSS_ENTROPIES["mean"], z))
    weighted = rounding(evaluated(lambda z: F.cross_entropy(z, TARGETS, weight), z))
    assert 0.5 * plain <= weighted <= 2 * plain
    total = rounding(evaluated(lambda z: F.cross_entropy(z, TARGETS, weight, reduction="sum"), z))
    assert total >= SAMPLES * float(weight.mean()) * float(z.abs().amax(1).mean())


def test_losses_that_do_not_count():
    z = logits(16, "")
    both = evaluated(lambda z: F.cross_entropy(z, TARGETS) * 0 + z.square().mean(), z)
    assert rounding(both) == both.value
    unused = evaluated(lambda z: (F.cross_entropy(z, TARGETS), z.square().mean())[1], z)
    assert rounding(unused) == unused.value


def test_dense_targets_and_sums_of_losses():
    z = torch.randn(4, CLASSES, 6, 5)

    def dense(z):
        return F.cross_entropy(z, z.new_zeros(4, 6, 5).long(), reduction="sum")

    evaluation = evaluated(dense, z)
    sizes = float(z.abs().amax(1).sum())
    assert sizes <= rounding(evaluation) - evaluation.value <= 2 * sizes
    twice = evaluated(lambda z: dense(z) + 2 * dense(z), z)
    assert rounding(twice) == pytest.approx(3 * rounding(evaluation), rel=1e-5)


def test_half_precision_and_an_empty_batch():
    z = logits(16, "")
    half = evaluated(CROSS_ENTROPIES["none"], z.bfloat16())
    assert rounding(half) == pytest.approx(rounding(evaluated(CROSS_ENTROPIES["none"], z)), rel=0.02)
    empty = evaluated(lambda z: F.cross_entropy(z[:0], TARGETS[:0], reduction="sum") + z.sum(), z)
    assert rounding(empty) == abs(empty.value)
