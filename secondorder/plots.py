"""A picture of a run: what its steps did, and what they cost."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Panel(NamedTuple):
    """One of the axes.

    Attributes:
        columns: What it shows, of these those that the run has; with a label for each.
        label: Of the vertical axis.
        is_log: Where all that is shown is positive.
        is_summed: Of the steps so far.
    """

    columns: Mapping[str, str]
    label: str
    is_log: bool = True
    is_summed: bool = False


# What a run of an optimizer shows, and one of minimize and its like.
OF_STEPS = (
    Panel({"loss": ""}, "loss before the step"),
    Panel({"gradient_norm": "gradient", "step_norm": "step"}, "Euclidean norm"),
    Panel({"rho": ""}, "rho: actual / predicted decrease", is_log=False),
    Panel({"damping": "damping", "radius": "radius", "cubic_weight": "cubic weight"}, "bound of the step"),
    Panel({"products": "products", "gradient_equivalents": "all, in gradients"}, "work so far", False, True),
)
OF_POINTS = (
    Panel({"fun": ""}, "objective"),
    Panel({"grad_norm": "gradient, largest entry", "step_norm": "step, Euclidean norm"}, "size"),
    Panel({"size": ""}, "radius or damping"),
)
# Told apart without colours, too.
STYLES = ("-", "--", ":")
MARKED = 30


def plot(run: Any, figure: Any = None) -> Any:
    """Draw loss, reduction ratio, damping or radius, and work of a run over its steps.

    Args:
        run: An optimizer with ``history=True``, its history, the ``columns()`` of that; or a result of
            ``optim.minimize``, ``least_squares``, ``curve_fit`` or ``root``.
        figure: A ``matplotlib.figure.Figure`` to draw in; a new one when None.

    Returns:
        The figure: ``plot(optimizer).savefig("run.png")``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError: ``run`` is none of these.
        ValueError: it has no steps.

    Cost: that of drawing; nothing of the run is computed again.

    Example:
        >>> import torch, optim
        >>> result = optim.minimize(lambda x: (x - 1).square().sum(), torch.zeros(2))
        >>> len(plot(result).axes)
        3
    """
    columns, panels = _read(run)
    shown = [panel for panel in panels if any(_is_shown(columns, name) for name in panel.columns)]
    if figure is None:
        try:
            pyplot = importlib.import_module("matplotlib.pyplot")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("secondorder.plot needs matplotlib: pip install matplotlib.") from error
        figure = pyplot.figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    noisy = columns.get("noisy", ())
    for panel, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        _draw(axes, panel, columns)
        if panel is panels[0] and any(noisy):
            axes.set_title("samples change from step to step", fontsize="medium")
    return figure


def _read(run: Any) -> tuple[Mapping[str, Sequence[float]], Sequence[Panel]]:
    """Columns by their names, and what to draw of them."""
    history = getattr(run, "history", run)
    panels: Sequence[Panel] = OF_STEPS
    table = history.columns() if callable(getattr(history, "columns", None)) else history
    if isinstance(history, tuple) and history:
        table = {name: [getattr(point, name) for point in history] for name in type(history[0])._fields}
        panels = OF_POINTS
    if not isinstance(table, Mapping) or not all(isinstance(column, Sequence) for column in table.values()):
        raise TypeError(
            "run must be an optimizer with history=True, its history or an OptimizeResult, got"
            f" {type(run).__name__}{' without a history' if history is None else ''}."
        )
    if not any(_is_shown(table, name) for panel in panels for name in panel.columns):
        raise ValueError("run must have steps to draw, got none; take one first.")
    return table, panels


def _is_shown(columns: Mapping[str, Sequence[float]], name: str) -> bool:
    """Whether a column has a number; of what bounds a step the unused ones are 0 or infinite throughout."""
    values = [value for value in columns.get(name, ()) if not math.isnan(value)]
    is_unused = name in OF_STEPS[3].columns and all(value == 0 or math.isinf(value) for value in values)
    return bool(values) and not is_unused


def _draw(axes: Any, panel: Panel, columns: Mapping[str, Sequence[float]]) -> None:
    smallest = math.inf
    drawn: list[str] = []
    for name in (name for name in panel.columns if _is_shown(columns, name)):
        values = [value if math.isfinite(value) else math.nan for value in columns[name]]
        if panel.is_summed:
            values = [sum(values[: i + 1]) for i in range(len(values))]
        marker = "." if len(values) <= MARKED else None
        axes.plot(range(len(values)), values, STYLES[len(drawn)], marker=marker, label=panel.columns[name])
        smallest = min([smallest, *(value for value in values if not math.isnan(value))])
        drawn.append(name)
    if panel.is_log and smallest > 0:
        axes.set_yscale("log")
    elif panel.is_log and smallest == 0:
        axes.set_yscale("log", nonpositive="mask")
    if "rho" in panel.columns:
        axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_ylim(-1.0, 2.0)
    if len(drawn) > 1:
        axes.legend(fontsize="small")
    axes.set_xlabel("step")
    only = panel.columns[drawn[0]] if len(drawn) == 1 else ""
    axes.set_ylabel(only or panel.label)
    axes.grid(alpha=0.3)
