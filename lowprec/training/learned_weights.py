"""The learned parameters of a model's weights, where the optimizer of these weights looks for them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowprec.nn.stack import is_run, run_start
from lowprec.optim.oscillation import Grids
from lowprec.quantizers import OPERANDS
from lowprec.quantizers.variables import Arrays


def by_kernel(quant_params: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Arrays]:
    """Path of a kernel -> the parameters of its quantizer, the runs of a stack of layers joined as the kernel's are.

    Args:
      quant_params: the collection, in which all layers of a stack have the same parameters.
    """
    if set(quant_params) & set(OPERANDS):
        return {"/".join((*path, "kernel")): quant_params["fwd.w"]} if "fwd.w" in quant_params else {}
    runs = sorted(filter(is_run, quant_params), key=run_start)
    if runs:
        found = [by_kernel(quant_params[run], path) for run in runs]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)
    found = [by_kernel(tree, (*path, name)) for name, tree in quant_params.items()]
    return {kernel: own for of_part in found for kernel, own in of_part.items()}


def grids_of_run(grids: Grids) -> Grids:
    """Grids that are told the learned steps, as a training step tells its optimizer: by its collection quant_params."""

    def found(params, quant_params=None, **extra):
        return grids(params, learned=by_kernel(quant_params) if quant_params else None, **extra)

    return found
