"""A synthetic language whose entropy is known exactly.

Order k: each context of k tokens has its own random order of the vocabulary, and the token at rank r of it
follows with probability ∝ r^−alpha (Zipf). A model must learn every context's order; none can beat the
entropy rate H = −Σ_c π_c Σ_j P_cj ln P_cj, π the stationary distribution of the contexts.
"""

import re
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from lowprec.errors import UsageError, unknown

MAX_CONTEXTS = 2**12


@dataclass(frozen=True)
class Markov:
    """The language. Tokens are bytes 0 … vocab-1.

    Attributes:
      vocab: tokens, 2 … 256 (… 64 at order 2).
      order: tokens of context, 1 or 2.
      alpha: Zipf exponent, 0 (uniform noise) … 4.
      seed: of the orders and of the text.
      size: tokens in the train split; the validation split has an eighth of it.
    """

    vocab: int = 64
    order: int = 1
    alpha: float = 1.5
    seed: int = 0
    size: int = 2**20

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise UsageError(f"markov_text: order is 1 or 2, not {self.order}")
        if not 2 <= self.vocab <= 256 or self.vocab**self.order > MAX_CONTEXTS:
            raise UsageError(f"markov_text: vocab is 2 … 256 at order 1, 2 … 64 at order 2, not {self.vocab}")
        if not 0 <= self.alpha <= 4:
            raise UsageError(f"markov_text: alpha is 0 … 4, not {self.alpha}")
        if self.size < 8:
            raise UsageError(f"markov_text: size is at least 8 tokens, not {self.size}")

    def __str__(self) -> str:
        return "-".join(f"{field.name}{getattr(self, field.name)}" for field in fields(self))

    @cached_property
    def rank_probability(self) -> np.ndarray:
        """[vocab] float64: probability of the token at each rank, the same in every context."""
        weight = np.arange(1, self.vocab + 1, dtype=np.float64) ** -self.alpha
        return weight / weight.sum()

    @cached_property
    def ranking(self) -> np.ndarray:
        """[vocab**order, vocab] uint8: each context's tokens by rank. Context (a, b) is row a·vocab + b."""
        # argsort of uniforms, not Generator.permutation: numpy keeps the stream of uniforms stable.
        noise = np.random.default_rng([self.seed, 0]).random((self.vocab**self.order, self.vocab))
        return noise.argsort(axis=1, kind="stable").astype(np.uint8)

    @cached_property
    def transition(self) -> np.ndarray:
        """[vocab**order, vocab] float64: P(token | context)."""
        table = np.empty(self.ranking.shape)
        np.put_along_axis(table, self.ranking.astype(np.intp), self.rank_probability[None, :], axis=1)
        return table

    @cached_property
    def stationary(self) -> np.ndarray:
        """[vocab**order] float64: how often each context occurs, to 1e-13 in total variation."""
        table = self.transition.reshape((self.vocab,) * (self.order + 1))
        share = np.full((self.vocab,) * self.order, self.vocab**-self.order, np.float64)
        for _ in range(100_000):
            # The oldest token of the context leaves, the new one joins at the end.
            following = np.einsum("a,ab->b" if self.order == 1 else "ab,abc->bc", share, table)
            following /= following.sum()
            moved, share = np.abs(following - share).sum() / 2, following
            if moved < 1e-13:
                return share.reshape(-1)
        raise ArithmeticError(f"the stationary distribution of {self} did not converge")

    @property
    def entropy(self) -> float:
        """Entropy rate, nats per token: the least loss that a model can reach."""
        return float(-np.sum(self.stationary[:, None] * self.transition * np.log(self.transition)))

    @property
    def unigram_entropy(self) -> float:
        """Nats per token: the loss of the best model that ignores the context."""
        share = self.stationary.reshape((self.vocab,) * self.order)
        share = share.sum(axis=0) if self.order == 2 else share
        return float(-np.sum(share * np.log(np.maximum(share, 1e-300))))

    def sample(self, size: int, stream: int) -> bytes:
        """size tokens, one byte each, of a text that starts in the stationary distribution.

        Args:
          stream: which independent text, ≥ 1.
        """
        rng = np.random.default_rng([self.seed, stream])
        context = int(np.searchsorted(np.cumsum(self.stationary), rng.random()))
        context = min(context, self.stationary.size - 1)
        ranks = np.searchsorted(np.cumsum(self.rank_probability)[:-1], rng.random(size), side="right").tolist()
        ranking = self.ranking.tobytes()
        text, vocab, contexts = bytearray(size), self.vocab, self.vocab**self.order
        for position, rank in enumerate(ranks):
            token = ranking[context * vocab + rank]
            text[position] = token
            context = (context * vocab + token) % contexts
        return bytes(text)


def parse_markov(text: str) -> Markov:
    """Reads "vocab64-order2-alpha1.5"; what is left out keeps its default. parse_markov(str(x)) == x."""
    types: dict[str, type] = {name: type(value) for name, value in vars(Markov()).items()}
    given: dict[str, int | float] = {}
    for part in filter(None, text.split("-")):
        match = re.fullmatch(r"([a-z]+)([0-9.]+)", part)
        if not match or match[1] not in types:
            raise unknown("markov_text option", part, [f"{k}{v}" for k, v in vars(Markov()).items()])
        try:
            given[match[1]] = types[match[1]](match[2])
        except ValueError:
            raise UsageError(f"markov_text option {part!r}: {match[1]} is {types[match[1]].__name__}") from None
    return Markov(**given)  # type: ignore[arg-type]
