"""Parameters and floating-point operations of a model, from its config alone."""

from dataclasses import dataclass

from lowprec.models.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Args:
      non_embedding: all but the tables: N of the scaling laws.
      embedding: the input table and the head.
      linear: the kernels of the linear layers inside the blocks, those that recipes quantize.
    """

    non_embedding: int
    embedding: int
    linear: int

    @property
    def total(self) -> int:
        return self.non_embedding + self.embedding


def count_parameters(config: ModelConfig, vocab_size: int) -> Counts:
    """Counts the parameters of a Llama, unit-scaled or not."""
    D, head = config.width, config.width // config.heads
    attention = 2 * D * D + 2 * D * head * config.key_heads
    linear = config.layers * (attention + 3 * D * config.gate_width)
    norms = (2 * config.layers + 1) * D
    return Counts(non_embedding=linear + norms, embedding=2 * vocab_size * D, linear=linear)


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations of training on one token: forward and both backward products.

    6 for each weight of a product (the head's among them), and 6 · T · D a layer for the two products of causal
    attention, of which half are masked (Kaplan et al., arXiv 2001.08361, appendix B).
    """
    counts = count_parameters(config, vocab_size)
    return 6 * (counts.linear + vocab_size * config.width) + 6 * config.layers * seq_len * config.width
