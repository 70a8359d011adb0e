"""One stored integer tensor, many widths: Double Rounding, and how its widths are trained together (arXiv 2502.01199).

The codes of h bits are stored, W_h = clip(round(w / s_h)). Those of every lower width l follow from them alone,
W_l = clip(round(W_h / 2^(h-l))), to be multiplied by a scale of their own or by s_h · 2^(h-l).
"""

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.elements import code_dtype, decode, encode_rounded
from lowprec.formats.packing import pack, unpack
from lowprec.formats.types import BlockFormat, IntFormat
from lowprec.quantizers.learned import scaled_blocks
from lowprec.quantizers.learned_rules import SMALLEST, gradient_factor
from lowprec.quantizers.qtensor import QTensor
from lowprec.quantizers.surrogate import at_least, scale_gradient, with_slopes
from lowprec.quantizers.variables import Arrays, Differentiable, Remembering
from lowprec.typing import Array, Bool, Float, Int

WIDTHS = (8, 6, 4, 2)


def narrowed(codes: Int[Array, "..."], bits: int, width: int | Int[Array, ""]) -> Int[Array, "..."]:
    """clip(round(codes / 2^(bits-width)), -2^(width-1), 2^(width-1) - 1) in integers; halves go to the even neighbour.

    Args:
      codes: signed, of so many bits.
      width: of the result, at most bits; it may be an array.
    """
    codes = codes.astype(jnp.int32)
    shift, one = jnp.asarray(bits - width, jnp.int32), jnp.int32(1)
    low = codes >> shift
    rest, half = codes - (low << shift), (one << shift) >> 1
    up = (rest > half) | ((rest == half) & (low & 1 == 1))
    top = one << (jnp.asarray(width, jnp.int32) - 1)
    return jnp.clip(jnp.where(shift > 0, low + up, codes), -top, top - 1)


def at_width(q: QTensor, width: int) -> QTensor:
    """The tensor of a lower width, from stored codes alone; its scales are 2^(h-l) times those stored.

    Args:
      q: of signed integers with one level of float scales, e.g. int8@row.
      width: at most that of q.
    Raises:
      UsageError: (a ValueError) if q is stored otherwise, or narrower.
    """
    element = _element(q.fmt, (width,))
    packed = element.bits < 8
    stored = decode(unpack(q.codes, element.bits, q.shape[-1]) if packed else q.codes, element).astype(jnp.int32)
    narrow = IntFormat(width)
    codes = encode_rounded(narrowed(stored, element.bits, width).astype(jnp.float32), narrow).astype(code_dtype(width))
    return QTensor(
        codes=pack(codes, width) if width < 8 else codes,
        scales=q.scales * jnp.asarray(2.0 ** (element.bits - width), q.scales.dtype),
        tensor_scale=None,
        fmt=BlockFormat(narrow, q.fmt.block, q.fmt.scale),
        shape=q.shape,
        axis=q.axis,
    )


@dataclass(frozen=True)
class NestedWidths(Differentiable):
    """Codes of the format's width h, read at a width l: y = s_l · W_l.

    Parameters "step_<width>", a step a block for each of the widths: the same tree whichever width is read, so that the
    losses of several widths share it. With the roundings passed straight through, ∂y/∂w = s_l / (s_h · 2^(h-l)) where
    no code clips and ∂y/∂s_l = W_l; at the width stored both are LSQ's. s_h learns from the loss at its own width
    alone: lower widths, which would have it small enough to clip, take the codes as they are. The gradient of each step
    is divided by √(values a block · (2^(l-1) - 1)).

    Args:
      widths: that the tensor is trained for, in descending order from the one stored.
      shared: one step alone, s_l = s_h · 2^(h-l), which learns from all widths: ∂y/∂s_h = 2^(h-l) W_l - w/s_h.
    """

    widths: tuple[int, ...] = WIDTHS
    shared: bool = False

    def __post_init__(self):
        if list(self.widths) != sorted(set(self.widths), reverse=True) or not self.widths:
            raise UsageError(f"widths descend from the one stored, e.g. {WIDTHS}; not {self.widths}")

    def reads_parameters_of(self, other):
        """Whichever width is read, if the same are learned."""
        return isinstance(other, NestedWidths) and (self.widths, self.shared) == (other.widths, other.shared)

    @abstractmethod
    def read_width(self, state: Arrays) -> int | Int[Array, ""]:
        """Of one step."""

    def initial_params(self, x, fmt, axis):
        """The largest code stands at the largest magnitude; narrower steps are s_h · 2^(h-l)."""
        fmt, layout = scaled_blocks(x, fmt, axis)
        stored = self._stored(fmt).bits
        top = jnp.max(jnp.abs(layout.split(x.astype(jnp.float32))), axis=layout.members, keepdims=True)
        step = (jnp.where(top > 0, top, 1.0) / np.float32(fmt.element.max)).reshape(layout.scale_shape)
        return {_step(width): step * np.float32(2.0 ** (stored - width)) for width in self._own_steps()}

    def quantize(self, x, fmt, axis, params, state, key):
        fmt, layout = scaled_blocks(x, fmt, axis)
        element, width = self._stored(fmt), self.read_width(state)
        steps = {}
        for each in self._own_steps():
            factor = gradient_factor("block", x, layout, axis, 2.0 ** (each - 1) - 1)
            steps[each] = layout.broadcast_scale(scale_gradient(at_least(params[_step(each)], SMALLEST), factor))
        step = steps[element.bits]
        if not self.shared:
            step = jnp.where(width == element.bits, step, lax.stop_gradient(step))
        v = layout.split(x.astype(jnp.float32)) / step
        inside = (v >= element.min) & (v <= element.max)
        stored = jnp.round(jnp.clip(lax.stop_gradient(v), element.min, element.max)).astype(jnp.int32)
        codes = narrowed(stored, element.bits, width)
        ratio = (1 << (element.bits - jnp.asarray(width, jnp.int32))).astype(jnp.float32)
        # A code that clips at the lower width does not follow w either.
        inside &= jnp.abs(codes * ratio - stored) <= ratio / 2
        values = with_slopes(codes.astype(jnp.float32), (jnp.where(inside, 1 / ratio, 0), v))
        own = [jnp.where(width == each, each_step, 0) for each, each_step in steps.items()]
        read = steps[element.bits] * ratio if self.shared else functools.reduce(jnp.add, own)
        return layout.merge(values * read), layout.merge(inside)

    def _stored(self, fmt):
        element, (first, *_) = _element(fmt, self.widths), self.widths
        if element.bits != first:
            raise UsageError(f"the first of the widths {self.widths} is the one stored, not {element.bits} of {fmt}")
        return element

    def _own_steps(self):
        return self.widths[:1] if self.shared else self.widths

    def _names(self):
        return f"learned {'step' if self.shared else 'steps'} of {', '.join(map(str, self.widths))} bits"


@dataclass(frozen=True)
class DoubleRounding(NestedWidths):
    """`NestedWidths` read at one of them.

    Args:
      width: one of the widths.
    """

    width: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.width not in self.widths:
            raise UsageError(f"the width read is one of {', '.join(map(str, self.widths))}, not {self.width}")

    def read_width(self, state):
        return self.width

    def __str__(self):
        return f"{self._names()}, read at {self.width}"


@dataclass(frozen=True)
class SampledDoubleRounding(NestedWidths, Remembering):
    """`NestedWidths` read at the "width" of its state: another one for each layer and step without a recompilation.

    It starts as the stored width and stays what `with_widths` makes it.
    """

    def initial_state(self, fmt):
        return {"width": jnp.asarray(self.widths[0], jnp.float32)}

    def observe(self, x):
        return jnp.ones(1)

    def next_state(self, state, observed, fmt):
        return dict(state)

    def read_width(self, state):
        return state["width"].astype(jnp.int32)

    def __str__(self):
        return f"{self._names()}, read at one drawn"


def with_widths(quant: Any, key: jax.Array, probabilities: Any, widths: Sequence[int] = WIDTHS) -> Any:
    """The collection "quant" with the width of every layer drawn anew.

    Args:
      quant: a tree of dicts, with entries "width" of `SampledDoubleRounding`; its other entries stay.
      probabilities: of each of the widths: (widths,) for all layers, or a tree with (…, widths) where quant has (…).
      widths: those of the rule.
    """
    drawn, tree = [], jax.tree.structure(quant)
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(quant)):
        if path[-1].key != "width":
            drawn.append(leaf)
            continue
        chances = probabilities
        for entry in path if isinstance(probabilities, Mapping) else ():
            chances = chances[entry.key]
        logits = jnp.broadcast_to(jnp.log(chances), (*leaf.shape, len(widths)))
        picked = jax.random.categorical(jax.random.fold_in(key, index), logits)
        drawn.append(jnp.asarray(widths, jnp.float32)[picked])
    return jax.tree.unflatten(tree, drawn)


def width_probabilities(traces: Float[Array, " layers"], widths: Sequence[int]) -> Float[Array, "layers widths"]:
    """Hessian-aware sampling: layers whose trace is below the mean prefer low widths, the others high ones.

    The preferred widths have the larger of the chances 1, 2, …, n over n (n + 1) / 2. (HASB, §3.3; the paper says which
    layers prefer which, these chances are ours.)
    """
    traces = jnp.asarray(traces)
    return width_chances(traces < jnp.mean(traces), widths)


def width_chances(flat: Bool[Array, "..."] | np.ndarray, widths: Sequence[int]) -> Float[Array, "... widths"]:
    """Of each width in a layer, as `width_probabilities` has them: low ones preferred where the loss is flat."""
    rank = np.argsort(np.argsort(np.asarray(widths))) + 1.0
    high, low = rank / rank.sum(), (len(widths) + 1 - rank) / rank.sum()
    return jnp.where(jnp.asarray(flat)[..., None], low, high)


def rate_factors(widths: Sequence[int] = WIDTHS) -> dict[str, float]:
    """What the learning rate of each width's step is multiplied by, by the parameter's name: 10^(-(h-l)/2).

    Adaptive learning rate scaling (ALRS, §3.2): the fewer the bits, the more the gradient of the step varies. The base
    is a default to be swept.
    """
    stored = max(widths)
    return {_step(width): 10.0 ** (-(stored - width) / 2) for width in widths}


def _step(width):
    return f"step_{width}"


def _element(fmt, widths) -> IntFormat:
    element = fmt.element if isinstance(fmt, BlockFormat) else None
    if element != IntFormat(getattr(element, "bits", 1)) or fmt.scale.per_tensor or fmt.scale.power_of_two:
        raise UsageError(f"widths are read from signed integers with float scales, e.g. int8@row; not from {fmt}")
    if not all(2 <= width <= element.bits for width in widths):
        raise UsageError(f"of {fmt} widths from 2 to {element.bits} can be read, not {', '.join(map(str, widths))}")
    return element
