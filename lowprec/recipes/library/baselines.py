"""Products as they are, and in bfloat16."""

from lowprec.ops import KEEP, GemmRule
from lowprec.quantizers import Quantizer
from lowprec.recipes.recipe import LayerRule, Recipe

BF16 = Quantizer("bfloat16")

f32 = Recipe("f32", (LayerRule(".*", KEEP, optional=True),), "products in the dtype of the model")

# Unlike the narrower formats, bf16 serves the head too, as in every mixed-precision run.
bf16 = Recipe(
    "bf16",
    {".*": GemmRule(fwd=(BF16, BF16), dgrad=(BF16, BF16), wgrad=(BF16, BF16))},
    "operands of all products in bfloat16, accumulated in float32 (Kalamkar et al., arXiv 1905.12322)",
)

RECIPES = (f32, bf16)
