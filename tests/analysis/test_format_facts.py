"""What the pages of formats say: counts, spacings and the place of overflow, against the formats themselves."""

import ml_dtypes
import numpy as np
import pytest

from lowprec import formats
from lowprec.analysis.format_plots import relative_error
from lowprec.analysis.format_table import count_finite, overflow_threshold, ulp
from lowprec.formats import FloatFormat

ELEMENTS = [
    *(name for name in formats.names() if "@" not in str(formats.parse(name))),
    *("e3m2fn_nosubnormals", "e3m2_ieee_unsigned", "e0m3fn", "e4m0fn_nosubnormals", "e2m2_p3109e", "int3_midrise"),
]
FLOATS = [name for name in ELEMENTS if isinstance(formats.parse(name), FloatFormat)]


@pytest.mark.parametrize("name", [name for name in ELEMENTS if formats.parse(name).bits <= 16])
def test_finite_values_are_counted(name):
    assert count_finite(formats.parse(name)) == len(formats.value_table(name))


@pytest.mark.parametrize("name", [name for name in ELEMENTS if formats.parse(name).bits <= 16])
def test_an_ulp_is_the_distance_to_the_neighbour(name):
    fmt, values = formats.parse(name), formats.value_table(name)
    if fmt.max != values[-1] or np.log2(fmt.max) % 1 == 0:
        return  # below a power of two the neighbour is nearer
    assert ulp(fmt, fmt.max) == pytest.approx(values[-1] - values[-2], rel=1e-6)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e3m4"])
def test_epsilon_is_that_of_ml_dtypes(name):
    dtype = ml_dtypes.finfo(np.float16 if name == "float16" else getattr(ml_dtypes, name))
    element = formats.parse(name.removeprefix("float8_") if name == "float8_e4m3fn" else name)
    assert ulp(element, 1.0) == float(dtype.eps)


@pytest.mark.parametrize("name", FLOATS)
def test_casts_overflow_where_the_page_says(name):
    fmt = formats.parse(name)
    cast = lambda x: float(formats.round_to(np.float32(x), fmt, saturate=False))
    threshold = overflow_threshold(fmt)
    if threshold is None:
        assert cast(4 * fmt.max) == fmt.max
        return
    if threshold[0] > float(np.finfo(np.float32).max):
        return
    magnitude, inclusive = np.float32(threshold[0]), threshold[1]
    assert cast(np.nextafter(magnitude, np.float32(0))) == fmt.max
    assert np.isfinite(cast(magnitude)) != inclusive
    beyond = cast(np.nextafter(magnitude, np.float32(np.inf)))
    assert beyond == np.inf if fmt.has_inf else np.isnan(beyond)


def test_the_relative_error_is_half_an_ulp_at_most_between_smallest_normal_and_largest():
    fmt = formats.parse("e4m3fn")
    x, error = relative_error(fmt)
    normal = (x >= fmt.min_normal) & (x <= fmt.max)
    assert 0.9 / 17 < error[normal].max() <= 1 / 17  # halfway from 1 to 1.125
    assert error[x < fmt.min_subnormal / 2].min() == 1 and error[x > 1.5 * fmt.max].min() > 0.3
