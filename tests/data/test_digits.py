"""The digits are scikit-learn's."""

import sys

import numpy as np
import pytest

from lowprec.data import DataConfig, load_images
from lowprec.errors import UsageError


def test_the_images_are_those_of_scikit_learn(tmp_path):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    for _ in range(2):  # prepared, then read
        data = load_images(DataConfig("digits", data_dir=str(tmp_path)))
        assert data.train_images.shape == (1500, 8, 8, 1)
        assert data.eval_images.shape == (297, 8, 8, 1)
        assert data.train_images.dtype == np.uint8
        assert data.classes == 10
        images = np.concatenate([data.train_images, data.eval_images])
        np.testing.assert_array_equal(images[..., 0], digits.images)
        labels = np.concatenate([data.train_labels, data.eval_labels])
        np.testing.assert_array_equal(labels, digits.target)


def test_without_scikit_learn_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"lowprec\[digits\]"):
        load_images(DataConfig("digits", data_dir=str(tmp_path)))


def test_an_unknown_image_set_is_named(tmp_path):
    with pytest.raises(UsageError, match="unknown data set 'digit'; did you mean digits"):
        load_images(DataConfig("digit", data_dir=str(tmp_path)))
