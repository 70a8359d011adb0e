"""An optimizer's step on the parameters of a Llama, as a ratio to optax.adamw in float32."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec import optim
from lowprec.analysis.bench.case import MEASURED, Conditions, Record
from lowprec.analysis.bench.interleaved import Times, step_ratios, timed

WIDTH, HIDDEN, TOKENS = 512, 1408, 32000
# Of parameters: the embeddings and one layer or two.
MILLIONS = 38.0
OURS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optim.adamw(1e-3),
    "adam8": lambda: optim.adam8(1e-3),
    "adam4": lambda: optim.adam4(1e-3),
    "stable_adam4": lambda: optim.stable_adam4(1e-3),
    "adamw, de8": lambda: optim.adamw(1e-3, mu_format="de8", nu_format="de8(stochastic)"),
    "adamw, coat8": lambda: optim.adamw(1e-3, mu_format="coat8", nu_format="coat8"),
    "solo": lambda: optim.solo(1e-3),
}


class MeasuredStep(Protocol):
    """A step that can be run again and again, ours or a peer's."""

    state_bytes: float
    temporary_bytes: float
    init_seconds: float
    compile_seconds: float

    def run(self) -> Times: ...


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """Of about so many million parameters. Fewer than one layer and its embeddings has: matrices of 64 columns."""
    matrices = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]
    embeddings = {"embed/embedding": (TOKENS, WIDTH), "head/kernel": (WIDTH, TOKENS)}
    of_layer = sum(a * b for a, b in matrices)
    layers = round((millions * 1e6 - 2 * WIDTH * TOKENS) / of_layer)
    if layers < 1:
        return {f"layers_{i}/kernel": (round(millions * 1e6 / 4 / 64), 64) for i in range(4)}
    inside = {f"layers_{i}/{j}/kernel": shape for i in range(layers) for j, shape in enumerate(matrices)}
    return {**embeddings, **inside, **{f"layers_{i}/norm/scale": (WIDTH,) for i in range(layers)}}


def draw(millions: float) -> tuple[Any, Any]:
    """Parameters and gradients, normal."""
    draws = np.random.default_rng(0)
    tree = lambda scale: {
        name: jnp.asarray(scale * draws.standard_normal(shape, np.float32)) for name, shape in shapes(millions).items()
    }
    return tree(0.02), tree(1e-3)


class Step:
    """A compiled step and its parameters and state.

    Args:
      init: params -> state.
      step: (params, grads, state) -> (params, state).
    """

    def __init__(self, init: Callable, step: Callable, params: Any, grads: Any):
        start = time.perf_counter()
        init = jax.jit(init).lower(params).compile()
        self.init_seconds = time.perf_counter() - start
        self.grads, self.params = grads, jax.tree.map(jnp.copy, params)
        self.state = init(params)
        self.state_bytes: float = optim.state_bytes(self.state)
        start = time.perf_counter()
        self.compiled = jax.jit(step, donate_argnums=(0, 2)).lower(self.params, grads, self.state).compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary_bytes: float = self.compiled.memory_analysis().temp_size_in_bytes

    def run(self) -> Times:
        """One step."""
        return timed(self._step)

    def _step(self):
        self.params, self.state = self.compiled(self.params, self.grads, self.state)
        return self.params, self.state


def unfused(optimizer: optax.GradientTransformation) -> Callable:
    """Its update and `apply_updates`, as a step."""

    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    return step


def base_step(params: Any, grads: Any) -> Step:
    """optax.adamw in float32."""
    reference = optax.adamw(1e-3)
    return Step(reference.init, unfused(reference), params, grads)


def our_steps(params: Any, grads: Any) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Names and makers of steps."""
    for name, make in OURS.items():
        for fused in (False, True):
            yield f"{name}, fused" if fused else name, partial(_step, make, fused, params, grads)


def measure(step: MeasuredStep, base: MeasuredStep, seconds: float) -> dict[str, float]:
    """Ratios of one step to another, timed in turn; bytes and seconds of compiling."""
    return {
        **step_ratios(step.run, base.run, seconds, least=5),
        "state_bytes": step.state_bytes,
        "temporary_bytes": step.temporary_bytes,
        "init_s": step.init_seconds,
        "compile_s": step.compile_seconds,
    }


@dataclass(frozen=True)
class OptimizerStep:
    """The step of one optimizer, beside optax.adamw."""

    optimizer: str
    fused: bool

    @property
    def name(self) -> str:
        return f"optimizers/{self.optimizer.replace(', ', '_')}/{'fused' if self.fused else 'update'}"

    def run(self, conditions: Conditions) -> Record:
        params, grads, base = _base(0.05 if conditions.tiny else MILLIONS)
        found = measure(_step(OURS[self.optimizer], self.fused, params, grads), base, conditions.seconds)
        count = sum(leaf.size for leaf in params.values())
        return {"status": MEASURED, "parameters": count, "state_bytes_each": found["state_bytes"] / count} | found


def optimizer_steps() -> Iterator[OptimizerStep]:
    """Each optimizer by its update, and fused."""
    for name in OURS:
        yield OptimizerStep(name, False)
        yield OptimizerStep(name, True)


def _step(make, fused, params, grads):
    optimizer = make()
    return Step(optimizer.init, optim.fused_step(optimizer).step if fused else unfused(optimizer), params, grads)


@cache
def _base(millions):
    params, grads = draw(millions)
    return params, grads, base_step(params, grads)
