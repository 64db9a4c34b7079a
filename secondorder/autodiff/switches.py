"""Settings of torch that all threads share, turned for a while and put back.

Saved and restored by each thread for itself they would stay turned: a thread that enters while another is
inside finds them turned, and puts that back when it leaves last. So they have one owner, which counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

PutBack = Callable[[], Any]

_lock = threading.RLock()
# Forward mode has one level for the process: entered by a second thread, torch calls it nested.
_forward_mode = threading.RLock()
# Seconds after which a thread that waits for forward mode is told of: it may wait for what waits for it.
PATIENCE = 60.0


class Switch:
    """One setting, and who holds it turned.

    Args:
        turn: Turns it; returns what puts it back, or None where it was so already.
    """

    def __init__(self, turn: Callable[[], PutBack | None]) -> None:
        self._turn = turn
        # Each with its thread and what it puts back, in the order of entering.
        self._holders: list[tuple[held, int, PutBack | None]] = []

    def hold(self, holder: held) -> None:
        """Turn the switch, also where somebody inside had put it back."""
        self._holders.append((holder, threading.get_ident(), self._turn()))

    def release(self, holder: held) -> None:
        """Put it back if nobody needs it any more."""
        index = len(self._holders) - 1
        while index >= 0 and self._holders[index][0] is not holder:
            index -= 1
        if index < 0:
            return
        _, thread, put_back = self._holders.pop(index)
        if index == 0 and self._holders:
            # What was there before all: that goes to the next.
            self._holders[0] = (*self._holders[0][:2], put_back)
        elif put_back and index == len(self._holders) and all(t == thread for _, t, _ in self._holders):
            put_back()


class held:  # noqa: N801 - used as a function, like torch.no_grad
    """Context in which some switches are turned.

    After the last one has left they are what the first one found. Threads that need them otherwise meanwhile
    find them turned: attention takes its slower kernel there.
    """

    def __init__(self, *switches: Switch) -> None:
        self._switches = switches

    def __enter__(self) -> None:
        try:
            with _lock:
                for switch in self._switches:
                    switch.hold(self)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            for switch in self._switches:
                switch.release(self)


def _flag(read: Callable[[], bool], write: Callable[[bool], Any], wanted: bool) -> Switch:
    def turn() -> PutBack | None:
        if read() == wanted:
            return None
        write(wanted)
        return partial(write, not wanted)

    return Switch(turn)


def _force_eager() -> PutBack | None:
    stance = torch.compiler.set_stance("force_eager")
    return None if stance.prev.stance == "force_eager" else partial(stance.__exit__, None, None, None)


def _attention(name: str) -> Switch:
    read, write = f"_get_{name}_sdp_enabled", f"_set_sdp_use_{name}"
    return _flag(getattr(torch._C, read), getattr(torch._C, write), name == "math")


# Attention by its math kernel alone: the others have no second derivative and no batching rule.
MATH_ATTENTION = tuple(map(_attention, ("math", "flash", "mem_efficient", "cudnn", "overrideable")))
# Unlike torch.backends.cudnn.flags it leaves alone whether kernels are deterministic, and the like.
NO_CUDNN = _flag(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False)
NO_FAST_PATH = _flag(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
NO_COMPILED_CODE = Switch(_force_eager)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Forward mode is one thread's; the others wait.

    Raises:
        RuntimeError: for longer than a minute.
    """
    if not _forward_mode.acquire(timeout=PATIENCE):
        raise RuntimeError(
            f"forward mode is one thread's at a time, and another had it for {PATIENCE:.0f} seconds; a"
            " function in forward mode must not wait for a thread that uses it too: use reverse mode in one."
        )
    try:
        yield
    finally:
        _forward_mode.release()


@contextlib.contextmanager
def dual_level() -> Iterator[None]:
    """Level of dual numbers; other threads wait. Nested in one thread, torch refuses it."""
    with forward_mode(), forward_ad.dual_level():
        yield
