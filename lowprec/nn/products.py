"""One product under a rule, in the forms in which Flax layers call for it."""

from abc import ABC, abstractmethod
from typing import Any

from lowprec.ops import GemmRule, qconv, qdot, qeinsum

STREAM = "quant"  # the random stream of quantizers
SUMS = "sums"  # the tap slot of error sums; those of observations are named by their operands


class ProductForms(ABC):
    """What a layer's hooks take, from what an adapter knows of the product.

    Attributes:
      rule: of the product.
    """

    rule: GemmRule

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The key, taps, variables and backend of one call, as `ops.qdot` takes them; not asked for by exact rules."""

    def dot_general(self, x, w, dimension_numbers, precision=None, preferred_element_type=None, **_):
        y = qdot(x, w, self.rule, dimension_numbers=dimension_numbers, **self._options())
        return y.astype(preferred_element_type or y.dtype)

    def einsum(self, subscripts, x, w, precision=None, preferred_element_type=None, **_):
        y = qeinsum(subscripts, x, w, self.rule, **self._options())
        return y.astype(preferred_element_type or y.dtype)

    def conv(self, x, w, window_strides, padding, *, precision=None, preferred_element_type=None, **geometry):
        geometry.pop("out_sharding", None)
        y = qconv(x, w, self.rule, window_strides=window_strides, padding=padding, **geometry, **self._options())
        return y.astype(preferred_element_type or y.dtype)

    def attend(self, query, embedding):
        return self.dot_general(query, embedding, (((query.ndim - 1,), (1,)), ((), ())))

    def _options(self):
        return {} if self.rule.exact else self.options()
