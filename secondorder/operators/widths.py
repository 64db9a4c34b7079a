"""Products with a block of vectors: together, one after another, or cut into pieces in between."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from secondorder.autodiff.graph import Source, pass_bytes
from secondorder.vectors.host import is_true

# The narrowest piece that is measured against a loop; then its doubles.
NARROWEST = 8
# More does not pay.
MOST = 2**12
# Of the memory that is free, what a batched pass may take.
SHARE = 0.5

Product = Callable[[Tensor], Tensor]


class Pieces:
    """How a block of vectors is multiplied, as fast as was measured.

    The first block of at least eight columns is multiplied in pieces of growing width, as long as a column
    gets cheaper and memory allows; the best width is remembered, and wider ones are tried when a wider block
    comes. Results agree to rounding: where those of a batch and of a loop do not, it is a loop.

    Args:
        batched: True, the whole block in one pass; False, one vector after another; None, as measured.

    Attributes:
        batched: As given.
        seconds: For each width measured, those that a column takes; inf where a batch fails.
    """

    def __init__(self, batched: bool | None) -> None:
        self.batched = batched
        self.seconds: dict[int, float] = {}

    def multiply(
        self, V: Tensor, alone: Product, together: Product, roots: Callable[[], Iterable[Source | None]]
    ) -> Tensor:
        """The product with ``V``, shape (n, k).

        Args:
            V: Its columns are multiplied.
            alone: Multiplies one vector.
            together: Multiplies a block in one pass.
            roots: What a pass starts from: it says what a batch may take in memory.
        """
        if self.batched:
            return together(V)
        if self.batched is None and not self.seconds and V.shape[1] >= NARROWEST:
            self._most = _affordable(pass_bytes(roots()), V.device)
            self._measure(V[:, :NARROWEST], alone, together)
        if self.width == 1:
            # The entries of a column lie far apart: it is copied first, and results are stacked in rows, in
            # memory.
            return torch.stack([alone(v.contiguous()) for v in V.unbind(1)]).T
        done, rows = 0, list[Tensor]()
        while done < V.shape[1]:
            width = self._next(V.shape[1] - done)
            part = self._product(V[:, done : done + width], together)
            if part is not None:
                rows.append(part.T)
                done += width
        return torch.cat(rows).T

    @property
    def width(self) -> int:
        """The best one measured; 1, a loop, where there is none."""
        return min(self.seconds, key=self.seconds.__getitem__, default=1)

    def _measure(self, few: Tensor, alone: Product, together: Product) -> None:
        """A loop, and the narrowest piece."""
        self.seconds[1] = math.inf
        if self._most < NARROWEST:
            return
        first = few[:, 0].contiguous()
        try:
            # The first call of each does not count: torch prepares its batching rules.
            if _agree(together(few)[:, 0], alone(first)):
                self.seconds[NARROWEST] = _timed(together, few)[1] / NARROWEST
                self.seconds[1] = min(_timed(alone, first)[1] for _ in range(3))
        except RuntimeError:
            # An operation without a batching rule; a loop says what else may be wrong.
            self.seconds = {1: math.inf}

    def _next(self, rest: int) -> int:
        """The width of the next piece: a new one as long as the widest is best, or the last but one is."""
        best, widest = self.width, max(self.seconds)
        if 2 * widest <= min(rest, self._most) and widest <= 2 * best:
            return 2 * widest
        return math.ceil(rest / math.ceil(rest / best))

    def _product(self, part: Tensor, together: Product) -> Tensor | None:
        """That of a piece, timed where its width is new; None where it is too wide."""
        width = part.shape[1]
        if width <= max(self.seconds):
            return together(part)
        try:
            product, seconds = _timed(together, part)
        except torch.OutOfMemoryError:
            self.seconds[width] = math.inf
            return None
        self.seconds[width] = seconds / width
        return product


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether two results are one up to rounding, or both not finite: one host read."""
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    scale = first.abs().max().maximum(second.abs().max()) if first.numel() else first.new_zeros(())
    return not is_true(((first - second).abs() > tolerance * scale).any())


def _timed(function: Product, argument: Tensor) -> tuple[Tensor, float]:
    """The product, and the seconds that it takes: on CPU those of this thread, whatever else runs there."""
    if argument.device.type == "cpu":
        start = time.thread_time()
        return function(argument), time.thread_time() - start
    torch.accelerator.synchronize(argument.device)
    start = time.perf_counter()
    product = function(argument)
    torch.accelerator.synchronize(argument.device)
    return product, time.perf_counter() - start


def _affordable(column_bytes: int, device: torch.device) -> int:
    """How wide a piece may be by the memory that is free now."""
    free = math.inf
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    elif device.type not in ("cpu", "meta"):
        # Not every accelerator says.
        module = torch.get_device_module(device)
        free = module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else math.inf
    return int(min(SHARE * free / max(column_bytes, 1), MOST))
