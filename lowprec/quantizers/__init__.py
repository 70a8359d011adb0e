"""Quantizers: from formats to operands. QTensor, fake quantization, rotations, scales, gradient estimators, errors."""

from lowprec.quantizers.blockwise import Rounded, round_blocks
from lowprec.quantizers.centered import SignAboutMean
from lowprec.quantizers.clamp import ClampQuantiles
from lowprec.quantizers.eden import Eden
from lowprec.quantizers.error import (
    OPERANDS,
    OperandStatistics,
    error_sums,
    gradient_to_noise,
    read_taps,
    rounding_noise,
    tap_slot,
)
from lowprec.quantizers.estimators import Clip, DifferentiableGradient, StraightThrough, Trust, inside
from lowprec.quantizers.fake import fake_quant
from lowprec.quantizers.gaussian import gaussian_error, optimal_clip
from lowprec.quantizers.hadamard import FIXED_SIGNS, Hadamard, hadamard, hadamard_matrix, inverse_hadamard
from lowprec.quantizers.learned import initial_scale, learned_quant
from lowprec.quantizers.line_scales import CrossQuant, PowerOfTwoRatios
from lowprec.quantizers.qtensor import QTensor, dequantize, quantize
from lowprec.quantizers.quantizer import EXACT, REUSE, Quantizer
from lowprec.quantizers.scales import (
    AbsMax,
    AbsMean,
    FourOverSix,
    LeastSquares,
    OctaveMax,
    Percentile,
    RootMeanSquare,
    ScaleRule,
    exponent_bias,
)
from lowprec.quantizers.storage import load_safetensors, save_safetensors

__all__ = [
    "EXACT",
    "FIXED_SIGNS",
    "OPERANDS",
    "REUSE",
    "AbsMax",
    "AbsMean",
    "ClampQuantiles",
    "Clip",
    "CrossQuant",
    "DifferentiableGradient",
    "Eden",
    "FourOverSix",
    "Hadamard",
    "LeastSquares",
    "OctaveMax",
    "OperandStatistics",
    "Percentile",
    "PowerOfTwoRatios",
    "QTensor",
    "Quantizer",
    "RootMeanSquare",
    "Rounded",
    "ScaleRule",
    "SignAboutMean",
    "StraightThrough",
    "Trust",
    "dequantize",
    "error_sums",
    "exponent_bias",
    "fake_quant",
    "gaussian_error",
    "gradient_to_noise",
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
    "rounding_noise",
    "save_safetensors",
    "tap_slot",
]
