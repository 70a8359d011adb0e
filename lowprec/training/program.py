"""A run's config made executable: data, model, recipe, and the compiled functions that the loop calls."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec import models, recipes
from lowprec.data import TextData, TrainBatches, eval_batches, load, train_batches
from lowprec.nn import linen
from lowprec.training import evaluation, health, sharding
from lowprec.training.config import RunConfig
from lowprec.training.optimizer import build_optimizer, build_quantizer_optimizer, learning_rate
from lowprec.training.state import Quantizers, TrainState, initial_quantizers, initial_state, run_keys
from lowprec.training.step import Update, make_train_step


class Program:
    """Everything that can be refused is refused when it is built; functions are compiled at their first use.

    Args:
      config: of the run.
      data: its data, when they are loaded already.
    Raises:
      UsageError: (a ValueError) what the config asks for is not there or does not fit together.
    """

    def __init__(self, config: RunConfig, data: TextData | None = None):
        self.config = config
        self.recipe = recipes.parse(config.recipe)
        self.update = Update(
            build_optimizer(config.optimizer, config.train.steps),
            learning_rate(config.optimizer, config.train.steps),
            build_quantizer_optimizer(config.optimizer, config.train.steps),
        )
        self.mesh = sharding.make_mesh(config)
        self.data = load(config.data) if data is None else data
        self.model = models.build(config.model, self.data.vocab_size)
        self.quantized = linen.quantize(self.model, self.recipe)
        self.keys = run_keys(config.seed)
        microbatch = config.train.batch_size // config.train.accumulate
        self._inputs = jax.ShapeDtypeStruct((microbatch, config.data.seq_len), jnp.int32)
        # Tracing the model under the recipe finds rules without a layer and blocks that do not fit.
        self.taps = self.quantized.tap_slots(self._inputs)
        self._slots = self.quantized.state_slots(self._inputs) if self.recipe.remembers else {}
        self._shapes = jax.eval_shape(self._initial_state, self._inputs)
        self._shardings = sharding.state_shardings(self.mesh, self._shapes)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    def _initial_state(self, inputs) -> TrainState:
        state = initial_state(self.model, self.update.optimizer, self.keys.params, self.config.data.seq_len)
        return state._replace(quantizers=self._initial_quantizers(state.params, inputs))

    def _initial_quantizers(self, params, inputs) -> Quantizers:
        return initial_quantizers(self.quantized, self.update.quantizer_optimizer, params, inputs, self.keys.evaluation)

    def initial_state(self) -> TrainState:
        """Before the first step. Learned quantizer parameters start from the first held-out batch."""
        return jax.jit(self._initial_state, out_shardings=self._shardings)(self._example())

    def initial_variables(self, params) -> dict[str, Any]:
        """The collections of the quantized model for parameters that were trained under another recipe."""
        quantizers = jax.jit(self._initial_quantizers)(params, self._example())
        return TrainState(jnp.int32(0), params, (), quantizers).variables

    def _example(self):
        if self.recipe.learns:
            return self.eval_batches[0]["tokens"][:, :-1]
        return jnp.zeros(self._inputs.shape, self._inputs.dtype)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings, to restore into."""
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.tree.map(place, self._shapes, self._shardings)

    @cached_property
    def train_step(self):
        """(state, which is given away, tokens) -> (state, metrics)."""
        step = make_train_step(self.quantized, self.update, self.keys.noise, self._slots)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(self._shardings, sharding.batch_sharding(self.mesh, leading=1)),
            out_shardings=(self._shardings, sharding.replicated(self.mesh)),
        )

    def batches(self) -> TrainBatches:
        """This process's part of the training batches, from the beginning."""
        return train_batches(
            self.data,
            seq_len=self.config.data.seq_len,
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def put(self, batch: dict[str, np.ndarray]) -> jax.Array:
        """A training batch as (microbatches, windows, tokens), spread over the devices."""
        tokens = batch["tokens"]
        tokens = tokens.reshape(self.config.train.accumulate, -1, tokens.shape[-1])
        return jax.make_array_from_process_local_data(sharding.batch_sharding(self.mesh, leading=1), tokens)

    @cached_property
    def eval_batches(self) -> list[dict[str, Any]]:
        """In pieces as large as a microbatch: what trains fits, and so does this."""
        accumulate = self.config.train.accumulate
        return eval_batches(
            self.data,
            seq_len=self.config.data.seq_len,
            batch_size=self.config.train.batch_size // accumulate,
            batches=self.config.eval.batches * accumulate,
        )

    @cached_property
    def _window_losses(self):
        return jax.jit(
            evaluation.make_window_losses(self.model, self.quantized),
            in_shardings=(
                self._shardings.variables,
                sharding.batch_sharding(self.mesh),
                sharding.replicated(self.mesh),
            ),
            out_shardings=sharding.replicated(self.mesh),
        )

    def evaluate(self, variables) -> evaluation.Evaluation:
        """The loss on the held-out windows."""
        return evaluation.evaluate(self._window_losses, variables, self.eval_batches, self.keys.evaluation)

    @cached_property
    def _tap_gradient(self):
        return jax.jit(
            health.make_tap_gradient(self.quantized),
            in_shardings=(
                self._shardings.variables,
                sharding.replicated(self.mesh),
                sharding.batch_sharding(self.mesh),
                sharding.replicated(self.mesh),
            ),
            out_shardings=sharding.replicated(self.mesh),
        )

    def measure_health(self, variables) -> health.Health:
        """Of every quantized operand, on the first held-out batch."""
        if not jax.tree.leaves(self.taps):
            return health.Health({})
        tokens = self.eval_batches[0]["tokens"]
        return health.Health.from_cotangents(self._tap_gradient(variables, self.taps, tokens, self.keys.evaluation))
