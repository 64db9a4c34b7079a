"""What ``python -m secondorder`` looks at, on a device."""

import pytest
import torch

from secondorder import __main__ as main


@pytest.mark.parametrize("name", main.CHECKS)
def test_each_check_passes(device, name):
    check, is_step = main.CHECKS[name]
    assert check(device, torch.float64) <= main.TOLERANCES[torch.float64][is_step]


def test_the_device_is_among_those_that_are_checked(device):
    assert device in [found for found, _ in main.devices()]
