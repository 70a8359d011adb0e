"""Step time and memory of recipes, as ratios to the same step in float32.

    python -m benchmarks.step_time [--only nvfp4] [--batch 1024 --width 512 --layers 4 --seconds 3] [--json FILE]

The model is `layers` × Dense(width) with ReLU between, mean squared error, plain SGD, one jitted step (gradient and
update). Each variant runs in turn with float32, step by step, so that other load on the machine hits both; the figure
to quote is the ratio of process CPU time per step ("cpu"). Peers are measured beside ours when they are installed.
"""

import functools
from collections.abc import Callable, Iterator
from importlib import util

from benchmarks.options import command_line, say_where, write_table
from lowprec.analysis.bench.recipe_steps import MLP, Step, batch, measure, quantized_models


def variants(width: int, layers: int) -> Iterator[tuple[str, Callable]]:
    """Names and makers of models; a model has init and apply."""
    for name, make in quantized_models(width, layers):
        yield f"lowprec {name}", make
    if util.find_spec("qwix"):
        yield from _qwix(MLP(width, layers))
    if util.find_spec("aqt"):
        yield from _aqt(width, layers)


def _qwix(plain):
    import qwix

    def model(**rule):
        return qwix.quantize_model(plain, qwix.QtProvider([qwix.QtRule(module_path=".*", **rule)]))

    both = lambda qtype: {"weight_qtype": qtype, "act_qtype": qtype}
    yield "qwix int8 forward", functools.partial(model, **both("int8"))
    yield "qwix fp8 e4m3 forward", functools.partial(model, **both("float8_e4m3fn"))
    yield "qwix fp8 e4m3/e5m2", functools.partial(model, **both("float8_e4m3fn"), bwd_qtype="float8_e5m2")
    yield "qwix nvfp4 forward, one level", functools.partial(model, **both("nvfp4"), tile_size=16)
    noise = {"bwd_stochastic_rounding": "uniform", "channelwise_noise_axes": (0, 1)}
    yield "qwix int8, full noise", functools.partial(model, **both("int8"), bwd_qtype="int8", **noise)


def _aqt(width, layers):
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax.aqt_flax import AqtDotGeneral

    def model(make):
        return MLP(width, layers, functools.partial(AqtDotGeneral, make()))

    def hybrid():
        made = config.set_bits(config.config_v4(), "e4m3", "e4m3", "e5m2", "e4m3", "e5m2", "e4m3")
        config.set_stochastic_rounding(made, True, False, "jax.uniform")  # after set_bits, which undoes it
        return made

    forward = lambda: config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    full = lambda: config.fully_quantized(fwd_bits=8, bwd_bits=8, use_fwd_quant=True)
    yield "aqt int8 forward", functools.partial(model, forward)
    yield "aqt int8 fully quantized, stochastic", functools.partial(model, full)
    yield "aqt fp8 e4m3/e5m2 stochastic", functools.partial(model, hybrid)


def main() -> None:
    parser = command_line(__doc__, seconds=3.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    x, y = batch(options.batch, options.width)
    base = Step(MLP(options.width, options.layers), x, y)
    say_where("jax", "flax", "qwix", "aqtp")
    print(
        f"{options.layers} x Dense({options.width}), batch {options.batch}: ratios to float32, medians of paired steps"
    )
    print(f"{'':44s} {'cpu':>6s} {'wall':>6s} {'memory':>7s} {'compile':>8s} {'steps':>6s}")
    rows = {}
    for name, make in variants(options.width, options.layers):
        if options.only not in name:
            continue
        try:
            row = measure(Step(make(), x, y), base, options.seconds)
        except Exception as error:  # a peer that fails is a row of the table, not the end of it
            print(f"{name:44s} failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        rows[name] = row
        ratios = f"{row['cpu']:6.2f} {row['wall']:6.2f} {row['memory']:7.2f}"
        print(f"{name:44s} {ratios} {row['compile_s']:7.1f}s {row['steps']:6d}", flush=True)
    write_table(options.json, rows)


if __name__ == "__main__":
    main()
