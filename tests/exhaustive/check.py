"""All 2^32 float32 numbers: every way we round and encode them, against the native casts of XLA.

    python tests/exhaustive/check.py [--formats e4m3fn e5m2] [--state FILE]

A chunk is every 512th pattern, so the first one already spans the line: it holds all bfloat16 numbers. The state is
written after each chunk; the same command goes on from there, unless the sources of `lowprec.formats` have changed.
Exit status: 0 no fault so far, 1 some (the first ones are printed, and kept in the state), 2 bad usage,
130 interrupted.
"""

import argparse
import functools
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lowprec
from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats import Rounding, elements
from lowprec.training.run_directory import read_json, write_json

FORMATS = ("e4m3fn", "e5m2", "e2m1fn", "bfloat16", "float16")
MAGNITUDE, INFINITY, NAN = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC00000)
CULPRITS, RECORDED = 5, 100  # patterns of a chunk; lines of a format


def bits_of(x: jax.Array) -> jax.Array:
    """The patterns of float32 values, all NaN alike."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits & MAGNITUDE > INFINITY, NAN, bits)


def views(x: jax.Array, name: str) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What each of our functions gives for float32 x, and what the native cast says; uint32 patterns or codes.

    The cast never saturates. NaN has the canonical code; where the format has none (XLA gives -0), it stays a NaN and
    has code 0.
    """
    fmt = formats.parse(name)
    unsigned = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}[fmt.bits]
    native = lax.bitcast_convert_type(x.astype(fmt.dtype), unsigned).astype(jnp.uint32)
    # Looked up, since XLA may take a cast to a narrow float and back for nothing at all.
    codes = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    values = codes.view(fmt.dtype).astype(np.float32).view(np.uint32)
    value = jnp.asarray(np.where(values & MAGNITUDE > INFINITY, NAN, values))[native]
    is_nan = bits_of(x) == NAN
    value = jnp.where(is_nan, NAN, value)
    code = jnp.where(value == NAN, np.uint32(fmt.nan_code or 0), native)
    largest = bits_of(jnp.copysign(jnp.float32(fmt.max), x))
    saturated = jnp.where((value & MAGNITUDE > largest & MAGNITUDE) & ~is_nan, largest, value)
    # With the exponent of a scale, here 2^0, the integer kernel rounds to nearest too.
    kernel = elements.round_elements(x, fmt, Rounding(), saturate=False, exponent=jnp.int32(0))
    return {
        "round_to": (bits_of(formats.round_to(x, name, saturate=False)), value),
        "round_to, saturating": (bits_of(formats.round_to(x, name)), saturated),
        "integer kernel": (bits_of(kernel), value),
        "encode": (formats.encode(x, name, saturate=False).astype(jnp.uint32), code),
    }


def chunk_checker(name: str, chunk_bits: int) -> Callable[[int], list[dict[str, str]]]:
    """A function of the number of a chunk: what our functions get wrong at its first faulty patterns."""
    stride = np.uint32(1 << (32 - chunk_bits))

    @jax.jit
    def compare(patterns):
        return views(lax.bitcast_convert_type(patterns, jnp.float32), name)

    @jax.jit
    def faulty(chunk):
        pairs = compare(lax.iota(jnp.uint32, 1 << chunk_bits) * stride + chunk).values()
        return functools.reduce(jnp.logical_or, (got != expected for got, expected in pairs))

    def check(chunk: int) -> list[dict[str, str]]:
        found = np.flatnonzero(faulty(np.uint32(chunk)))[:CULPRITS]
        if not found.size:
            return []
        patterns = found.astype(np.uint32) * stride + np.uint32(chunk)
        return [
            {"view": view, "x": hexadecimal(x), "expected": hexadecimal(right), "got": hexadecimal(wrong)}
            for view, (got, expected) in compare(patterns).items()
            for x, wrong, right in zip(patterns, got, expected, strict=True)
            if wrong != right
        ]

    return check


def hexadecimal(bits: Any) -> str:
    return f"{int(bits):#010x}"


def provenance(chunk_bits: int) -> dict[str, Any]:
    """What the results in a state are about; with anything else the check starts again."""
    digest = hashlib.sha256()
    for path in sorted(Path(formats.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    versions = {"lowprec": lowprec.__version__, "jax": jax.__version__}
    return versions | {"formats_sha256": digest.hexdigest(), "chunk_bits": chunk_bits}


def load_state(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    state = read_json(path)
    if state is not None and not {"about", "formats"} <= set(state):
        raise UsageError(f"{path} is not the state of an exhaustive check; it is left as it is")
    if state is not None and state["about"] == about:
        return state
    if state is not None:
        print("the sources, a version or the chunks are not those of the state: starting again")
    return {"about": about, "formats": {}}


def run(names: list[str], path: Path, chunk_bits: int, limit: int | None) -> int:
    """Checks up to `limit` chunks of each format; returns how many culprits the state holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = load_state(path, provenance(chunk_bits))
    total = 1 << (32 - chunk_bits)
    ends = {}
    for name in names:
        done = state["formats"].setdefault(name, {"chunks": 0, "culprits": []})["chunks"]
        ends[name] = total if limit is None else min(done + limit, total)
    remaining = sum(end - state["formats"][name]["chunks"] for name, end in ends.items())
    start, checked = time.perf_counter(), 0
    for name in names:
        record, check = state["formats"][name], chunk_checker(name, chunk_bits)
        for chunk in range(record["chunks"], ends[name]):
            culprits = check(chunk)[: RECORDED - len(record["culprits"])]
            for culprit in culprits:
                print(f"\r{describe(culprit)}")
            record["culprits"] += culprits
            record["chunks"], checked = chunk + 1, checked + 1
            write_json(path, state)
            left = (time.perf_counter() - start) / checked * (remaining - checked)
            print(f"\r{name}: {chunk + 1} of {total} chunks, {left:.0f} s left   ", end="", flush=True)
        print(f"\r{name}: {record['chunks']} of {total} chunks, {verdict(record)}            ")
    return sum(len(state["formats"][name]["culprits"]) for name in names)


def verdict(record: dict[str, Any]) -> str:
    return f"wrong: {describe(record['culprits'][0])}" if record["culprits"] else "no fault"


def describe(culprit: dict[str, str]) -> str:
    return "{view} of {x} gives {got}, not {expected}".format(**culprit)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, metavar="NAME")
    parser.add_argument("--state", type=Path, default=Path("runs/exhaustive.json"))
    parser.add_argument("--limit", type=int, help="chunks of each format in this call")
    parser.add_argument("--chunk-bits", type=int, default=23, help="2^this patterns a chunk")
    options = parser.parse_args(arguments)
    try:
        return 1 if run(options.formats, options.state, options.chunk_bits, options.limit) else 0
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
