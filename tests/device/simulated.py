"""A device that is not there, for tests of what an accelerator asks of the library.

``accelerator.cpp`` is its C++, built once for each version of torch. It has to be registered before the first
backward pass of a process, which starts the threads of the devices: these tests have a process of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch

NAME = "simulated"
SOURCE = pathlib.Path(__file__).with_name("accelerator.cpp")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> pathlib.Path:
    """The library, compiled where that was not done before."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "secondorder-tests"
    )
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"accelerator-{key}.so"
    if target.exists():
        return target
    root = pathlib.Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = pathlib.Path(scratch) / target.name
        options = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w", abi, *include]
        libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([compiler(), *options, str(SOURCE), "-o", str(made), *libraries], check=True)
        # Another process may have made it meanwhile: the same.
        made.rename(target)
    return target


def register() -> torch.device:
    torch.ops.load_library(build())
    torch.utils.rename_privateuse1_backend(NAME)
    ops = torch.ops.simulated
    module = types.ModuleType(NAME)
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = ops.seed
    module.get_rng_state = lambda device=None: ops.random_state()
    module.set_rng_state = lambda state, device=None: ops.set_random_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.synchronize = lambda _=None: None
    torch._register_device_module(NAME, module)
    ops.start()
    return torch.device(NAME, 0)


class Counts(NamedTuple):
    launches: int
    uploads: int
    reads: int


class Counter:
    """What happened since it was made."""

    def __init__(self) -> None:
        torch.ops.simulated.clear()

    @property
    def counts(self) -> Counts:
        return Counts(*torch.ops.simulated.counts())

    @property
    def why(self) -> dict[str, int]:
        return dict(torch.ops.simulated.why())


@contextlib.contextmanager
def no_reads(device: torch.device | None = None) -> Iterator[None]:
    """The host must not wait for the device inside; the simulated one where None."""
    is_cuda = device is not None and device.type == "cuda"
    if is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    else:
        torch.ops.simulated.forbid(True)
    try:
        yield
    finally:
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        else:
            torch.ops.simulated.forbid(False)


@contextlib.contextmanager
def no_transfers(device: torch.device) -> Iterator[None]:
    """The same, and nothing comes from the host, where that is counted."""
    before = Counts(*torch.ops.simulated.counts()) if device.type == NAME else None
    with no_reads(device):
        yield
    if before is not None:
        assert Counts(*torch.ops.simulated.counts()).uploads == before.uploads
