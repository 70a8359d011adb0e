"""Every code of every named format of up to 16 bits, and every P3109 name."""

import numpy as np
import pytest

from lowprec import formats
from lowprec.formats import FloatFormat, IntFormat, TableFormat

ELEMENTS = sorted({str(formats.element_of(name)) for name in formats.names() if formats.element_of(name).bits <= 16})


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_decodes_and_encodes_to_itself(name):
    fmt = formats.parse(name)
    codes = np.arange(1 << fmt.bits, dtype=formats.elements.code_dtype(fmt.bits))
    if isinstance(fmt, TableFormat):
        places = (codes.astype(int) - fmt.first_code) % (1 << fmt.bits)
        codes = codes[(places < len(fmt.values)) | (codes == fmt.nan_code)]
    if isinstance(fmt, IntFormat) and fmt.symmetric:
        codes = codes[codes != 1 << (fmt.bits - 1)]
    values = np.asarray(formats.decode(codes, fmt))
    expected = codes
    if isinstance(fmt, FloatFormat) and fmt.nan_code is not None:  # one NaN for all
        expected = np.where(np.isnan(values), fmt.nan_code, codes)
    np.testing.assert_array_equal(formats.encode(values, fmt, saturate=False), expected)
    finite = np.unique(values[np.isfinite(values)])
    np.testing.assert_array_equal(finite, np.unique(formats.value_table(fmt).astype(np.float32)))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("p3109_k8p4f", "e4m3fnuz"), ("p3109_k8p3f", "e5m2fnuz"), ("p3109_k8p4e", "e4m3_p3109e"),
        ("p3109_k8p4se", "e4m3_p3109e"), ("p3109_k8p4ue", "e5m3_p3109ue"), ("p3109_k3p1f", "e2m0_p3109f"),
    ],
)  # fmt: skip
def test_p3109_names_by_width_and_precision(name, same):
    assert formats.parse(name) == formats.parse(same)


def test_p3109_limits():
    """IEEE P3109 interim report, and gfloat's table."""
    largest = {"k8p3e": 49152, "k8p3f": 57344, "k8p4e": 224, "k8p4f": 240, "k8p5e": 15, "k8p5f": 15.5}
    largest |= {"k6p3e": 12, "k6p3f": 14, "k6p4e": 3.5, "k6p4f": 3.75, "k4p2e": 2, "k4p2f": 3}
    for name, value in largest.items():
        assert formats.parse(f"p3109_{name}").max == value, name
    with pytest.raises(ValueError, match="p3109_k8p9f"):
        formats.parse("p3109_k8p9f")
