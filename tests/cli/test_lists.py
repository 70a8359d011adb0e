"""`lowprec formats` and `lowprec recipes`: everything that is registered, and everything about one."""

import numpy as np
import pytest

from lowprec import formats, recipes


def test_every_format_has_a_row_with_its_numbers(lowprec, cells):
    status, output, _ = lowprec("formats")
    rows = cells(output)
    assert status == 0 and [row["format"] for row in rows] == list(formats.names())
    by_name = {row["format"]: row for row in rows}
    assert (by_name["e4m3fn"]["max"], by_name["e4m3fn"]["special values"]) == ("448", "nan 0x7f")
    assert by_name["nvfp4"]["bits/value"] == "4.5"
    assert by_name["mxfp4"]["bits/value"] == "4.25"
    for row in rows:
        assert float(row["max"]) == pytest.approx(formats.parse(row["format"]).max, rel=1e-5)


@pytest.mark.parametrize("name", [*formats.names(), "e3m2fn@1x32/e8m0.ceil", "fx8.4", "int4@row"])
def test_every_format_has_its_page(lowprec, name):
    status, output, _ = lowprec("formats", name)
    assert status == 0
    fmt = formats.parse(name)
    element = formats.element_of(fmt)
    assert output.splitlines()[0].split()[1] == name
    if element.bits > 8:
        assert "finite values" not in output
        return
    shown = output.split("finite values\n")[1].removeprefix("the negative ones mirror these:\n")
    values = formats.value_table(element)
    found = np.array([float(text) for text in shown.split()])
    expected = values if len(found) == len(values) else values[values >= 0]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_a_page_tells_the_layout(lowprec):
    _, output, _ = lowprec("formats", "nvfp4")
    words = " ".join(output.split())
    assert "name nvfp4 = e2m1fn@1x16/e4m3fn.tensor" in words and "bits per value 4.5" in words
    assert "layout 1 sign, 2 exponent, 1 mantissa bias 1 max 6 = 1.5 · 2^2" in words
    assert "scale e4m3fn, times one float32 scale of the tensor" in words


def test_every_recipe_is_listed_and_described(lowprec):
    status, output, _ = lowprec("recipes")
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()] == list(recipes.names())
    for name in recipes.names():
        assert lowprec("recipes", name)[1].strip() == recipes.get(name).describe().strip()


def test_a_short_form_is_described_too(lowprec):
    status, output, _ = lowprec("recipes", "fwd=int4@row dgrad=int8@row(stochastic)")
    assert status == 0 and "stochastic" in output and "int4@row" in output
