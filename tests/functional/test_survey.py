"""Every public route to a derivative of every surveyed operation, against central differences."""

import pytest
import routes
import survey
import torch

from secondorder import functional
from secondorder.autodiff.graph import WrongDerivativeError
from secondorder.autodiff.ladder import MissingDerivativeError

# Torch loops by itself where it has no batching rule, and says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    # torch 2.11 and 2.12 say so also where checks are asked for.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

# Where torch has no right derivative and there is no decomposition here: what is said instead. Of all routes,
# or of those in forward mode or with ``create_graph``.
FORWARD = {"hvp forward-over-reverse", "jvp forward-mode", "jacobian forward-mode", "hessian forward-mode"}
ERRORS = {
    "ctc": (None, "_ctc_loss.* has no (second|forward) derivative in torch"),
    "grid_sample": (FORWARD, "grid_sampler_2d has no forward derivative"),
    "sparse_times_dense": (FORWARD, "_sparse_addmm has no forward derivative"),
    "scatter_reduce": (FORWARD, r"scatter_reduce with reduce='prod' is wrong in torch's forward mode"),
    "checkpointed_norm": ({"hvp create_graph"}, "under torch.utils.checkpoint was computed again"),
}
# Without a first derivative.
UNDIFFERENTIABLE = {"reentrant_checkpoint"}
if torch.__version__ < (2, 12):
    UNDIFFERENTIABLE.add("aminmax")
    # What a checkpoint is made of has no forward mode there.
    ERRORS["checkpoint"] = ERRORS["checkpointed_attention"] = (FORWARD, "implement the jvp function")
    ERRORS["checkpointed_norm"] = (
        FORWARD | {"hvp create_graph"},
        "implement the jvp function|under torch.utils.checkpoint was computed again",
    )
    ERRORS["grid_sample"] = (None, "grid_sampler_2d.* has no (second|forward) derivative")
CASES = [
    pytest.param(name, index, id=f"{name}-{'x'.join(map(str, x.shape)) or 'scalar'}")
    for name, (_, starts) in survey.OPERATIONS.items()
    for index, x in enumerate(starts)
    if name not in UNDIFFERENTIABLE
]
QUICK = dict(
    hessians={route: routes.HESSIANS[route] for route in ("hvp", "hessian vectorize")},
    jacobians={route: routes.JACOBIANS[route] for route in ("jvp",)},
    gauss_newtons={},
)


def check(name, index, **tables):
    operation, starts = survey.OPERATIONS[name]
    clear_routes, text = ERRORS.get(name, ((), ""))
    for route, verdict in routes.verdicts(operation, starts[index], **tables):
        if isinstance(verdict, Exception):
            assert clear_routes is None or route in clear_routes, f"{route}: {verdict!r}"
            assert isinstance(verdict, RuntimeError | MissingDerivativeError | WrongDerivativeError)
            with pytest.raises(RuntimeError, match=text):
                raise verdict
        else:
            assert verdict == "right", route


@pytest.mark.parametrize("name", [name for name in survey.OPERATIONS if name not in UNDIFFERENTIABLE])
def test_products_of_one_shape_are_right(name):
    check(name, 0, **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), CASES)
def test_every_route_and_shape_is_right(name, index):
    check(name, index)


def test_how_much_is_surveyed():
    assert len(survey.OPERATIONS) >= 210
    assert all(len({tuple(x.shape) for x in starts}) >= 3 for _, starts in survey.OPERATIONS.values())


def test_reentrant_checkpoints_are_refused():
    function, (x, *_) = survey.OPERATIONS["reentrant_checkpoint"]
    with pytest.raises(RuntimeError, match="use_reentrant"):
        functional.hvp(survey.objective(function), x, torch.ones_like(x))
