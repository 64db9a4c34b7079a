"""One step of an optimizer, from a problem and its groups to what the method came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.operators.parameters import Jacobian
from secondorder.operators.pieces import TooLargeError
from secondorder.vectors.flat import is_finite
from secondorder.vectors.host import read

from ..closure.evaluate import Evaluation
from ..methods import control, search
from ..methods.acceleration import Acceleration
from ..methods.batches import GAIN, LEAST_RATIO, MORE, BatchNoise
from ..methods.control import Rule
from ..methods.formed import Formed
from ..methods.forms import BENT, PASS_COST, USUAL, Form, choose, usual_cost
from ..methods.grown import Grown, Growth
from ..methods.problem import QuadraticModel, Trial
from ..methods.residual import Residual
from ..methods.sampling import share_of
from ..methods.step import Options, Outcome, Step
from ..methods.subspace import Bound, Subspace
from ..methods.truncated import Sketch, Solver, Truncated
from .groups import Groups, moving, rates
from .kept import LAST, SKETCH, SOLUTION, STEP, VECTORS, Kept
from .problem import ClosureProblem
from .residuals import Known, cost_of

# The first one, of that which halves the step to the minimum along the gradient: a tenth of the curvature
# there, or the radius in which all of that step fits.
FIRST = {"damping": 0.1, "cubic_weight": 0.1, "radius": 2.0}
# Why there is no space of residuals.
NO_RESIDUALS = (
    "the loss is no convex function of outputs that shows them, as mse_loss is, or weights decay at different"
    " rates, or in units of their own"
)
DISAGREES = "the gradient in .grad is not that of the loss: it was clipped, or changed, or is not finite"
# A model that was right to this is near a minimum, where Newton's steps converge quadratically.
CONVERGING = 0.05


class Method(NamedTuple):
    """What tells the optimizers apart, beside their curvature.

    Attributes:
        size: The option that is controlled, "damping", "radius" or "cubic_weight".
        bound: How it bounds a step.
        rule: How it follows the trials.
        truncated: CG in place of a space; None for none.
        rtol: Relative residual at which a space need not grow, where none is asked for.
        keeps_solution: Whether CG starts from its last solution.
        sketch: What preconditions CG; None for nothing.
        by_residuals: Whether the space may be that of the residuals.
    """

    size: str
    bound: Bound
    rule: Rule
    truncated: Solver | None
    rtol: float
    keeps_solution: bool = False
    sketch: Sketch | None = None
    by_residuals: bool = False


class Result(NamedTuple):
    """What a step came to, and in what space; ``is_noisy``: samples change from step to step."""

    outcome: Outcome
    space: Subspace | None = None
    form: Form | None = None
    is_noisy: bool = False


def find_step(problem: ClosureProblem, groups: Groups, method: Method, state: Kept, tries: bool) -> Result:
    """Find the step to take; what it leaves is kept for the next.

    Args:
        problem: At the present parameters.
        groups: Of the optimizer; the first has the joint options.
        method: Of the optimizer.
        state: What the last step left.
        tries: Whether the loss can judge a step; else the first solution is it.
    """
    group, model = groups[0], problem.model()
    if model.norm == 0:
        return Result(Outcome("zero_gradient"))
    if not any(float(each["lr"]) > 0 for each in groups):
        return Result(Outcome("zero_lr"))
    rate = rates(groups, model.gradient)
    noise = _noise(problem, group, state) if tries else BatchNoise()
    form, space = _form_and_space(problem, group, method, noise, state)
    if space.size == 0 and space.is_free:
        return Result(Outcome("non_finite"), space, form)
    start = _start(group, method, model, space, noise)
    if tries:
        options = _options(group, group[method.size] is None, rate, noise)
        if isinstance(space, Residual):
            options = _bending(options, problem, group, space)
        outcome = Step(problem, model, space, method.rule, options).take(start)
        if isinstance(rate, Tensor) and outcome.trial is not None:
            outcome = outcome._replace(trial=_with_rates(problem, model, outcome.trial, rate))
        noise = noise.stepped(model.value, outcome.trial)
        state.learn(
            **{method.size: _settled(outcome, start, method, space, noise)},
            batch_noise=tuple(noise),
            usual_products=usual_cost(group["usual_products"], form, space.products),
            gradient_norm=model.norm if abs(outcome.rho - 1) < CONVERGING else None,
        )
        if isinstance(method.rule, control.Nielsen):
            state.learn(damping_growth=method.rule.growth)
    else:
        noise = BatchNoise()
        state.learn(batch_noise=None)
        outcome = _untried(space, start, rate)
    state.keep_space(space, method.keeps_solution)
    state.keep_sketch(method.sketch)
    step = None if outcome.trial is None else problem.scaling.times(outcome.trial.step)
    state.keep(STEP, step, is_wanted=noise.changes > 0)
    if step is not None and not isinstance(rate, Tensor):
        # As long as the solution was.
        step = step / (rate * noise.rate)
    state.keep(LAST, step, is_wanted=group.get("spring", 0.0) > 0)
    return Result(outcome, space, form, noise.is_seen)


def make_state(state: Kept, group: Mapping[str, Any], method: Method, parameters: Sequence[Tensor]) -> None:
    """What a first step would fill it with, where there is no gradient for one."""
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    form = form_of(group, method, sum(p.numel() for p in parameters), dtype).name
    if form == "grown" or (form == "cg" and method.keeps_solution):
        of_cg = (SOLUTION,) if method.sketch is None else (SOLUTION, SKETCH)
        state.make(*((VECTORS,) if form == "grown" else of_cg))


def _options(group: Mapping[str, Any], is_first: bool, lr: float | Tensor, noise: BatchNoise) -> Options:
    """``is_first``: damping, radius or weight are not known yet."""
    rate = noise.rate if isinstance(lr, Tensor) else lr * noise.rate
    # A rate below one asks for short steps, and a first size that was given for just that step.
    is_free = isinstance(lr, float) and rate == 1.0 and (is_first or noise.before is not None)
    return Options(
        rate,
        group["max_trials"],
        is_bold=is_first or noise.is_news,
        longest=group["max_extension"] if is_free else 1.0,
        least_ratio=LEAST_RATIO if noise.is_seen else control.BAD,
    )


def prefers_residuals(evaluation: Evaluation, groups: Sequence[dict[str, Any]], method: Method) -> bool:
    """Whether the space of all residuals is worth less products than one by a part of the samples takes."""
    group, coverage = groups[0], evaluation.coverage
    outputs = [output for block in coverage.blocks for output in block.outputs]
    moves = any(float(each["lr"]) > 0 for each in groups)
    if group["curvature_batch"] != "auto" or evaluation.partial or not (outputs and moves):
        return False
    jacobian = Jacobian(outputs, moving(groups), keep_graph=False)
    cost = cost_of(jacobian, group["residual_cost"], group["memory"])
    for each in groups:
        each["residual_cost"] = cost
    worth = cost[-1] / (BENT if group["acceleration"] and coverage.squares else 1.0)
    share = share_of(group["curvature_share"], coverage.rows)
    part = {**group, "usual_products": share * (group["usual_products"] or USUAL)}
    form = form_of(part, method, jacobian.shape[1], jacobian.dtype, worth)
    return form.name == "residual" or group["spring"] > 0 or group["scaling"] != "identity"


def _bending(options: Options, problem: ClosureProblem, group: Mapping[str, Any], space: Residual) -> Options:
    """With acceleration, which is that of whole steps, in place of multiples of them."""
    if not group["acceleration"] or options.rate != 1.0 or not problem.residuals.are_squares:
        return options
    noise = problem.noise(Trial(problem.model().gradient, math.nan))
    return options._replace(bend=Acceleration(space, problem.residuals.change, noise), longest=1.0)


def _noise(problem: ClosureProblem, group: Mapping[str, Any], state: Kept) -> BatchNoise:
    """Whether these are other samples; where they are, the last step is tried on them: an evaluation."""
    noise = BatchNoise(*(group["batch_noise"] or ()))
    noise = noise.observed(problem.model().value, problem.outputs())
    last = state.vector(STEP) if noise.is_other else None
    if last is None:
        return noise
    undone = problem.scaling.over(-last)
    return noise.tested(problem.evaluate(undone).value, problem.model().value)


def form_of(
    group: Mapping[str, Any], method: Method, n: int, dtype: torch.dtype, residual: float = math.inf
) -> Form:
    """The form of the space for ``n`` parameters, by the options of a group.

    ``residual``: as of ``forms.choose``.
    """
    solver = group["solver"]
    choices = {
        "usual": group["usual_products"],
        "memory": group["memory"],
        "max_iter": group["max_iter"],
        "direct_limit": group.get("direct_limit", 0),
        "residual": residual,
    }
    form = choose(solver, n, dtype, **choices)
    if form.name == "cg" and method.truncated is None:
        return choose("subspace", n, dtype, **choices)._replace(why=form.why)
    return form


def _growth(
    group: Mapping[str, Any], method: Method, form: Form, noise: BatchNoise, gradient_norm: float
) -> Growth:
    """A residual that is asked for is met, whatever it gains.

    Undamped the residual is small where gradients fall fast and the model was right, so that the last
    steps converge quadratically.

    Reference: Eisenstat and Walker (1996), Choosing the forcing terms in an inexact Newton method, choice 2.
    """
    if group["rtol"] is not None:
        return Growth(-math.inf, group["rtol"], form.max_size)
    gain = min(group["gain"], GAIN) if noise.is_seen else group["gain"]
    last = group["gradient_norm"] if method.size != "damping" and not noise.is_seen else None
    forcing = min(1.0, (gradient_norm / last) ** 2) if last else 1.0
    return Growth(gain, method.rtol * forcing, form.max_size, converges=last is not None)


def _form_and_space(
    problem: ClosureProblem, group: Mapping[str, Any], method: Method, noise: BatchNoise, state: Kept
) -> tuple[Form, Subspace]:
    """That of the residuals, if they turn out to be there, else another."""
    model = problem.model()
    n, dtype = model.gradient.numel(), model.gradient.dtype
    if method.by_residuals:
        needs = [name for name in ("spring", "scaling") if group[name] not in (0.0, "identity")]
        known = problem.residuals.cost(group["residual_cost"])
        bends = group["acceleration"] and problem.residuals.are_squares
        form = form_of(group, method, n, dtype, known[-1] / (BENT if bends else 1.0))
        if needs:
            form = form._replace(name="residual", why=f"as {needs[0]} needs it")
        if form.name == "residual":
            space, why = _of_residuals(problem, group, method, state)
            if known[0]:
                state.learn(residual_cost=_corrected(known, space, why))
            if space is not None:
                return form, space
            if needs:
                raise RuntimeError(f"{needs[0]} needs the space of residuals, but {why}.")
        elif known[0]:
            state.learn(residual_cost=known)
    form = form_of(group, method, n, dtype)
    growth = _growth(group, method, form, noise, model.norm)
    return form, _space(model, method, form, growth, state)


def _of_residuals(
    problem: ClosureProblem, group: Mapping[str, Any], method: Method, state: Kept
) -> tuple[Residual | None, str]:
    """Their space, or why there is none."""
    if missing := problem.residuals.missing:
        return None, missing
    last = state.vector(LAST) if group["spring"] else None
    before = None if last is None else problem.scaling.over(group["spring"] * last)
    try:
        residuals = problem.residuals.model()
        if residuals is None:
            return None, NO_RESIDUALS
        space = Residual(problem.model(), residuals, group[method.size], before)
    except TooLargeError as error:
        return None, str(error).rstrip(".")
    if not space.agrees():
        return None, DISAGREES
    return space, ""


def _corrected(known: Known, space: Residual | None, why: str) -> Known:
    """What the space costs, as it turned out: infinite where it will not be there in the next step either."""
    m, n, passes, cost = known
    if space is not None:
        return m, n, space.products, cost + PASS_COST * (space.products - passes)
    return known if why == DISAGREES else (m, n, passes, math.inf)


def _space(model: QuadraticModel, method: Method, form: Form, growth: Growth, state: Kept) -> Subspace:
    if form.name == "formed":
        return Formed(model, method.bound)
    if form.name == "cg" and method.truncated is not None:
        return Truncated(model, method.truncated, damps=method.size == "damping")
    return Grown(model, method.bound, growth, state.ritz())


def _start(
    group: Mapping[str, Any], method: Method, model: QuadraticModel, space: Subspace, noise: BatchNoise
) -> float:
    """The first damping, radius or weight of this step: in the first step, from the function."""
    name, size = method.size, group[method.size]
    if size is None:
        first = FIRST[name] * _halving(name, abs(space.steepest()), model.norm)
        return control.clamped(name, first) if 0 < first < math.inf else 1.0
    if not noise.loses:
        return float(size)
    # Batches ask for no shorter steps than half of the one to the minimum along the gradient.
    limit = _halving(name, abs(space.steepest()) if space.is_free else math.inf, model.norm)
    if name == "radius":
        return control.clamped(name, max(size / MORE, min(size, limit)))
    return control.clamped(name, min(MORE * size, max(size, limit)))


def _halving(name: str, curvature: float, slope: float) -> float:
    """That which halves the step to the minimum along the gradient; no radius where there is none."""
    if name == "radius":
        return 0.5 * slope / (curvature or math.inf)
    return curvature if name == "damping" else 2 * curvature / slope * curvature


def _settled(outcome: Outcome, start: float, method: Method, space: Subspace, noise: BatchNoise) -> float:
    """The next damping, radius or weight; while steps lose on other samples a trial may not loosen it."""
    size = outcome.size
    if method.size == "radius":
        return min(size, start) if noise.loses else size
    least = space.least_damping()
    if method.size == "cubic_weight":
        length = math.inf if outcome.trial is None else outcome.trial.norm
        least = least / length if length > 0 else 0.0
    return max(size, start if noise.loses else min(start, least))


def _untried(space: Subspace, size: float, lr: float | Tensor) -> Outcome:
    solution = space.solve(size)
    step = lr * solution.step
    trial = Trial(step, math.nan) if is_finite(step) else None
    return Outcome(solution.status, trial=trial, trials=1)


def _with_rates(problem: ClosureProblem, model: QuadraticModel, full: Trial, lr: Tensor) -> Trial | None:
    """The step entry by entry times its rate, which is no longer the model's; else a shorter whole one."""
    trial = problem.evaluate(lr * full.step)
    # Of those that move.
    slowest = torch.where(lr > 0, lr.where(lr > 0, math.inf).min(), 0.0) * full.step
    slopes = read(model.gradient.dot(trial.step), model.gradient.dot(slowest))
    if search.decreases_enough(model, trial, slopes[0]):
        return trial
    return search.backtrack(problem, model, slowest, slopes[1])
