"""What a functional front end returns: read by attribute or by key, as SciPy's ``OptimizeResult``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from secondorder.solvers._shown import MOST, shown


class Record(NamedTuple):
    """A point on the way.

    Attributes:
        fun: Objective there; for residuals half their sum of squares.
        grad_norm: Largest entry of the gradient there.
        step_norm: Euclidean norm of the step that led to it, in the variables of the model; 0 at the start.
        size: Radius or damping of that step; NaN at the start.
    """

    fun: float
    grad_norm: float
    step_norm: float
    size: float


Result = TypeVar("Result", bound="OptimizeResult")


class OptimizeResult(Mapping[str, Any]):
    """Where a method stopped, and why. Immutable; ``result.x`` and ``result["x"]`` are the same.

    Attributes:
        x: Best point found, as ``x0`` was given.
        fun: Objective there, a float; residuals of ``least_squares`` and ``root``, a tensor.
        jac: Gradient of the objective there, as ``x0`` was given; the Jacobian of residuals.
        status: A word that says what stopped it.
        success: Whether that is what was asked for.
        message: What stopped it, and what to try where that is not success.
        nit: Steps tried: each is the minimiser of a model with one radius or damping.
        nfev: Evaluations of the function.
        njev: Gradients, or Jacobians.
        nhev: Dense Hessians, or products with the Hessian.
        history: A ``Record`` for each point, the start first.
    """

    x: Any
    fun: Any
    jac: Any
    status: Any
    success: Any
    message: str
    nit: Any
    nfev: int
    njev: int
    nhev: int
    history: tuple[Record, ...]

    _fields: dict[str, Any]

    def __init__(self, **fields: Any) -> None:
        object.__setattr__(self, "_fields", fields)

    def __getattr__(self, name: str) -> Any:
        # Copying asks for names before there are fields.
        fields = self.__dict__.get("_fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(fields)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable, got {name!r} to set.")

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._fields})

    def __eq__(self, other: object) -> bool:
        # Tensors do not compare to one Boolean.
        return self is other

    __hash__ = object.__hash__

    def changed(self: Result, **fields: Any) -> Result:
        """The same with other fields."""
        return type(self)(**{**self._fields, **fields})

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self._fields)

    def __repr__(self) -> str:
        fields = self._fields
        width = max(map(len, fields), default=0)
        lines = [f"{name:>{width}}: {_shown(name, fields[name], width + 2)}" for name in fields]
        return "\n".join(lines)


def _restored(kind: type[OptimizeResult], fields: dict[str, Any]) -> OptimizeResult:
    return kind(**fields)


def _shown(name: str, value: Any, indent: int) -> str:
    if name == "history":
        return f"{len(value)} points"
    if isinstance(value, list) and len(value) > MOST:
        return ", ".join(f"{count} {item}" for item, count in Counter(value).most_common())
    return shown(value).replace("\n", "\n" + " " * indent)
