"""Integers of eight and sixteen bits: real int8 products wherever XLA has them."""

from dataclasses import replace

from lowprec.ops import GemmRule
from lowprec.ops.accumulation import IntegerAccumulation
from lowprec.quantizers import REUSE, Clip, Quantizer
from lowprec.recipes.recipe import everywhere, forward_only

ROW = Quantizer("int8_symmetric@row")
TENSOR = Quantizer("int8_symmetric@tensor")
ROW_STOCHASTIC = Quantizer("int8_symmetric@row", rounding="stochastic")

int8 = everywhere(
    "int8",
    GemmRule(fwd=(ROW, TENSOR), dgrad=(ROW, REUSE)),
    "SwitchBack, arXiv 2304.13013: int8 by rows with weights by tensor; the weight gradient in high precision",
)

int8_full = everywhere(
    "int8_full",
    GemmRule(fwd=(ROW, ROW), dgrad=(ROW_STOCHASTIC, ROW), wgrad=(ROW_STOCHASTIC, ROW)),
    "all three products in int8, a scale a row of each; gradients rounded stochastically",
)

# A tile is the same along either axis: what a backward product reuses is what quantizing again would give.
TILE32 = Quantizer("int8_symmetric@32x32", pad=True)

jetfire = everywhere(
    "jetfire",
    GemmRule(fwd=(TILE32, TILE32), dgrad=(TILE32, REUSE), wgrad=(REUSE, REUSE)),
    "Jetfire, arXiv 2403.12422: int8 tiles of 32x32 in all products (of its int8 data flow the saved activations)",
)

DFP16 = Quantizer("dfp16")

dfp16 = everywhere(
    "dfp16",
    GemmRule(
        fwd=(DFP16, DFP16), dgrad=(DFP16, REUSE), wgrad=(REUSE, REUSE), accumulation=IntegerAccumulation(chunk=256)
    ),
    "dynamic fixed point, Das et al., arXiv 1802.00930: int16 with an exponent a tensor, chained integer sums",
)

# Weights are kept in their own units, where the scaling of gradients by 1 / s² is one; for those who keep codes:
# optim.quantization_aware_scaling.
qas_int8 = forward_only(
    "qas_int8",
    replace(TENSOR, estimator=Clip()),
    replace(ROW, estimator=Clip()),
    "on-device training, arXiv 2206.15472: an int8 graph, weights by output channel, gradients of it in float32",
)

RECIPES = (int8, int8_full, jetfire, dfp16, qas_int8)
