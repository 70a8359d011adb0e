"""Rotating and quantizing as cases: blocks along rows, and along rows and columns in one pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from lowprec.analysis.bench.case import Shape, Work, elements, shape_name
from lowprec.analysis.bench.checks import same_codes
from lowprec.analysis.bench.kernel_case import KernelCase, Program
from lowprec.analysis.bench.xla_products import COPY, normal
from lowprec.formats import BlockFormat, parse

BIG, SMALL = (8192, 8192), (128, 256)
# Of codes: the sums of a rotation are those of tensor cores, in an order of their own.
_DIFFERING = 1e-3


@dataclass(frozen=True)
class Variant:
    """One way to quantize.

    Args:
      fmt: of the blocks.
      rotation: the size of its Hadamard matrix, with random signs; None: as it is. With `columns`, of the columns.
      rounding: "nearest_even" or "stochastic".
      columns: whether the transposed matrix is quantized too.
      noise: of stochastic rounding, see `pallas.rotate_quantize`.
    """

    fmt: str
    rotation: int | None = None
    rounding: str = "nearest_even"
    columns: bool = False
    noise: str = "each"

    @property
    def name(self) -> str:
        operation = "rows_and_columns" if self.columns else "rotate_quantize"
        fmt = self.fmt.replace("@", "_").replace("/", ".")
        rotation = f"hadamard{self.rotation}" if self.rotation else "plain"
        shared = "_shared" if self.noise == "shared" else ""
        return f"{operation}/{fmt}_{rotation}_{self.rounding}{shared}"

    def bytes(self, shape: Shape) -> float:
        """bfloat16 in, codes and scales out; where a block's scale has one of the tensor above it, its amax first."""
        fmt = parse(self.fmt)
        assert isinstance(fmt, BlockFormat)
        read = 4 if fmt.scale.per_tensor else 2
        return elements(shape) * (read + fmt.bits_per_value / 8 * (2 if self.columns else 1))


FP8 = "e4m3fn@1x128"
VARIANTS = (
    Variant(FP8),
    Variant(FP8, rotation=128),
    Variant(FP8, rounding="stochastic"),
    Variant(FP8, rotation=128, rounding="stochastic"),
    Variant(FP8, rotation=128, rounding="stochastic", noise="shared"),
    Variant("nvfp4"),
    Variant("nvfp4", rotation=16, rounding="stochastic"),
    Variant("mxfp4", rotation=32),
    Variant("mxfp4", rotation=32, rounding="stochastic"),
    Variant(FP8, columns=True),
    Variant(FP8, rotation=128, rounding="stochastic", columns=True),
)


def correctness() -> Iterator[KernelCase]:
    """Every variant, small."""
    for variant in VARIANTS:
        yield KernelCase(f"correct/{variant.name}", partial(quantizing, variant), SMALL, SMALL, True, timed=False)


def quantizers() -> Iterator[KernelCase]:
    """Every variant beside XLA's program of the reference."""
    for variant in VARIANTS:
        name, build = f"{variant.name}/{shape_name(BIG)}", partial(quantizing, variant)
        yield KernelCase(f"{name}/xla", build, BIG, SMALL, peers=(COPY,))
        yield KernelCase(f"{name}/kernel", build, BIG, SMALL, True, peers=(f"{name}/xla", COPY))


def quantizing(variant: Variant, shape: Shape, impl: str) -> Program:
    """What one variant does."""
    quantize = lambda by: lambda *arrays: _quantize(variant, by, *arrays)

    def inputs():
        turned = shape[0 if variant.columns else 1]  # the axis that a rotation mixes
        signs = jax.random.rademacher(jax.random.key(1), (turned,), jnp.float32)
        return normal(0, shape), signs, jax.random.key(2)

    reference = quantize("xla") if impl != "xla" else None
    return Program(quantize(impl), inputs, Work(bytes=variant.bytes(shape)), reference, same_codes(_DIFFERING))


def _quantize(variant, impl, x, signs, key):
    key = key if variant.rounding == "stochastic" else None
    rotation = {"rotation": variant.rotation, "signs": signs} if variant.rotation else {}
    if not variant.columns:
        from lowprec.pallas.rotate_quantize import rotate_quantize

        how = {**rotation, "rounding": variant.rounding, "key": key, "noise": variant.noise}
        return rotate_quantize(x, variant.fmt, **how, impl=impl)
    from lowprec.pallas.quantize_rows_and_columns import quantize_rows_and_columns

    # As a gradient is wanted: for dgrad as it is, for wgrad rotated along the batch and rounded without bias.
    how = {**rotation, "column_rounding": variant.rounding, "column_key": key, "noise": variant.noise}
    return quantize_rows_and_columns(x, variant.fmt, **how, impl=impl)
