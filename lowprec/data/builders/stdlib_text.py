"""stdlib_text: the running Python's standard-library sources, split by file."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from lowprec.data.builders.offline import OfflineBuilder
from lowprec.data.stdlib import Corpus, read_corpus
from lowprec.errors import UsageError


@dataclasses.dataclass(eq=False)
class StdlibConfig(tfds.core.BuilderConfig):
    corpus: Corpus = dataclasses.field(default_factory=read_corpus)


class StdlibText(OfflineBuilder):
    """One example per file, {"path", "text"}, sorted by path: 548 files, 10.5 MB for Python 3.12.

    The config is named after the Python version and the hash of all files: a set that was prepared from
    another Python, or before a file changed, has another directory and is never taken for this one.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        corpus = self.builder_config.corpus
        return tfds.core.DatasetInfo(
            builder=self,
            description="Sources of the Python standard library, without tests.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
            disable_shuffling=True,
            license="Python Software Foundation License",
            metadata=tfds.core.MetadataDict(
                python=corpus.python,
                sha256=corpus.sha256,
                text_sha256={name: _text_sha256(corpus, name) for name in ("train", "validation")},
            ),
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "validation")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index, document in enumerate(self.builder_config.corpus.split(split)):
            yield index, {"path": document.path, "text": document.text}


def _text_sha256(corpus: Corpus, split: str) -> str:
    return hashlib.sha256(b"\0".join(document.text for document in corpus.split(split))).hexdigest()


def make(options: str, data_dir: Path, corpus: Corpus | None = None) -> StdlibText:
    """The builder for the sources of this Python, or for another corpus. It takes no options."""
    if options:
        raise UsageError(f"stdlib_text takes no options, but was given {options!r}: data.name=stdlib_text")
    corpus = corpus or read_corpus()
    return StdlibText(
        data_dir=data_dir, file_format="array_record", config=StdlibConfig(name=corpus.name, corpus=corpus)
    )
