"""Saved activations: what the backward pass needs is kept in fewer bits."""

from lowprec.ops import GemmRule
from lowprec.ops.saved import Codes, Policy, RunningUint8, Stored
from lowprec.quantizers import REUSE, AbsMax
from lowprec.recipes.library.fp8 import E4M3, E5M2
from lowprec.recipes.recipe import ATTENTION_PRODUCTS, EMBEDDINGS_AND_HEAD, LayerRule, Recipe, SavedRule

# Any model has some of them; one that has none of a kind has nothing to save.
NORMS = r"(.*/)?[^/]*([nN]orm|ln)[^/]*"
GATES = r"(.*/)?gating"
ATTENTION = r"(.*/)?core"


def inputs_of(norms: Policy, gates: Policy, attention: Policy) -> tuple[SavedRule, ...]:
    """Policies by kind of layer."""
    kinds = ((NORMS, norms), (GATES, gates), (ATTENTION, attention))
    return tuple(SavedRule(pattern, policy, optional=True) for pattern, policy in kinds)


FP8_GROUPS = Stored("e4m3fn@1x16/bf16", scale=AbsMax(offset=1e-10), pad=True)

coat = Recipe(
    "coat",
    (
        EMBEDDINGS_AND_HEAD,
        ATTENTION_PRODUCTS,
        LayerRule(".*", GemmRule(fwd=(E4M3, E4M3), dgrad=(E5M2, REUSE), wgrad=(REUSE, REUSE), saved=Codes())),
    ),
    "COAT, arXiv 2410.19313: fp8 products whose inputs are kept as codes; inputs of all else saved as e4m3 in 16s",
    saved=inputs_of(FP8_GROUPS, FP8_GROUPS, FP8_GROUPS),
)

UINT8 = RunningUint8()

mesa = Recipe(
    "mesa",
    (EMBEDDINGS_AND_HEAD, ATTENTION_PRODUCTS, LayerRule(".*", GemmRule(saved=UINT8))),
    "Mesa, arXiv 2111.11124: an exact forward pass, inputs saved as 8-bit integers in running ranges",
    saved=inputs_of(UINT8, UINT8, RunningUint8(groups="heads")),
)

RECIPES = (coat, mesa)
