"""TFDS sets from elsewhere: read when prepared, fetched only when asked, never waited for in vain."""

import importlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from lowprec.data.quiet import quiet
from lowprec.errors import UsageError, unknown

PROBE_SECONDS = 10.0


def open_external(name: str, root: Path, *, download: bool, ours: Iterable[str]):
    """The builder of a prepared TFDS set, found on disk without running the code that made it.

    Args:
      name: "set", "set/config" or "set/config:version".
      ours: names to suggest besides TFDS's.
    Raises:
      UsageError: unknown name; not prepared and not to be fetched; no network; tools to prepare it missing.
    """
    base = _base_name(name, ours)
    with quiet():
        builder = _from_disk(name, root)
        known = builder is not None or base in _tfds_names()
    if builder is not None:
        return builder
    if not known:
        hint = f"nor is a set of that name prepared in {root}; TFDS's own: tensorflow.org/datasets/catalog"
        raise unknown("data set", name, {*ours, *_tfds_names()}, hint)
    if not download:
        raise UsageError(_how_to_get(name, base, root, ours))
    return _fetch(name, root)


def _base_name(name: str, ours: Iterable[str]) -> str:
    from tensorflow_datasets.core import naming

    try:
        parsed, _ = naming.parse_builder_name_kwargs(name)
    except ValueError:
        raise unknown("data set", name, {*ours, *_tfds_names()}, "form: set, set/config, set/config:1.0.0") from None
    if parsed.namespace:
        raise UsageError(
            f"data.name={name!r}: sets of the namespace {parsed.namespace!r} are looked up on the network at "
            "each use; prepare it as a TFDS set of its own and give that name"
        )
    return parsed.name


def _tfds_names() -> list[str]:
    import tensorflow_datasets as tfds

    # tfds imports its older builders group by group and stops, silently, at the first that needs tensorflow:
    # without this, c4, wiki40b and others would be unknown.
    for group in ("text", "text_simplification", "summarization", "translate", "question_answering"):
        try:
            importlib.import_module(f"tensorflow_datasets.{group}")
        except ImportError:
            continue
    # The community's list would be fetched from the network.
    return tfds.list_builders(with_community_datasets=False)


def _from_disk(name: str, root: Path):
    """The builder of the files below root, or None."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        return None
    except Exception as error:  # a broken info file raises whatever its parser raises
        raise UsageError(
            f"the prepared set {name!r} in {root} can't be read: {_first_line(error)}; remove it and prepare it again"
        ) from error


def _how_to_get(name: str, base: str, root: Path, ours: Iterable[str]) -> str:
    found = sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"{base}/**/dataset_info.json"))
    others = f" (but {', '.join(found)} is)" if found else ""
    return (
        f"data set {name!r} is not prepared in {root}{others}. To fetch and prepare it there (needs a network): "
        f'--config.data.download=True, or: python -c "{_prepare_code(name, root)}". Prepared elsewhere: '
        f"--config.data.data_dir=DIR or TFDS_DATA_DIR. Without a network: {', '.join(sorted(ours))}"
    )


def _prepare_code(name: str, root: Path) -> str:
    builder = f"tfds.builder('{name}', data_dir='{root}', file_format='array_record')"
    return f"import tensorflow_datasets as tfds; {builder}.download_and_prepare()"


def _fetch(name: str, root: Path):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except Exception as error:
        raise UsageError(f"data set {name!r}: {_first_line(error)}") from error
    _require_network(name, sorted(builder.url_infos or ()))
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever the set's own code raises: the request can't be served
        raise UsageError(
            f"data set {name!r} could not be prepared here: {type(error).__name__}: {_first_line(error)}. "
            f"Some sets need tensorflow or apache_beam to be prepared (not to be read): run this where they "
            f'are installed, and copy the directory: python -c "{_prepare_code(name, root)}"'
        ) from error
    return builder


def _require_network(name: str, urls: list[str]) -> None:
    """tfds retries an unreachable host for minutes: ask it once first."""
    if not urls:
        return
    answer: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(urls[0], method="HEAD")
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # the host answers: that is enough
        except Exception as error:
            answer.append(str(getattr(error, "reason", error)))
            return
        answer.append("")

    # In a thread, because looking up a host's name knows no timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * PROBE_SECONDS)
    reason = answer[0] if answer else f"no answer in {2 * PROBE_SECONDS:.0f} s"
    if reason:
        raise UsageError(
            f"data.download=True, but {urls[0]} of data set {name!r} is out of reach ({reason}); prepare the "
            "set where there is a network and copy it, or give its place: --config.data.data_dir=DIR"
        )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
