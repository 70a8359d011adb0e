"""The products of an NNX layer under a rule, as nodes of the model with their random streams and variables."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lowprec.errors import UsageError
from lowprec.nn.products import STREAM, ProductForms
from lowprec.ops import GemmRule, ProductVariables, canonical_variables, initial_memory
from lowprec.quantizers import tap_slot


class QuantParam(nnx.Variable):
    """A learned parameter of a quantizer: a step size, a clip, an offset."""


class QuantState(nnx.Variable):
    """What a quantizer remembers from step to step."""


class QuantTap(nnx.Variable):
    """Zeros, whose gradient carries statistics and observations of a step."""


class Start:
    """Notes the shapes of the learned parameters of a product while its model is traced."""

    def __init__(self):
        self.shapes: dict[str, Any] = {}


class Product(ProductForms, nnx.Module):
    """One product of a layer under a rule.

    Args:
      path: of the product in the model.
      form: the method of `ProductForms` by which the layer calls it.
      rule, backend: see `ops.qdot`.
      lead: the axes of stacked layers, before all others of every variable.
      key: of the random stream; None where there is none.
    """

    def __init__(
        self, path: str, form: str, rule: GemmRule, backend: str, lead: tuple[int, ...], key: jax.Array | None
    ):
        self.path, self.form, self.rule, self.backend, self.lead = path, form, rule, backend, lead
        self.deterministic = False  # set by model.eval(): backward products then have no key
        self.starting: Start | None = None  # set while learned parameters get their first values
        if key is not None and lead:
            key = jax.random.split(key, lead)
        state, slots = initial_memory(rule)
        self.stream = nnx.data(None if key is None else nnx.RngStream(key, tag=STREAM))
        self.learned: dict[str, Any] = nnx.data({})
        self.state = nnx.data(jax.tree.map(lambda leaf: self._stacked(QuantState, leaf), state))
        self.slots = nnx.data({name: self._stacked(QuantTap, slot) for name, slot in slots.items()})
        self.sums = nnx.data(None)

    def __call__(self, *args, **kwargs):
        return getattr(self, self.form)(*args, **kwargs)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
          deterministic: whether backward products go without a key.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def add_sums(self) -> None:
        """Makes the slot of the error sums."""
        self.sums = nnx.data(self._stacked(QuantTap, tap_slot()))

    def make_learned(self, shapes) -> None:
        """Makes room for learned parameters: NaN until a call gives them their first values."""
        nans = lambda shape: self._stacked(QuantParam, jnp.full(shape.shape, jnp.nan, shape.dtype))
        self.learned = nnx.data(jax.tree.map(nans, shapes))

    def options(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "key": self._key(),
            "taps": None if self.sums is None else self._one_layer(self.sums),
            "variables": self._variables if rule.learns or rule.remembers else None,
            "backend": self.backend,
        }

    def _key(self):
        if self.stream is None or (self.deterministic and not any(q.stochastic for q in self.rule.fwd)):
            return None
        if self.stream.key.ndim:
            raise self._not_sliced(self.stream.key)
        return self.stream()

    def _variables(self, x, w) -> ProductVariables:
        read = lambda tree: jax.tree.map(self._one_layer, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        return ProductVariables(self._started(x, w) or read(self.learned), read(self.state), read(self.slots))

    def _started(self, x, w):
        """The learned parameters while a model is traced for their shapes; None once they are there.

        First values are written here: a layer called twice starts from its first call.
        """
        if self.starting is None:
            if self.rule.learns and not self.learned:
                raise UsageError(
                    f"layer {self.path!r} learns quantizer parameters that start from data: call "
                    "nnx.initialize(module, *inputs) before, or quantize(module, recipe, example=inputs)"
                )
            return None
        start = canonical_variables(x, w, self.rule).params
        if not self.learned:
            self.starting.shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start)
            return start
        for name, values in start.items():
            for leaf, value in values.items():
                before = self._one_layer(self.learned[name][leaf])
                self.learned[name][leaf][...] = jnp.where(jnp.isnan(before), value, before)
        return None

    def _stacked(self, kind, value):
        return kind(jnp.broadcast_to(value, (*self.lead, *value.shape)), own_axes=value.ndim)

    def _one_layer(self, variable):
        if variable.ndim != variable.get_metadata("own_axes"):
            raise self._not_sliced(variable)
        return variable[...]

    def _not_sliced(self, variable):
        return UsageError(
            f"layer {self.path!r} is one of a stack of {self.lead} and was called with all of their variables: give "
            f"axis 0 to {type(variable).__name__} too where the stack is scanned, e.g. nnx.scan(in_axes=(0, nnx.Carry))"
        )


class Attention(nnx.Module):
    """`nnx.dot_product_attention` with products under rules; the softmax in float32.

    Heads of keys and values that serve several heads of queries (GQA) are repeated.
    """

    def __init__(self, scores: Product, context: Product):
        self.scores, self.context = scores, context

    def __call__(
        self,
        query,
        key,
        value,
        bias=None,
        mask=None,
        *,
        dtype=None,
        precision=None,
        module=None,
        is_causal=False,
        deterministic=False,
        **dropout,
    ):
        query, key, value = nnx.nn.dtypes.promote_dtype((query, key, value), dtype=dtype)
        key, value = (jnp.repeat(heads, query.shape[-2] // heads.shape[-2], axis=-2) for heads in (key, value))
        if is_causal:
            causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
            mask = causal if mask is None else causal & mask.astype(bool)
        weights = linen.dot_product_attention_weights(
            query,
            key,
            bias,
            mask,
            deterministic=deterministic,
            force_fp32_for_softmax=True,
            einsum=self.scores,
            **dropout,
        )
        if module is not None:
            module.sow(nnx.Intermediate, "attention_weights", weights)
        return self.context("...hqk,...khd->...qhd", weights.astype(value.dtype), value)


class QuantizedEmbed(nnx.Embed):
    """An nnx.Embed whose `attend` is a product under a rule."""

    attend_product: Product

    def attend(self, query, out_sharding=None):
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return self.attend_product(query, embedding)
