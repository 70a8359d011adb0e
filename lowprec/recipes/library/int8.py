"""Eight-bit integers: real int8 products wherever XLA has them."""

from lowprec.ops import GemmRule
from lowprec.quantizers import REUSE, Quantizer
from lowprec.recipes.recipe import everywhere

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
    "all three products in int8, a scale a row of each; gradients rounded stochastically, hence unbiased",
)

RECIPES = (int8, int8_full)
