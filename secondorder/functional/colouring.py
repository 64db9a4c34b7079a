"""Greedy colourings of the columns of a sparse matrix; on the host, in time linear in the entries' paths."""

from __future__ import annotations

import torch
from torch import Tensor


def distance_two_colours(rows: Tensor, columns: Tensor, m: int, n: int) -> Tensor:
    """Colours of the columns such that two that share a row differ; shape (n,)."""
    rows_of, columns_of = _lists(columns, rows, n), _lists(rows, columns, m)
    colours = [-1] * n
    for column in range(n):
        taken = {colours[other] for row in rows_of[column] for other in columns_of[row]}
        colours[column] = _smallest_free(taken)
    return torch.tensor(colours, dtype=torch.long, device=rows.device)


def star_colours(rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """Colours of a symmetric matrix's columns: neighbours differ, and no path of four has two colours.

    Then every entry is alone in its row, or in its column, among those of its colour. Shape (n,).

    Reference: Gebremedhin, Manne and Pothen (2005), algorithm 4.1.
    """
    off = rows != columns
    neighbours = _lists(rows[off], columns[off], n)
    colours = [-1] * n
    for v in range(n):
        taken = set()
        for w in neighbours[v]:
            if colours[w] >= 0:
                taken.add(colours[w])
            for x in neighbours[w]:
                if x != v and colours[x] >= 0 and (colours[w] < 0 or _closes_path(colours, neighbours, w, x)):
                    taken.add(colours[x])
        colours[v] = _smallest_free(taken)
    return torch.tensor(colours, dtype=torch.long, device=rows.device)


def _closes_path(colours: list[int], neighbours: list[list[int]], w: int, x: int) -> bool:
    """Whether ``x`` has another neighbour of the colour of ``w``: a path of four would have two colours."""
    return any(y != w and colours[y] == colours[w] for y in neighbours[x])


def _lists(keys: Tensor, values: Tensor, n: int) -> list[list[int]]:
    lists: list[list[int]] = [[] for _ in range(n)]
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        lists[key].append(value)
    return lists


def _smallest_free(taken: set[int]) -> int:
    colour = 0
    while colour in taken:
        colour += 1
    return colour
