"""Quantization-aware training whose quantizers have parameters or running ranges of their own."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer, RootMeanSquare
from lowprec.quantizers.affine import RunningRange
from lowprec.quantizers.diffq import DiffQ
from lowprec.quantizers.learned_rules import Elastic, LearnedClip, LearnedExponentBias, LearnedStep
from lowprec.quantizers.noisy_bits import LearnedBits
from lowprec.recipes.recipe import Recipe, everywhere, forward_only


def lsq(bits: int) -> Recipe:
    """Learned step sizes of weights and inputs, one a layer each."""
    x = Quantizer(f"int{bits}@tensor", scale=LearnedStep(count="features"))
    w = Quantizer(f"int{bits}@tensor", scale=LearnedStep())
    return forward_only(f"lsq_{bits}", x, w, f"LSQ, arXiv 1902.08153, {bits}-bit weights and inputs")


def lsq_plus(bits: int) -> Recipe:
    """Inputs with a learned offset, weights from the best step for Gaussian data."""
    x = Quantizer(f"uint{bits}@tensor", scale=LearnedStep("range", offset=True, count="features"))
    w = Quantizer(f"int{bits}@row", scale=LearnedStep("gaussian"))
    return forward_only(f"lsq_plus_{bits}", x, w, f"LSQ+, arXiv 2004.09576, {bits}-bit weights, asymmetric inputs")


def pact(bits: int) -> Recipe:
    """Inputs with a learned clip, signed since they follow a norm; weights scaled by their statistics (SAWB)."""
    x = Quantizer(f"int{bits}_symmetric@tensor", scale=LearnedClip())
    w = Quantizer(f"int{bits}_symmetric@row", scale=RootMeanSquare())
    return forward_only(f"pact_{bits}", x, w, f"PACT, arXiv 1805.06085, {bits}-bit inputs with a learned clip")


def qat(bits: int, start: int = 100) -> Recipe:
    """Weights by output channel, inputs affine by running ranges, quantized from a later step on."""
    x = Quantizer(f"uint{bits}@tensor", scale=RunningRange(start=start))
    w = Quantizer(f"int{bits}_symmetric@row")
    source = f"quantization-aware training, arXiv 1806.08342 §3.2: {bits}-bit weights by channel, running input ranges"
    return forward_only(f"int{bits}_qat", x, w, source)


def paretoq(name: str, fmt: str, scale) -> Recipe:
    """Weights alone, a learned scale a row."""
    gemm = GemmRule(fwd=(EXACT, Quantizer(fmt, scale=scale)), dgrad=(EXACT, REUSE))
    return everywhere(name, gemm, "ParetoQ, arXiv 2502.02631: weights alone, from a trained model")


PARETOQ_STEP = LearnedStep("max", count="matrix")


def noisy(name: str, fmt: str, bits: LearnedBits | DiffQ, source: str) -> Recipe:
    """Weights with noise in place of rounding."""
    return everywhere(name, GemmRule(fwd=(EXACT, Quantizer(fmt, scale=bits, pad=True)), dgrad=(EXACT, REUSE)), source)


llm_fp4_learned = forward_only(
    "llm_fp4_learned",
    Quantizer("e2m1fn@tensor", scale=LearnedExponentBias()),
    Quantizer("e2m1fn@row", scale=LearnedExponentBias()),
    "LLM-FP4, arXiv 2310.16836: FP4 with real exponent biases, here learned as LSQ learns steps",
)

RECIPES = (
    *(lsq(bits) for bits in (2, 3, 4, 8)),
    *(lsq_plus(bits) for bits in (2, 4)),
    *(pact(bits) for bits in (2, 4)),
    *(qat(bits) for bits in range(2, 9)),
    paretoq("paretoq_1", "binary@row", Elastic()),
    paretoq("paretoq_158", "ternary@row", Elastic()),
    paretoq("paretoq_2", "int2_midrise@row", Elastic()),
    paretoq("paretoq_3", "int3@row", PARETOQ_STEP),
    paretoq("paretoq_4", "int4@row", PARETOQ_STEP),
    llm_fp4_learned,
    noisy("pqt", "bfloat16@32x32", LearnedBits(), "PQT, arXiv 2505.11170: Gaussian weight sampling, learned bits"),
    noisy("diffq", "float32@1x8", DiffQ(), "DiffQ, arXiv 2104.09987: uniform noise, learned bits"),
)
