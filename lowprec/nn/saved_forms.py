"""Functions of a layer whose inputs are saved as a recipe says, in the forms in which Flax layers call for them."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax

from lowprec.errors import UsageError
from lowprec.ops.saved import Exact, Policy, saved

CORE = "core"  # of attention: from queries, keys and values to the context, as recipes name it
_ARRAYS_OF_ATTENTION = ("bias", "mask", "dropout_rng")


class SavedForms(ABC):
    """A function in a model whose inputs are kept by a policy.

    Attributes:
      policy: of the inputs.
    """

    policy: Policy

    @abstractmethod
    def options(self, inputs: tuple[jax.Array, ...]) -> dict[str, Any]:
        """The key, state and slots of one call, as `ops.saved.saved` takes them."""

    def call(self, function: Callable, inputs: tuple, others: tuple = ()):
        """function(*inputs, *others), of which the inputs are kept by the policy and the others exactly."""
        policies = [self.policy] * len(inputs) + [Exact()] * len(others)
        return saved(function, *policies)(*inputs, *others, **self.options(inputs))

    def core(self, plain: Callable) -> Callable:
        """What takes the place of a function of queries, keys and values."""

        @functools.wraps(plain)  # Flax reads the signature to see which options it takes
        def attention(query, key, value, *products, **options):
            if options.get("module") is not None:
                raise UsageError("attention weights cannot be sown where the inputs of attention are saved")
            arrays = {name: options.pop(name) for name in _ARRAYS_OF_ATTENTION if name in options}

            def function(query, key, value, arrays):
                return plain(query, key, value, *products, **arrays, **options)

            return self.call(function, (query, key, value), (arrays,))

        return attention
