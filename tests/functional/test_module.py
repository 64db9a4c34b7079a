import pytest
import torch
import zoo

from secondorder.functional import hvp, linearize_grad, module_function


def test_is_the_loss_of_the_model():
    case = zoo.network("tied_weights")
    function, parameters = module_function(case.model, case.loss, case.inputs, case.targets)
    assert function(parameters).item() == pytest.approx(case.value().item(), rel=1e-13)
    assert not any(p.requires_grad for p in parameters.values())
    v = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, _, hvp_fn = linearize_grad(function, parameters)
    names = list(parameters)

    def of_tuple(*values):
        return function(dict(zip(names, values, strict=True)))

    expected = hvp(of_tuple, tuple(parameters.values()), tuple(v.values()))[1]
    torch.testing.assert_close(tuple(hvp_fn(v).values()), expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_do_not_move():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double()
    model[1].bias.requires_grad_(False)
    case = zoo.network("mlp_mse")
    before = [b.clone() for b in model.buffers()]
    function, parameters = module_function(model, case.loss, case.inputs, case.targets)
    assert sorted(parameters) == ["0.bias", "0.weight", "1.weight"]
    function(parameters)
    assert all(map(torch.equal, model.buffers(), before))


def test_bad_input():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="inputs and targets, got 1 of them"):
        module_function(model, torch.nn.functional.mse_loss, torch.ones(3, 2))
    with pytest.raises(ValueError, match="a parameter that requires gradients, got none"):
        module_function(model.requires_grad_(False), torch.nn.functional.mse_loss, torch.ones(3, 2), 0)
