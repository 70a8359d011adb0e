"""Bits by layer, read from the lines of a run."""

import numpy as np
import pytest

from lowprec.analysis.trajectories import draw_trajectory, trajectory
from lowprec.errors import UsageError

LINES = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.5, "bits": {"a": 8, "b": 4}},
    {"step": 4, "loss": 2.0, "bits": {"a": 6}},
]


def test_each_layer_has_a_number_a_step():
    found = trajectory(LINES)
    np.testing.assert_array_equal(found.steps, [2, 4])
    np.testing.assert_array_equal(found.bits["a"], [8, 6])
    np.testing.assert_array_equal(found.bits["b"], [4, np.nan])
    np.testing.assert_array_equal(found.mean, [6, 6])


def test_a_run_without_a_controller_has_none():
    with pytest.raises(UsageError, match="no line has bits"):
        trajectory(LINES[:1])


def test_the_picture_is_written(tmp_path):
    draw_trajectory(trajectory(LINES), tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="a picture ends in"):
        draw_trajectory(trajectory(LINES), tmp_path / "bits.xyz")
