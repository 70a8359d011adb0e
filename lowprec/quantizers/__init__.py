"""Quantizers: from formats to operands. QTensor, fake quantization, rotations, scales, gradient estimators, errors."""

from lowprec.quantizers.blockwise import Rounded, round_blocks
from lowprec.quantizers.eden import Eden
from lowprec.quantizers.error import OPERANDS, OperandStatistics, error_sums, read_taps, tap_slot
from lowprec.quantizers.estimators import Clip, StraightThrough, inside
from lowprec.quantizers.fake import fake_quant
from lowprec.quantizers.gaussian import gaussian_error, optimal_clip
from lowprec.quantizers.hadamard import FIXED_SIGNS, Hadamard, hadamard, hadamard_matrix, inverse_hadamard
from lowprec.quantizers.learned import initial_scale, learned_quant
from lowprec.quantizers.qtensor import QTensor, dequantize, quantize
from lowprec.quantizers.quantizer import EXACT, REUSE, Quantizer
from lowprec.quantizers.scales import AbsMax, AbsMean, FourOverSix, LeastSquares, Percentile, RootMeanSquare, ScaleRule
from lowprec.quantizers.storage import load_safetensors, save_safetensors

__all__ = [
    "EXACT",
    "FIXED_SIGNS",
    "OPERANDS",
    "REUSE",
    "AbsMax",
    "AbsMean",
    "Clip",
    "Eden",
    "FourOverSix",
    "Hadamard",
    "LeastSquares",
    "OperandStatistics",
    "Percentile",
    "QTensor",
    "Quantizer",
    "RootMeanSquare",
    "Rounded",
    "ScaleRule",
    "StraightThrough",
    "dequantize",
    "error_sums",
    "fake_quant",
    "gaussian_error",
    "hadamard",
    "hadamard_matrix",
    "initial_scale",
    "inside",
    "inverse_hadamard",
    "learned_quant",
    "load_safetensors",
    "optimal_clip",
    "quantize",
    "read_taps",
    "round_blocks",
    "save_safetensors",
    "tap_slot",
]
