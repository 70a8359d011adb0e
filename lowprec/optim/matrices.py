"""Which parameters are the matrices of linear layers, for optimizers that treat those as matrices."""

import math
import re
from typing import Any

import jax

from lowprec.optim.paths import path_name

# Embeddings, heads and what else is a list of vectors, or of numbers: norms and biases have two axes in a stack of
# layers.
NO_MATRICES = r"(.*/)?([^/]*(embed|norm)[^/]*|wte|wpe|head|lm_head|logits|classifier|scale|bias)(/.*)?"


def matrix_mask(params: Any, skip: str = NO_MATRICES) -> Any:
    """A tree like the parameters: whether each is a matrix, or a stack of matrices, over its last two axes.

    Args:
      skip: regular expression; parameters whose whole path matches are none.
    """

    def is_matrix(path, w):
        return (
            w.ndim >= 2 and min(w.shape[-2:]) > 1 and math.prod(w.shape) > 0 and not re.fullmatch(skip, path_name(path))
        )

    return jax.tree_util.tree_map_with_path(is_matrix, params)
