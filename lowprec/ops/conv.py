"""qconv: a convolution as one quantized product, of patches with the kernel."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lowprec.errors import UsageError
from lowprec.ops.canonical import canonical_form
from lowprec.ops.dot import qdot, saved_product
from lowprec.ops.operand import Streams
from lowprec.ops.rule import GemmRule
from lowprec.ops.saved import KEPT, SAVED_X, Exact, Recompute, RunningUint8, Stored, saved, slot_name
from lowprec.ops.variables import ProductVariables, Variables, check_variables
from lowprec.typing import Array, Float

Padding = str | Sequence[tuple[int, int]]


def qconv(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    rule: GemmRule,
    *,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    key: jax.Array | None = None,
    taps: Float[Array, "operands sums"] | None = None,
    variables: Variables = None,
    backend: str = "auto",
) -> Float[Array, "..."]:
    """`lax.conv_general_dilated`, quantized by the rule as `qdot` does, forward and backward.

    The product is that of implicit GEMM: a row for each image and output position, a column for each output feature,
    and K runs over kernel positions and, innermost, input features (within a group). Blocks, scales and rotations of
    the forward product run along this K, those of dgrad along the output features, those of wgrad along images and
    output positions. Groups of features are a batch axis of the product; "tensor" is one scale for all of them.

    Scales and error statistics of x see the patches: a value counts as often as patches hold it, the zeros of padding
    and dilation count too, and a value that strides skip does not. Patches are made anew in the backward pass: what is
    kept is x, as `rule.saved` says (where it says `Codes`, x as it is: patches are many times larger).

    Args:
      x: the images, any number of spatial axes.
      w: the kernel.
      rule, key, taps, variables, backend: see `qdot`.
      window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count: see
        `lax.conv_general_dilated`; without dimension numbers x is (N, C, spatial) and w (O, I, spatial), while Flax
        has the features last.
      batch_group_count: 1.
    Returns:
      As `lax.conv_general_dilated`, in the common dtype of x and w; an exact rule gives that function itself.
    Raises:
      UsageError: (a ValueError) for what `lax.conv_general_dilated` refuses, and for groups of images.
    """
    if not isinstance(rule, GemmRule):
        raise TypeError(f"qconv takes a GemmRule, not {rule!r}")
    if batch_group_count != 1:
        raise UsageError(f"qconv has no groups of images: batch_group_count is 1, not {batch_group_count}")
    arguments: dict[str, Any] = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
    }
    dtype = jnp.result_type(x, w)
    y_shape = _shape(x.shape, w.shape, arguments)
    if 0 in y_shape:
        return lax.conv_general_dilated(x.astype(dtype), w.astype(dtype), **arguments)
    if rule.exact_products:
        plain = lambda x, w: lax.conv_general_dilated(x, w, **arguments)
        return saved_product(plain, x.astype(dtype), w.astype(dtype), rule, key, variables)
    x_spec, w_spec, y_spec = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    # Here x itself is kept, not its patches; codes of them would take more room.
    quantizing = replace(rule, saved=None)

    def operands(x, w):
        # In float32, so that the gradients of overlapping patches are not added in fewer bits.
        images = x.astype(jnp.float32).transpose(x_spec[0], *x_spec[2:], x_spec[1])
        kernel = w.transpose(*w_spec[2:], w_spec[1], w_spec[0])
        *window, features, outputs = kernel.shape
        patches = _patches(images, window, window_strides, padding, lhs_dilation, rhs_dilation)
        rows = patches.shape[: x.ndim - 1]
        if feature_group_count == 1:
            return patches.reshape(*rows, -1), kernel.reshape(-1, outputs), (((x.ndim - 1,), (0,)), ((), ()))
        patches = patches.reshape(*rows, -1, feature_group_count, features)
        kernel = kernel.reshape(-1, features, feature_group_count, outputs // feature_group_count)
        place, group, feature = range(len(rows), patches.ndim)
        return patches, kernel, (((place, feature), (0, 1)), ((group,), (2,)))

    def product(x, w, key, taps, variables):
        patches, kernel, contraction = operands(x, w)
        options = {"key": key, "taps": taps, "variables": variables, "backend": backend}
        y = qdot(patches, kernel, quantizing, dimension_numbers=contraction, **options)
        return y if feature_group_count == 1 else jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], -1)

    if callable(variables):
        # Outside of the checkpoint: what the function makes of a layer's variables may not stay inside.
        patches, kernel, contraction = operands(x, w)
        form = canonical_form(patches.shape, kernel.shape, contraction)
        variables = variables(form.collapse_x(patches), form.collapse_w(kernel))
    y = _keeping_x(product, rule, x, w, key, taps, variables or ProductVariables())
    order = (y_spec[0], *y_spec[2:], y_spec[1])
    return y.transpose([order.index(axis) for axis in range(y.ndim)]).astype(dtype)


def _keeping_x(product, rule, x, w, key, taps, variables: ProductVariables):
    """The product, of whose inside nothing is kept, and x as the rule's policy says."""
    if isinstance(rule.saved, (Stored, RunningUint8)):
        check_variables(rule, variables)
        state: dict[str, Any] = dict(variables.state)
        slots: dict[str, Any] = dict(variables.slots)
        own = [{slot_name(0): tree.pop(SAVED_X)} if SAVED_X in tree else {} for tree in (state, slots)]
        arguments = (x, w, key, taps, variables._replace(state=state, slots=slots))
        keeping = saved(product, rule.saved, *[Exact()] * 4)
        return keeping(*arguments, key=Streams(key).saved(), state=own[0], slots=own[1])
    y = jax.checkpoint(product)(x, w, key, taps, variables)
    return checkpoint_name(y, KEPT) if isinstance(rule.saved, Recompute) else y


def _patches(images, window, strides, padding, image_dilation, window_dilation):
    """(N, spatial …, C) to (N, output positions …, window …, C), one spatial axis after the other.

    By slices, not by `lax.conv_general_dilated_patches`: that multiplies by ones and zeros, which spreads an infinity
    or NaN over its neighbourhood.
    """
    image_dilation, window_dilation = (d or (1,) * len(window) for d in (image_dilation, window_dilation))
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(window, window_dilation, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:-1], spans, strides, padding)
    edges = [(low, high, dilation - 1) for (low, high), dilation in zip(padding, image_dilation, strict=True)]
    patches = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    for i, (size, span, stride, dilation) in enumerate(zip(window, spans, strides, window_dilation, strict=True)):
        axis = 2 * i + 1
        reach = (patches.shape[axis] - span) // stride * stride + 1
        starts = range(0, size * dilation, dilation)
        shifted = [lax.slice_in_dim(patches, start, start + reach, stride, axis) for start in starts]
        patches = jnp.stack(shifted, axis=axis + 1)
    last = patches.ndim - 1
    return patches.transpose(0, *range(1, last, 2), *range(2, last, 2), last)


def _shape(x_shape, w_shape, arguments):
    """Of the output; lax checks the arguments of a convolution before it computes anything."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, w_shape))
    try:
        return jax.eval_shape(lambda x, w: lax.conv_general_dilated(x, w, **arguments), x, w).shape
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"qconv of x{list(x_shape)} and w{list(w_shape)}: {error}") from error
