"""Counts what a step spends on the closure, beside the run that is recorded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Meter:
    """Runs of the closure, and their time.

    Attributes:
        evaluations: Of the loss.
        gradients: Of it.
        seconds: In both.
    """

    def __init__(self) -> None:
        self.evaluations = self.gradients = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around one."""
        start = time.perf_counter()
        yield
        self.evaluations += 1
        self.seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def gradient(self) -> Iterator[None]:
        """Around one."""
        start = time.perf_counter()
        yield
        self.gradients += 1
        self.seconds += time.perf_counter() - start
