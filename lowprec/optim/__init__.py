"""Optax transformations for low-precision training."""

from lowprec.optim.adam import adam, adam4, adam8, adamw, scale_by_adam
from lowprec.optim.adam_mini import adam_mini, scale_by_adam_mini
from lowprec.optim.adaptive import adaptive_grad_norm, adaptive_spike_clip
from lowprec.optim.affine import affine_format
from lowprec.optim.conversion import convert_state, require_formats, stored_formats
from lowprec.optim.diagnostics import optimizer_diagnostics
from lowprec.optim.discrete import discrete_updates
from lowprec.optim.fused import Step, fused_step
from lowprec.optim.galore import galore, project_gradients, q_galore
from lowprec.optim.kahan import kahan
from lowprec.optim.labels import Elementwise, Leafwise, chain, elementwise, leafwise
from lowprec.optim.memory import state_bytes
from lowprec.optim.muon import muon
from lowprec.optim.narrow_weights import export_fp32
from lowprec.optim.oscillation import cosine_threshold, freeze_oscillations, oscillation_metrics, quantizer_grids
from lowprec.optim.quantization_aware_scaling import quantization_aware_scaling
from lowprec.optim.quantize_state import quantize_state
from lowprec.optim.quantized_weights import dense, dense_weights, quantize_weights
from lowprec.optim.registry import Optimizer, get, names
from lowprec.optim.sgd_sai import scale_by_sai, sgd_sai
from lowprec.optim.shardings import state_shardings
from lowprec.optim.solo import solo
from lowprec.optim.spam import scale_by_spam, spam
from lowprec.optim.sparse import magnitude_masks, masked_decay, scale_by_sparse_adam, sparse_adamw
from lowprec.optim.sparse_update import SCALES_ALONE, Candidate, Selection, choose, contributions
from lowprec.optim.split_weights import split_weights
from lowprec.optim.stable_adam4 import stable_adam4
from lowprec.optim.stable_spam import cosine_decay, stable_spam
from lowprec.optim.state_formats import StateFormat, state_format, state_format_names
from lowprec.optim.state_tensor import StateTensor, is_stored, leaf_key, load, store, zeros
from lowprec.optim.stochastic_weights import apply_updates, with_stochastic_rounding

__all__ = [
    "SCALES_ALONE",
    "Candidate",
    "Elementwise",
    "Leafwise",
    "Optimizer",
    "Selection",
    "StateFormat",
    "StateTensor",
    "Step",
    "adam",
    "adam4",
    "adam8",
    "adam_mini",
    "adamw",
    "adaptive_grad_norm",
    "adaptive_spike_clip",
    "affine_format",
    "apply_updates",
    "chain",
    "choose",
    "contributions",
    "convert_state",
    "cosine_decay",
    "cosine_threshold",
    "dense",
    "dense_weights",
    "discrete_updates",
    "elementwise",
    "export_fp32",
    "freeze_oscillations",
    "fused_step",
    "galore",
    "get",
    "is_stored",
    "kahan",
    "leaf_key",
    "leafwise",
    "load",
    "magnitude_masks",
    "masked_decay",
    "muon",
    "names",
    "optimizer_diagnostics",
    "oscillation_metrics",
    "project_gradients",
    "q_galore",
    "quantization_aware_scaling",
    "quantize_state",
    "quantize_weights",
    "quantizer_grids",
    "require_formats",
    "scale_by_adam",
    "scale_by_adam_mini",
    "scale_by_sai",
    "scale_by_spam",
    "scale_by_sparse_adam",
    "sgd_sai",
    "solo",
    "spam",
    "sparse_adamw",
    "split_weights",
    "stable_adam4",
    "stable_spam",
    "state_bytes",
    "state_format",
    "state_format_names",
    "state_shardings",
    "store",
    "stored_formats",
    "with_stochastic_rounding",
    "zeros",
]
