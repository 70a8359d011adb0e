"""Adam with moments of few bits as cases: one parameter, its moments changed in their place step by step."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lowprec import optim
from lowprec.analysis.bench.case import Shape, Work, elements, shape_name
from lowprec.analysis.bench.checks import same_codes
from lowprec.analysis.bench.kernel_case import KernelCase, Program
from lowprec.analysis.bench.xla_products import COPY, normal
from lowprec.formats import TableFormat
from lowprec.optim.state_scales import AbsMax

BIG, SMALL = (8192, 8192), (64, 512)
# Formats of the first and second moment, as optim.adam8 and adam4 store them.
MOMENTS = {"adam8": ("cmp8@128", "log8(stochastic)"), "adam4": ("de4", "log4(stochastic)")}
# A multiplication and an addition may be one operation, or two; a value at a tie then goes to its other neighbour.
_DIFFERING = 1e-3


def correctness() -> Iterator[KernelCase]:
    """Both optimizers, small."""
    for name in MOMENTS:
        yield KernelCase(f"correct/adam/{name}", partial(by_kernel, name), SMALL, SMALL, True, timed=False)


def adam_cases() -> Iterator[KernelCase]:
    """The kernel beside `optim.fused_step`, in chunks of rows and whole, and beside Adam with float32 moments."""
    size = shape_name(BIG)
    for name in ("adamw", *MOMENTS):
        for way, chunk in (("whole", None), ("chunks", 1 << 16)):
            yield KernelCase(f"adam/{name}/{size}/{way}", partial(by_xla, name, chunk), BIG, SMALL, peers=(COPY,))
    for name in MOMENTS:
        peers = (f"adam/{name}/{size}/whole", f"adam/adamw/{size}/whole", COPY)
        yield KernelCase(f"adam/{name}/{size}/kernel", partial(by_kernel, name), BIG, SMALL, True, peers=peers)


def by_xla(name: str, chunk: int | None, shape: Shape, _: str) -> Program:
    """`fused_step` of an optimizer, gradients in bfloat16."""
    optimizer = getattr(optim, name)(1e-3)
    step = optim.fused_step(optimizer, chunk=chunk).step

    def inputs():
        w = {"kernel": normal(0, shape, jnp.float32)}
        return w, {"kernel": 0.01 * normal(1, shape)}, optimizer.init(w)

    advance = lambda given, found: (found[0], given[1], found[1])
    return Program(step, inputs, Work(bytes=_bytes(name, shape)), advance=advance)


def by_kernel(name: str, shape: Shape, impl: str) -> Program:
    """`pallas.adam_update`, gradients in bfloat16."""
    mu_code, nu_code = (_code(fmt, signed) for fmt, signed in zip(MOMENTS[name], (True, False), strict=True))

    def step(w, g, mu, nu, scalars, words, impl=impl):
        from lowprec.pallas.adam_update import adam_update

        return adam_update(w, g, mu, nu, scalars, words, mu_code=mu_code, nu_code=nu_code, impl=impl)

    def inputs():
        from lowprec.pallas import reference
        from lowprec.pallas.adam_arithmetic import AdamScalars

        index = jnp.arange(elements(shape), dtype=jnp.uint32).reshape(shape)
        m = 0.01 * normal(2, shape, jnp.float32)
        moments = reference.stored(m, mu_code, index), reference.stored(m * m, nu_code, index << 8)
        scalars = AdamScalars(*map(jnp.float32, (0.9, 0.1, 0.999, 0.001, 1e-8, 1.7, 30.0, -1e-3, 0.1)))
        words = jax.random.bits(jax.random.key(3), (3, 2), jnp.uint32)
        return normal(0, shape, jnp.float32), 0.01 * normal(1, shape), *moments, scalars, words

    return Program(
        step,
        inputs,
        Work(bytes=_bytes(name, shape)),
        partial(step, impl="xla"),
        same_codes(_DIFFERING),
        advance=lambda given, found: (found[0], given[1], found[1], found[2], *given[4:]),
    )


def _bytes(name, shape):
    """Weights in float32 and moments read and written, gradients in bfloat16 read."""
    state = jax.eval_shape(getattr(optim, name)(1e-3).init, {"kernel": jax.ShapeDtypeStruct(shape, np.float32)})
    return elements(shape) * (4 + 2 + 4) + 2 * optim.state_bytes(state)


def _code(name, signed):
    from lowprec.pallas.adam_arithmetic import MomentCode

    fmt = optim.state_format(name, signed=signed)
    scales, element = fmt.scales, fmt.element
    assert isinstance(scales, AbsMax) and isinstance(element, TableFormat)
    return MomentCode(element, scales.block, scales.dtype, scales.signed, fmt.stochastic, fmt.keeps_positive)
