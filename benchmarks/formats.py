"""Rounding, coding and packing: ns an element, and ratios to one pass over the same array.

    python -m benchmarks.formats [--only e4m3fn] [--seconds 1] [--json FILE]

The pass is a jitted x * 1.0000001. Each case runs in turn with it, call by call, so that other load on the machine hits
both; ratios are medians over these pairs, of process CPU time ("cpu", the figure to quote) and of wall time. Elements
are those of the float32 array, also where codes go in. 16M elements lie in memory, 512k in cache.

All allocate a new output in each call, as the pass does; what malloc makes of that decides the large case. Freed memory
is kept (`host_memory.keep_freed_memory`, as in `lowprec train`), so in cache no page is new. On Linux outputs of 32 MiB
and more are mapped anew all the same, and the system clears their pages, at several times the cost of the arithmetic;
with MALLOC_ARENA_MAX=1 in the environment glibc reuses these too. The head of the table counts the page faults.
"""

import resource
from collections.abc import Callable, Iterator
from importlib import util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.options import command_line, say_where, write_table
from lowprec import formats
from lowprec.analysis.bench.interleaved import paired, timed
from lowprec.formats.rounding import KINDS
from lowprec.quantizers import fake_quant
from lowprec.training.host_memory import keep_freed_memory

LARGE, CACHED = 1 << 24, 1 << 19
NEAREST = ("e4m3fn", "e5m2", "e2m1fn", "float16", "int8")
PEERS = ("jax", "ml_dtypes", "gfloat", "pychop")


class Case(NamedTuple):
    """One row of the table.

    Args:
      build: (float32 array, key) -> a function without arguments that computes the result from arrays at hand.
      goals: elements -> the ratio of CPU time that it should not exceed.
    """

    name: str
    build: Callable[[jax.Array, jax.Array], Callable]
    goals: dict[int, float]


def jitted(function: Callable) -> Callable:
    """Builds a case from a function of (x, key)."""

    def build(x, key):
        compiled = jax.jit(function)
        return lambda: compiled(x, key)

    return build


def of_codes(function: Callable, fmt: str) -> Callable:
    """Builds a case from a function of codes."""

    def build(x, _):
        codes, compiled = formats.encode(x, fmt), jax.jit(function)
        return lambda: compiled(codes)

    return build


one_pass = jitted(lambda x, _: x * np.float32(1.0000001))


def cases() -> Iterator[Case]:
    def rounding(fmt, **options):
        return jitted(lambda x, key: formats.round_to(x, fmt, key=key, **options))

    def blocks(fmt, **options):
        return jitted(lambda x, key: fake_quant(x, fmt, key=key, **options))

    yield Case("x * 1.0000001 itself", one_pass, {})  # how far the ratios of this run can be trusted
    for fmt in NEAREST:
        yield Case(f"round_to {fmt}", rounding(fmt), {LARGE: 1.15, CACHED: 1.3})
    for fmt in NEAREST:
        yield Case(f"round_to {fmt} stochastic", rounding(fmt, rounding="stochastic"), {LARGE: 1.2, CACHED: 3.2})
    for mode in (*KINDS[1:], "stochastic[8]"):
        if mode != "stochastic":
            yield Case(f"round_to e4m3fn {mode}", rounding("e4m3fn", rounding=mode), {LARGE: 1.3})
    for fmt in ("posit8", "nf4"):
        yield Case(f"round_to {fmt}", rounding(fmt), {})
    for fmt in ("e4m3fn", "e2m1fn", "int8"):
        yield Case(f"encode {fmt}", jitted(lambda x, _, fmt=fmt: formats.encode(x, fmt)), {CACHED: 3.5})
        yield Case(f"decode {fmt}", of_codes(lambda codes, fmt=fmt: formats.decode(codes, fmt), fmt), {})
    for fmt, bits in (("e2m1fn", 4), ("e3m2fn", 6)):
        yield Case(f"pack {bits} bits", of_codes(lambda codes, bits=bits: formats.pack(codes, bits), fmt), {})
    for fmt in ("mxfp4", "mxfp8"):
        yield Case(f"fake_quant {fmt}", blocks(fmt), {LARGE: 1.4})
        yield Case(f"fake_quant {fmt} stochastic", blocks(fmt, rounding="stochastic"), {})
    for fmt in ("nvfp4", "nf4@1x64"):
        yield Case(f"fake_quant {fmt}", blocks(fmt), {})
    yield from peers()


def peers() -> Iterator[Case]:
    for fmt in ("e4m3fn", "e5m2", "e2m1fn", "float16"):
        dtype = formats.parse(fmt).dtype
        yield Case(f"XLA {fmt} and back", jitted(lambda x, _, d=dtype: x.astype(d).astype(jnp.float32)), {})
    for name in ("float8_e4m3fn", "float4_e2m1fn"):
        dtype = np.dtype(getattr(ml_dtypes, name))
        yield Case(f"ml_dtypes {name} and back", on_host(lambda x, d=dtype: x.astype(d).astype(np.float32)), {})
    if util.find_spec("gfloat"):
        yield Case("gfloat e4m3fn", _gfloat, {})
    if util.find_spec("pychop"):
        yield Case("pychop (4, 3)", lambda x, _: _pychop(x, rmode=1), {})
        yield Case("pychop (4, 3) stochastic", lambda x, _: _pychop(x, rmode=5), {})


def on_host(function: Callable) -> Callable:
    def build(x, _):
        host = np.asarray(x)
        return lambda: function(host)

    return build


def _gfloat(x, key):
    from gfloat import RoundMode, round_ndarray
    from gfloat.formats import format_info_ocp_e4m3

    return jitted(lambda x, _: round_ndarray(format_info_ocp_e4m3, x, RoundMode.TiesToEven, True))(x, key)


def _pychop(x, rmode):
    from pychop.jx.lightchop import LightChop_

    chop = LightChop_(4, 3, rmode=rmode)
    return lambda: chop(x)


def measure(function: Callable, base: Callable, elements: int, seconds: float) -> dict[str, float]:
    repeats = max(1, (1 << 22) // elements)
    times = paired(lambda: timed(function, repeats), lambda: timed(base, repeats), seconds, least=5)
    ours, theirs = times[:, 0], times[:, 1]
    cpu, wall = np.median(ours, axis=0) * 1e9 / elements
    cpu_ratio, wall_ratio = np.median(ours / theirs, axis=0)
    return {"cpu_ns": cpu, "wall_ns": wall, "cpu": cpu_ratio, "wall": wall_ratio, "pairs": len(times)}


def page_faults(function: Callable) -> int:
    """Of a call: the median of some, since the heap grows at first."""
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(15):
        jax.block_until_ready(function())
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return int(np.median(np.diff(counts)))


def rows(case: Case, inputs: dict[int, jax.Array], seconds: float) -> Iterator[dict[str, float]]:
    for elements, x in inputs.items():
        key = jax.random.key(1)
        row = measure(case.build(x, key), one_pass(x, key), elements, seconds)
        yield row | {"elements": elements, "goal": case.goals.get(elements)}


def cells(row: dict[str, float]) -> str:
    goal = f"≤{row['goal']:.2f}" if row["goal"] else ""
    return f"{row['cpu_ns']:9.3f} {row['cpu']:7.2f} {row['wall']:6.2f} {goal:>6s}"


def main() -> None:
    options = command_line(__doc__, seconds=1.0).parse_args()
    keep_freed_memory()
    inputs = {size: jax.random.normal(jax.random.key(0), (size // 1024, 1024)) for size in (LARGE, CACHED)}
    say_where(*PEERS)
    faults = ", ".join(f"{page_faults(one_pass(x, None))} at {size}" for size, x in inputs.items())
    print(f"ratios to x * 1.0000001, medians of pairs; page faults of a call: {faults}")
    head = f"{'cpu ns':>9s} {'cpu':>7s} {'wall':>6s} {'goal':>6s}"
    print(f"{'':34s} {'16M elements':>31s}  {'512k elements':>31s}\n{'':34s} {head}  {head}")
    table = {}
    for case in cases():
        if options.only not in case.name:
            continue
        try:
            table[case.name] = list(rows(case, inputs, options.seconds))
        except Exception as error:  # a peer that fails is a row of the table, not the end of it
            print(f"{case.name:34s} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}")
            continue
        print(f"{case.name:34s} {'  '.join(map(cells, table[case.name]))}", flush=True)
    write_table(options.json, table)


if __name__ == "__main__":
    main()
