"""2:4 sparse weights, exact or quantized: of every four inputs of an output, two are multiplied.

Train them with `optim.sparse.sparse_adamw`, which pulls the masked weights towards zero.
"""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.quantizers.sparsity import Sparse
from lowprec.recipes.recipe import Recipe, everywhere, forward_only

SOURCE = "AST, arXiv 2407.20584"


def sparse_weights(name: str, source: str, scale: Sparse) -> Recipe:
    """Of weights that are not quantized; inputs as they are."""
    gemm = GemmRule(fwd=(EXACT, Quantizer("float32", scale=scale)), dgrad=(EXACT, REUSE))
    return everywhere(name, gemm, f"{SOURCE}: 2:4 sparse weights, {source}")


RECIPES = (
    sparse_weights("ast_2_4", "straight-through to the masked ones", Sparse()),
    sparse_weights("ast_2_4_wanda", "those with the largest products with their inputs", Sparse(importance="wanda")),
    sparse_weights("ast_2_4_slorb", "and a weight for every 64 inputs of an output (SLoRB)", Sparse(blocks=64)),
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
