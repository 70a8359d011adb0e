"""Recipes that differ in element formats alone, as one recipe and the formats that it is given."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowprec.errors import UsageError
from lowprec.formats import element_of, parse
from lowprec.formats.types import BlockFormat, ElementFormat, FloatFormat, IntFormat
from lowprec.ops import GemmRule
from lowprec.ops.accumulation import Accumulation
from lowprec.ops.backends import may_take
from lowprec.ops.codes import native_dtype
from lowprec.optim.paths import path_name
from lowprec.quantizers import AbsMax, Clip, Quantizer, StraightThrough
from lowprec.quantizers.traced_choice import GivenElements, format_numbers, with_element
from lowprec.recipes import LayerRule, Recipe
from lowprec.typing import Array, Int

# Stand in for elements that XLA multiplies as int8, and for those whose values are multiplied in float32: no narrower
# dtype has the latter.
_CODES, _VALUES = IntFormat(8), FloatFormat(5, 11)


@dataclass(frozen=True)
class OpenRecipe:
    """A recipe whose element formats are left open.

    Args:
      recipe: with `GivenElements` where they are; formats that cannot be given stay in it.
      elements: those of the recipe that it was made of, by the index of `GivenElements`.
    """

    recipe: Recipe
    elements: tuple[ElementFormat, ...]

    @property
    def numbers(self) -> Int[np.ndarray, "formats fields"]:
        """The elements as the program takes them."""
        return np.stack([format_numbers(element) for element in self.elements]) if self.elements else np.zeros((0, 0))

    @property
    def signature(self) -> str:
        """Equal for recipes that are one program."""
        return repr(replace(self.recipe, name="", source=""))


def open_recipe(recipe: Recipe) -> OpenRecipe:
    """Leaves open what can be given: the elements of all quantizers with absmax scales whose gradients ask no more than
    where their range ends, of rules that accumulate in float32 and keep no codes. A recipe that learns, remembers or
    has a controller stays as it is.
    """
    if recipe.learns or recipe.remembers or recipe.control:
        return OpenRecipe(recipe, ())
    elements: list[ElementFormat] = []
    rules = [rule for rule in recipe.rules if isinstance(rule, LayerRule)]  # which they are, once it is made
    opened = tuple(replace(rule, gemm=_opened(rule.gemm, elements)) for rule in rules)
    return OpenRecipe(replace(recipe, rules=opened), tuple(elements))


def given_formats(shapes: Any, numbers: Int[Array, "formats fields"]) -> Any:
    """The collection "quant" of an open recipe, of which the shapes are given: each operand with its format."""

    def given(path, leaf):
        index = int(path_name(path).rpartition("/format")[2])
        return jnp.broadcast_to(jnp.asarray(numbers)[index], leaf.shape)

    return jax.tree_util.tree_map_with_path(given, shapes)


def _opened(gemm: GemmRule, elements: list[ElementFormat]) -> GemmRule:
    if gemm.saved is not None or gemm.accumulation != Accumulation():
        return gemm

    def opened(pair: tuple[Quantizer, Quantizer]) -> tuple[Quantizer, Quantizer]:
        return _open_operand(pair[0], elements), _open_operand(pair[1], elements)

    return replace(gemm, fwd=opened(gemm.fwd), dgrad=opened(gemm.dgrad), wgrad=opened(gemm.wgrad))


def _open_operand(q: Quantizer, elements: list[ElementFormat]) -> Quantizer:
    stand_in = _stand_in(q)
    if stand_in is None or q.format is None:
        return q
    elements.append(element_of(q.format))
    return replace(q, format=with_element(parse(q.format), stand_in), scale=GivenElements(len(elements) - 1))


def _stand_in(q: Quantizer) -> ElementFormat | None:
    """For the element of a quantizer; None where it cannot be given."""
    simple = q.scale == AbsMax() and isinstance(q.estimator, StraightThrough | Clip) and q.correction is None
    if q.format is None or not simple or not _can_be_traced(q.format):
        return None
    native = native_dtype(q.format)
    if native == jnp.int8:
        # Blocks along the contraction axis keep their scales out of the product: it multiplies values.
        along = isinstance(q.format, BlockFormat) and isinstance(q.format.block, tuple)
        return _VALUES if along else _CODES
    return None if may_take(native, "auto") else _VALUES


def _can_be_traced(fmt) -> bool:
    if isinstance(fmt, BlockFormat) and fmt.scale.rule in ("nearest", "rceil"):
        return False
    try:
        format_numbers(fmt)
    except UsageError:
        return False
    return True
