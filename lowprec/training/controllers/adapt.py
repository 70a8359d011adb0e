"""AdaPT: fixed-point weights, as long as their histograms and the progress of the loss ask for (arXiv 2107.13490)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.formats import round_to
from lowprec.formats.bits import exponent_field, to_bits
from lowprec.formats.traced import traced_fixed
from lowprec.recipes import PrecisionSwitching
from lowprec.training.controllers.protocol import Signals, map_products, weights_at
from lowprec.typing import Array, Float, Int

# Added to each bin of a histogram: a bin that q(w) leaves empty costs much, not infinitely much.
_FLOOR = 1e-6
# Before the first window: the loss has fallen from there.
_NO_LOSS = np.finfo(np.float32).max


class AdaptMemory(NamedTuple):
    """Of the window so far.

    Attributes:
      gradients: sums, for each product (…, values).
      squares: sums of their squared norms, for each product (…).
      raised: bits above those that the histograms ask for, for each product (…).
      losses: their sum.
      loss_before: the mean loss of the window before; in the first, above any.
      steps: taken so far.
    """

    gradients: Any
    squares: Any
    raised: Any
    losses: Float[Array, ""]
    loss_before: Float[Array, ""]
    steps: Int[Array, ""]


@dataclass(frozen=True)
class Adapt:
    """See `recipes.PrecisionSwitching`."""

    rule: PrecisionSwitching

    def init(self, params, quant, key):
        zeros = map_products(lambda path, state: jnp.zeros(_layers(state)), quant)
        sums = map_products(lambda path, state: jnp.zeros_like(weights_at(params, path, _layers(state))), quant)
        return AdaptMemory(sums, zeros, zeros, jnp.zeros(()), jnp.float32(_NO_LOSS), jnp.int32(0)), quant

    def update(self, memory: AdaptMemory, quant, signals: Signals):
        found = map_products(lambda path, state: weights_at(signals.gradients, path, _layers(state)), quant)
        memory = memory._replace(
            gradients=jax.tree.map(jnp.add, memory.gradients, found),
            squares=jax.tree.map(lambda total, g: total + jnp.sum(g * g, axis=-1), memory.squares, found),
            losses=memory.losses + signals.loss,
            steps=memory.steps + 1,
        )
        used = map_products(lambda path, state: state["fwd.w"]["bits"], quant)
        due = memory.steps % self.rule.window == 0
        decide = lambda: self._decide(memory, quant, signals.params)
        memory, quant = jax.lax.cond(due, decide, lambda: (memory, quant))
        return memory, quant, {"bits": used}

    def _decide(self, memory, quant, params):
        loss = memory.losses / self.rule.window
        stalled = loss > np.float32(1 - self.rule.progress) * memory.loss_before
        raised = jax.tree.map(
            lambda squares, total, raised: jnp.where(
                stalled & (diversity(squares, total) >= self.rule.diversity), raised + 1, 0.0
            ),
            memory.squares,
            memory.gradients,
            memory.raised,
        )
        switch = lambda path, state, raised: self._switched(state, weights_at(params, path, _layers(state)), raised)
        quant = map_products(switch, quant, raised)
        zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        return (
            AdaptMemory(zeros(memory.gradients), zeros(memory.squares), raised, jnp.zeros(()), loss, memory.steps),
            quant,
        )

    def _switched(self, state, weights, raised):
        rule, layers = self.rule, weights.shape[:-1]
        rows = weights.reshape(-1, weights.shape[-1])
        integer = integer_bits(rows)
        down = jax.vmap(lambda w, bits: fewest_bits(w, bits, rule))(rows, integer)
        bits = jnp.minimum(down + raised.reshape(-1), rule.highest)
        fraction = bits - 1 - integer
        after = {"bits": bits.reshape(layers), "fraction_bits": fraction.reshape(layers).astype(jnp.float32)}
        return {**state, "fwd.w": after}


def diversity(squares: Float[Array, "..."], total: Float[Array, "... n"]) -> Float[Array, "..."]:
    """Σ‖g‖² / ‖Σg‖² of a window's gradients."""
    return squares / jnp.maximum(jnp.sum(total * total, axis=-1), np.float32(1e-30))


def integer_bits(weights: Float[Array, "... n"]) -> Int[Array, "..."]:
    """Before the point, without the sign: the smallest e with max |w| < 2^e (at least -20)."""
    amax = jnp.max(jnp.abs(weights), axis=-1)
    return jnp.maximum(exponent_field(to_bits(amax)) - 127 + 1, -20)


def fewest_bits(weights: Float[Array, " n"], integer: Int[Array, ""], rule: PrecisionSwitching) -> Float[Array, ""]:
    """The shortest word whose rounding leaves the histogram as it is; the longest where none does."""
    lengths = jnp.arange(rule.lowest, rule.highest + 1)
    rounded = lambda bits: round_to(weights, traced_fixed(bits, bits - 1 - integer))
    near = jax.lax.map(lambda bits: histogram_distance(weights, rounded(bits), rule.bins), lengths) <= rule.tolerance
    return jnp.where(jnp.any(near), lengths[jnp.argmax(near)], rule.highest).astype(jnp.float32)


def histogram_distance(w: Float[Array, " n"], q: Float[Array, " n"], bins: int) -> Float[Array, ""]:
    """KL(hist(w) ‖ hist(q)) in nats, over the range of w widened to contain zero."""
    amax = jnp.maximum(jnp.max(jnp.abs(w)), np.float32(1e-30))

    def histogram(values):
        index = jnp.clip(jnp.floor((values / amax + 1) * np.float32(bins / 2)), 0, bins - 1).astype(jnp.int32)
        counts = jnp.zeros(bins).at[index].add(1) / w.size + np.float32(_FLOOR)
        return counts / jnp.sum(counts)

    p, r = histogram(w), histogram(q)
    return jnp.sum(p * (jnp.log(p) - jnp.log(r)))


def _layers(state) -> tuple[int, ...]:
    return state["fwd.w"]["bits"].shape
