"""Elements that are given as numbers: the same bits as the static format's, from one program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import formats
from lowprec.errors import UsageError
from lowprec.formats.types import IntFormat
from lowprec.quantizers import Clip, Quantizer
from lowprec.quantizers.traced_choice import GivenElements, format_numbers, from_numbers, with_element

ELEMENTS = ("int2", "int3", "int4", "int8", "int8_symmetric", "fx8.4", "e2m1fn", "e3m2fn", "e4m3fn", "e5m2", "e4m3fnuz")
BLOCKS = ("", "@row", "@tensor", "@1x16", "@16x16", "@1x16/e4m3fn.tensor", "@1x32/e8m0fnu.floor", "@1x32/e8m0fnu.even")


@pytest.fixture(scope="module")
def values():
    x = jax.random.normal(jax.random.key(0), (48, 64)) * jnp.exp(3 * jax.random.normal(jax.random.key(1), (48, 1)))
    # A block of zeros, subnormal values, and a value that stands out.
    return x.at[0].set(0.0).at[1].multiply(1e-38).at[2, 3].set(1e4)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("block", BLOCKS)
def test_given_elements_round_as_the_static_format_does(values, block, rounding):
    stand_in = with_element(formats.parse("int8" + block), IntFormat(8))
    given = Quantizer(stand_in, rounding=rounding, scale=GivenElements(0), estimator=Clip(0.5))
    key = jax.random.key(2)

    @jax.jit
    def by_numbers(x, numbers):
        rounded = given.round(x, -1, key, {"format0": numbers})
        return rounded.values, rounded.elements, given.estimator.factor(x, rounded)

    for element in ELEMENTS:
        static = Quantizer(element + block, rounding=rounding, estimator=Clip(0.5))

        def by_format(x, static=static):
            rounded = static.round(x, -1, key)
            return rounded.values, rounded.elements, static.estimator.factor(x, rounded)

        # A program a format: without LLVM's optimizations, from which bits do not come.
        expected = jax.jit(by_format, compiler_options={"xla_backend_optimization_level": 0})(values)
        for ours, theirs in zip(by_numbers(values, format_numbers(element)), expected, strict=True):
            np.testing.assert_array_equal(*(np.asarray(a).view(np.uint8) for a in (ours, theirs)), err_msg=element)
    assert by_numbers._cache_size() == 1


@pytest.mark.parametrize("name", ELEMENTS)
def test_numbers_are_the_traced_format(name):
    again, traced = from_numbers(jnp.asarray(format_numbers(name))), formats.traced(name)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), again, replace(traced, block=None, scale=None)))


def test_tables_have_no_numbers():
    with pytest.raises(UsageError, match="cannot be traced"):
        format_numbers("nf4")
