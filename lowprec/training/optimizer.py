"""From `optimizer.*` to an Optax transformation: clip → update rule → decoupled decay → learning rate.

With AdamW (Loshchilov & Hutter, arXiv 1711.05101), g clipped to norm `clip`:
    m ← b1·m + (1 - b1)·g,  v ← b2·v + (1 - b2)·g²,  w ← w - lr(t)·(m̂ / (√v̂ + eps) + weight_decay·w)
and with SGD  m ← b1·m + g,  w ← w - lr(t)·(m + weight_decay·w).  sparse_adamw is `optim.sparse`: its masked decay lies
inside the moments. All of it in float32; lr(t), and a weight decay that ends, in `training.schedules`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowprec.errors import unknown
from lowprec.optim.named_rates import scale_by_name
from lowprec.optim.oscillation import FreezeState, Grids, freeze_oscillations, oscillation_metrics
from lowprec.optim.sparse import masked_decay, scale_by_sparse_adam
from lowprec.training.config import OptimizerConfig
from lowprec.training.schedules import learning_rate, weight_decay

# Norm scales and biases have no direction that decay could keep small; in a stack of layers they have two axes, so
# that the name decides and not the rank.
_NO_DECAY = re.compile(r"(.*/)?([^/]*norm[^/]*|scale|bias)(/.*)?")

_RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.float32),
    "sgd": lambda c: optax.trace(c.b1, accumulator_dtype=jnp.float32),
    "sparse_adamw": lambda c: scale_by_sparse_adam(
        c.b1, c.b2, c.eps, decay=masked_decay(c.masked_decay_steps, c.masked_decay)
    ),
}


def names() -> tuple[str, ...]:
    return tuple(_RULES)


def build_optimizer(config: OptimizerConfig, steps: int, grids: Grids | None = None) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps.

    Args:
      grids: of the weights that are frozen when they oscillate (`freeze_oscillations`); None: none is.
    Raises:
      UsageError: (a ValueError) if it has no such name; it names the nearest.
    """
    if config.name not in _RULES:
        raise unknown("optimizer", config.name, _RULES)
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _RULES[config.name](config),
        optax.add_decayed_weights(weight_decay(config, steps), mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
    return chain if grids is None else freeze_oscillations(chain, grids, threshold=config.freeze_oscillations)


def build_quantizer_optimizer(
    config: OptimizerConfig, steps: int, rates: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Of learned quantizer parameters: Adam, whose updates are in proportion to the root mean square of each parameter.

    Step sizes, clips and bit widths differ by orders of magnitude from each other and from weights; `quant_lr` is their
    relative change. Decay is that of `quant_weight_decay` alone.

    Args:
      rates: factors of the learning rate by the last name of a parameter's path.
    """
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
        optax.scale_by_param_block_rms(),
        *([scale_by_name(rates)] if rates else []),
        optax.add_decayed_weights(config.quant_weight_decay),
        optax.scale_by_learning_rate(learning_rate(replace(config, lr=config.quant_lr), steps)),
    )


def optimizer_measures(config: OptimizerConfig) -> tuple[tuple[str, Callable[[Any], jax.Array]], ...]:
    """What the state of `build_optimizer` tells of a step: pairs (name in the log, function of that state).

    flip_rate: of the sparse weights, those that entered or left the masks. Of the watched weights, oscillating_weights
    and frozen_weights are shares.
    """
    found: dict[str, Callable[[Any], jax.Array]] = {}
    if config.name == "sparse_adamw":
        found["flip_rate"] = lambda state: optax.tree_utils.tree_get(state, "flip_rate")
    if config.freeze_oscillations:
        found["oscillating_weights"] = lambda state: oscillation_metrics(state)["oscillating"]
        found["frozen_weights"] = lambda state: oscillation_metrics(state)["frozen"]
    return tuple(found.items())


def reset_moments(optimizer: optax.GradientTransformation, opt_state: optax.OptState, params) -> optax.OptState:
    """The state of `build_optimizer`'s chain without its moments; how far its schedules have come is kept."""
    return _with_moments(opt_state, optimizer.init(params))


def _with_moments(opt_state, fresh):
    if isinstance(opt_state, FreezeState):
        return opt_state._replace(inner=_with_moments(opt_state.inner, fresh.inner))
    clip, _, *schedules = opt_state
    return (clip, fresh[1], *schedules)


def decay_mask(params):
    """True for each parameter that decays: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _NO_DECAY.fullmatch(path_name(path)), params)


def path_name(path) -> str:
    """The names along a path of a tree, joined by slashes."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)
