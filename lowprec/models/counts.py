"""Parameters and floating-point operations of a model, from its config alone."""

from dataclasses import dataclass
from itertools import pairwise

from lowprec.models.config import ModelConfig
from lowprec.nn.attention_gate import hidden_width


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
    kernels, biases = _head_gates(config)
    linear = config.layers * (attention + kernels + 3 * D * config.gate_width)
    others = config.layers * (2 * D + biases) + D
    return Counts(non_embedding=linear + others, embedding=2 * vocab_size * D, linear=linear)


def flops_per_token(config: ModelConfig, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations of training on one token: forward and both backward products.

    6 for each weight of a product (the head's among them), and 6 · T · D a layer for the two products of causal
    attention, of which half are masked (Kaplan et al., arXiv 2001.08361, appendix B).
    """
    counts = count_parameters(config, vocab_size)
    return 6 * (counts.linear + vocab_size * config.width) + 6 * config.layers * seq_len * config.width


def _head_gates(config):
    """(kernels, biases) of the gates of one layer."""
    if not config.gate:
        return 0, 0
    head = config.width // config.heads
    hidden = hidden_width(config.gate, head)
    widths = (head, hidden, 1) if hidden else (head, 1)
    kernels = sum(a * b for a, b in pairwise(widths))
    return config.heads * kernels, config.heads * sum(widths[1:])
