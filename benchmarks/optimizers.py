"""Time of an optimizer's step, as the ratio to optax.adamw in float32, with the bytes of its state and of its step.

    python -m benchmarks.optimizers [--only adam4] [--millions 50 --seconds 10] [--json FILE]

Parameters are those of a Llama of 512 channels with 32000 tokens, and as many layers as make up the number; gradients
are noise, the same in each step. Each variant runs in turn with optax.adamw, step by step, so that other load on the
machine hits both; the figure to quote is the ratio of process CPU time per step ("cpu"). torchao is measured beside
ours when it is installed.
"""

import time
from collections.abc import Callable, Iterator
from importlib import util
from typing import Any

import jax
import numpy as np

from benchmarks.options import command_line, say_where, write_table
from lowprec.analysis.bench.interleaved import Times, timed
from lowprec.analysis.bench.optimizer_steps import base_step, draw, measure, our_steps


class TorchStep:
    """That of a torch optimizer, on the CPU."""

    def __init__(self, make: Callable, params: Any):
        import torch

        weights = [torch.nn.Parameter(torch.from_numpy(np.array(leaf))) for leaf in jax.tree.leaves(params)]
        for weight in weights:
            weight.grad = torch.randn_like(weight) * 1e-3
        self.optimizer = make(weights)
        start = time.perf_counter()
        self.optimizer.step()
        self.compile_seconds, self.init_seconds = time.perf_counter() - start, float("nan")
        self.state_bytes = self.temporary_bytes = float("nan")

    def run(self) -> Times:
        """One step."""
        return timed(self.optimizer.step)


def variants(params: Any, grads: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and makers of steps."""
    yield from our_steps(params, grads)
    if util.find_spec("torchao"):
        from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

        for make in (AdamW8bit, AdamW4bit, AdamWFp8):
            yield f"torchao {make.__name__}", lambda make=make: TorchStep(make, params)


def main() -> None:
    parser = command_line(__doc__, seconds=10.0)
    parser.add_argument("--millions", type=float, default=50.0, help="of parameters")
    options = parser.parse_args()
    params, grads = draw(options.millions)
    count = sum(leaf.size for leaf in params.values())
    base = base_step(params, grads)
    say_where("jax", "optax", "torchao")
    print(f"{count / 1e6:.1f} million parameters: ratios to optax.adamw in float32, medians of paired steps")
    head = f"{'':24s} {'cpu':>6s} {'wall':>6s} {'cpu ms':>8s} {'state B/p':>9s}"
    print(f"{head} {'temp MB':>8s} {'init':>6s} {'compile':>8s}")
    rows = {}
    for name, make in variants(params, grads):
        if options.only not in name:
            continue
        row = rows[name] = measure(make(), base, options.seconds)
        print(
            f"{name:24s} {row['cpu']:6.2f} {row['wall']:6.2f} {row['cpu_ms']:8.1f} {row['state_bytes'] / count:9.4f} "
            f"{row['temporary_bytes'] / 1e6:8.1f} {row['init_s']:5.2f}s {row['compile_s']:7.1f}s",
            flush=True,
        )
    write_table(options.json, rows)


if __name__ == "__main__":
    main()
