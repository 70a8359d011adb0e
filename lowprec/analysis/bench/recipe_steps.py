"""A training step of dense layers under recipes, as a ratio to the same step in float32."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lowprec import recipes
from lowprec.analysis.bench.case import MEASURED, Conditions, Record
from lowprec.analysis.bench.interleaved import Times, step_ratios, timed
from lowprec.nn import linen
from lowprec.typing import Array

SHORT_FORMS = {
    "int8 forward": "fwd=int8_symmetric@row",
    "fp8 e4m3fn forward": "fwd=e4m3fn@row",
    "fp8 e4m3fn/e5m2": "fwd=e4m3fn@row dgrad=e5m2@row,reuse wgrad=e5m2@row,reuse",
    "fp8 e4m3fn/e5m2 stochastic": "fwd=e4m3fn@row dgrad=e5m2@row(stochastic),reuse wgrad=e5m2@row(stochastic),reuse",
    "int8 three products": "fwd=int8_symmetric@row dgrad=int8_symmetric@row wgrad=int8_symmetric@row",
    "int8 three products stochastic": (
        "fwd=int8_symmetric@row dgrad=int8_symmetric@row(stochastic),int8_symmetric@row "
        "wgrad=int8_symmetric@row(stochastic),int8_symmetric@row"
    ),
    "mxfp4 three products": "fwd=mxfp4 dgrad=mxfp4 wgrad=mxfp4",
}
NAMED = ("bf16", "int8", "int8_full", "fp8", "fp8_block", "mxfp8", "nvfp4", "quartet2", "quest_4", "bitnet158")
BATCH, WIDTH, LAYERS = 1024, 512, 4


class MLP(nn.Module):
    width: int
    layers: int
    dot_general_cls: Callable | None = None

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = nn.Dense(self.width, use_bias=False, dot_general_cls=self.dot_general_cls)(x)
            x = nn.relu(x) if i < self.layers - 1 else x
        return x


class Step:
    """A compiled training step, mean squared error and plain SGD, and its state.

    Args:
      model: has init and apply.
      x, y: the batch.
    """

    def __init__(self, model: Any, x: Array, y: Array):
        streams = lambda key: {"quant": key, "params": key, "stochastic_rounding": key}
        params = model.init(streams(jax.random.key(0)), x)["params"]
        optimizer = optax.sgd(1e-2)

        def step(state, key, x, y):
            params, opt_state = state
            loss = lambda p: jnp.mean((model.apply({"params": p}, x, rngs=streams(key)) - y) ** 2)
            value, gradient = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        self.key, self.inputs = jax.random.key(7), (x, y)
        self.state = (params, optimizer.init(params))
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self.key, x, y)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary_bytes = self.compiled.memory_analysis().temp_size_in_bytes

    def run(self) -> Times:
        """One step."""
        return timed(self._step)

    def _step(self):
        self.state, loss = self.compiled(self.state, self.key, *self.inputs)
        return self.state, loss


def quantized_models(width: int, layers: int) -> Iterator[tuple[str, Callable]]:
    """Names and makers of the model under each recipe."""
    plain = MLP(width, layers)
    for name in (*SHORT_FORMS, *NAMED):
        yield name, partial(linen.quantize, plain, recipes.parse(SHORT_FORMS.get(name, name)))


def batch(size: int, width: int) -> tuple[Array, Array]:
    """Inputs and targets, standard normal."""
    x, y = (jax.random.normal(jax.random.key(i), (size, width)) for i in (1, 2))
    return x, y


def measure(step: Step, base: Step, seconds: float) -> dict[str, float]:
    """Ratios of one step to another, timed in turn; seconds of compiling."""
    return {
        **step_ratios(step.run, base.run, seconds, least=10),
        "memory": step.temporary_bytes / base.temporary_bytes,
        "compile_s": step.compile_seconds,
    }


@dataclass(frozen=True)
class RecipeStep:
    """The step of one recipe, beside float32."""

    recipe: str
    make: Callable

    @property
    def name(self) -> str:
        return f"recipes/{self.recipe.replace(' ', '_').replace('/', '_')}"

    def run(self, conditions: Conditions) -> Record:
        x, y = batch(8 if conditions.tiny else BATCH, WIDTH)
        base = _plain_step(len(x))
        return {"status": MEASURED} | measure(Step(self.make(), x, y), base, conditions.seconds)


def recipe_steps() -> Iterator[RecipeStep]:
    """Four Dense(512) layers, batch 1024, under each recipe."""
    for name, make in quantized_models(WIDTH, LAYERS):
        yield RecipeStep(name, make)


@cache
def _plain_step(rows):
    return Step(MLP(WIDTH, LAYERS), *batch(rows, WIDTH))
