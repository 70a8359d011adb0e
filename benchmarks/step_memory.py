"""Where the memory of one training step of a Llama goes, all of it trained or only some of its tensors.

    python -m benchmarks.step_memory [--recipe qas_int8] [--train 'head/.*' …] [--layers 8 --width 256 --batch 8 …]

Adam, one microbatch, layers scanned; the memory is what XLA allocates on this machine. Nothing is run.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from lowprec import models
from lowprec.analysis.memory import MemoryReport, memory_report
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.optim.sparse_update import Selection
from lowprec.training.tasks import NEXT_TOKEN

VOCABULARY = 64


def step_memory(
    config: ModelConfig, *, tokens: tuple[int, int], recipe: str = "f32", patterns: tuple[str, ...] = (".*",)
) -> MemoryReport:
    """Of a step that trains what the patterns match.

    Args:
      tokens: (batch, positions).
    """
    model = linen.quantize(models.build(config, VOCABULARY), recipe)
    selection, optimizer = Selection(patterns), optax.adam(1e-3)
    key = jax.random.key(0)
    windows = jax.ShapeDtypeStruct((tokens[0], tokens[1] + 1), jnp.int32)
    variables = jax.eval_shape(model.init, {"params": key, "quant": key}, jax.ShapeDtypeStruct(tokens, jnp.int32))
    params, rest = variables["params"], {name: tree for name, tree in variables.items() if name != "params"}
    trained = jax.eval_shape(lambda params: selection.split(params)[0], params)
    moments = jax.eval_shape(optimizer.init, trained)

    def loss(trained, params, rest, windows):
        given = {**rest, "params": selection.join(trained, params)}
        return NEXT_TOKEN.loss(model, given, windows, key)[0]

    def step(state, rest, windows):
        params, moments = state
        trained, frozen = selection.split(params)
        updates, moments = optimizer.update(jax.grad(loss)(trained, frozen, rest, windows), moments)
        return selection.join(optax.apply_updates(trained, updates), params), moments

    compiled = jax.jit(step, donate_argnums=0).lower((params, moments), rest, windows).compile()
    return memory_report(
        compiled,
        loss=loss,
        trained=trained,
        others=(params, rest, windows),
        parts={"parameters": params, "optimizer state": moments},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="f32")
    parser.add_argument("--train", nargs="*", default=["final_norm/.*", "head/.*"], help="patterns of what is trained")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    config = ModelConfig(layers=options.layers, width=options.width, heads=options.heads, mlp_width=3 * options.width)
    for patterns in ((".*",), tuple(options.train)):
        tokens = (options.batch, options.seq_len)
        print(f"{options.recipe}, trained: {', '.join(patterns)}")
        print(step_memory(config, tokens=tokens, recipe=options.recipe, patterns=patterns).table(), flush=True)


if __name__ == "__main__":
    main()
