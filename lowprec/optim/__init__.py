"""Optax transformations for low-precision training."""

from lowprec.optim.quantization_aware_scaling import quantization_aware_scaling

__all__ = ["quantization_aware_scaling"]
