"""The shapes and dtypes that annotations promise, checked by beartype while the public functions run.

In a process of its own: the hook must be there before lowprec is imported.
"""

import os
import subprocess
import sys

PROGRAM = """
from jaxtyping import install_import_hook
with install_import_hook("lowprec", "beartype.beartype"):
    import lowprec
    from lowprec import formats, quantizers, recipes
    from lowprec.models import ladder
    from lowprec.nn import linen
import flax.linen as nn, jax, jax.numpy as jnp

key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (32, 64))
for name in formats.names():
    if formats.element_of(name).bits <= 16:
        codes = formats.encode(x, name)
        formats.decode(codes, name)
        formats.pack(codes, formats.element_of(name).bits)
for mode in (*formats.rounding.KINDS, "stochastic[4]"):
    for name in ("e4m3fn", "int4", "nf4", "posit8", "int4_midrise"):
        formats.round_to(x.astype(jnp.bfloat16), name, rounding=mode, key=key)
formats.round_to(x, formats.traced("e4m3fn"))
for name in ("mxfp4", "mxfp6_e3m2", "nvfp4", "int4@row", "e4m3fn@1x16/bf16", "posit8@tensor"):
    q = lowprec.quantize(x, name, rounding="stochastic", key=key)
    q.dequantize()
    jax.grad(lambda x: lowprec.fake_quant(x, name, gradient="clipped", cotangent="e5m2").sum())(x)
quantizers.learned_quant(x, quantizers.initial_scale(x, "int4@row"), "int4@row")
for rule in (quantizers.Percentile(), quantizers.LeastSquares(3), quantizers.RootMeanSquare(), quantizers.AbsMean()):
    quantizers.round_blocks(x, formats.parse("int4@1x32"), -1, rule=rule)
for name in recipes.names():
    layer = linen.quantize(nn.Dense(16, use_bias=False), recipes.get(name))

    def gradient(key, x):
        variables = layer.init({"params": key, "quant": key}, x) | {"taps": layer.tap_slots(x)}
        return jax.grad(lambda v: layer.apply(v, x, rngs={"quant": key}).sum())(variables)

    jax.eval_shape(gradient, key, x)  # traced: annotations are checked then
ladder.get("S0")
print("checked")
"""


def checked(program):
    # What is compiled here is not looked at.
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_public_functions_keep_to_their_annotations():
    run = checked(PROGRAM)
    assert run.stdout == "checked\n", run.stderr[-3000:]


def test_the_check_can_fail():
    wrong = PROGRAM.split("key, x =")[0] + "formats.pack(jnp.ones((4,), jnp.float32), 4)"
    run = checked(wrong)
    assert "TypeCheckError" in run.stderr
