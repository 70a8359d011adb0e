"""Robust least squares of a law from many starts at once: Levenberg–Marquardt with reweighting, vmapped, in float64.

Each step solves (H + lambda diag H) dp = -g with H = Jᵀ Q J, g = Jᵀ Q r, and Q the weights that make the quadratic
touch the Huber function at the residuals r. There is no line search, so all starts advance in lock-step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError, unknown
from lowprec.scaling.law import Law, Levels, Parameter, by_row, coordinates_of

OBJECTIVES = ("huber", "lad", "l2")
# Absolute values have no curvature: they are approached through Huber functions that grow ever sharper.
SHARPEST = 1e-7
FINALISTS = 16
BATCHED = {"weights": (None, 0, None), "fixed": (0, None, 0)}


@dataclass(frozen=True)
class Problem:
    """What a solver is compiled for: a law, its labels, and which constants are free."""

    law: Law
    levels: Levels
    free: tuple[str, ...]
    residual: str

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The parameter that each constant belongs to, fixed ones too."""
        return {name: p for p in self.law.parameters for name in coordinates_of(p, self.levels)}

    def interval(self, which: str) -> tuple[np.ndarray, np.ndarray]:
        """The "start" or "bounds" of the free constants, as searched."""
        ends = [
            [np.log(end) if self.parameters[name].log else end for end in getattr(self.parameters[name], which)]
            for name in self.free
        ]
        low, high = np.array(ends, np.float64).reshape(-1, 2).T
        return low, high

    def centred(self, values: Mapping[str, float], centres: Mapping[str, float]) -> np.ndarray:
        """The free constants as searched, from the constants by name."""
        searched = []
        for name in self.free:
            p = self.parameters[name]
            shift = sum(sign * (values[e] if e else 1.0) * centres[column] for e, column, sign in p.centre)
            searched.append(np.log(values[name]) - shift if p.log else values[name])
        return np.array(searched, np.float64)

    def natural(self, theta: Any, fixed: Mapping[str, Any], centres: Mapping[str, Any]) -> dict[str, Any]:
        """The constants by name, from those searched and those fixed."""
        values = dict(fixed)
        searched = dict(zip(self.free, theta, strict=True))
        for name, u in searched.items():
            if not self.parameters[name].log:
                values[name] = u
        for name, u in searched.items():
            p = self.parameters[name]
            if p.log:
                shift = sum(sign * (values[e] if e else 1.0) * centres[column] for e, column, sign in p.centre)
                values[name] = jnp.exp(u + shift)
        return values

    def residuals(self, theta: Any, sample: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
        """Predicted less measured, or its logarithm, of each row."""
        values = self.natural(theta, fixed, sample["centres"])
        predicted = self.law.function(by_row(self.law, self.levels, values, sample["columns"]), sample["columns"])
        if self.residual == "log":
            return jnp.log(predicted) - jnp.log(sample["target"])
        return predicted - sample["target"]


def schedule(objective: str, delta: float, iterations: int, sharp: bool = False) -> np.ndarray:
    """The width of the Huber function at each iteration.

    Args:
      objective: "huber", "lad" (least absolute deviations) or "l2" (least squares).
      delta: of Huber, where the square ends.
      iterations: how many.
      sharp: whether the search starts near the optimum.

    Raises:
      UsageError: for another objective.
    """
    if objective == "huber":
        return np.full(iterations, delta)
    if objective == "l2":
        return np.full(iterations, np.inf)
    if objective == "lad":
        return np.geomspace(1e-4 if sharp else 1e-2, SHARPEST if sharp else 1e-4, iterations)
    raise unknown("objective", objective, OBJECTIVES)


def cost(r: Any, weights: Any, delta: Any) -> Any:
    """The weighted sum of Huber functions: r²/2 up to delta, a line beyond."""
    a = jnp.abs(r)
    return jnp.sum(weights * jnp.where(a <= delta, 0.5 * r * r, delta * (a - 0.5 * delta)))


def objective_value(r: np.ndarray, weights: np.ndarray, objective: str, delta: float) -> float:
    """The sum over rows: Huber functions of delta, absolute values ("lad") or halves of squares ("l2")."""
    if objective == "lad":
        return float(np.sum(weights * np.abs(r)))
    return float(cost(r, weights, delta if objective == "huber" else np.inf))


def _descend(problem: Problem, theta, weights, fixed, deltas, sample, low, high):
    def linear(p):
        def both(p):
            r = problem.residuals(p, sample, fixed)
            return r, r

        jacobian, r = jax.jacfwd(both, has_aux=True)(p)
        return r, jacobian

    def step(carry, delta):
        p, damping, r, jacobian = carry
        q = weights * jnp.minimum(1.0, delta / jnp.maximum(jnp.abs(r), 1e-300))
        weighted = jacobian * q[:, None]
        h, g = weighted.T @ jacobian, weighted.T @ r
        diagonal = jnp.diag(h)
        scale = diagonal + 1e-12 * jnp.max(diagonal) + 1e-300
        move = jnp.linalg.solve(h + damping * jnp.diag(scale), -g)
        trial = jnp.clip(p + jnp.clip(move, -2.0, 2.0), low, high)
        r_trial, jacobian_trial = linear(trial)
        better = cost(r_trial, weights, delta) < jnp.nan_to_num(cost(r, weights, delta), nan=jnp.inf)
        carry = (
            jnp.where(better, trial, p),
            jnp.clip(jnp.where(better, damping * 0.3, damping * 4.0), 1e-12, 1e8),
            jnp.where(better, r_trial, r),
            jnp.where(better, jacobian_trial, jacobian),
        )
        return carry, None

    start = jnp.clip(theta, low, high)
    (p, _, r, _), _ = jax.lax.scan(step, (start, jnp.float64(1e-2), *linear(start)), deltas)
    return p, jnp.nan_to_num(cost(r, weights, deltas[-1]), nan=jnp.inf)


@partial(jax.jit, static_argnames=("problem", "over"))
def _solve(problem: Problem, over: str, theta, weights, fixed, deltas, sample):
    low, high = problem.interval("bounds")
    descend = lambda t, w, f: _descend(problem, t, w, f, deltas, sample, low, high)
    return jax.vmap(descend, in_axes=BATCHED[over])(theta, weights, fixed)


@partial(jax.jit, static_argnames=("problem",))
def _search(problem: Problem, theta, weights, fixed, deltas, polishing, sample):
    low, high = problem.interval("bounds")
    descend = lambda t, d: _descend(problem, t, weights, fixed, d, sample, low, high)
    found, values = jax.vmap(descend, in_axes=(0, None))(theta, deltas)
    finalists = jnp.argsort(values)[:FINALISTS]
    polished, finals = jax.vmap(descend, in_axes=(0, None))(found[finalists], polishing)
    return values, polished[jnp.argmin(finals)]


@partial(jax.jit, static_argnames=("problem",))
def _jacobian(problem: Problem, theta, fixed, sample):
    return problem.residuals(theta, sample, fixed), jax.jacfwd(problem.residuals)(theta, sample, fixed)


def search(
    problem: Problem,
    theta: np.ndarray,
    weights: np.ndarray,
    fixed: Mapping[str, float],
    deltas: np.ndarray,
    polishing: np.ndarray,
    sample: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """What each start came to, and the best optimum after the best of them were followed further.

    Args:
      problem: what to solve.
      theta: the starts, as searched.
      weights: of the rows.
      fixed: constants that are held.
      deltas: of each iteration from every start.
      polishing: of each further iteration from the best of them.
      sample: columns, target and centres.
    """
    with jax.enable_x64(True):
        values, best = _search(problem, theta, weights, dict(fixed), deltas, polishing, sample)
        return np.asarray(values), np.asarray(best)


def solve(
    problem: Problem,
    over: str,
    theta: np.ndarray,
    weights: np.ndarray,
    fixed: Mapping[str, Any],
    deltas: np.ndarray,
    sample: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """The optima of many problems at once, and their objectives at the last delta.

    Args:
      problem: what to solve.
      over: what differs between them: "weights" (the start is one) or "fixed" (constants held, and starts).
      theta: the starts, as searched.
      weights: of the rows.
      fixed: constants that are held.
      deltas: of each iteration.
      sample: columns, target and centres.
    """
    with jax.enable_x64(True):
        best, value = _solve(problem, over, theta, weights, dict(fixed), deltas, sample)
        return np.asarray(best), np.asarray(value)


def linearised(
    problem: Problem, theta: np.ndarray, fixed: Mapping[str, float], sample: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The residuals and their Jacobian by the searched constants."""
    with jax.enable_x64(True):
        r, jacobian = _jacobian(problem, theta, dict(fixed), sample)
        return np.asarray(r), np.asarray(jacobian)


def check_free(names: Sequence[str], fixed: Mapping[str, float]) -> None:
    """Refuses constants that the law does not have.

    Raises:
      UsageError: for an unknown name, or if none is left to fit.
    """
    for name in fixed:
        if name not in names:
            raise unknown("constant", name, names)
    if set(fixed) >= set(names):
        raise UsageError("every constant is fixed; there is nothing to fit")
