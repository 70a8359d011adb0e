"""From `optimizer.*` to an Optax transformation: clip → update rule → decoupled decay → learning rate, and around it
what stores the parameters (`training.weight_storage`). The rules are in `training.update_rules`.

With AdamW (Loshchilov & Hutter, arXiv 1711.05101), g clipped to norm `clip`:
    m ← b1·m + (1 - b1)·g,  v ← b2·v + (1 - b2)·g²,  w ← w - lr(t)·(m̂ / (√v̂ + eps) + weight_decay·w)
and with SGD  m ← b1·m + g,  w ← w - lr(t)·(m + weight_decay·w).  sparse_adamw is `optim.sparse`: its masked decay lies
inside the moments. All of it in float32; lr(t), and a weight decay that ends, in `training.schedules`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowprec import optim
from lowprec.errors import UsageError
from lowprec.optim.fused import CHUNK, Step, fused_step
from lowprec.optim.labels import Chain, chain, elementwise
from lowprec.optim.named_rates import scale_by_name
from lowprec.optim.narrow_weights import Narrow, NarrowState
from lowprec.optim.oscillation import FreezeState, Grids, cosine_threshold, freeze_oscillations, oscillation_metrics
from lowprec.optim.paths import path_name
from lowprec.optim.quantized_weights import DenseWeights
from lowprec.optim.specs import DecaySpec, IdentitySpec, RateSpec
from lowprec.optim.state_tensor import is_stored
from lowprec.training.config import OptimizerConfig
from lowprec.training.parameter_kinds import is_small
from lowprec.training.schedules import Strengths, learning_rate, weight_decay
from lowprec.training.update_rules import named_settings, update_rule
from lowprec.training.weight_storage import storage_of


def build_optimizer(
    config: OptimizerConfig,
    steps: int,
    grids: Grids | None = None,
    seed: int = 0,
    strengths: Strengths | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps, of parameters that are stored as the config says.

    Args:
      grids: of the weights that are frozen when they oscillate (`freeze_oscillations`); None: none is.
      seed: of stochastic rounding.
      strengths: of learning rate and decay, instead of the config's.
    Raises:
      UsageError: (a ValueError) for what does not exist, or does not fit together; it names the nearest.
    """
    storage = storage_of(config.weights)
    decay, rate = weight_decay(config, steps, strengths), learning_rate(config, steps, strengths)
    whole = chain(
        optax.clip_by_global_norm(config.clip) if config.clip else elementwise(optax.identity(), IdentitySpec()),
        update_rule(config, seed),
        elementwise(optax.add_decayed_weights(decay, mask=decay_mask), DecaySpec(decay, decay_mask)),
        elementwise(optax.scale_by_learning_rate(rate), RateSpec(rate)),
    )
    if grids is None:
        return storage.wrap(whole, seed)
    if config.weights != "f32":
        raise UsageError(f"optimizer.freeze_oscillations freezes weights in float32, not in {config.weights}")
    start, end = config.freeze_oscillations_start, config.freeze_oscillations
    return freeze_oscillations(whole, grids, threshold=cosine_threshold(start, end, steps) if start else end)


def fused_optimizer(optimizer: optax.GradientTransformation, params: Any, chunk: int | None = CHUNK) -> Step | None:
    """`optim.fused_step` of an optimizer of `build_optimizer`, where it saves memory; else None.

    It does so where moments or parameters are stored in fewer bits than float32, and nothing is wrapped around the
    chain that needs the updates of all parameters at once.

    Args:
      params: as they are stored, or their shapes.
      chunk: see `optim.fused_step`.
    """
    if isinstance(optimizer, Narrow | DenseWeights):
        return fused_step(optimizer, chunk=chunk)
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params), is_leaf=is_stored)
    return fused_step(optimizer, chunk=chunk) if isinstance(optimizer, Chain) and any(map(is_stored, leaves)) else None


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

    Those of `optim.optimizer_diagnostics` that the optimizer has. flip_rate: of the sparse weights, those that entered
    or left the masks. Of the watched weights, oscillating_weights and frozen_weights are shares.
    """
    found: dict[str, Callable[[Any], jax.Array]] = {name: _diagnostic(name) for name in _diagnostics(config)}
    if config.name == "sparse_adamw":
        found["flip_rate"] = lambda state: optax.tree_utils.tree_get(state, "flip_rate")
    if config.freeze_oscillations:
        found["oscillating_weights"] = lambda state: oscillation_metrics(state)["oscillating"]
        found["frozen_weights"] = lambda state: oscillation_metrics(state)["frozen"]
    return tuple(found.items())


def _diagnostic(name: str) -> Callable[[Any], jax.Array]:
    return lambda state: optim.optimizer_diagnostics(state)[name]


def _diagnostics(config: OptimizerConfig) -> list[str]:
    if config.name not in optim.names():
        return []
    rule, settings = update_rule(config), optim.get(config.name).settings | named_settings(config)
    measured = jax.eval_shape(lambda: optim.optimizer_diagnostics(rule.init({"kernel": jnp.zeros((8, 8))})))
    return [name for name in measured if name != "resets" or settings.get("reset_every") is not None]


def reset_moments(optimizer: optax.GradientTransformation, opt_state: optax.OptState, params) -> optax.OptState:
    """The state of `build_optimizer`'s chain without its moments; how far its schedules have come is kept."""
    return _with_moments(opt_state, optimizer.init(params))


def _with_moments(opt_state, fresh):
    if isinstance(opt_state, FreezeState | NarrowState):
        return opt_state._replace(inner=_with_moments(opt_state.inner, fresh.inner))
    clip, _, *schedules = opt_state
    return (clip, fresh[1], *schedules)


def decay_mask(params):
    """True for each parameter that decays: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_small(path_name(path)), params)
