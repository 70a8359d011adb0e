"""Quantizer: a value that says what happens to an operand, checked when it is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.formats import Rounding, parse
from lowprec.quantizers import (
    EXACT,
    REUSE,
    AbsMax,
    Clip,
    Eden,
    FourOverSix,
    Hadamard,
    Quantizer,
    RootMeanSquare,
    fake_quant,
)


def test_names_become_values_so_that_equal_quantizers_are_equal():
    by_name, by_value = (
        Quantizer("nvfp4", rounding="stochastic"),
        Quantizer(parse("nvfp4"), rounding=Rounding("stochastic")),
    )
    assert by_name == by_value and hash(by_name) == hash(by_value)
    assert Quantizer(EXACT.format) == EXACT


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8@row", "e4m3fn@16x16", "e4m3fn", "int4"])
def test_rounding_an_operand_is_fake_quantization(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32)
    q, key = Quantizer(name, rounding="stochastic"), jax.random.key(3)
    values = jax.jit(lambda x, key: q.round(x, 0, key).values)(x, key)
    np.testing.assert_array_equal(values, fake_quant(x, name, axis=0, rounding="stochastic", key=key))


def test_what_needs_a_key_says_so():
    assert Quantizer("nvfp4", rounding="stochastic").stochastic
    assert Quantizer("nvfp4", Hadamard(16, "random")).stochastic
    assert Quantizer("nvfp4", correction=Eden()).stochastic
    assert not Quantizer("nvfp4", Hadamard(16, "fixed")).stochastic
    assert not EXACT.stochastic and EXACT.exact
    assert not REUSE.exact and not Quantizer("int8").exact


@pytest.mark.parametrize(
    "quantizer,text",
    [
        (EXACT, "as it is"),
        (REUSE, "reuse"),
        (Quantizer("int8@row"), "int8@row"),
        (Quantizer("nvfp4", rounding="stochastic"), "e2m1fn@1x16/e4m3fn.tensor, stochastic"),
        (
            Quantizer("nvfp4", Hadamard(16, "fixed"), scale=FourOverSix()),
            "e2m1fn@1x16/e4m3fn.tensor, fixed signs · H16, absmax on 6 or 4",
        ),
        (
            Quantizer("int4_midrise@row", Hadamard(128), scale=RootMeanSquare(2.514005), estimator=Clip(0.5)),
            "int4_midrise@row, H128, 2.514 · rms, gradient clip + 0.5",
        ),
        (
            Quantizer("nvfp4", scale=AbsMax(limit=255.99), correction=Eden(128), source="requantize"),
            "e2m1fn@1x16/e4m3fn.tensor, absmax, block scale ≤ 255.99, eden over 128, from the forward values",
        ),
    ],
)
def test_it_can_be_read(quantizer, text):
    assert str(quantizer) == text


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"format": "nvpf4"}, "did you mean nvfp4"),
        ({"format": "int8", "rounding": "stochastc"}, "did you mean stochastic"),
        ({"format": "int8", "source": "forward"}, "original, requantize or reuse, not 'forward'"),
        ({"rounding": "stochastic"}, "an operand without a format is left as it is"),
        ({"rotation": Hadamard(16)}, "an operand without a format is left as it is"),
        ({"format": "int8", "source": "reuse"}, "a reused operand is taken as it is"),
        ({"format": "mxfp4", "correction": Eden()}, "narrow float scales"),
    ],
)
def test_contradictions_are_refused_when_it_is_made(arguments, message):
    with pytest.raises(UsageError, match=message):
        Quantizer(**arguments)
