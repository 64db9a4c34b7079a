"""Checkpoints: a resumed run is the run, and what does not fit is refused before anything changes."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import optim

OPTIMIZERS = {"newton": optim.Newton, "hessian_free": optim.HessianFree, "gauss_newton": optim.GaussNewton}
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def network(dtype=torch.float64, width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def steps(model, optimizer, count):
    x = X.to(next(model.parameters()).dtype)
    for _ in range(count):
        optimizer.step(lambda: F.cross_entropy(model(x), x[:, :3].argmax(1)))


def by_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def by_load(model, optimizer):
    again = copy.deepcopy(model)
    resumed = type(optimizer)(again.parameters())
    resumed.load_state_dict(by_file(optimizer.state_dict()))
    return again, resumed


def by_distributed(model, optimizer):
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    state = by_file(dcp.get_optimizer_state_dict(model, optimizer))
    again = copy.deepcopy(model)
    resumed = type(optimizer)(again.parameters())
    dcp.set_optimizer_state_dict(again, resumed, state)
    return again, resumed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", [by_load, by_distributed], ids=lambda way: way.__name__)
def test_a_resumed_run_is_the_uninterrupted_one(make, way, dtype):
    model = network(dtype)
    # A formed matrix is made in batches or by a loop, as is faster: two runs may differ by rounding.
    optimizer = make(model.parameters(), **({} if make is optim.HessianFree else {"solver": "cg"}))
    steps(model, optimizer, 3)
    again, resumed = way(model, optimizer)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for name, value in optimizer.state[p].items():
            assert resumed.state[q][name].dtype == value.dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(resumed.state[q][name], value)
    steps(model, optimizer, 3)
    steps(again, resumed, 3)
    assert resumed.report == optimizer.report
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_hooks_see_tensors_and_may_change_them():
    model = network(torch.bfloat16)
    optimizer = optim.HessianFree(model.parameters(), solver="cg")
    steps(model, optimizer, 2)
    saved, seen = optimizer.state_dict(), []
    again = optim.HessianFree(network(torch.bfloat16).parameters(), solver="cg")

    def doubled(_, state):
        entries = {i: {"cg_solution": 2 * e["cg_solution"]} for i, e in state["state"].items()}
        return {**state, "state": entries}

    again.register_load_state_dict_pre_hook(doubled)
    again.register_load_state_dict_post_hook(lambda o: seen.extend(o.state.values()))
    again.load_state_dict(saved)
    again.load_state_dict(saved)  # the hook that checks is gone again
    for entry, before in zip(seen[:4], saved["state"].values(), strict=True):
        assert torch.equal(entry["cg_solution"], 2 * before["cg_solution"])


def others():
    """Optimizers of torch and of this library, by name."""
    torchs = {
        "Adam": torch.optim.Adam,
        "SGD": torch.optim.SGD,
        "RMSprop": torch.optim.RMSprop,
        "Adadelta": torch.optim.Adadelta,
        "Adagrad": torch.optim.Adagrad,
        "Rprop": torch.optim.Rprop,
        "ASGD": torch.optim.ASGD,
        "LBFGS": torch.optim.LBFGS,
    }
    return {**torchs, **{cls.__name__: cls for cls in OPTIMIZERS.values()}}


# Torch's own LBFGS, in 2.8.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
@pytest.mark.parametrize("name", others())
def test_of_another_optimizer(make, name):
    other, model = others()[name], network()
    if other is make:
        return
    theirs = other(model.parameters(), lr=0.01)

    def closure():
        theirs.zero_grad()
        loss = F.cross_entropy(model(X.double()), X[:, :3].argmax(1))
        loss.backward()
        return loss

    theirs.step(closure)
    optimizer = make(model.parameters())
    before = repr(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=f"state_dict must be that of a {make.__name__}, but its groups have"
    ):
        optimizer.load_state_dict(theirs.state_dict())
    assert repr(optimizer.state_dict()) == before


def test_of_another_model():
    model, wide = network(), network(width=7)
    optimizer, other = (optim.HessianFree(m.parameters()) for m in (model, wide))
    steps(wide, other, 1)
    text = r"ritz_vectors of parameter 0 has shape \(\d+, 7, 4\) and the parameter \(6, 4\)"
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state
    steps(model, optimizer, 1)


def test_of_something_else(make):
    model = network()
    optimizer = make(model.parameters())
    with pytest.raises(ValueError, match="lacks 'param_groups', 'state', and has '0.bias', '0.weight'"):
        optimizer.load_state_dict(model.state_dict())


def test_with_an_option_out_of_range(make):
    optimizer = make(network().parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    name = "damping" if "damping" in optimizer.defaults else "radius"
    saved["param_groups"][0][name] = float("nan")
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got nan"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] is None


def test_with_keys_of_the_user(make):
    """They are no sign of another optimizer."""
    optimizer = make(network().parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["name"] = "all"
    del saved["param_groups"][0]["damping_scale"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["name"] == "all"
    assert optimizer.param_groups[0]["damping_scale"] == 1.0
