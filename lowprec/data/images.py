"""Labelled images: the digits, made offline, and any prepared TFDS set that has an image and a label."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.data.catalog import TEXT_SETS, open_offline
from lowprec.data.config import DataConfig, data_root
from lowprec.data.quiet import quiet
from lowprec.data.source import only_tensorflow_reads
from lowprec.errors import UsageError

IMAGE_SETS = ("digits",)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set of images in memory.

    Attributes:
      name: set, config and version.
      classes: labels are 0 … classes - 1.
      train_images, eval_images: uint8 [n, height, width, channels].
      train_labels, eval_labels: int32 [n].
      mean, std: float32 [channels], of the training images' pixels.
      sha256: of images and labels of both splits.
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    eval_images: np.ndarray
    eval_labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    sha256: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    def normalized(self, images: np.ndarray) -> np.ndarray:
        """float32, of mean 0 and deviation 1 in each channel over the training images."""
        return (images.astype(np.float32) - self.mean) / self.std


def load_images(config: DataConfig) -> ImageData:
    """Opens the set, preparing what is missing, and reads it whole into memory.

    Args:
      config: name is "digits" (1500 + 297 images of 8×8 pixels with values 0 … 16, 10 classes; needs scikit-learn) or
        a TFDS set with the features "image" and "label", all images of one size, e.g. "cifar10" or "mnist".
    Raises:
      UsageError: unknown or missing set; other features; images of several sizes; scikit-learn missing.
    """
    root = data_root(config.data_dir)
    base, _, options = config.name.partition("/")
    if base in TEXT_SETS:
        raise UsageError(
            f"data.name={config.name!r} is a set of text; models of images read {', '.join(IMAGE_SETS)} or a TFDS set "
            "with image and label, e.g. cifar10"
        )
    if base in IMAGE_SETS:
        builder = open_offline(base, options, root)
    else:
        from lowprec.data.external import open_external

        builder = open_external(config.name, root, download=config.download, ours=IMAGE_SETS)
    classes = _classes(builder)
    train_images, train_labels = _read(builder, config.train_split)
    eval_images, eval_labels = _read(builder, config.eval_split)
    if train_images.shape[1:] != eval_images.shape[1:]:
        raise UsageError(f"{builder.info.full_name}: images of two sizes, {train_images.shape[1:]} to train")
    return image_data(builder.info.full_name, classes, train_images, train_labels, eval_images, eval_labels)


def image_data(
    name: str,
    classes: int,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    eval_images: np.ndarray,
    eval_labels: np.ndarray,
) -> ImageData:
    """Arrays as `ImageData` has them, with their mean, deviation and hash."""
    arrays = (train_images, train_labels, eval_images, eval_labels)
    digest = hashlib.sha256(b"".join(hashlib.sha256(np.ascontiguousarray(array)).digest() for array in arrays))
    mean, std = _moments(train_images)
    return ImageData(name, classes, *arrays, mean=mean, std=std, sha256=digest.hexdigest())


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each channel, exactly: from how often each of the 256 values occurs."""
    values = np.arange(256, dtype=np.float64)
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    shares = np.stack([count / count.sum() for count in counts])
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    # A channel of one value stays 0.
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def _classes(builder: Any) -> int:
    features = builder.info.features
    missing = [name for name in ("image", "label") if name not in features]
    if missing or not hasattr(features["label"], "num_classes"):
        raise UsageError(
            f"{builder.info.full_name} is not a set of labelled images: it has the features {', '.join(features)}, "
            "not image and label; models of images (model.name) read such sets, those of text others"
        )
    return features["label"].num_classes


def _read(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with quiet():
            examples = list(builder.as_data_source(split=split))
    except NotImplementedError as error:
        raise only_tensorflow_reads(builder) from error
    except (ValueError, KeyError, AssertionError) as error:
        found = ", ".join(builder.info.splits)
        raise UsageError(
            f"no split {split!r} in {builder.info.full_name}; it has {found}: set --config.data.train_split and "
            "--config.data.eval_split"
        ) from error
    images = [np.asarray(example["image"]) for example in examples]
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or images[0].dtype != np.uint8 or images[0].ndim != 3:
        raise UsageError(
            f"{builder.info.full_name}, split {split!r}: {len(images)} images of {len(shapes)} sizes; needed are uint8 "
            "images [height, width, channels] of one size"
        )
    return np.stack(images), np.array([example["label"] for example in examples], np.int32)
