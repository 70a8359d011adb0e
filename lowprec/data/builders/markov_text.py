"""markov_text: a synthetic language with exactly known entropy, one long document per split."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from lowprec.data.builders.offline import OfflineBuilder
from lowprec.data.markov import Markov, parse_markov


@dataclasses.dataclass(eq=False)
class MarkovConfig(tfds.core.BuilderConfig):
    language: Markov = dataclasses.field(default_factory=Markov)


class MarkovText(OfflineBuilder):
    """Features {"text"}; metadata entropy_per_byte and unigram_entropy_per_byte in nats.

    One document, so that no separator disturbs the entropy. The config's name spells all parameters.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        language = self.builder_config.language
        return tfds.core.DatasetInfo(
            builder=self,
            description="Order-k Markov text with Zipf-distributed successors.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                entropy_per_byte=language.entropy,
                unigram_entropy_per_byte=language.unigram_entropy,
            ),
        )

    def _split_generators(self, dl_manager):
        size = self.builder_config.language.size
        return {
            "train": self._generate_examples(size, 1),
            "validation": self._generate_examples(size // 8, 2),
        }

    def _generate_examples(self, size: int, stream: int) -> Iterator[tuple[int, dict]]:
        yield 0, {"text": self.builder_config.language.sample(size, stream)}


def make(options: str, data_dir: Path) -> MarkovText:
    """The builder for e.g. "vocab16-order2-size100000"; "" is the default language."""
    language = parse_markov(options)
    return MarkovText(
        data_dir=data_dir,
        file_format="array_record",
        config=MarkovConfig(name=str(language), language=language),
    )
