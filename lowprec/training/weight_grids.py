"""The integer grids that a recipe rounds the weights of a model to, for optimizers that watch them."""

from typing import Any

from lowprec.errors import UsageError
from lowprec.optim.oscillation import Grids, quantizer_grids
from lowprec.optim.paths import LAYER_KERNELS, matching
from lowprec.recipes import Recipe

_STACK = "layers/"


def weight_grids(recipe: Recipe, params: Any, layers: int) -> Grids:
    """Of all kernels of the layers.

    Args:
      params: of the plain model, arrays or shapes.
      layers: of its stack.
    Raises:
      UsageError: (a ValueError) if the recipe rounds some otherwise than others, if their codes depend on more than the
        weights (learned steps, rotations), or if there are kernels of convolutions.
    """
    quantizers = set()
    for path, kernel in matching(params, LAYER_KERNELS).items():
        product, stacked = path.rpartition("/")[0], path.startswith(_STACK)
        if len(kernel.shape) != 2 + stacked:
            raise UsageError(f"optimizer.freeze_oscillations serves matrices, not {path} of shape {kernel.shape}")
        inner = product.removeprefix(_STACK)
        places = [f"{_STACK}{index}/{inner}" for index in range(layers)] if stacked else [product]
        quantizers |= {recipe.rule_for(place).fwd[1] for place in places}
    if len(quantizers) > 1:
        raise UsageError(
            f"optimizer.freeze_oscillations serves recipes that quantize all layers alike; {recipe} quantizes their "
            f"weights as {' and '.join(map(str, quantizers))}"
        )
    try:
        return quantizer_grids(quantizers.pop())
    except UsageError as error:
        raise UsageError(f"optimizer.freeze_oscillations does not serve recipe {recipe}: {error}") from None
