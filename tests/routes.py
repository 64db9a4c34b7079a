"""Every public route to a derivative, as a dense matrix; ``python tests/routes.py`` counts over the survey.

``HESSIANS``, ``JACOBIANS`` and ``GAUSS_NEWTONS`` map names to functions of an operation and a point. The
truth is taken from central differences of values and gradients.
"""

from __future__ import annotations

import collections
import sys
import warnings

import survey
import torch

from secondorder import GaussNewton, Hessian, Jacobian, functional, ggnvp

# Differences of fourth order with steps of 1e-3: h^4 = 1e-12 times a fifth derivative, and rounding over h.
STEP, TOLERANCE = 1e-3, 2e-6


def basis(x):
    return torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)


def columns(product, x):
    return torch.stack([product(e).detach().reshape(-1) for e in basis(x)], dim=1)


def flat(operation):
    """The outputs of an operation as one vector."""
    return lambda x: torch.cat([t.reshape(-1) for t in survey.outputs(operation, x)])


def loss(z):
    """A smooth function of outputs with a full Hessian."""
    return (z.sin() * survey.make(*z.shape, seed=4)).sum() + z.pow(4).sum() + z.sum() ** 2


def _hvp(**options):
    return lambda f, x: columns(lambda e: functional.hvp(f, x, e, **options)[1], x)


def _hessian(**options):
    return lambda f, x: functional.hessian(f, x, **options).detach().reshape(x.numel(), -1)


def _jacobian(**options):
    return lambda f, x: functional.jacobian(f, x, **options).reshape(-1, x.numel())


def _vjp(f, x):
    rows = torch.eye(f(x).numel(), dtype=x.dtype)
    return torch.stack([functional.vjp(f, x, row)[1].reshape(-1) for row in rows])


FORWARD = dict(vectorize=True, outer_jacobian_strategy="forward-mode")
HESSIANS = {
    "hvp": _hvp(),
    "hvp double-backward": _hvp(strategy="double-backward"),
    "hvp create_graph": _hvp(create_graph=True),
    "hvp forward-over-reverse": _hvp(strategy="forward-over-reverse"),
    "vhp": lambda f, x: columns(lambda e: functional.vhp(f, x, e)[1], x),
    "hvps": lambda f, x: functional.hvps(f, x, basis(x))[1].reshape(x.numel(), -1),
    "linearize_grad": lambda f, x: columns(functional.linearize_grad(f, x)[2], x),
    "hessian": _hessian(),
    "hessian vectorize": _hessian(vectorize=True),
    "hessian chunk_size": _hessian(chunk_size=2),
    "hessian forward-mode": _hessian(**FORWARD),
    "Hessian": lambda f, x: Hessian.of(f, x).dense(),
    "Hessian batched": lambda f, x: Hessian.of(f, x, batched=True).dense(),
    "Hessian looped": lambda f, x: Hessian.of(f, x, batched=False).dense(),
    "Hessian fresh": lambda f, x: Hessian.of(f, x, keep_graph=False).dense(),
}
JACOBIANS = {
    "vjp": _vjp,
    "jvp": lambda f, x: columns(lambda e: functional.jvp(f, x, e)[1], x),
    "jvp forward-mode": lambda f, x: columns(
        lambda e: functional.jvp(f, x, e, strategy="forward-mode")[1], x
    ),
    "linearize": lambda f, x: columns(functional.linearize(f, x)[1], x),
    "linearize batched": lambda f, x: functional.linearize(f, x)[1](basis(x), batched=True).T,
    "jacobian": _jacobian(),
    "jacobian vectorize": _jacobian(vectorize=True),
    "jacobian forward-mode": _jacobian(vectorize=True, strategy="forward-mode"),
    "Jacobian": lambda f, x: Jacobian.of(f, x).dense(),
    "Jacobian batched": lambda f, x: Jacobian.of(f, x, batched=True).dense(),
    "Jacobian.T batched": lambda f, x: Jacobian.of(f, x, batched=True).T.dense().T,
}
GAUSS_NEWTONS = {
    "ggnvp": lambda f, x: columns(lambda e: ggnvp(f, loss, x, e)[1], x),
    "GaussNewton": lambda f, x: GaussNewton.of(f, loss, x).dense(),
    "GaussNewton batched": lambda f, x: GaussNewton.of(f, loss, x, batched=True).dense(),
}


def difference(func, x):
    """Jacobian of a function with one flat output, by central differences of fourth order."""
    steps = [STEP * e for e in basis(x)]
    rows = [8 * (func(x + e) - func(x - e)) - (func(x + 2 * e) - func(x - 2 * e)) for e in steps]
    return torch.stack(rows, dim=1) / (12 * STEP)


def verdicts(operation, x, hessians=HESSIANS, jacobians=JACOBIANS, gauss_newtons=GAUSS_NEWTONS):
    """Pairs of a route and what came of it: "right", "wrong", or the exception."""
    scalar, outputs = survey.objective(operation), flat(operation)
    J = difference(lambda p: outputs(p).detach(), x)
    H = difference(lambda p: functional.vjp(scalar, p)[1].reshape(-1), x)
    middle = torch.autograd.functional.hessian(loss, outputs(x).detach())
    for table, function, truth in (
        (hessians, scalar, H),
        (jacobians, outputs, J),
        (gauss_newtons, outputs, J.T @ middle @ J),
    ):
        for route, matrix in table.items():
            try:
                error = float((matrix(function, x) - truth).norm()) / max(float(truth.norm()), 1.0)
            except Exception as exception:
                yield route, exception
                continue
            yield route, "right" if error <= TOLERANCE else "wrong"


def main(names):
    warnings.simplefilter("ignore")
    table = collections.defaultdict(collections.Counter)
    for name in names or survey.OPERATIONS:
        operation, starts = survey.OPERATIONS[name]
        for x in starts:
            try:
                found = list(verdicts(operation, x))
            except RuntimeError as error:
                print(f"{name}: no gradient: {str(error)[:80]}")
                continue
            for route, verdict in found:
                is_clear = type(verdict).__module__.startswith("secondorder") or "checkpoint" in str(verdict)
                kind = verdict if isinstance(verdict, str) else "clear error" if is_clear else "raw error"
                table[route][kind] += 1
                if kind != "right":
                    print(f"{name} {tuple(x.shape)} {route}: {kind} {str(verdict)[:90]}")
    kinds = ("right", "clear error", "raw error", "wrong")
    print(f"{'route':<26}" + "".join(f"{kind:>12}" for kind in kinds))
    for route, counts in table.items():
        print(f"{route:<26}" + "".join(f"{counts[kind]:>12}" for kind in kinds))


if __name__ == "__main__":
    main(sys.argv[1:])
