"""FLIQS: which format each layer gets, found by REINFORCE while the model trains (arXiv 2308.03290)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowprec.errors import UsageError
from lowprec.nn.stack import first_layer
from lowprec.quantizers.dynamic import DynamicChoice
from lowprec.recipes import FormatSearch, Recipe
from lowprec.training.controllers.protocol import Signals, map_products, weights_at
from lowprec.typing import Array, Float, Int

_FIRST_LOGIT = np.float32(0.5)


class FliqsMemory(NamedTuple):
    """The policy.

    Attributes:
      logits: for each product (…, formats).
      opt_state: of Adam on them.
      average: of rewards.
      steps: of the search so far.
    """

    logits: Any
    opt_state: optax.OptState
    average: Float[Array, ""]
    steps: Int[Array, ""]


@dataclass(frozen=True)
class Fliqs:
    """See `recipes.FormatSearch`.

    Args:
      recipe: whose products have a `DynamicChoice`.
    """

    search: FormatSearch
    recipe: Recipe

    def __post_init__(self):
        bits = [fmt.bits for rule in self.recipe.rules for q in rule.gemm.operands().values() for fmt in _formats(q)]
        low, high = min(bits), max(bits)
        if not low <= self.search.target <= high:
            raise UsageError(f"formats of {low} to {high} bits do not cost {self.search.target:g} bits a value")

    def init(self, params, quant, key):
        logits = map_products(
            lambda path, state: jnp.full((*_layers(state), len(self._bits(path))), _FIRST_LOGIT), quant
        )
        memory = FliqsMemory(logits, self._adam.init(logits), jnp.zeros(()), jnp.int32(0))
        return memory, self._drawn(quant, logits, key)

    def update(self, memory: FliqsMemory, quant, signals: Signals):
        cost = self._mean(quant, signals.params, self._cost_of_choice)
        reward = -signals.loss - self.search.strength * jnp.abs(cost / self._target - 1)
        searching, first = signals.progress >= self.search.delay, memory.steps == 0
        advantage = jnp.where(first, 0.0, reward - memory.average)
        decay = np.float32(self.search.average)
        average = jnp.where(first, reward, decay * memory.average + (1 - decay) * reward)

        def policy_loss(logits):
            chosen = _mean_over_layers(map_products(_log_probability, quant, logits))
            return -advantage * chosen + self._entropy_weight(signals.progress) * _mean_over_layers(_entropies(logits))

        updates, opt_state = self._adam.update(jax.grad(policy_loss)(memory.logits), memory.opt_state)
        learned = FliqsMemory(optax.apply_updates(memory.logits, updates), opt_state, average, memory.steps + 1)
        # Logits that have not learned yet are equal: formats are drawn uniformly.
        memory = jax.tree.map(lambda new, old: jnp.where(searching, new, old), learned, memory)
        metrics = {
            "bits": map_products(lambda path, state: self._bits(path)[_choice(state)], quant),
            "format_reward": reward,
            "format_cost": self._mean_cost(memory.logits, quant, signals.params) / self._target,
            "format_entropy": _mean_over_layers(_entropies(memory.logits)),
        }
        return memory, self._drawn(quant, memory.logits, signals.key), metrics

    @property
    def _adam(self):
        return optax.adam(self.search.learning_rate)

    @property
    def _power(self) -> int:
        """How bits enter the cost: weights alone, or weights and inputs, which share a format."""
        return 1 if self.search.cost == "memory" else 2

    @property
    def _target(self) -> float:
        return self.search.target**self._power

    def _entropy_weight(self, progress):
        done = jnp.clip((progress - self.search.delay) / np.float32(1 - self.search.delay), 0, 1)
        return np.float32(self.search.entropy) * (1 - jnp.cos(jnp.pi * done)) / 2

    def _bits(self, path):
        rule = self.recipe.rule_for(first_layer(path)).fwd[1].scale
        return jnp.array([float(fmt.bits) for fmt in rule.formats])

    def _drawn(self, quant, logits, key):
        """A format for each layer."""
        products = iter(range(len(jax.tree.leaves(logits))))

        def draw(path, state, logits):
            own = jax.random.fold_in(key, next(products))
            choice = jax.random.categorical(own, logits).astype(jnp.float32)
            return {name: {"choice": choice} for name in state}

        return map_products(draw, quant, logits)

    def _cost_of_choice(self, path, state):
        return self._bits(path)[_choice(state)] ** self._power

    def _mean(self, quant, params, of_product):
        """Of a number a layer, weighted by its parameters (its multiplications are in proportion to them)."""
        size = lambda path, state: jnp.full(_layers(state), float(weights_at(params, path, _layers(state)).shape[-1]))
        sizes = jax.tree.leaves(map_products(size, quant))
        values = jax.tree.leaves(map_products(of_product, quant))
        return sum(jnp.sum(n * v) for n, v in zip(sizes, values, strict=True)) / sum(jnp.sum(n) for n in sizes)

    def _mean_cost(self, logits, quant, params):
        """Expected under the policy."""
        expected = map_products(
            lambda path, state, logits: jax.nn.softmax(logits) @ self._bits(path) ** self._power, quant, logits
        )
        pick = iter(jax.tree.leaves(expected))
        return self._mean(quant, params, lambda path, state: next(pick))


def _formats(q):
    return q.scale.formats if isinstance(q.scale, DynamicChoice) else ()


def _choice(state):
    return state["fwd.w"]["choice"].astype(jnp.int32)


def _layers(state) -> tuple[int, ...]:
    return state["fwd.w"]["choice"].shape


def _log_probability(path, state, logits):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), _choice(state)[..., None], axis=-1)[..., 0]


def _entropies(logits):
    return jax.tree.map(lambda leaf: -jnp.sum(jax.nn.softmax(leaf) * jax.nn.log_softmax(leaf), axis=-1), logits)


def _mean_over_layers(tree):
    leaves = jax.tree.leaves(tree)
    return sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves)
