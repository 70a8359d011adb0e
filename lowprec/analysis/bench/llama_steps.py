"""A training step of Llama blocks, end to end: models of `lowprec.models` under recipes, on each backend."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec import models
from lowprec.analysis.bench.case import CHECKED, MEASURED, WRONG, Conditions, Record
from lowprec.analysis.bench.machine import clocks
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.training.tasks import NEXT_TOKEN

VOCABULARY = 256
# (recipe, backend); XLA's own products are "native".
RUNS = (
    ("bf16", "auto"),
    ("fp8", "native"),
    ("fp8", "pallas"),
    ("fp8_block", "auto"),
    ("fp8_block", "pallas"),
    ("int8", "native"),
    ("int8", "pallas"),
    ("fp8", "auto"),
    ("int8", "auto"),
)
_WARM_UP, _REPEATS, _STEPS = 2, 5, 4


@dataclass(frozen=True)
class LlamaStep:
    """Forward, backward and plain SGD on one batch of random tokens, the state donated.

    Args:
      recipe, backend: of `nn.linen.quantize`.
      config: of the model.
      tokens: (batch, positions).
    """

    recipe: str
    backend: str
    config: ModelConfig
    tokens: tuple[int, int]

    @property
    def name(self) -> str:
        return f"llama/{self.config.width}/{self.recipe}/{self.backend}"

    @property
    def trial(self) -> str:
        """What cases have in common that are the same program where nothing is timed."""
        return f"llama/{self.recipe}/{self.backend}"

    def run(self, conditions: Conditions) -> Record:
        tiny = conditions.tiny
        config = ModelConfig(layers=1, width=128, heads=2, mlp_width=256, dtype="bfloat16") if tiny else self.config
        tokens = (2, 64) if tiny else self.tokens
        step, params, windows = _step(config, self.recipe, self.backend, tokens)
        start = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0).lower(params, jax.random.key(0), windows).compile()
        compile_s = time.perf_counter() - start
        losses, seconds = [], []
        for at in range(1 if tiny else _WARM_UP + _REPEATS):
            start = time.perf_counter()
            for _ in range(1 if tiny or at < _WARM_UP else _STEPS):
                params, loss = compiled(params, jax.random.key(at), windows)
                losses.append(loss)
            jax.block_until_ready(params)
            seconds.append((time.perf_counter() - start) / _STEPS)
        first, last = float(losses[0]), float(losses[-1])
        record: Record = {"first_loss": first, "loss": last, "steps": len(losses)}
        # Random tokens: the first loss is that of a guess, and one batch again and again is learned by heart.
        if not (abs(first - math.log(VOCABULARY)) < 0.5 and last <= first):
            return {
                "status": WRONG,
                "error": f"loss {first:.3f} at first, {last:.3f} after {len(losses)} steps",
            } | record
        if tiny:
            return {"status": CHECKED} | record
        times = np.array(seconds[_WARM_UP:]) * 1e3
        flops = 6 * self.tokens[0] * self.tokens[1] * _weights(params)
        return {
            "status": MEASURED,
            "plain": f"llama/{config.width}/bf16/auto",
            "ms": float(np.median(times)),
            "low_ms": float(times.min()),
            "high_ms": float(times.max()),
            "tflops": flops / float(np.median(times)) / 1e9,
            "compile_s": compile_s,
            "temporary_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
            "model": f"{config.layers} layers of {config.width}, mlp {config.gate_width}, tokens {self.tokens}",
            "clocks": clocks(),
        } | record


def llama_steps() -> Iterator[LlamaStep]:
    """Every run at width 4096, the shape of Llama 3 8B's blocks, then some at 2048."""
    wide = ModelConfig(layers=2, width=4096, heads=32, kv_heads=8, mlp_width=14336, dtype="bfloat16")
    narrow = ModelConfig(layers=4, width=2048, heads=16, kv_heads=4, mlp_width=8192, dtype="bfloat16")
    for recipe, backend in RUNS:
        yield LlamaStep(recipe, backend, wide, (8, 1024))
    for recipe, backend in RUNS[:5]:
        yield LlamaStep(recipe, backend, narrow, (8, 1024))


def _step(config, recipe, backend, tokens):
    """(params, key, windows) -> (params, loss), its parameters and windows."""
    model = linen.quantize(models.build(config, VOCABULARY), recipe, backend=backend)
    windows = jax.random.randint(jax.random.key(1), (tokens[0], tokens[1] + 1), 0, VOCABULARY)
    streams = {"params": jax.random.key(2), "quant": jax.random.key(3)}
    params = jax.jit(model.init)(streams, windows[:, :-1])["params"]
    optimizer = optax.sgd(0.1)

    def step(params, key, windows):
        loss, gradient = jax.value_and_grad(lambda p: NEXT_TOKEN.loss(model, {"params": p}, windows, key)[0])(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params))
        return optax.apply_updates(params, updates), loss

    return step, params, windows


def _weights(params):
    """Of the kernels: each takes part in six operations a token and training step."""
    return sum(leaf.size for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) > 1)
