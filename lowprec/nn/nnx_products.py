"""The products of an NNX layer under a rule, as nodes of the model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lowprec.errors import UsageError
from lowprec.nn.nnx_nodes import Node, QuantParam, QuantTap
from lowprec.nn.products import ProductForms
from lowprec.ops import GemmRule, ProductVariables, canonical_variables, initial_memory, next_state
from lowprec.quantizers import tap_slot


class Start:
    """Notes the shapes of the learned parameters of a product while its model is traced."""

    def __init__(self):
        self.shapes: dict[str, Any] = {}


class Product(ProductForms, Node):
    """One product of a layer under a rule.

    Args:
      path, lead, key: see `Node`.
      form: the method of `ProductForms` by which the layer calls it.
      rule, backend: see `ops.qdot`.
    """

    def __init__(
        self, path: str, form: str, rule: GemmRule, backend: str, lead: tuple[int, ...], key: jax.Array | None
    ):
        self.form, self.rule, self.backend = form, rule, backend
        self.starting: Start | None = None  # set while learned parameters get their first values
        self.learned: dict[str, Any] = nnx.data({})
        self.sums = nnx.data(None)
        super().__init__(path, not any(q.stochastic for q in rule.fwd), lead, key, *initial_memory(rule))

    def __call__(self, *args, **kwargs):
        return getattr(self, self.form)(*args, **kwargs)

    def after(self, state, observed):
        return next_state(self.rule, state, observed)

    def add_sums(self) -> None:
        """Makes the slot of the error sums."""
        self.sums = nnx.data(self.stacked(QuantTap, tap_slot()))

    def make_learned(self, shapes) -> None:
        """Makes room for learned parameters: NaN until a call gives them their first values."""
        nans = lambda shape: self.stacked(QuantParam, jnp.full(shape.shape, jnp.nan, shape.dtype))
        self.learned = nnx.data(jax.tree.map(nans, shapes))

    def options(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "key": self.key(),
            "taps": None if self.sums is None else self.one_layer(self.sums),
            "variables": self._variables if rule.learns or rule.remembers else None,
            "backend": self.backend,
        }

    def _variables(self, x, w) -> ProductVariables:
        learned = self._started(x, w) or self.one_layer(self.learned)
        return ProductVariables(learned, self.one_layer(self.state), self.one_layer(self.slots))

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
                before = self.one_layer(self.learned[name][leaf])
                self.learned[name][leaf][...] = jnp.where(jnp.isnan(before), value, before)
        return None


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
