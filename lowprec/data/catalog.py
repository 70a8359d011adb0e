"""The one door to every text set: ours, which prepare here, and any of TFDS."""

import importlib
from pathlib import Path

from lowprec.data.source import TextSource
from lowprec.errors import UsageError

TEXT_SETS = ("markov_text", "stdlib_text")


def names() -> tuple[str, ...]:
    """The text sets that need no network. Any TFDS name is valid too."""
    return TEXT_SETS


def open_text(name: str, root: Path, *, text_key: str = "text", download: bool = False) -> TextSource:
    """The prepared set, prepared now if it is ours, or if it is TFDS's and download is asked for.

    Args:
      name: as in DataConfig.name.
      root: the directory of all prepared sets.
      text_key: the feature that holds the text.
    Raises:
      UsageError: unknown name, missing set, wrong feature, or a set that this machine can't read.
    """
    base, _, options = name.partition("/")
    if base in TEXT_SETS:
        return TextSource(open_offline(base, options, root), text_key)
    if base == "digits":
        raise UsageError("data.name='digits' is a set of images, not of text: set model.name=resnet or vit to read it")
    from lowprec.data.external import open_external

    return TextSource(open_external(name, root, download=download, ours=TEXT_SETS), text_key)


def open_offline(base: str, options: str, root: Path):
    """The prepared builder of one of our own sets: stdlib_text, markov_text or digits."""
    from lowprec.data.builders.offline import prepared

    module = importlib.import_module(f"lowprec.data.builders.{base}")
    return prepared(lambda: module.make(options, root))
