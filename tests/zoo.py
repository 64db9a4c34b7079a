"""Every problem that a test uses, with its source; ``test_zoo.py`` checks the records themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOUBLE = torch.float64


class Problem(NamedTuple):
    """A smooth function, the sum of squares of ``residual``, with published start and minimiser."""

    name: str
    func: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    start_value: float
    minimizer: tuple[float, ...]
    minimum: float
    reference: str

    def x0(self) -> Tensor:
        return torch.tensor(self.start, dtype=DOUBLE)


def _problem(name, residual, start, start_value, minimizer, reference):
    def func(x):
        return residual(x).square().sum()

    return Problem(name, func, residual, start, start_value, minimizer, 0.0, reference)


def _rosenbrock(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def _powell_singular(x):
    return torch.stack(
        [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2]
    )


def _beale(x):
    targets = torch.tensor([1.5, 2.25, 2.625], dtype=x.dtype)
    powers = torch.stack([x[1], x[1] ** 2, x[1] ** 3])
    return targets - x[0] * (1 - powers)


def _helical_valley(x):
    angle = torch.atan(x[1] / x[0]) / (2 * torch.pi) + 0.5 * (x[0] < 0)
    return torch.stack(
        [10 * (x[2] - 10 * angle), 10 * ((x[0] ** 2 + x[1] ** 2).sqrt() - 1), x[2]],
    )


def _wood(x):
    return torch.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            10**-0.5 * (x[1] - x[3]),
        ]
    )


MGH = "Moré, Garbow and Hillstrom (1981), Testing unconstrained optimization software, problem "
PROBLEMS = [
    _problem("rosenbrock", _rosenbrock, (-1.2, 1.0), 24.2, (1.0, 1.0), MGH + "1"),
    _problem("beale", _beale, (1.0, 1.0), 14.203125, (3.0, 0.5), MGH + "5"),
    _problem("helical_valley", _helical_valley, (-1.0, 0.0, 0.0), 2500.0, (1.0, 0.0, 0.0), MGH + "7"),
    _problem("powell_singular", _powell_singular, (3.0, -1.0, 0.0, 1.0), 215.0, (0.0,) * 4, MGH + "13"),
    _problem("wood", _wood, (-3.0, -1.0, -3.0, -1.0), 19192.0, (1.0,) * 4, MGH + "14"),
]


class Equations(NamedTuple):
    """As many equations as unknowns. NaN and None: not published."""

    name: str
    residual: Callable[[Tensor], Tensor]
    start: Tensor
    start_value: float
    solution: tuple[float, ...] | None
    reference: str


def _powell_badly_scaled(x):
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def _broyden_tridiagonal(x):
    before, after = F.pad(x[:-1], (1, 0)), F.pad(x[1:], (0, 1))
    return (3 - 2 * x) * x - before - 2 * after + 1


def _trigonometric(x):
    i = torch.arange(1, len(x) + 1, dtype=x.dtype)
    return len(x) - x.cos().sum() + i * (1 - x.cos()) - x.sin()


def _discrete_boundary_value(x):
    h = 1 / (len(x) + 1)
    t = h * torch.arange(1, len(x) + 1, dtype=x.dtype)
    before, after = F.pad(x[:-1], (1, 0)), F.pad(x[1:], (0, 1))
    return 2 * x - before - after + h**2 * (x + t + 1) ** 3 / 2


def _parabola(n):
    t = torch.arange(1, n + 1, dtype=DOUBLE) / (n + 1)
    return t * (t - 1)


def _chandrasekhar(h):
    """With albedo 0.9, by the midpoint rule."""
    n = len(h)
    mu = (torch.arange(1, n + 1, dtype=h.dtype) - 0.5) / n
    return h - 1 / (1 - CHANDRASEKHAR_ALBEDO / (2 * n) * (mu[:, None] / (mu[:, None] + mu)) @ h)


def _freudenstein_roth(x):
    return torch.stack(
        [-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]]
    )


def _equations(name, residual, start, start_value, solution, reference):
    return Equations(name, residual, torch.as_tensor(start, dtype=DOUBLE), start_value, solution, reference)


CHANDRASEKHAR_ALBEDO = 0.9
KELLEY = "Kelley (1995), Iterative methods for linear and nonlinear equations, section 5.6"
EQUATIONS = [
    _equations("rosenbrock", _rosenbrock, (-1.2, 1.0), 24.2, (1.0, 1.0), MGH + "1"),
    _equations(
        "powell_badly_scaled",
        _powell_badly_scaled,
        (0.0, 1.0),
        1 + (math.exp(-1) - 1e-4) ** 2,
        (1.098159e-5, 9.106146),
        MGH + "3",
    ),
    _equations("broyden_tridiagonal", _broyden_tridiagonal, [-1.0] * 10, 21.0, None, MGH + "30"),
    _equations(
        "discrete_boundary_value", _discrete_boundary_value, _parabola(10), math.nan, None, MGH + "28"
    ),
    _equations("chandrasekhar", _chandrasekhar, [1.0] * 100, math.nan, None, KELLEY),
]

# From these starts the sum of squares falls to a minimum that is no root: start, sum of squares there.
NO_ROOTS = [
    (
        _equations("freudenstein_roth", _freudenstein_roth, (0.5, -2.0), 400.5, (5.0, 4.0), MGH + "2"),
        48.98425,
    ),
    (
        _equations("trigonometric", _trigonometric, [0.1] * 10, 7.0757594662226e-3, (0.0,) * 10, MGH + "26"),
        2.795056e-5,
    ),
]


class NetworkCase(NamedTuple):
    """A model, a loss and a batch, in float64."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    def outputs(self) -> Tensor:
        return self.model(self.inputs)

    def value(self) -> Tensor:
        return self.loss(self.outputs(), self.targets)

    def loss_of(self, *parameters: Tensor) -> Tensor:
        """The loss as a function of the parameters, for dense references."""
        names = [name for name, _ in self.model.named_parameters()]
        outputs = torch.func.functional_call(
            self.model, dict(zip(names, parameters, strict=True)), (self.inputs,)
        )
        return self.loss(outputs, self.targets)

    def outputs_of(self, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in self.model.named_parameters()]
        return torch.func.functional_call(
            self.model, dict(zip(names, parameters, strict=True)), (self.inputs,)
        )


def _mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def _tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 3))


class _Scaled(nn.Module):
    """A parameter without dimensions, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(2))
        self.mlp = _mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * self.scale.exp()


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0][:, -1])


def _batch_norm() -> nn.Module:
    """In evaluation mode, with running statistics that are not trivial."""
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0])
    return nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).eval()


class Attention(nn.Module):
    """A transformer block around ``scaled_dot_product_attention``, with a linear head."""

    def __init__(self, width: int = 4, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 6), nn.GELU())
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return self.head(self.mlp(self.norm(x + attended)).mean(1))


NETWORKS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor], tuple[int, ...], str]
] = {
    "mlp_cross_entropy": (lambda: _mlp(3), F.cross_entropy, (9, 4), "classes"),
    "mlp_mse": (lambda: _mlp(2), F.mse_loss, (9, 4), "values"),
    "mlp_bce": (lambda: _mlp(2), F.binary_cross_entropy_with_logits, (9, 4), "binary"),
    "tied_weights": (_tied, F.cross_entropy, (9, 4), "classes"),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)),
        F.cross_entropy,
        (5, 1, 4, 4),
        "classes",
    ),
    "cnn_batch_norm": (_batch_norm, F.cross_entropy, (5, 1, 4, 4), "classes"),
    "lstm": (_LSTM, F.cross_entropy, (4, 3, 2), "classes"),
    "scalar_and_unused": (_Scaled, F.mse_loss, (6, 4), "values"),
}


def network(name: str) -> NetworkCase:
    build, loss, shape, kind = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build().to(DOUBLE)
    inputs = torch.randn(shape, generator=generator, dtype=DOUBLE)
    outputs = model(inputs)
    if kind == "classes":
        targets = torch.randint(outputs.shape[1], (shape[0],), generator=generator)
    elif kind == "binary":
        targets = torch.randint(2, outputs.shape, generator=generator).to(DOUBLE)
    else:
        targets = torch.randn(outputs.shape, generator=generator, dtype=DOUBLE)
    return NetworkCase(name, model, loss, inputs, targets)


def spd_matrix(n: int, condition: float, seed: int) -> Tensor:
    """Symmetric positive definite, eigenvalues spaced evenly in the logarithm from 1 to ``condition``."""
    return _with_spectrum(
        torch.logspace(0, torch.log10(torch.tensor(condition)).item(), n, dtype=DOUBLE), seed
    )


def indefinite_matrix(n: int, seed: int) -> Tensor:
    """Symmetric with eigenvalues of both signs, none closer to zero than 0.5."""
    values = torch.linspace(-2, 3, n, dtype=DOUBLE)
    return _with_spectrum(torch.where(values >= 0, values + 0.5, values - 0.5), seed)


def _with_spectrum(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=DOUBLE))[0]
    return basis @ torch.diag(values) @ basis.T


def _spectra() -> dict[str, Tensor]:
    """Eigenvalues of operators of 300 rows. ETW: Epperly, Tropp and Webber (2024), XTrace, section 4.1."""
    n = 300
    i = torch.arange(1, n + 1, dtype=DOUBLE)
    bulk = torch.linspace(-0.2, 1, n - 10, dtype=DOUBLE)
    return {
        "flat": 3 - 2 * (i - 1) / (n - 1),  # ETW
        "poly": i**-2,  # ETW
        "exp": 0.7**i,  # ETW
        "step": torch.where(i <= 20, 1.0, 1e-3).to(DOUBLE),  # ETW, with a step that fits n
        "low_rank": torch.where(i <= 8, 9 - i, 0.0),
        # A bulk around zero and one outlier a class: Ghorbani, Krishnan and Xiao (2019), figure 3.
        "outliers": torch.cat([bulk, 10 * torch.arange(1, 11, dtype=DOUBLE)]),
        "multiple": torch.cat(
            [torch.linspace(0, 5, n - 5, dtype=DOUBLE), torch.full((5,), 6.0, dtype=DOUBLE)]
        ),
        # A copy at the end of a spectrum without gaps, where one Krylov space does not see it.
        "double_edge": torch.cat([torch.linspace(0, 1, n - 1, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)]),
        "indefinite": torch.linspace(-1, 1.5, n, dtype=DOUBLE),
        # Each magnitude twice, with both signs.
        "two_signs": torch.linspace(-1, 1, n, dtype=DOUBLE),
    }


def with_named_spectrum(name: str, seed: int = 0) -> Tensor:
    """A symmetric matrix of shape (300, 300) with the eigenvalues ``SPECTRA[name]``."""
    return _with_spectrum(SPECTRA[name], seed)


def vector(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class System(NamedTuple):
    """``A x = b``, symmetric; ``kind``: words of "definite indefinite singular inconsistent"."""

    A: Tensor
    b: Tensor
    kind: str


def _systems() -> dict[str, System]:
    generic = vector(40, 11)
    indefinite = indefinite_matrix(40, 5)
    lowest = torch.linalg.eigh(indefinite)[1][:, 0]
    ranks = torch.cat([torch.zeros(10), torch.linspace(1, 20, 30)]).to(DOUBLE)
    singular = _with_spectrum(ranks, 6)
    singular_indefinite = _with_spectrum(torch.where(torch.arange(40) % 2 == 0, ranks, -ranks), 7)
    clusters = torch.tensor([1.0, 1e2, 1e4], dtype=DOUBLE).repeat_interleave(10)
    scales = torch.logspace(-3, 3, 40, dtype=DOUBLE)
    well = spd_matrix(40, 10.0, 8)
    return {
        "definite": System(spd_matrix(40, 1e2, 1), generic, "definite"),
        "condition_1e5": System(spd_matrix(40, 1e5, 2), generic, "definite"),
        "condition_1e12": System(spd_matrix(40, 1e12, 3), generic, "definite"),
        "clustered": System(_with_spectrum(clusters, 4), vector(30, 12), "definite"),
        "badly_scaled": System(scales[:, None] * well * scales, generic, "definite"),
        "one_by_one": System(torch.full((1, 1), 3.0, dtype=DOUBLE), vector(1, 13), "definite"),
        "identity": System(torch.eye(5, dtype=DOUBLE), vector(5, 14), "definite"),
        "zero_right_hand_side": System(spd_matrix(40, 1e2, 1), 0 * generic, "definite"),
        "indefinite": System(indefinite, generic, "indefinite"),
        "hard_case": System(indefinite, generic - (lowest @ generic) * lowest, "indefinite"),
        "negative": System(-spd_matrix(40, 1e2, 1), generic, "indefinite"),
        "one_by_one_negative": System(torch.full((1, 1), -3.0, dtype=DOUBLE), vector(1, 13), "indefinite"),
        "saddle": System(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE), vector(2, 15), "indefinite"),
        "singular": System(singular, singular @ generic, "singular"),
        "singular_indefinite": System(
            singular_indefinite, singular_indefinite @ generic, "singular indefinite"
        ),
        "inconsistent": System(singular, generic, "inconsistent"),
        "inconsistent_indefinite": System(singular_indefinite, generic, "inconsistent indefinite"),
        "zero": System(torch.zeros(4, 4, dtype=DOUBLE), vector(4, 16), "inconsistent"),
    }


class Skewed(torch.autograd.Function):
    """Its backward is not the gradient of anything: the "Hessian" is not symmetric."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.flip(0) * torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view(x.shape)


SYSTEMS = _systems()
SPECTRA = _spectra()


class Box(NamedTuple):
    """A function to be minimised between bounds, with published start and solution."""

    name: str
    func: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    bounds: tuple[tuple[float | None, float | None], ...]
    minimizer: tuple[float, ...]
    minimum: float


def _hs(number, func, start, bounds, minimizer, minimum):
    return Box(f"hs{number}", func, start, bounds, minimizer, minimum)


def _hs5(x):
    return torch.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def _hs38(x):
    first = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 90 * (x[3] - x[2] ** 2) ** 2 + (1 - x[2]) ** 2
    return first + 10.1 * ((x[1] - 1) ** 2 + (x[3] - 1) ** 2) + 19.8 * (x[1] - 1) * (x[3] - 1)


def _hs110(x):
    logs = torch.log(x - 2).square() + torch.log(10 - x).square()
    return logs.sum() - x.prod().pow(0.2)


# Hock and Schittkowski (1981), Test examples for nonlinear programming codes: those with bounds alone.
_W = (598 / 1200) ** 0.5
_HS2 = 2 * _W * math.cos(math.acos(1 / (400 * _W**3)) / 3)
BOXES = [
    _hs(
        1,
        lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2,
        (-2.0, 1.0),
        ((None, None), (-1.5, None)),
        (1.0, 1.0),
        0.0,
    ),
    _hs(
        2,
        lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2,
        (1.0, 1.6),
        ((None, None), (1.5, None)),
        (_HS2, 1.5),
        100 * (1.5 - _HS2**2) ** 2 + (1 - _HS2) ** 2,
    ),
    _hs(
        3,
        lambda x: x[1] + 1e-5 * (x[1] - x[0]) ** 2,
        (10.0, 1.0),
        ((None, None), (0.0, None)),
        (0.0, 0.0),
        0.0,
    ),
    _hs(
        4, lambda x: (x[0] + 1) ** 3 / 3 + x[1], (1.125, 0.125), ((1.0, None), (0.0, None)), (1.0, 0.0), 8 / 3
    ),
    _hs(
        5,
        _hs5,
        (0.0, 0.0),
        ((-1.5, 4.0), (-3.0, 3.0)),
        (0.5 - math.pi / 3, -0.5 - math.pi / 3),
        -(3**0.5) / 2 - math.pi / 3,
    ),
    _hs(38, _hs38, (-3.0, -1.0, -3.0, -1.0), ((-10.0, 10.0),) * 4, (1.0,) * 4, 0.0),
    _hs(
        45,
        lambda x: 2 - x.prod() / 120,
        (2.0,) * 5,
        tuple((0.0, float(i)) for i in range(1, 6)),
        (1.0, 2.0, 3.0, 4.0, 5.0),
        1.0,
    ),
    _hs(110, _hs110, (9.0,) * 10, ((2.001, 9.999),) * 10, (9.350265791,) * 10, -45.77846971),
]
