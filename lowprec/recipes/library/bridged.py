"""Quantization-aware training from near full precision: a low-rank bridge over the error, taken down in steps."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.quantizers.rank_decay import RankDecay
from lowprec.quantizers.token_ranges import ClippedRange
from lowprec.recipes.recipe import Recipe, everywhere, forward_only

SOURCE = "QVGen, arXiv 2505.11497"


def qvgen(bits: int, rank: int = 32, interval: int = 444) -> Recipe:
    """Weights with learned steps by output channel and a bridge; inputs by the range of each token, clipped as learned.

    Args:
      rank, interval: of the bridge; the paper's phases are a sixth of its training.
    """
    w = Quantizer(f"int{bits}@row", scale=RankDecay(rank, interval, LearnedStep("gaussian")))
    x = Quantizer(f"uint{bits}@row", scale=ClippedRange())
    source = f"{SOURCE}: {bits}-bit weights with a decaying branch of rank {rank}, {bits}-bit inputs with a zero point"
    return forward_only(f"qvgen_{bits}", x, w, source)


def bridged_weights(name: str, fmt: str, source: str, rank: int = 32, interval: int = 444) -> Recipe:
    """Weights alone."""
    w = Quantizer(fmt, scale=RankDecay(rank, interval, LearnedStep("gaussian")))
    return everywhere(name, GemmRule(fwd=(EXACT, w), dgrad=(EXACT, REUSE)), source)


RECIPES = (qvgen(4), bridged_weights("qvgen_w2", "int2@row", f"{SOURCE}: 2-bit weights alone, a branch of rank 32"))
