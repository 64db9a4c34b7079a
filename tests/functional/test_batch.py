import pytest
import torch
import torch.autograd.functional as reference
import zoo

from secondorder.functional import batch_hessian, batch_jacobian, hessian_diag, module_function

EXACT = dict(rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_batch_jacobian_is_the_jacobian_of_each_sample(chunk_size):
    case = zoo.network("cnn")
    got = batch_jacobian(case.model, case.inputs, chunk_size=chunk_size)
    assert got.shape == (5, 3, 1, 4, 4)
    for i, x in enumerate(case.inputs):
        expected = reference.jacobian(lambda x: case.model(x[None])[0], x)
        torch.testing.assert_close(got[i], expected, **EXACT)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_batch_hessian_is_the_hessian_of_each_sample(chunk_size):
    case = zoo.network("mlp_mse")

    def func(x):
        return case.model(x).square().sum(1)

    got = batch_hessian(func, case.inputs, chunk_size=chunk_size)
    for i, x in enumerate(case.inputs):
        expected = reference.hessian(lambda x: func(x[None])[0], x)
        torch.testing.assert_close(got[i], expected, **EXACT)


def test_shapes_without_elements_and_without_dependence():
    assert batch_jacobian(lambda x: x[:, :0], torch.ones(3, 2)).shape == (3, 0, 2)
    assert batch_hessian(lambda x: x.sum(1), torch.ones(3, 2)).tolist() == torch.zeros(3, 2, 2).tolist()
    assert batch_jacobian(lambda x: torch.ones(3, 4), torch.ones(3, 2)).abs().sum() == 0


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_exact_diagonal(chunk_size):
    case = zoo.network("mlp_cross_entropy")
    function, parameters = module_function(case.model, case.loss, case.inputs, case.targets)
    got = hessian_diag(function, parameters, chunk_size=chunk_size)
    dense = reference.hessian(case.loss_of, tuple(parameters.values()))
    for i, (name, p) in enumerate(parameters.items()):
        expected = dense[i][i].reshape(p.numel(), p.numel()).diagonal().view(p.shape)
        torch.testing.assert_close(got[name], expected, **EXACT)


def test_estimated_diagonal_is_unbiased_and_exact_for_diagonal_hessians():
    A, x = zoo.spd_matrix(6, 10.0, 1), zoo.vector(6, 2)
    exact = hessian_diag(lambda x: x.pow(4).sum(), x)
    assert torch.equal(hessian_diag(lambda x: x.pow(4).sum(), x, num_probes=1), exact)
    generator = torch.Generator().manual_seed(0)
    estimate = hessian_diag(lambda x: 0.5 * x @ A @ x, x, num_probes=4000, generator=generator)
    # Five standard deviations of the mean.
    deviation = (A - A.diagonal().diag()).square().sum(1).div(4000).sqrt()
    assert bool(((estimate - A.diagonal()).abs() <= 5 * deviation).all())


def test_bad_input():
    with pytest.raises(ValueError, match=r"one output a sample, got shape \(2,\) for 3 samples"):
        batch_jacobian(lambda x: x[:2, 0], torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"one number a sample, shape \(3,\), got \(3, 2\)"):
        batch_hessian(lambda x: x, torch.ones(3, 2))
    with pytest.raises(TypeError, match="must return a real floating-point tensor, got tuple"):
        batch_jacobian(lambda x: (x,), torch.ones(3, 2))
    with pytest.raises(ValueError, match="num_probes must be a positive integer or None, got 0"):
        hessian_diag(lambda x: x.sum(), torch.ones(3), num_probes=0)


def test_a_missing_or_wrong_second_derivative_is_decomposed():
    x, g = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64) + 0.5
    expected = torch.stack(
        [
            torch.autograd.functional.hessian(lambda r, i=i: (r * (g[i] / r.norm())).pow(3).sum(), x[i])
            for i in range(4)
        ]
    )
    torch.testing.assert_close(
        batch_hessian(lambda x: torch._weight_norm(x, g, 0).pow(3).sum(1), x), expected
    )
    smooth = batch_hessian(lambda x: torch.nn.functional.hardsigmoid(x).pow(2).sum(1), x / 10)
    torch.testing.assert_close(smooth, torch.eye(3, dtype=torch.float64).expand(4, 3, 3) / 18)


def test_edges():
    x = torch.randn(3, 2)
    assert torch.equal(batch_hessian(lambda x: torch.ones(3), x), torch.zeros(3, 2, 2))
    assert torch.equal(
        batch_hessian(lambda x: x.pow(2).sum(1), x, chunk_size=10**30), 2 * torch.eye(2).expand(3, 2, 2)
    )
    for function in (batch_jacobian, batch_hessian):
        for bad in (torch.tensor(1.0), x.to(torch.complex64), (x, x)):
            with pytest.raises(TypeError, match="must be one real tensor of shape"):
                function(lambda *x: x[0], bad)
        for size in (0, -1, 2.5, True, "a"):
            with pytest.raises(ValueError, match="chunk_size must be a positive integer or None"):
                function(lambda x: x[:, 0], x, chunk_size=size)
    with pytest.raises(ValueError, match="chunk_size must be a positive integer or None, got -1"):
        hessian_diag(lambda x: x.pow(3).sum(), x, chunk_size=-1)
    with pytest.raises(ValueError, match="num_probes must be a positive integer or None, got True"):
        hessian_diag(lambda x: x.pow(3).sum(), x, num_probes=True)
