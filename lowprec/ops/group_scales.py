"""What makes an ordinary rule one of groups: scales of each group's own, and blocks that fit into groups of rows."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from lowprec.errors import UsageError
from lowprec.formats.blocks import BlockLayout
from lowprec.formats.scaling import Scale
from lowprec.formats.types import BlockFormat
from lowprec.ops.accumulation import Accumulation
from lowprec.ops.operand import CONTRACTION
from lowprec.ops.rule import GemmRule
from lowprec.quantizers import FIXED_SIGNS, AbsMax, Eden, FourOverSix, LeastSquares, Quantizer, ScaleRule
from lowprec.quantizers.centered import SignAboutMean
from lowprec.quantizers.line_scales import CrossQuant
from lowprec.quantizers.variables import Differentiable, Remembering
from lowprec.typing import Array, Float, Int

# The scales of a block to which zeros were added are those of the block without them.
_BLIND_TO_ZEROS = (AbsMax, FourOverSix, LeastSquares)


def by_group(rule: GemmRule, group: Int[Array, " rows"], groups: int) -> GemmRule:
    """The rule for operands (rows, …), whose groups are given, and (groups, …)."""

    def operand(name, q):
        if q.format is None:
            return q
        return replace(q, scale=EachMatrix(q.scale) if _of_weights(name) else EachGroup(q.scale, group, groups))

    changed = {name: operand(name, q) for name, q in rule.operands().items()}
    product = lambda name: tuple(q for operand, q in changed.items() if operand.startswith(name))
    return replace(rule, fwd=product("fwd"), dgrad=product("dgrad"), wgrad=product("wgrad"))


@dataclass(frozen=True, eq=False)
class EachGroup:
    """A scale rule, for each group of rows by itself: the first axis are the rows, or whole blocks of them."""

    rule: ScaleRule
    group: Int[Array, " rows"]
    groups: int

    def __call__(self, blocks: Float[Array, "..."], layout: BlockLayout, fmt: BlockFormat) -> Scale:
        if not _spans_rows(fmt, 0 in layout.members):
            return self.rule(blocks, layout, fmt)
        group = self.group.reshape(blocks.shape[0], -1)[:, :1].reshape(-1, *(1,) * (blocks.ndim - 1))

        def add(g, scales):
            scale = self.rule(jnp.where(group == g, blocks, 0), layout, fmt)
            return jax.tree.map(lambda new, old: jnp.where(group == g, new, old), scale, scales)

        # The rows of no group are zeros.
        of_zeros = self.rule(jnp.zeros_like(blocks), layout, fmt)
        wide = lambda leaf: jnp.broadcast_to(leaf, jnp.broadcast_shapes(leaf.shape, group.shape))
        return lax.fori_loop(0, self.groups, add, jax.tree.map(wide, of_zeros))


@dataclass(frozen=True)
class EachMatrix:
    """A scale rule, for each matrix of a stack by itself."""

    rule: ScaleRule

    def __call__(self, blocks: Float[Array, "..."], layout: BlockLayout, fmt: BlockFormat) -> Scale:
        matrix = BlockLayout(
            layout.shape[1:],
            layout.padded[1:],
            layout.split_shape[1:],
            tuple(axis - 1 for axis in layout.members if axis),
            layout.scale_shape[1:],
        )
        scales = jax.vmap(lambda blocks: self.rule(blocks, matrix, fmt))(blocks)
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape + (1,) * (blocks.ndim - leaf.ndim)), scales)


def row_alignment(rule: GemmRule) -> int:
    """The number of rows of which all blocks and rotations that span rows are parts."""
    sizes = [1]
    for name, q in rule.operands().items():
        if q.format is None or _of_weights(name):
            continue
        if isinstance(q.format, BlockFormat) and isinstance(q.format.block, tuple):
            sizes.append(q.format.block[1 if _along_rows(name) else 0])
        if _along_rows(name) and q.rotation is not None:
            sizes.append(q.rotation.block(1))
            if q.rotation.signs == "fixed":
                sizes.append(len(FIXED_SIGNS))
        if _along_rows(name) and isinstance(q.correction, Eden):
            sizes.append(q.correction.chunk)
    return math.lcm(*sizes)


def check_groups(rule: GemmRule) -> None:
    """Refuses what has no meaning for groups of rows.

    Raises:
      UsageError: (a ValueError) that names the operand.
    """
    if rule.accumulation != Accumulation():
        raise UsageError(f"products of groups accumulate in float32, not in {rule.accumulation}")
    for name, q in rule.operands().items():
        reason = None if q.format is None else _why_not(name, q)
        if reason:
            raise UsageError(f"operand {name} of a product of groups ({q}): {reason}")


def _why_not(name: str, q: Quantizer) -> str | None:
    if isinstance(q.scale, Differentiable | Remembering):
        return "it has variables, which are those of one product"
    if q.rotation is not None and q.rotation.side == "outer":
        return "a rotation along the other axis is that of one product"
    if _of_weights(name):
        return "the mean of its tensor would be that of all matrices" if _across_matrices(q) else None
    along_rows = _along_rows(name)
    if along_rows and q.rotation is not None and q.rotation.size == "full":
        return "a rotation of all rows has a length that the groups decide"
    if along_rows and q.clamp is not None:
        return "quantiles of all rows have ranks that the groups decide"
    if isinstance(q.scale, CrossQuant):
        return "its columns cross groups; say @row with another scale"
    if isinstance(q.format, BlockFormat):
        spans = _spans_rows(q.format, q.format.block == "tensor" or along_rows)
        if spans and (isinstance(q.correction, SignAboutMean) or not isinstance(q.scale, _BLIND_TO_ZEROS)):
            return "its scale counts the values of a group, of which some are the zeros of others; use absmax"
    return None


def _across_matrices(q):
    return isinstance(q.correction, SignAboutMean) and q.format.block == "tensor"


def _spans_rows(fmt, block_does):
    return block_does or fmt.scale.per_tensor


def _along_rows(name):
    return CONTRACTION[name] == -2


def _of_weights(name):
    return name.endswith(".w")
