"""What users write into parameter groups is checked at the step, by name."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import optim

OPTIMIZERS = {"newton": optim.Newton, "hessian_free": optim.HessianFree, "gauss_newton": optim.GaussNewton}
NOT_NEGATIVE, COUNTS = ("lr", "weight_decay"), ("max_iter", "max_trials", "direct_limit")
POSITIVE = ("damping", "radius", "damping_scale", "damping_growth", "rtol", "progress")
NUMBERS = [*NOT_NEGATIVE, *POSITIVE, *COUNTS, "decay"]
KINDS = {
    "numpy": lambda value: np.asarray(value)[()],
    "array": np.asarray,
    "tensor": torch.tensor,
    "vector": lambda value: torch.tensor([value]),
}
BAD = [float("nan"), float("inf"), -1, "0.1", None, True, [0.1], torch.ones(2), torch.tensor(True), 1 + 1j]
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def problem():
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    return w, lambda: F.mse_loss((X @ w).tanh(), X.sum(1).sign())


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_of_the_range(make, name, bad):
    w, closure = problem()
    optimizer = make([w])
    if name not in optimizer.defaults or (bad is None and optimizer.defaults[name] is None):
        return  # None: from the function
    optimizer.step(closure)
    before, value = w.detach().clone(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = bad
    with pytest.raises(ValueError, match=f"{name} must be |Tensor {name} must be 1-element"):
        optimizer.step(closure)
    assert torch.equal(w.detach(), before)
    optimizer.param_groups[0][name] = value
    optimizer.step(closure)
    if name != "damping_growth":
        with pytest.raises(ValueError, match=f"{name} must be |Tensor {name} must be 1-element"):
            make([w], **{name: bad})
    with pytest.raises(ValueError, match=f"{name} must be |Tensor {name} must be 1-element"):
        make([{"params": [w], name: bad}])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_any_kind_is_that_number(make, name, kind):
    runs = []
    for convert in (lambda value: value, KINDS[kind]):
        w, closure = problem()
        # A formed matrix is made in batches or by a loop, as is faster: two runs may differ by rounding.
        optimizer = make([w], **({} if make is optim.HessianFree else {"solver": "cg"}))
        if name not in optimizer.defaults:
            return
        number = 3 if name in COUNTS else 0.25  # the same in single precision
        optimizer.param_groups[0][name] = convert(number)
        for _ in range(3):
            optimizer.step(closure)
        runs.append((w.detach().clone(), optimizer.report))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        if name != "lr":
            assert type(optimizer.param_groups[0][name]) in (int, float)
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_a_tensor_rate_stays_the_tensor_of_the_user(make):
    w, closure = problem()
    rate = torch.tensor(0.5)
    optimizer = make([w], lr=rate)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] is rate


def test_an_option_that_was_deleted(make):
    w, closure = problem()
    optimizer = make([w])
    del optimizer.param_groups[0]["max_trials"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] must have every option, but lacks max_trials"):
        optimizer.step(closure)


def test_a_joint_option_of_one_group(make):
    """Written to the second group alone it would be passed over."""
    w, closure = problem()
    other = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = make([{"params": [w]}, {"params": [other]}])
    name = "damping" if "damping" in optimizer.defaults else "radius"
    optimizer.param_groups[1][name] = 0.1
    with pytest.raises(ValueError, match=f"{name} must be the same in all parameter groups"):
        optimizer.step(closure)
    optimizer.param_groups[0][name] = 0.1
    optimizer.step(closure)


def test_a_copy_is_checked_too(make):
    w, closure = problem()
    again = copy.deepcopy(make([w]))
    again.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr must be a non-negative number, got nan"):
        again.step(closure)


@pytest.mark.parametrize("value", ["no", -1, 0.1, float("nan"), None])
@pytest.mark.parametrize("name", ["maximize", "strict"])
def test_switches_are_booleans(name, value):
    """By its truth value "no" would maximise."""
    p = torch.ones(1, requires_grad=True)
    optimizer = optim.GaussNewton([p])
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        optimizer.step(lambda: p.square().sum())
    with pytest.raises(ValueError, match=f"{name} must be True or False"):
        optim.GaussNewton([p], **{name: value})


def test_a_number_that_no_float_holds():
    p = torch.ones(1, requires_grad=True)
    optimizer = optim.GaussNewton([p])
    optimizer.param_groups[0]["damping"] = 10**400
    with pytest.raises(ValueError, match="damping must be a positive number"):
        optimizer.step(lambda: p.square().sum())
