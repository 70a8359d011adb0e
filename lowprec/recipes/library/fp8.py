"""Eight-bit floats."""

from dataclasses import replace

from lowprec.ops import GemmRule
from lowprec.ops.accumulation import NarrowAccumulation
from lowprec.quantizers import REUSE, AbsMax, Quantizer
from lowprec.quantizers.delayed import Delayed
from lowprec.recipes.recipe import everywhere

E4M3 = Quantizer("e4m3fn@tensor")
E5M2 = Quantizer("e5m2@tensor")

fp8 = everywhere(
    "fp8",
    GemmRule(fwd=(E4M3, E4M3), dgrad=(E5M2, REUSE), wgrad=(REUSE, REUSE)),
    "current scaling, hybrid: e4m3 forward, e5m2 gradients, a scale a tensor (TransformerEngine Float8CurrentScaling)",
)

DELAYED_E4M3 = Quantizer("e4m3fn@tensor", scale=Delayed())
DELAYED_E5M2 = Quantizer("e5m2@tensor", scale=Delayed())

fp8_delayed = everywhere(
    "fp8_delayed",
    GemmRule(fwd=(DELAYED_E4M3, DELAYED_E4M3), dgrad=(DELAYED_E5M2, REUSE), wgrad=(REUSE, REUSE)),
    "delayed scaling, hybrid: scales from the largest amax of the last 1024 steps (TransformerEngine DelayedScaling)",
)

# DeepGEMM floors amax at 1e-4. dx takes the forward tiles as they are; for dw the activations, of which only the
# quantized ones are kept, are quantized again along the rows.
FLOORED = AbsMax(floor=1e-4)
LINE128 = Quantizer("e4m3fn@1x128", scale=FLOORED, pad=True)
TILE128 = Quantizer("e4m3fn@128x128", scale=FLOORED, pad=True)

DEEPSEEK = GemmRule(
    fwd=(LINE128, TILE128),
    dgrad=(LINE128, REUSE),
    wgrad=(LINE128, Quantizer("e4m3fn@1x128", scale=FLOORED, source="requantize", pad=True)),
)

# Sums in float32, which their promotion every 128 products comes to but for 1e-4; the next two show the difference.
fp8_block = everywhere(
    "fp8_block",
    DEEPSEEK,
    "DeepSeek-V3, arXiv 2412.19437 §3.3: 1x128 activations and gradients, 128x128 weights, all e4m3",
)

fp8_block_promoted = everywhere(
    "fp8_block_promoted",
    replace(DEEPSEEK, accumulation=NarrowAccumulation(bits=14, step=32, promote=128)),
    "DeepSeek-V3, arXiv 2412.19437 §3.3.2: fp8_block with the sums of Hopper's tensor cores, promoted every 128",
)

fp8_tensor_core = everywhere(
    "fp8_tensor_core",
    replace(DEEPSEEK, accumulation=NarrowAccumulation(bits=14, step=32, promote=None)),
    "fp8_block with the 14-bit sums of Hopper's tensor cores as they are, never promoted (for comparison)",
)

MXFP8 = Quantizer("mxfp8", pad=True)

mxfp8 = everywhere(
    "mxfp8",
    GemmRule(fwd=(MXFP8, MXFP8), dgrad=(MXFP8, MXFP8), wgrad=(MXFP8, MXFP8)),
    "OCP Microscaling; e4m3 in all products, each orientation quantized from the original (TransformerEngine MXFP8)",
)

# Values of a unit-scaled model need no scale: all of them are near one.
CAST_E4M3, CAST_E5M2 = Quantizer("e4m3fn"), Quantizer("e5m2")

unit_scaling_fp8 = everywhere(
    "unit_scaling_fp8",
    GemmRule(fwd=(CAST_E4M3, CAST_E4M3), dgrad=(CAST_E5M2, REUSE), wgrad=(REUSE, REUSE)),
    "Unit Scaling, arXiv 2303.11257: plain casts to e4m3 and, of gradients, e5m2, for unit-scaled models (unit_llama)",
)

RECIPES = (fp8, fp8_delayed, fp8_block, fp8_block_promoted, fp8_tensor_core, mxfp8, unit_scaling_fp8)
