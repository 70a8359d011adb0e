"""The 2:4 masks of a run's weights, as its recipe multiplies them: by magnitude, or by Wanda's scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lowprec.errors import UsageError
from lowprec.nn.stack import is_run, run_layers
from lowprec.optim.paths import LAYER_KERNELS, matching
from lowprec.optim.sparse import Masks
from lowprec.quantizers.sparsity import SQUARES, nm_mask, wanda_scores


def recipe_masks(params: Any, quant_params: Mapping[str, Any] | None = None, **_: Any) -> Masks:
    """Of every four weights along the inputs of a kernel (…, K, N), the two that count most.

    Args:
      params: of the plain model.
      quant_params: the learned parameters of its quantizers, where there are any: layers whose inputs were measured
        (`quantizers.sparsity.Sparse` by "wanda") are compared by |w| · ‖x‖, all others by |w|.
    Raises:
      UsageError: (a ValueError) of a kernel whose inputs are not an axis of its own, that of a convolution.
    """
    return {path: _mask(path, w, quant_params or {}) for path, w in matching(params, LAYER_KERNELS).items()}


def _mask(path, w, quant_params):
    squares = _find(quant_params, path.split("/")[:-1], w.shape)
    if squares is None:
        return nm_mask(w)
    if squares.shape != w.shape[:-1]:
        raise UsageError(f"masks by the norms of inputs serve matrices, not {path} of shape {w.shape}")
    return nm_mask(wanda_scores(w.astype(jnp.float32), squares))


def _find(tree: Mapping[str, Any], names: Sequence[str], shape: tuple[int, ...]):
    """The mean squares of the inputs of a product; of stacked layers together, ones where they were not measured."""
    if not names:
        return tree.get("fwd.w", {}).get(SQUARES)
    runs = sorted(filter(is_run, tree), key=lambda name: run_layers(name).start)
    if not runs:
        return _find(tree[names[0]], names[1:], shape) if names[0] in tree else None
    found = [(run_layers(name), _find(tree[name], names, shape)) for name in runs]
    measured = [(rows, squares) for rows, squares in found if squares is not None]
    if not measured:
        return None
    whole = jnp.ones((shape[0], *measured[0][1].shape[1:]))
    for rows, squares in measured:
        whole = whole.at[rows].set(squares)
    return whole
