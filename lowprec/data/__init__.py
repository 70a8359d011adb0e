"""Text and small images for training: TFDS sets without tensorflow, tokenised once, read through grain.

data = load(DataConfig("stdlib_text", tokenizer="bpe2048"))
for batch in train_batches(data, seq_len=128, batch_size=16, seed=0): ...   # {"tokens": int32 [16, 129]}
"""

from lowprec.data.batches import TrainBatches, eval_batches, train_batches
from lowprec.data.catalog import names
from lowprec.data.config import DataConfig
from lowprec.data.images import ImageData, load_images
from lowprec.data.text import TextData, load
from lowprec.data.tokenizer import Tokenizer

__all__ = [
    "DataConfig",
    "ImageData",
    "TextData",
    "Tokenizer",
    "TrainBatches",
    "eval_batches",
    "load",
    "load_images",
    "names",
    "train_batches",
]
