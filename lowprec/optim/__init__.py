"""Optax transformations for low-precision training."""

from lowprec.optim.oscillation import cosine_threshold, freeze_oscillations, oscillation_metrics, quantizer_grids
from lowprec.optim.quantization_aware_scaling import quantization_aware_scaling
from lowprec.optim.sparse import magnitude_masks, masked_decay, scale_by_sparse_adam, sparse_adamw
from lowprec.optim.sparse_update import SCALES_ALONE, Candidate, Selection, choose, contributions

__all__ = [
    "SCALES_ALONE",
    "Candidate",
    "Selection",
    "choose",
    "contributions",
    "cosine_threshold",
    "freeze_oscillations",
    "magnitude_masks",
    "masked_decay",
    "oscillation_metrics",
    "quantization_aware_scaling",
    "quantizer_grids",
    "scale_by_sparse_adam",
    "sparse_adamw",
]
