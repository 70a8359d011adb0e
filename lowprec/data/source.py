"""A prepared TFDS text set, read document by document in its own order."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowprec.data.quiet import quiet
from lowprec.errors import UsageError, unknown

RECORDS_AT_ONCE = 256


def only_tensorflow_reads(builder: Any) -> UsageError:
    """Of a set prepared in another format than array_record."""
    return UsageError(
        f"{builder.info.full_name} in {builder.data_path} is stored as {builder.info.file_format}, "
        "which only tensorflow reads; prepare it again with file_format='array_record'"
    )


@dataclass(frozen=True)
class TextSource:
    """A prepared set.

    Attributes:
      builder: the tfds builder, with its files on disk.
      text_key: the feature that holds the text.
    """

    builder: Any
    text_key: str

    @property
    def name(self) -> str:
        """Set, config and version, e.g. "stdlib_text/py3.12.1-0f4c2a9b61d3/1.0.0"."""
        return self.builder.info.full_name

    @property
    def entropy_per_byte(self) -> float | None:
        """Nats, where the set's metadata says it."""
        value = (self.builder.info.metadata or {}).get("entropy_per_byte")
        return None if value is None else float(value)

    def text_sha256(self, split: str) -> str | None:
        """Hash of the split's documents joined by NUL, where the set's metadata says it."""
        return (self.builder.info.metadata or {}).get("text_sha256", {}).get(split)

    def identity(self, split: str) -> dict:
        """What the split's text depends on: set, config, version, split, feature, sizes of the files."""
        splits = {
            name: [info.num_bytes, list(info.shard_lengths or ())] for name, info in self.builder.info.splits.items()
        }
        content = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
        return {"set": self.name, "split": split, "text_key": self.text_key, "content": content[:16]}

    def documents(self, split: str) -> Iterator[bytes]:
        """The documents of a split expression ("train", "train[:95%]"), always in the same order.

        Raises:
          UsageError: no such split or feature; a feature that is not text; a format without random access;
            files that can't be read.
        """
        records = self._open(split)
        for start in range(0, len(records), RECORDS_AT_ONCE):
            chosen = list(range(start, min(start + RECORDS_AT_ONCE, len(records))))
            try:
                examples = _read(records, chosen)
            except Exception as error:  # the C++ readers raise several types
                raise UnreadableSet(
                    f"the prepared set {self.name} in {self.builder.data_path} can't be read: {error}; "
                    "remove that directory and prepare the set again"
                ) from error
            for example in examples:
                yield _as_bytes(example[self.text_key], self.text_key)

    def _open(self, split: str):
        features = self.builder.info.features
        if self.text_key not in features:
            raise unknown(f"feature of {self.name} (data.text_key)", self.text_key, features)
        self._require_examples(split)
        try:
            with quiet():
                return self.builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise only_tensorflow_reads(self.builder) from error
        except Exception as error:
            raise UnreadableSet(
                f"the prepared set {self.name} in {self.builder.data_path} can't be opened: {error}; "
                "remove that directory and prepare the set again"
            ) from error

    def _require_examples(self, split: str) -> None:
        splits = self.builder.info.splits
        if not splits:  # only what tfds.testing.mock_data makes: there any split exists
            return
        try:
            found = splits[split].num_examples > 0
        except (ValueError, KeyError, AssertionError):
            found = False
        if not found:
            sizes = ", ".join(f"{name} ({info.num_examples} examples)" for name, info in splits.items())
            raise UsageError(
                f"no split {split!r} in {self.name}, or nothing in it; it has {sizes}: set --config.data.train_split "
                "and --config.data.eval_split (slices such as 'train[95%:]' work)"
            )


class UnreadableSet(UsageError):
    """The files of a prepared set are damaged."""


def _read(records, indices: list[int]) -> list:
    try:
        return records.__getitems__(indices)  # six times faster than one by one
    except (AttributeError, TypeError):  # lists, and what tfds.testing.mock_data gives, know single records only
        return [records[index] for index in indices]


def _as_bytes(value: object, key: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
        return value.tobytes()
    raise UsageError(f"feature {key!r} is {type(value).__name__}, not text; choose another data.text_key")
