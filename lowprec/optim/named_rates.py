"""Learning rates by the names of parameters: what several steps of one quantizer, say, are slowed down by."""

from collections.abc import Mapping

import jax
import optax


def scale_by_name(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """u ← factor · u for parameters of these names; the others stay as they are.

    After the rule that normalizes updates: Adam would undo it before. With `quantizers.nested.rate_factors` it is the
    adaptive learning rate scaling of Double Rounding (ALRS, arXiv 2502.01199).

    Args:
      factors: by the last name of a parameter's path, e.g. "step_4".
    """

    def scaled(path, update):
        name = getattr(path[-1], "key", None) if path else None
        return update * factors[name] if name in factors else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates))
