"""Scores in a file: an array on disk, written in pieces, and a map of the pieces that are done.

The map is text beside the array, ``scores.npy.done``: a line that says which problem this is, then a line for
each piece. A line is written after the piece's numbers are; a last line without its end is no line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.data.batches import Batch

SUFFIX = ".done"
# Values at the same parameters differ by rounding between machines, not by this.
SAME = 1e-3


def digest(parts: Iterable[Any]) -> str:
    """A fingerprint of tensors and other values, in their order."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            array = part.detach().cpu().contiguous()
            found.update(f"{array.dtype}{tuple(array.shape)}".encode())
            found.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:32]


def digest_of_data(batches: Iterable[Batch]) -> str:
    """A fingerprint of samples, however they are cut."""
    found = hashlib.sha256()
    for batch in batches:
        # Nothing but tensors: other objects have no value that outlives the process.
        leaves = [leaf for leaf in pytree.tree_leaves(tuple(batch)) if isinstance(leaf, Tensor)]
        found.update(digest(leaves).encode())
    return found.hexdigest()[:32]


class Store:
    """Scores on disk, in pieces: rows, or columns.

    Args:
        path: Of the array; made if there is none.
        shape: Of the array.
        dtype: Of the array.
        about: What the scores are of, by what it is called in an error.
        values: What was measured at the base point, which ``about`` has no word for.

    Attributes:
        array: Mapped into memory.
        done: Of each finished piece its notes, by its name.

    Raises:
        ValueError: ``path`` holds something else, or scores of another problem.
    """

    def __init__(
        self, path: str | os.PathLike[str], shape: Sequence[int], dtype: torch.dtype, about: dict[str, str],
        values: Tensor,
    ) -> None:  # fmt: skip
        self._path, self._map = Path(path), Path(f"{os.fspath(path)}{SUFFIX}")
        sums = [float(values.double().sum()), float(values.double().norm())]
        head = {**about, "shape": list(shape), "values": sums}
        self.done: dict[int, dict[str, Any]] = {}
        if self._map.exists():
            self._read(head)
        elif self._path.exists():
            raise ValueError(
                f"out must be a new file, or one with its map {self._map.name!r}, got {str(path)!r} without;"
                " choose another name."
            )
        else:
            self._write_head(head)
        if not self._path.exists():
            if self.done:
                raise ValueError(f"out must be there with its map, got {self._map.name!r} alone; remove it.")
            kind = torch.zeros((), dtype=dtype, device="cpu").numpy().dtype
            # Under another name until it has its full size.
            fresh = Path(f"{os.fspath(path)}.part")
            np.lib.format.open_memmap(fresh, "w+", kind, tuple(shape)).flush()
            os.replace(fresh, self._path)
        self.array = np.load(self._path, mmap_mode="r+")
        if self.array.shape != tuple(shape):
            raise ValueError(
                f"out must hold an array of shape {tuple(shape)}, got {self.array.shape};"
                " choose another name."
            )

    def _write_head(self, head: dict[str, Any]) -> None:
        fresh = Path(f"{self._map}.part")
        with fresh.open("w") as file:
            file.write(json.dumps(head) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._map)

    def _read(self, head: dict[str, Any]) -> None:
        text = self._map.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            # The writer was stopped within a line.
            os.truncate(self._map, len(whole))
        try:
            found, *pieces = map(json.loads, whole.splitlines())
            self.done = {piece["piece"]: piece for piece in pieces}
            others = [key for key in head if not _agree(found[key], head[key])]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out must have a map that can be read, {self._map.name!r} cannot.") from error
        if others:
            raise ValueError(
                f"out must hold scores of this problem, got {str(self._path)!r} of another: its"
                f" {', '.join(others)} differ; choose another name, or remove it and {self._map.name!r}."
            )

    def finish(self, piece: int, **notes: Any) -> None:
        """Put down that a piece has been written, with what is to be remembered of it."""
        self.array.flush()
        note = {"piece": piece, **notes}
        with self._map.open("a") as file:
            file.write(json.dumps(note) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[piece] = note

    def scores(self) -> Tensor:
        """All of them, read when they are asked for; writing to the tensor leaves the file alone."""
        self.array.flush()
        return torch.from_numpy(np.load(self._path, mmap_mode="c"))


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, list) and any(isinstance(x, float) for x in a):
        return all(math.isclose(x, y, rel_tol=SAME, abs_tol=SAME) for x, y in zip(a, b, strict=True))
    return bool(a == b)
