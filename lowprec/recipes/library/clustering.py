"""Weights as the centroids of differentiable clusters."""

from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.clustering import SoftClusters
from lowprec.recipes.recipe import Recipe, everywhere


def dkm(bits: int, scale: SoftClusters, suffix: str, what: str) -> Recipe:
    """Weights alone, 2^bits centroids a matrix."""
    gemm = GemmRule(fwd=(EXACT, Quantizer(f"uint{bits}@tensor", scale=scale)), dgrad=(EXACT, REUSE))
    source = f"DKM, arXiv 2108.12659, and eDKM, arXiv 2309.00964: {2**bits} centroids a matrix, {what}"
    return everywhere(f"dkm_{bits}{suffix}", gemm, source)


RECIPES = (
    dkm(3, SoftClusters(), "", "the nearest one with the gradient of soft clusters"),
    dkm(3, SoftClusters(snapped=False), "_soft", "mixed softly as in training there"),
)
