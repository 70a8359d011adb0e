"""A split's text as one long row of tokens, made once and mapped into memory ever after."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowprec.data.cache import cache_name, read_json, write_json, written_whole
from lowprec.data.source import TextSource, UnreadableSet
from lowprec.data.tokenizer import SEPARATOR, Tokenizer
from lowprec.errors import UsageError

CHUNK_BYTES = 2**20
# Above this size a cached file is checked by its length alone: hashing it would cost more than a second.
VERIFY_BYTES = 2**30
LAYOUT = 1


@dataclass(frozen=True, eq=False)
class PackedSplit:
    """The tokens of one split.

    Attributes:
      tokens: uint8 or uint16 [n], read-only and memory-mapped: the documents in order, a NUL byte's token
        between them, none after the last.
      bytes: length of the text that the tokens stand for, separators included.
      text_sha256: of that text.
    """

    tokens: np.ndarray
    bytes: int
    text_sha256: str


def pack(source: TextSource, split: str, tokenizer: Tokenizer, directory: Path, *, max_bytes: int = 0) -> PackedSplit:
    """Reads, tokenises and stores the split, unless `directory` has it already; a damaged store is made anew.

    Args:
      max_bytes: the text is cut after so many bytes; 0 takes all.
    Raises:
      UsageError: no text; a set that can't be read.
    """
    identity = {
        **source.identity(split),
        "tokenizer": f"{tokenizer.name}-{tokenizer.sha256}",
        "max_bytes": max_bytes,
        "layout": LAYOUT,
    }
    path = directory / f"{cache_name(identity)}.tokens"
    packed = _load(path)
    if packed is None:
        _store(path, identity, text_chunks(source.documents(split), max_bytes), tokenizer)
        packed = _load(path)
    if packed is None:
        raise UsageError(f"the packed text {path} changes while it is read; is its disk full or failing?")
    if packed.bytes == 0:
        raise UsageError(f"split {split!r} of {source.name} has no text")
    expected = source.text_sha256(split)
    if expected and not max_bytes and packed.text_sha256 != expected:
        path.with_suffix(".json").unlink(missing_ok=True)
        raise UnreadableSet(
            f"{source.name} in {source.builder.data_path} is not the text it was made from ({split}: sha256 "
            f"{packed.text_sha256[:12]}…, not {expected[:12]}…); remove that directory and run again"
        )
    return packed


def text_chunks(documents: Iterable[bytes], max_bytes: int = 0) -> Iterator[bytes]:
    """The documents joined by NUL, in pieces of about 1 MiB that begin or end beside a separator.

    Args:
      max_bytes: the joined text is cut after so many bytes; 0 takes all.
    """
    gathered: list[bytes] = []
    size, left = 0, max_bytes or float("inf")
    for index, document in enumerate(documents):
        part = (SEPARATOR if index else b"") + document
        if len(part) >= left:
            gathered.append(part[: int(left)])
            break
        left -= len(part)
        gathered.append(part)
        size += len(part)
        if size >= CHUNK_BYTES:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


def _store(path: Path, identity: dict, chunks: Iterable[bytes], tokenizer: Tokenizer) -> None:
    text_digest, token_digest = hashlib.sha256(), hashlib.sha256()
    size = count = 0
    dtype = np.dtype(np.uint8 if tokenizer.vocab_size <= 256 else np.uint16).newbyteorder("<")
    with written_whole(path) as file:
        for chunk in chunks:
            tokens = tokenizer.encode(chunk).astype(dtype, copy=False).tobytes()
            file.write(tokens)
            text_digest.update(chunk)
            token_digest.update(tokens)
            size += len(chunk)
            count += len(tokens) // dtype.itemsize
    # Last: tokens without their description count as absent. Of two processes, both write the same.
    description = {
        **identity,
        "dtype": dtype.name,
        "tokens": count,
        "bytes": size,
        "text_sha256": text_digest.hexdigest(),
        "tokens_sha256": token_digest.hexdigest(),
    }
    write_json(path.with_suffix(".json"), description)


def _load(path: Path) -> PackedSplit | None:
    """The stored split, or None if it is absent or damaged."""
    described = read_json(path.with_suffix(".json"))
    try:
        if described is None:
            return None
        dtype, count = np.dtype(described["dtype"]).newbyteorder("<"), int(described["tokens"])
        if path.stat().st_size != count * dtype.itemsize:
            return None
        tokens = np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)
        if tokens.nbytes <= VERIFY_BYTES and hashlib.sha256(tokens).hexdigest() != described["tokens_sha256"]:
            return None
        return PackedSplit(tokens, int(described["bytes"]), str(described["text_sha256"]))
    except (KeyError, TypeError, ValueError, OSError):
        return None
