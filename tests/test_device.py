"""The tests of ``tests/device``, in a process that registers a device before anything else happens."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_on_a_device_that_is_not_there():
    folder = Path(__file__).parent / "device"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(folder)]
    done = subprocess.run(command, cwd=folder.parent.parent, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
