"""formats.round_to and encode, operation by operation: the public ones compile a program for each format and mode,
which is what test_transformations compares these with, and too slow for thousands of formats."""

import jax.numpy as jnp
import numpy as np

from lowprec.formats import elements, parse_rounding


def round_to(x, fmt, *, rounding="nearest_even", key=None, saturate=True) -> np.ndarray:
    x, element = jnp.asarray(x, jnp.float32), elements.element_of(fmt)
    rounding = parse_rounding(rounding)
    random = elements.noise(rounding, key, x.shape)
    return np.asarray(elements.round_elements(x, element, rounding, random, saturate))


def encode(x, fmt, **options) -> np.ndarray:
    element = elements.element_of(fmt)
    codes = elements.encode_rounded(jnp.asarray(round_to(x, fmt, **options)), element)
    return np.asarray(codes.astype(elements.code_dtype(element.bits)))
