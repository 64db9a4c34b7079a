"""The simulated device itself: what it counts, and what it refuses."""

import pytest
import simulated
import torch


def test_tensors_do_not_mix(counted):
    with pytest.raises(RuntimeError, match="the same device|of the host and of the device"):
        torch.ones(3, device=counted) + torch.ones(3)


def test_launches_uploads_and_reads(counted):
    x = torch.ones(3, device=counted)
    counter = simulated.Counter()
    y = (2 * x).view(1, 3)[:, 1:]
    assert counter.counts == (1, 0, 0)
    assert float(y.sum()) == 4.0
    assert counter.counts == (2, 0, 1)
    torch.ones(2).to(counted)
    assert counter.counts == (2, 1, 1)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.linalg.eigh(torch.outer(x, x)),
        lambda x: torch.linalg.cholesky(torch.outer(x, x) + torch.diag(x)),
    ],
)
def test_each_way_to_wait_is_seen(counted, wait):
    x = torch.ones(3, device=counted)
    with simulated.no_reads(), pytest.raises(RuntimeError, match="the host waits"):
        wait(x)


def test_what_does_not_wait_is_let_through(counted):
    x = torch.ones(3, device=counted)
    with simulated.no_reads():
        torch.linalg.cholesky_ex(torch.outer(x, x) + torch.diag(x))
        torch.linalg.qr(torch.outer(x, x))
        x.masked_fill_(x > 0, 2.0)


def test_random_numbers_are_its_own(counted):
    torch.manual_seed(3)
    there, here = torch.randn(4, device=counted), torch.randn(4)
    assert torch.equal(there.cpu(), here)
    torch.randn(4)
    # The host has drawn once more.
    state = torch.get_device_module("simulated").get_rng_state()
    first = torch.randn(4, device=counted).cpu()
    torch.get_device_module("simulated").set_rng_state(state)
    assert torch.equal(torch.randn(4, device=counted).cpu(), first)
