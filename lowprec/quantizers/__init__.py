"""Quantizers: from formats to operands. QTensor, fake quantization, rotations, scales, gradient estimators, errors."""

from lowprec.quantizers.blockwise import Rounded, round_blocks
from lowprec.quantizers.eden import Eden
from lowprec.quantizers.error import OPERANDS, OperandStatistics, error_sums, read_taps, tap_slot
from lowprec.quantizers.estimators import Clip, StraightThrough, inside
from lowprec.quantizers.fake import fake_quant
from lowprec.quantizers.hadamard import FIXED_SIGNS, Hadamard, hadamard, hadamard_matrix, inverse_hadamard
from lowprec.quantizers.qtensor import QTensor, dequantize, quantize
from lowprec.quantizers.quantizer import EXACT, REUSE, Quantizer
from lowprec.quantizers.scales import AbsMax, AbsMean, FourOverSix, RootMeanSquare, ScaleRule
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
    "OperandStatistics",
    "QTensor",
    "Quantizer",
    "RootMeanSquare",
    "Rounded",
    "ScaleRule",
    "StraightThrough",
    "dequantize",
    "error_sums",
    "fake_quant",
    "hadamard",
    "hadamard_matrix",
    "inside",
    "inverse_hadamard",
    "load_safetensors",
    "quantize",
    "read_taps",
    "round_blocks",
    "save_safetensors",
    "tap_slot",
]
