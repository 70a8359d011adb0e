"""Byte-level byte-pair encoding, trained on the run's own text through the `tokenizers` package."""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lowprec.data.tokenizer import SEPARATOR
from lowprec.errors import UsageError

# Words with the blank before them, up to three digits, signs, runs of blanks: merges stay inside.
PIECES = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_TRAINING_BYTES = 2**25


@dataclass(frozen=True)
class BytePairTokenizer:
    """Trained merges over the 256 bytes.

    Bytes are handed to the package as the characters 0 … 255 (latin-1), so any bytes encode, and exactly.

    Attributes:
      name: "bpe<vocab>".
      definition: the package's JSON for the trained tokenizer.
    """

    name: str
    definition: str

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_of_token)

    @cached_property
    def _bytes_of_token(self) -> tuple[bytes, ...]:
        vocab = json.loads(self.definition)["model"]["vocab"]
        return tuple(piece.encode("latin-1") for piece, _ in sorted(vocab.items(), key=lambda item: item[1]))

    @cached_property
    def _encoder(self):
        return _package().Tokenizer.from_str(self.definition)

    def encode(self, text: bytes) -> np.ndarray:
        """uint16 [tokens]. Documents (between NULs) are encoded in parallel."""
        documents = [document.decode("latin-1") for document in text.split(SEPARATOR)]
        encodings = self._encoder.encode_batch_fast(documents, add_special_tokens=False)
        separator = np.array([self._bytes_of_token.index(SEPARATOR)], np.uint16)
        parts = [np.array(encoding.ids, np.uint16) for encoding in encodings]
        joined = itertools.chain.from_iterable((separator, part) for part in parts)
        return np.concatenate(list(joined)[1:])

    def decode(self, tokens: np.ndarray) -> bytes:
        return b"".join(self._bytes_of_token[token] for token in np.asarray(tokens).tolist())


def train_bpe(documents: Iterable[bytes], vocab: int) -> BytePairTokenizer:
    """Learns vocab - 256 merges on the documents; of a larger text, the first 32 MiB.

    The same documents give the same merges, byte for byte.

    Raises:
      UsageError: without the `tokenizers` package; if the text has too few repeated pairs for the vocabulary.
    """
    package = _package()
    encoder = package.Tokenizer(package.models.BPE())
    encoder.pre_tokenizer = package.pre_tokenizers.Split(package.Regex(PIECES), behavior="isolated")
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        initial_alphabet=[chr(byte) for byte in range(256)],
        show_progress=False,
    )
    encoder.train_from_iterator(_training_text(documents), trainer)
    learned = encoder.get_vocab_size()
    if learned < vocab:
        raise UsageError(
            f"tokenizer 'bpe{vocab}': the training text has pairs for only {learned} tokens; "
            f"choose bpe{learned} or less, or more text (data.max_bytes)"
        )
    return BytePairTokenizer(f"bpe{vocab}", encoder.to_str())


def _training_text(documents: Iterable[bytes]) -> Iterable[str]:
    left = MAX_TRAINING_BYTES
    for document in documents:
        for part in document[:left].split(SEPARATOR):
            yield part.decode("latin-1")
        left -= len(document)
        if left <= 0:
            return


def _package():
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(
            "data.tokenizer='bpe…' needs the tokenizers package: pip install 'lowprec[bpe]'; "
            "data.tokenizer=byte needs nothing"
        ) from error
    return tokenizers
