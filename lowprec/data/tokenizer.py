"""From bytes to token numbers and back."""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowprec.errors import UsageError

SEPARATOR = b"\0"
MAX_VOCAB = 2**16


class Tokenizer(Protocol):
    """What every tokenizer offers: decode(encode(text)) == text for any bytes.

    A NUL byte is always a token of its own: documents joined by NUL encode to their tokens, NUL's between.
    """

    @property
    def name(self) -> str:
        """As in DataConfig.tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 … vocab_size-1."""

    @property
    def sha256(self) -> str:
        """Of all that encode depends on."""

    def encode(self, text: bytes) -> np.ndarray:
        """uint8 (vocab_size ≤ 256) or uint16 tokens, 1-D."""

    def decode(self, tokens: np.ndarray) -> bytes:
        """The text of any integer tokens, 1-D."""


@dataclass(frozen=True)
class ByteTokenizer:
    """A byte is a token."""

    name: str = "byte"
    vocab_size: int = 256
    sha256: str = "byte"

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> bytes:
        return np.asarray(tokens).astype(np.uint8).tobytes()


def bpe_vocab(name: str) -> int | None:
    """Vocabulary of a tokenizer's name: None for "byte", 2048 for "bpe2048".

    Raises:
      UsageError: for any other name.
    """
    if name == "byte":
        return None
    match = re.fullmatch(r"bpe([0-9]{1,9})", name)
    if not match:
        raise UsageError(f"unknown tokenizer {name!r}; choose byte, or bpe<vocab> such as bpe2048 (data.tokenizer)")
    vocab = int(match[1])
    if not 256 < vocab <= MAX_VOCAB:
        raise UsageError(f"tokenizer {name!r}: the vocabulary is 257 … {MAX_VOCAB}, the first 256 are the bytes")
    return vocab
