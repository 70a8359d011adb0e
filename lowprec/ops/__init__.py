"""Products with quantized operands, forward and backward."""

from lowprec.ops.accumulation import Accumulation, IntegerAccumulation, NarrowAccumulation
from lowprec.ops.backends import BACKENDS
from lowprec.ops.conv import qconv
from lowprec.ops.dot import qdot
from lowprec.ops.einsum import bias_shape, qeinsum
from lowprec.ops.grouped import qragged_dot
from lowprec.ops.rule import KEEP, GemmRule
from lowprec.ops.variables import (
    ProductVariables,
    canonical_variables,
    initial_memory,
    initial_variables,
    next_state,
)

__all__ = [
    "BACKENDS",
    "KEEP",
    "Accumulation",
    "GemmRule",
    "IntegerAccumulation",
    "NarrowAccumulation",
    "ProductVariables",
    "bias_shape",
    "canonical_variables",
    "initial_memory",
    "initial_variables",
    "next_state",
    "qconv",
    "qdot",
    "qeinsum",
    "qragged_dot",
]
