"""Products with quantized operands, forward and backward."""

from lowprec.ops.backends import BACKENDS
from lowprec.ops.dot import qdot
from lowprec.ops.rule import KEEP, GemmRule

__all__ = ["BACKENDS", "KEEP", "GemmRule", "qdot"]
