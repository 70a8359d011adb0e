"""From `optimizer.*` to an Optax transformation: clip → update rule → decoupled decay → learning rate.

With AdamW (Loshchilov & Hutter, arXiv 1711.05101), g clipped to norm `clip`:
    m ← b1·m + (1 - b1)·g,  v ← b2·v + (1 - b2)·g²,  w ← w - lr(t)·(m̂ / (√v̂ + eps) + weight_decay·w)
and with SGD  m ← b1·m + g,  w ← w - lr(t)·(m + weight_decay·w).  All of it in float32.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from lowprec.errors import unknown
from lowprec.training.config import OptimizerConfig

# OneCycle's start in the set-up of QuEST and Quartet: a hundredth of the peak.
START_FRACTION = 0.01

# Norm scales and biases have no direction that decay could keep small; in a stack of layers they have two axes, so
# that the name decides and not the rank.
_NO_DECAY = re.compile(r"(.*/)?([^/]*norm[^/]*|scale|bias)(/.*)?")

_RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.float32),
    "sgd": lambda c: optax.trace(c.b1, accumulator_dtype=jnp.float32),
}


def names() -> tuple[str, ...]:
    return tuple(_RULES)


def build_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps.

    Raises:
      UsageError: (a ValueError) if it has no such name; it names the nearest.
    """
    if config.name not in _RULES:
        raise unknown("optimizer", config.name, _RULES)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _RULES[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def build_quantizer_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Of learned quantizer parameters: Adam, whose updates are in proportion to the root mean square of each parameter.

    Step sizes, clips and bit widths differ by orders of magnitude from each other and from weights; `quant_lr` is their
    relative change. Decay is that of `quant_weight_decay` alone.
    """
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(config.quant_weight_decay),
        optax.scale_by_learning_rate(learning_rate(replace(config, lr=config.quant_lr), steps)),
    )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Update index (0 for the first) -> learning rate: half a cosine up, then half a cosine down (OneCycle)."""
    rise = config.warmup_fraction * steps
    fall = max(steps - 1 - rise, 1.0)

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        up = _half_cosine(START_FRACTION, 1.0, count / rise) if rise else 1.0
        down = _half_cosine(1.0, config.final_fraction, (count - rise) / fall)
        return jnp.float32(config.lr) * jnp.where(count < rise, up, down)

    return schedule


def decay_mask(params):
    """True for each parameter that decays: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _NO_DECAY.fullmatch(path_name(path)), params)


def path_name(path) -> str:
    """The names along a path of a tree, joined by slashes."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def _half_cosine(start, end, fraction):
    return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(fraction, 0.0, 1.0)))
