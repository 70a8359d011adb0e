"""digits: scikit-learn's 1 797 handwritten digits of 8×8 pixels, bundled with it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from lowprec.data.builders.offline import OfflineBuilder
from lowprec.errors import UsageError

TRAIN_EXAMPLES = 1500


class Digits(OfflineBuilder):
    """Features {"image": uint8 [8, 8, 1] in 0 … 16, "label": 0 … 9}; the last 297 are for validation.

    Source: UCI "Optical Recognition of Handwritten Digits", through sklearn.datasets.load_digits.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # A Tensor, not an Image: tfds encodes images through tensorflow.
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8×8 pixels, 17 grey levels.",
            features=tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)}),
            disable_shuffling=True,
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager):
        images, labels = _read()
        return {
            "train": self._generate_examples(images[:TRAIN_EXAMPLES], labels[:TRAIN_EXAMPLES]),
            "validation": self._generate_examples(images[TRAIN_EXAMPLES:], labels[TRAIN_EXAMPLES:]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": int(label)}


def _read() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed: pip install 'lowprec[digits]'"
        ) from error
    digits = load_digits()
    return digits.images.astype(np.uint8)[..., None], digits.target


def make(options: str, data_dir: Path) -> Digits:
    """The builder. It takes no options."""
    if options:
        raise UsageError(f"digits takes no options, but was given {options!r}")
    return Digits(data_dir=data_dir, file_format="array_record")
