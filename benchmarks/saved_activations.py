"""Bytes that the backward pass of a Llama needs, by how activations are saved and where.

    python -m benchmarks.saved_activations [--only fp8] [--layers 8 --width 256 --batch 8 --seq-len 256] [--json FILE]

"residuals": the bytes of what the forward pass hands to the backward pass, as autodiff lists it, parameters and state
left out. "temporary": `memory_analysis().temp_size_in_bytes` of the compiled gradient of the whole model, layers
scanned. Both as ratios to the plain float32 model.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp

from lowprec import models
from lowprec.analysis.memory import saved_bytes
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.ops import GemmRule
from lowprec.ops.saved import Exact, Policy, Recompute, RunningUint8
from lowprec.recipes import EMBEDDINGS_AND_HEAD, LayerRule, Recipe, SavedRule
from lowprec.recipes.library.saved import ATTENTION, FP8_GROUPS, GATES, NORMS
from lowprec.recipes.recipe import ATTENTION_PRODUCTS

POLICIES: dict[str, Policy] = {
    "exact": Exact(),
    "fp8": FP8_GROUPS,
    "mesa": RunningUint8(),
    "recompute": Recompute(),
}
KINDS = {"norms": NORMS, "gates": GATES, "attention": ATTENTION}
PLACES = ("products", *KINDS, "all")
VOCABULARY = 64


def recipe(policy: Policy, place: str) -> Recipe:
    """Everything exact, the activations of a place saved by a policy."""
    products = GemmRule(saved=policy if place in ("products", "all") else None)
    kinds = KINDS if place == "all" else {place: KINDS[place]} if place in KINDS else {}
    rules = (EMBEDDINGS_AND_HEAD, ATTENTION_PRODUCTS, LayerRule(".*", products))
    return Recipe("measured", rules, saved=tuple(SavedRule(pattern, policy) for pattern in kinds.values()))


@dataclass(frozen=True)
class Bytes:
    """Of one gradient; see the top of this file."""

    residuals: int
    temporary: int


def measure(model, tokens: tuple[int, int]) -> Bytes:
    """Of the gradient of the mean squared logits, for the parameters, as XLA compiles it for this machine.

    Args:
      model: plain or quantized.
      tokens: (batch, positions).
    """
    inputs = jnp.zeros(tokens, jnp.int32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda: model.init({"params": key, "quant": key}, inputs))
    params, state = variables["params"], {name: tree for name, tree in variables.items() if name == "quant"}

    def loss(params, state, key):
        return jnp.mean(model.apply({"params": params, **state}, inputs, rngs={"quant": key}) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(params, state, key).compile()
    residuals = saved_bytes(loss, params, state, key)
    return Bytes(residuals, int(compiled.memory_analysis().temp_size_in_bytes))


def variants(only: str = "") -> Iterator[tuple[str, str, Recipe]]:
    for name, policy in POLICIES.items():
        for place in PLACES if name != "exact" else ("all",):
            if only in f"{name} {place}":
                yield name, place, recipe(policy, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the variants, e.g. 'mesa attention'")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="of activations")
    parser.add_argument("--json", help="write the table to this file too")
    options = parser.parse_args()
    config = ModelConfig(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        mlp_width=3 * options.width,
        dtype=options.dtype,
    )
    model, tokens = models.build(config, VOCABULARY), (options.batch, options.seq_len)
    plain = measure(model, tokens)
    print(f"{jax.default_backend()}, jax {jax.__version__}: {config}, tokens {tokens[0]} x {tokens[1]}")
    print(f"plain {options.dtype}: {plain.residuals:,} bytes of residuals, {plain.temporary:,} temporary")
    print(f"{'policy':10s} {'place':10s} {'residuals':>10s} {'temporary':>10s}   (ratios to plain)")
    rows = {}
    for policy, place, chosen in variants(options.only):
        found = measure(linen.quantize(model, chosen), tokens)
        rows[f"{policy} {place}"] = asdict(found)
        ratios = (found.residuals / plain.residuals, found.temporary / plain.temporary)
        print(f"{policy:10s} {place:10s} {ratios[0]:10.3f} {ratios[1]:10.3f}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"plain": asdict(plain), **rows}, file, indent=1)


if __name__ == "__main__":
    main()
