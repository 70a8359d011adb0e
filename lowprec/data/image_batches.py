"""Batches of images: shuffled and augmented for training, fixed for evaluation; rows are normalized."""

import numpy as np

from lowprec.data.batches import TrainBatches, endless
from lowprec.data.images import ImageData
from lowprec.errors import UsageError


def augmented(image: np.ndarray, rng: np.random.Generator, *, shift: int, flip: bool) -> np.ndarray:
    """[H, W, C], moved by -shift … shift pixels along both axes, zeros moving in, and mirrored every second time.

    The same as a crop of the image with a rim of `shift` zeros (He et al., arXiv 1512.03385, §4.2).
    """
    height, width, _ = image.shape
    rim = np.zeros((height + 2 * shift, width + 2 * shift, image.shape[2]), image.dtype)
    rim[shift : shift + height, shift : shift + width] = image
    row, column, mirrored = rng.integers((2 * shift + 1, 2 * shift + 1, 2))
    crop = rim[row : row + height, column : column + width]
    return crop[:, ::-1] if flip and mirrored else crop


def train_batches(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    shift: int = 0,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """An endless iterator of {"image": float32 [batch_size / process_count, height, width, channels], "label": int32}.

    Order, shards and resuming as of `batches.train_batches`. What happens to an image depends on (seed, epoch, index)
    alone: not on the size of the batch nor on the number of processes.

    Args:
      shift, flip: see `augmented`; 0 and False leave the images as they are.
    Raises:
      UsageError: fewer images than a batch; a batch that the processes can't share evenly; a bad seed or shift.
    """
    size = len(data.train_images)
    if size < batch_size:
        raise UsageError(f"{data.name} has {size} training images, less than one batch: train.batch_size={batch_size}")
    if not 0 <= shift < min(data.shape[:2]):
        raise UsageError(f"data.shift is 0 … {min(data.shape[:2]) - 1} for images of {data.shape}, not {shift}")

    def example(position: int, index: int) -> dict[str, np.ndarray]:
        image = data.normalized(data.train_images[index])
        if shift or flip:
            rng = np.random.default_rng((seed, position // size, index))
            image = augmented(image, rng, shift=shift, flip=flip)
        return {"image": image, "label": data.train_labels[index]}

    return endless(
        range(size),
        example,
        identity={"data": data.sha256, "seed": seed, "batch_size": batch_size, "shift": shift, "flip": flip},
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
    )


def eval_batches(data: ImageData, *, batch_size: int, batches: int) -> list[dict[str, np.ndarray]]:
    """The same images at every call, spread evenly over the evaluation split, as they are.

    Returns:
      at most `batches` times {"image", "label", "weight": float32 [batch_size]}; of a split with fewer images, all of
      them. Rows that fill up the last batch are 0 with weight 0.
    Raises:
      UsageError: if no batch is asked for.
    """
    if batch_size < 1 or batches < 1:
        raise UsageError(f"evaluation needs a batch: {batches} batches of {batch_size} (eval.batches)")
    size = len(data.eval_images)
    count = min(size, batches * batch_size)
    chosen = np.arange(count) * size // count
    result = []
    for start in range(0, count, batch_size):
        rows = chosen[start : start + batch_size]
        image = np.zeros((batch_size, *data.shape), np.float32)
        label = np.zeros(batch_size, np.int32)
        image[: len(rows)] = data.normalized(data.eval_images[rows])
        label[: len(rows)] = data.eval_labels[rows]
        weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
        result.append({"image": image, "label": label, "weight": weight})
    return result
