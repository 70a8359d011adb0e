"""Kernels written by hand, each beside the jnp reference that defines it (`reference`).

An operation picks its implementation by the device, shapes and dtypes of a call (`dispatch.choose`): a kernel of ours
where one serves the call, else XLA from the reference, with the same results.
"""

from lowprec.pallas.adam_update import adam_update
from lowprec.pallas.block_matmul import block_matmul
from lowprec.pallas.channel_matmul import channel_matmul
from lowprec.pallas.quantize_rows_and_columns import quantize_rows_and_columns
from lowprec.pallas.rotate_quantize import rotate_quantize
from lowprec.pallas.w4_matmul import w4_matmul

__all__ = [
    "adam_update",
    "block_matmul",
    "channel_matmul",
    "quantize_rows_and_columns",
    "rotate_quantize",
    "w4_matmul",
]
