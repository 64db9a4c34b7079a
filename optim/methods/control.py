"""Step control: numbers in, numbers out. No tensors, no state.

``rho`` is the reduction ratio, actual over predicted decrease of the loss.
"""

from __future__ import annotations

import math
from typing import Protocol

# Rounding of a computed loss, in units of eps * abs(loss): below it a decrease means nothing.
NOISE_FACTOR = 10.0
# A loss that sums terms larger than itself is seen to change by more than the rounding of its value; with
# three-hump camel a step was rejected for ever.
CANCELLATION = 100.0

# A loss below this part of the rounding of its terms is all rounding: a converged cross-entropy.
SUNK = 1e-2

# A step is taken when rho exceeds this (Nielsen 1999, section 2).
ACCEPTANCE = 1e-4

# The ratio at which none of the rules below changes anything, and that from which the radius and Martens'
# damping loosen.
NEUTRAL, GOOD = 0.5, 0.75
# Below it the model is worth less than a step with more damping; below the other, another trial.
LOW, BAD = 0.25, 0.1
# Above it twice the step is tried.
EXTEND = 0.5
# A ratio that only gradients tell loosens the control where this much more decrease would be seen in the
# loss. Past convergence the decreases are smaller: they go with the square of the gradient's rounding.
REACH = 1e4

# Where a value is in doubt, gradients are believed that give the predicted decrease to this part of it.
AGREES = 0.5

# The range of any loss: what is too little for a function, its space knows.
MIN_DAMPING, MAX_DAMPING = 1e-40, 1e40
# It goes with the square of a curvature, over a gradient.
MIN_WEIGHT, MAX_WEIGHT = 1e-80, 1e80
# Below this a step changes no parameter.
MIN_RADIUS = 1e-20
RANGES = {
    "damping": (MIN_DAMPING, MAX_DAMPING),
    "radius": (MIN_RADIUS, math.inf),
    "cubic_weight": (MIN_WEIGHT, MAX_WEIGHT),
}


def clamped(name: str, size: float) -> float:
    """Within the range of numbers that a damping, radius or cubic weight may have."""
    least, most = RANGES[name]
    return min(max(size, least), most)


def noise_of(value: float, eps: float) -> float:
    """Rounding of a computed loss: a smaller change of it means nothing."""
    return NOISE_FACTOR * eps * abs(value)


def is_noise(actual: float, predicted: float, noise: float) -> bool:
    """Whether a decrease is too small to be seen in the loss, so that only gradients can judge it.

    The decrease is predicted to lie below ``noise``, the rounding of the loss, and what was seen does not
    say otherwise. What was seen may be larger by ``CANCELLATION``, as it is for a loss that sums large
    terms of opposite sign.
    """
    return 0 < predicted <= noise and abs(actual) <= CANCELLATION * noise


def is_doubtful(actual: float, predicted: float, doubt: float) -> bool:
    """Whether value and model disagree, and both by no more than the value may be in doubt."""
    disagree = predicted > 0 and not actual >= LOW * predicted
    return disagree and predicted <= doubt and abs(actual) <= doubt


def is_refused(actual: float, predicted: float) -> bool:
    """Whether the loss refuses a step of which the model promises a decrease."""
    return predicted > 0 and not actual > ACCEPTANCE * predicted


def is_unseen(actual: float, predicted: float, limit: float) -> bool:
    """Whether a refused step may yet be a decrease that the loss does not show.

    The loss did not change at all, or decrease and prediction are such as a loss with large terms of
    opposite sign rounds away: both within ``limit``.
    """
    return actual == 0 or (predicted <= limit and abs(actual) <= limit)


def reduction_ratio(actual: float, predicted: float) -> float:
    """``actual / predicted``; minus infinity where it has no meaning, so that the step is rejected."""
    if not (math.isfinite(actual) and math.isfinite(predicted)) or predicted <= 0:
        return -math.inf
    return actual / predicted


def quiet_ratio(rho: float, holds_back: bool) -> float:
    """What a ratio of gradients in the noise of the loss tells the control: to loosen, where it holds back.

    What tightens is a rejection that the loss shows. Otherwise steps past convergence, whose ratios are
    rounding, leave a radius of their own size.
    """
    return rho if rho > GOOD and holds_back else NEUTRAL


def marquardt_damping(damping: float, rho: float) -> float:
    """Damping for the next trial in a space where that is free: times 4 below rho = 1/4, 1/4 above 3/4.

    Reference: Marquardt (1963), An algorithm for least-squares estimation, for a factor; its size is
        measured.
    """
    if not rho >= LOW:
        return min(4 * damping, MAX_DAMPING)
    return max(damping / 4, MIN_DAMPING) if rho > GOOD else damping


def levenberg_marquardt_damping(damping: float, rho: float) -> float:
    """Damping for the next step of Hessian-free: 3/2 below rho = 1/4, 2/3 above 3/4.

    Reference: Martens (2010), Deep learning via Hessian-free optimization, section 4.1.
    """
    if not rho >= LOW:
        return min(damping * 1.5, MAX_DAMPING)
    return max(damping * 2 / 3, MIN_DAMPING) if rho > GOOD else damping


def nielsen_damping(damping: float, growth: float, rho: float) -> tuple[float, float]:
    """Damping and its growth factor for the next trial of Gauss-Newton.

    An accepted step multiplies it by ``max(1/3, 1 - (2 rho - 1)^3)``; rejections in a row by 2, 4, 8, ...

    Reference: Nielsen (1999), Damping parameter in Marquardt's method, equation 2.5.
    """
    if rho > ACCEPTANCE:
        factor = max(1 / 3, 1 - (2 * min(rho, 2.0) - 1) ** 3)
        return min(max(damping * factor, MIN_DAMPING), MAX_DAMPING), 2.0
    return min(damping * growth, MAX_DAMPING), min(2 * growth, 1e6)


def trust_radius(radius: float, rho: float, length: float) -> float:
    """Radius for the next trial: a quarter below rho = 1/4, 5/2 above 3/4 for a step that reached it.

    Reference: Conn, Gould and Toint (2000), Trust-region methods, section 17.1, whose intervals the
    constants lie in.
    """
    if not rho >= LOW:
        shorter = min(radius, length) if length > 0 else radius
        return max(0.25 * shorter, MIN_RADIUS)
    return 2.5 * radius if rho > GOOD and length >= 0.9 * radius else radius


def cubic_weight(weight: float, rho: float) -> float:
    """Weight of the cubic term for the next trial: times 10 below rho = 1/4, a tenth above 3/4.

    Ten on both sides needs the fewest evaluations of 3, 4, 6, 8 and 10, measured; steps follow its root.

    Reference: Cartis, Gould and Toint (2011), Adaptive cubic regularisation methods for unconstrained
        optimization, part I, algorithm 2.1.
    """
    if not rho >= LOW:
        return min(10 * weight, MAX_WEIGHT)
    return max(weight / 10, MIN_WEIGHT) if rho > GOOD else weight


class Rule(Protocol):
    """How damping, radius or the weight of a cubic term follow the trials."""

    def __call__(self, size: float, rho: float, length: float, /) -> float:
        """The next one.

        Args:
            size: The present one.
            rho: Reduction ratio.
            length: Euclidean norm of the solution.
        """


def marquardt(size: float, rho: float, _length: float) -> float:
    """``marquardt_damping`` as a ``Rule``."""
    return marquardt_damping(size, rho)


def martens(size: float, rho: float, _length: float) -> float:
    """``levenberg_marquardt_damping`` as a ``Rule``."""
    return levenberg_marquardt_damping(size, rho)


def cubic(size: float, rho: float, _length: float) -> float:
    """``cubic_weight`` as a ``Rule``."""
    return cubic_weight(size, rho)


class Nielsen:
    """``nielsen_damping`` as a ``Rule``, with the growth factor that it keeps."""

    def __init__(self, growth: float) -> None:
        self.growth = growth

    def __call__(self, size: float, rho: float, _: float) -> float:
        """The next damping."""
        size, self.growth = nielsen_damping(size, self.growth, rho)
        return size
