"""Best scales on Gaussian data, against published constants and a brute-force search."""

import numpy as np
import pytest

from lowprec import formats
from lowprec.quantizers import gaussian_error, optimal_clip

# Lloyd-Max theory for equally spaced levels (QuEST, arXiv 2502.05003, table 1, for 1 to 5 bits) and exact integrals.
CLIPS = {
    "int1_midrise": (0.797885, 0.36338),
    "ternary": (1.224006, 0.190174),
    "int2_midrise": (1.49353, 0.118846),
    "int3_midrise": (2.051068, 0.0374397),
    "int4_midrise": (2.514005, 0.0115429),
    "int5_midrise": (2.916151, 0.00349521),
    "int6_midrise": (3.277985, 0.00104005),
    "int7_midrise": (3.611097, 0.000304333),
    "int8_midrise": (3.922205, 8.76862e-05),
    "int4_symmetric": (2.473879, 0.0128894),
    "int8_symmetric": (3.920501, 8.8308e-05),
    "e2m1fn": (2.922475, 0.0126849),
    "e3m0fn": (4.19362, 0.037745),
    "e2m3fn": (3.747541, 0.000829147),
    "e3m2fn": (4.541759, 0.00276611),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_clip_and_its_error_are_the_published_ones(name):
    clip, error = CLIPS[name]
    assert optimal_clip(name) == pytest.approx(clip, abs=1e-5)
    assert gaussian_error(name, optimal_clip(name) / formats.parse(name).max) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m2fn", "e2m1fn", "nf4", "posit8", "de8"])
def test_no_scale_on_a_fine_grid_is_better(name):
    largest = formats.parse(name).max
    errors = [gaussian_error(name, clip / largest) for clip in np.geomspace(0.6, 15.9, 3000)]
    assert gaussian_error(name, optimal_clip(name) / largest) <= min(errors) + 1e-12


def test_the_integral_is_the_error_of_rounding():
    random = np.random.default_rng(0)
    x = random.normal(size=1 << 18).astype(np.float32)
    scale = optimal_clip("e2m1fn") / 6
    squares = (np.asarray(formats.round_to(x / np.float32(scale), "e2m1fn"), np.float64) * scale - x) ** 2
    assert abs(squares.mean() - gaussian_error("e2m1fn", scale)) < 5 * squares.std() / np.sqrt(x.size)  # 6e-7


def test_wide_formats_are_refused():
    with pytest.raises(ValueError, match="12 bits"):
        optimal_clip("float16")
