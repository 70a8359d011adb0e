"""What a run reads: the `data.*` keys of its config."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    """Which text, cut how; or, for models that see, which images.

    Attributes:
      name: stdlib_text | markov_text[/vocab64-order1-alpha1.5-seed0-size1048576] | any TFDS text set, e.g.
        lm1b, tiny_shakespeare, c4/en, c4/en:3.0.1. Of images: digits | any TFDS set with image and label, e.g. cifar10.
      tokenizer: "byte" (256 tokens) or "bpe<vocab>", e.g. "bpe2048", trained on the train split.
      seq_len: tokens that the model reads in one window.
      text_key: the feature of the set that holds the text.
      data_dir: where TFDS sets lie; "" is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      download: fetch and prepare a set that needs the network when it is missing.
      train_split, eval_split: TFDS split expressions, e.g. "train[:95%]".
      max_bytes: read at most so many bytes of each split; 0 reads all.
      shift: training images are moved by up to so many pixels in each direction, over a rim of the mean; 0: not.
      flip: whether training images are mirrored left to right, half of them.
    """

    name: str = "stdlib_text"
    tokenizer: str = "byte"
    seq_len: int = 128
    text_key: str = "text"
    data_dir: str = ""
    download: bool = False
    train_split: str = "train"
    eval_split: str = "validation"
    max_bytes: int = 0
    shift: int = 0
    flip: bool = False


def data_root(data_dir: str = "") -> Path:
    """The directory of all prepared sets: data_dir, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser().absolute()
