"""The update rule of a run by `optimizer.name`: Optax's own, and every optimizer of `lowprec.optim`."""

import ast
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from lowprec import optim
from lowprec.errors import UsageError, unknown
from lowprec.optim.labels import elementwise
from lowprec.optim.sparse import masked_decay, scale_by_sparse_adam
from lowprec.training.config import OptimizerConfig
from lowprec.training.sparse_masks import recipe_masks

_RULES: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: elementwise(optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.float32)),
    "sgd": lambda c: elementwise(optax.trace(c.b1, accumulator_dtype=jnp.float32)),
    "sparse_adamw": lambda c: scale_by_sparse_adam(
        c.b1, c.b2, c.eps, decay=masked_decay(c.masked_decay_steps, c.masked_decay), masks=recipe_masks
    ),
}
# What other keys of the config say, by the name that it has as a setting of an optimizer.
_KEYS = {"b1": "b1", "b2": "b2", "eps": "eps", "momentum": "b1"}
# What a run does itself, for all rules alike.
_OF_THE_RUN = ("weight_decay", "mask", "seed", "adam_learning_rate", "mu_format", "nu_format")
# The types of values by that of their default.
_KINDS: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    type(None): (int, float, str),
}


def names() -> tuple[str, ...]:
    return tuple(dict.fromkeys((*_RULES, *optim.names())))


def update_rule(config: OptimizerConfig, seed: int = 0) -> optax.GradientTransformation:
    """Gradients -> updates of about the size 1, without decay and learning rate, which follow.

    Args:
      seed: of stochastic rounding.
    Raises:
      UsageError: (a ValueError) for an optimizer, a setting or a state format that there is not; it names the nearest.
    """
    settings = named_settings(config)
    if config.name in _RULES and not settings:
        return _RULES[config.name](config)
    entry = optim.get(config.name)
    found = {name: getattr(config, key) for name, key in _KEYS.items()} | {"seed": seed, "weight_decay": 0.0}
    found = {name: value for name, value in found.items() if name in entry.settings} | settings
    # The rate -1 gives the rule itself, exactly.
    return entry(-1.0, **found)


def named_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Of `optimizer.settings`, `optimizer.mu_format` and `optimizer.nu_format`: those that are given."""
    name = config.name
    if name not in names():
        raise unknown("optimizer", name, names(), f"lowprec optimizers lists {len(optim.names())}")
    formats = {key: getattr(config, key) for key in ("mu_format", "nu_format") if getattr(config, key)}
    settings = _parsed(config.settings)
    if name not in optim.names():
        if formats or settings:
            given = ", ".join(formats | settings)
            raise UsageError(f"optimizer {name} has neither state formats nor settings, but was given {given}")
        return {}
    defaults = optim.get(name).settings
    for key in formats:
        if key not in defaults:
            others = [other for other in optim.names() if key in optim.get(other).settings]
            raise UsageError(f"optimizer {name} has no {key}; those that have are {', '.join(others)}")
    for key, value in settings.items():
        if key in _KEYS or key in _OF_THE_RUN:
            raise UsageError(f"optimizer.settings: {key} is not set here; see the other keys of optimizer")
        if key not in defaults:
            raise unknown(f"setting of {name}", key, (each for each in defaults if each not in (*_KEYS, *_OF_THE_RUN)))
        _check_type(key, value, defaults[key])
    return formats | settings


def _check_type(key: str, value: Any, default: Any) -> None:
    if value is not None and type(value) not in _KINDS.get(type(default), ()):
        raise UsageError(f"optimizer.settings: {key} is like {default!r}, not {value!r}")


def _parsed(text: str) -> dict[str, Any]:
    """{"rank": 64, "reset": "repo"} of "rank=64 reset=repo"."""
    found = {}
    for part in re.split(r"[\s,]+", text.strip()) if text.strip() else []:
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"optimizer.settings is written like rank=64 gap=200, not {part!r}")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
