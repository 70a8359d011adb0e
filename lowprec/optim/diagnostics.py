"""What the state of an optimizer tells of its last update, for the log."""

from typing import Any

import jax
import jax.numpy as jnp

from lowprec.optim.adam import ScaleByAdamState
from lowprec.optim.adaptive import GradNormState, SpikeClipState
from lowprec.optim.spam import ScaleBySpamState
from lowprec.typing import Array, Float

_MEASURED = (SpikeClipState, GradNormState, ScaleBySpamState, ScaleByAdamState)


def optimizer_diagnostics(state: Any) -> dict[str, Float[Array, ""]]:
    """Scalars by name, of what there is in a state, however it is wrapped.

    clip_rate: the fraction of elements that were scaled down as spikes, the mean over tensors. clipped_tensors: the
    fraction of tensors in which any was. norm_factor, norm_factor_max: c of `adaptive_grad_norm`, mean and largest over
    tensors. resets: of the moments, so far.
    """
    found: dict[str, Float[Array, ""]] = {}
    for part in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, _MEASURED)):
        if isinstance(part, SpikeClipState | ScaleBySpamState):
            clipped = _stacked(part.clipped)
            found |= {"clip_rate": jnp.mean(clipped), "clipped_tensors": jnp.mean(clipped > 0)}
        elif isinstance(part, GradNormState):
            factor = _stacked(part.factor)
            found |= {"norm_factor": jnp.mean(factor), "norm_factor_max": jnp.max(factor)}
        elif isinstance(part, ScaleByAdamState):
            found["resets"] = part.resets.astype(jnp.float32)
    return found


def _stacked(tree):
    return jnp.stack(jax.tree.leaves(tree))
