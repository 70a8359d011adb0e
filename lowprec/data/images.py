"""Small labelled images, for models that see."""

import numpy as np

from lowprec.data.catalog import open_offline
from lowprec.data.config import data_root
from lowprec.errors import unknown

IMAGE_SETS = ("digits",)


def load_images(name: str, *, data_dir: str = "") -> dict[str, np.ndarray]:
    """All images of a set, prepared offline if need be.

    Args:
      name: "digits": 1 500 + 297 images of 8×8 pixels with values 0 … 16, 10 classes (needs scikit-learn).
      data_dir: as in DataConfig.
    Returns:
      train_images, validation_images: uint8 [n, height, width, channels];
      train_labels, validation_labels: int32 [n].
    Raises:
      UsageError: unknown name; scikit-learn missing.
    """
    if name not in IMAGE_SETS:
        raise unknown("image set", name, IMAGE_SETS)
    builder = open_offline(name, "", data_root(data_dir))
    arrays = {}
    for split in ("train", "validation"):
        examples = list(builder.as_data_source(split=split))
        arrays[f"{split}_images"] = np.stack([example["image"] for example in examples])
        arrays[f"{split}_labels"] = np.array([example["label"] for example in examples], np.int32)
    return arrays
