"""From a DataConfig to tokens."""

import contextlib
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowprec.data.cache import cache_directory, cache_name, read_json, write_json
from lowprec.data.catalog import open_text
from lowprec.data.config import DataConfig, data_root
from lowprec.data.packing import PackedSplit, pack, text_chunks
from lowprec.data.source import TextSource, UnreadableSet
from lowprec.data.tokenizer import ByteTokenizer, Tokenizer, bpe_vocab
from lowprec.errors import UsageError


@dataclass(frozen=True, eq=False)
class TextData:
    """A tokenised data set, index-addressed.

    Attributes:
      name: set, config and version.
      vocab_size: tokens are 0 … vocab_size-1.
      train_tokens, eval_tokens: uint8 or uint16 [n], read-only.
      train_bytes, eval_bytes: length of the text that those tokens stand for.
      sha256: of the texts of both splits and of the tokenizer.
      entropy_per_byte: nats, where exactly known (markov_text): no model's loss per byte stays below it.
      tokenizer: encode and decode.
    """

    name: str
    vocab_size: int
    train_tokens: np.ndarray
    eval_tokens: np.ndarray
    train_bytes: int
    eval_bytes: int
    sha256: str
    entropy_per_byte: float | None
    tokenizer: Tokenizer

    def bits_per_byte(self, loss: float, *, split: str = "eval") -> float:
        """A mean loss in nats per token, as bits per byte: comparable between tokenizers.

        Args:
          split: "train" or "eval": their tokens differ in mean length.
        """
        tokens, size = {
            "train": (self.train_tokens.size, self.train_bytes),
            "eval": (self.eval_tokens.size, self.eval_bytes),
        }[split]
        return loss / math.log(2) * tokens / size


def load(config: DataConfig) -> TextData:
    """Opens the set, preparing what is missing, and tokenises it; from the second time on it only maps files.

    Raises:
      UsageError: anything in the config that can't be served; the message says what can.
    """
    vocab = bpe_vocab(config.tokenizer)
    if config.max_bytes < 0:
        raise UsageError(f"data.max_bytes is 0 (all) or a number of bytes, not {config.max_bytes}")
    root = data_root(config.data_dir)
    source = _open(config, root)
    try:
        return _load(config, source, root, vocab)
    except UnreadableSet:
        if not _is_ours(source):
            raise
    # Ours can be made again from what this machine has.
    _discard(source)
    return _load(config, _open(config, root), root, vocab)


def _open(config: DataConfig, root: Path) -> TextSource:
    return open_text(config.name, root, text_key=config.text_key, download=config.download)


def _load(config: DataConfig, source: TextSource, root: Path, vocab: int | None) -> TextData:
    directory = cache_directory(root)
    tokenizer = ByteTokenizer() if vocab is None else _bpe(config, source, directory, vocab)

    def packed(split: str) -> PackedSplit:
        return pack(source, split, tokenizer, directory, max_bytes=config.max_bytes)

    train, evaluation = packed(config.train_split), packed(config.eval_split)
    parts = (train.text_sha256, evaluation.text_sha256, tokenizer.name, tokenizer.sha256)
    return TextData(
        name=source.name,
        vocab_size=tokenizer.vocab_size,
        train_tokens=train.tokens,
        eval_tokens=evaluation.tokens,
        train_bytes=train.bytes,
        eval_bytes=evaluation.bytes,
        sha256=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        entropy_per_byte=source.entropy_per_byte,
        tokenizer=tokenizer,
    )


def _bpe(config: DataConfig, source: TextSource, directory: Path, vocab: int) -> Tokenizer:
    """The tokenizer trained on this text before, or one trained now."""
    from lowprec.data.bpe import MAX_TRAINING_BYTES, PIECES, BytePairTokenizer, train_bpe

    identity = {
        **source.identity(config.train_split),
        "tokenizer": config.tokenizer,
        "max_bytes": config.max_bytes,
        "training": [MAX_TRAINING_BYTES, PIECES],
    }
    path = directory / f"{cache_name(identity)}.{config.tokenizer}.json"
    stored = read_json(path) or {}
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        tokenizer = BytePairTokenizer(config.tokenizer, stored["definition"])
        if tokenizer.sha256 == stored["sha256"]:
            return tokenizer
    tokenizer = train_bpe(text_chunks(source.documents(config.train_split), config.max_bytes), vocab)
    write_json(path, {**identity, "definition": tokenizer.definition, "sha256": tokenizer.sha256})
    return tokenizer


def _is_ours(source: TextSource) -> bool:
    from lowprec.data.builders.offline import OfflineBuilder

    return isinstance(source.builder, OfflineBuilder)


def _discard(source: TextSource) -> None:
    from lowprec.data.builders.offline import discard

    discard(source.builder)
