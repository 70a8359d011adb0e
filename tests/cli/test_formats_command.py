"""`lowprec formats`: the list, everything about one format, and several compared."""

import re

import ml_dtypes
import numpy as np
import pytest
from matplotlib.image import imread

from lowprec import formats

NATIVE = {
    name: formats.parse(name).dtype
    for name in formats.names()
    if formats.parse(name).bits <= 8 and formats.parse(name).dtype is not None and "@" not in str(formats.parse(name))
}
SIX_BITS = {"e3m2fn": ml_dtypes.float6_e3m2fn, "e2m3fn": ml_dtypes.float6_e2m3fn}


def codes_in(output):
    """{code: meaning} of the table that closes a page."""
    return {int(code, 16): meaning for code, meaning in re.findall(r"0x(\w+) (\S+)", output.partition("\n\n")[2])}


def numbers(meanings):
    return np.array([np.nan if text == "unused" else float(text) for text in meanings])


def assert_picture(path):
    pixels = imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 500
    assert 0.001 < np.mean(pixels[..., :3].min(axis=-1) < 0.9) < 0.5  # some ink, not a black square


def test_every_format_has_a_row_with_its_numbers(lowprec, cells):
    status, output, _ = lowprec("formats")
    rows = cells(output)
    assert status == 0 and [row["format"] for row in rows] == list(formats.names())
    by_name = {row["format"]: row for row in rows}
    assert (by_name["e4m3fn"]["max"], by_name["e4m3fn"]["special values"]) == ("448", "nan 0x7f")
    assert by_name["posit8"]["special values"] == "nan 0x80"
    assert by_name["nvfp4"]["bits/value"] == "4.5"
    assert by_name["mxfp4"]["bits/value"] == "4.25"
    for row in rows:
        assert float(row["max"]) == pytest.approx(formats.parse(row["format"]).max, rel=1e-5)


@pytest.mark.parametrize("name", [*formats.names(), "e3m2fn@1x32/e8m0.ceil", "fx8.4", "int4@row", "int4_symmetric"])
def test_every_format_has_its_page_with_all_values(lowprec, name):
    status, output, _ = lowprec("formats", name)
    assert status == 0 and output.splitlines()[0].split()[1] == name
    element = formats.element_of(name)
    codes = codes_in(output)
    if element.bits > 8:
        assert not codes
        return
    assert list(codes) == list(range(2**element.bits))
    shown = numbers(codes.values())
    np.testing.assert_allclose(np.unique(shown[np.isfinite(shown)]), formats.value_table(name), rtol=1e-7)


@pytest.mark.parametrize("name", [*NATIVE, *SIX_BITS])
def test_the_codes_are_those_of_ml_dtypes(lowprec, name):
    """Integers are two's complement; float codes, NaN and infinity among them, mean what ml_dtypes decodes."""
    shown = numbers(codes_in(lowprec("formats", name)[1]).values())
    dtype = np.dtype(SIX_BITS.get(name) or NATIVE[name])
    bits = formats.parse(name).bits
    codes = np.arange(2**bits, dtype=np.uint8)
    if dtype.kind in "iu" or "int" in dtype.name:
        codes = codes.astype(np.int16)
        expected = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes) if "uint" not in dtype.name else codes
    else:
        expected = codes.view(dtype).astype(np.float64)
    np.testing.assert_allclose(shown, expected, rtol=1e-7)
    assert np.array_equal(np.signbit(shown), np.signbit(expected)) or np.isnan(expected).any()


def test_codes_that_mean_nothing_are_said_to_be_unused(lowprec):
    unused = lambda name: [code for code, text in codes_in(lowprec("formats", name)[1]).items() if text == "unused"]
    assert (unused("int4_symmetric"), unused("ternary"), unused("nf4"), unused("e2m1fn")) == ([8], [3], [], [])
    assert codes_in(lowprec("formats", "posit8")[1])[0x80] == "nan"  # NaR


def test_a_page_tells_the_layout(lowprec):
    _, output, _ = lowprec("formats", "nvfp4")
    words = " ".join(output.split())
    assert "name nvfp4 = e2m1fn@1x16/e4m3fn.tensor" in words and "bits per value 4.5" in words
    assert "layout 1 sign, 2 exponent, 1 mantissa bias 1 max 6 = 1.5 · 2^2" in words
    assert "scale e4m3fn, times one float32 scale of the tensor" in words


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "e4m3fn",
            "ulp at 1 (epsilon) 0.125 = 1 · 2^-3 ulp at max 32 = 1 · 2^5 finite values 253 overflow beyond 464 =",
        ),
        ("e5m2", "ulp at max 8192 = 1 · 2^13 finite values 247 overflow from 61440 ="),
        ("float16", "ulp at max 32 = 1 · 2^5 finite values 63,487 overflow from 65520 ="),
        ("tf32", "ulp at 1 (epsilon) 0.000976562 = 1 · 2^-10"),
        ("e2m1fn", "ulp at max 2 = 1 · 2^1 finite values 15 overflow none: every cast saturates"),
        ("int8", "finite values 256 overflow none"),
        ("posit8", "ulp at 1 (epsilon) 0.125 = 1 · 2^-3"),
        ("fx8.8", "ulp at 1 (epsilon) none"),
    ],
)
def test_a_page_tells_precision_and_range(lowprec, name, said):
    assert said in " ".join(lowprec("formats", name)[1].split())


@pytest.mark.parametrize("name", ["e4m3fn", "nf4", "bfloat16", "nvfp4", "e8m0fnu", "ternary"])
def test_a_number_line_is_drawn(lowprec, tmp_path, name):
    status, output, _ = lowprec("formats", name, f"--plot={tmp_path / 'new' / 'line.png'}")
    assert status == 0 and output.endswith("line.png\n")
    assert_picture(tmp_path / "new" / "line.png")


def test_formats_are_compared(lowprec, cells, tmp_path):
    picture = tmp_path / "errors.png"
    # An option between the names is no obstacle.
    arguments = ("formats", "compare", "mxfp4", "--size=64", "nvfp4", "e4m3fn", f"--output={picture}")
    status, output, _ = lowprec(*arguments)
    rows = cells(output)
    assert status == 0
    assert [row["format"] for row in rows[:4]] == ["mxfp4", "nvfp4", "e4m3fn", "e4m3fn@tensor"]
    assert len(rows) == 16 and {row["data"] for row in rows} >= {"Gaussian", "Laplace"}
    for row in rows:
        assert float(row["SQNR dB"]) == pytest.approx(-10 * np.log10(float(row["relative MSE"])), abs=0.03)
    assert_picture(picture)
    assert lowprec(*arguments)[1] == output
    assert lowprec(*arguments, "--seed=1")[1] != output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "two formats at least"),
        (["compare", "nvfp4"], "two formats at least"),
        (["compare", "nvfp4", "mxfp5"], "unknown format 'mxfp5'; did you mean mxfp"),
        (["compare", "nvfp4", "uint4"], "uint4 has no negative values"),
        (["compare", "nvfp4", "mxfp4", "--size=0"], "one row of 1024 values at least, not 0"),
        (["compare", "nvfp4", "mxfp4", "--seed=-1"], "not negative"),
        (["compare", "nvfp4", "mxfp4", "--plot=x.png"], "--plot has no meaning here"),
        (["compare", "nvfp4", "mxfp4", "--sise=3"], "unknown argument '--sise=3'"),
        (["nvfp4", "--size=3"], "--size has no meaning here"),
        (["--plot=x.png"], "--plot has no meaning here"),
        (["tf32", "--plot=x.png"], "tf32 has 19 bits"),
        (["nvfp4", "--plot=x.doc"], "x.doc: a picture ends in"),
    ],
)
def test_bad_usage_says_what_would_be_valid(lowprec, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, output, errors = lowprec("formats", *arguments)
    assert status == 2 and output == "" and message in errors
    assert not list(tmp_path.iterdir())
