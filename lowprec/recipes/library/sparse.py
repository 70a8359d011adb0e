"""2:4 sparse weights, exact or quantized: of every four inputs of an output, two are multiplied.

Train them with `optim.sparse.sparse_adamw`, which pulls the masked weights towards zero.
"""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.quantizers.sparsity import Sparse
from lowprec.recipes.recipe import Recipe, everywhere, forward_only

SOURCE = "AST, arXiv 2407.20584"


def sparse_weights(name: str, fmt: str, source: str) -> Recipe:
    """Inputs as they are."""
    gemm = GemmRule(fwd=(EXACT, Quantizer(fmt, scale=Sparse())), dgrad=(EXACT, REUSE))
    return everywhere(name, gemm, source)


RECIPES = (
    sparse_weights("ast_2_4", "float32", f"{SOURCE}: 2:4 sparse weights, straight-through to the masked ones"),
    forward_only(
        "ast_2_4_int8",
        Quantizer("int8@row"),
        Quantizer("int8@row", scale=Sparse()),
        f"{SOURCE}: 2:4 sparse weights in 8 bits by output channel, 8-bit inputs",
    ),
    forward_only(
        "ast_2_4_int4",
        Quantizer("int8@row"),
        Quantizer("int4@row", scale=Sparse(inner=LearnedStep())),
        f"{SOURCE}: 2:4 sparse weights in 4 bits with learned steps by output channel, 8-bit inputs",
    ),
)
