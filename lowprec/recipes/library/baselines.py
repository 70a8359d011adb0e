"""Products as they are, and in bfloat16."""

from lowprec.ops import KEEP, GemmRule
from lowprec.quantizers import Quantizer
from lowprec.recipes.hooks import LossScaling
from lowprec.recipes.recipe import ATTENTION_PRODUCTS, LayerRule, Recipe

BF16 = Quantizer("bfloat16")

f32 = Recipe("f32", (LayerRule(".*", KEEP, optional=True),), "products in the dtype of the model")

# Unlike the narrower formats, bf16 serves the head too, as in every mixed-precision run.
bf16 = Recipe(
    "bf16",
    (ATTENTION_PRODUCTS, LayerRule(".*", GemmRule(fwd=(BF16, BF16), dgrad=(BF16, BF16), wgrad=(BF16, BF16)))),
    "operands of all products in bfloat16, accumulated in float32 (Kalamkar et al., arXiv 1905.12322)",
)

# Overflow must show: it is what the scale of the loss waits for.
FP16 = Quantizer("float16", saturate=False)

fp16_loss_scaled = Recipe(
    "fp16_loss_scaled",
    (ATTENTION_PRODUCTS, LayerRule(".*", GemmRule(fwd=(FP16, FP16), dgrad=(FP16, FP16), wgrad=(FP16, FP16)))),
    "operands of all products in float16, dynamic loss scaling (Micikevicius et al., arXiv 1710.03740)",
    loss_scaling=LossScaling(),
)

RECIPES = (f32, bf16, fp16_loss_scaled)
