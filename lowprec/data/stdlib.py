"""The standard-library sources of the Python that is running: real text that every machine has."""

import fnmatch
import hashlib
import os
import platform
import sysconfig
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lowprec.errors import UsageError

# Tests and vendored or generated trees; idlelib, lib2to3 and ensurepip are absent from some distributions.
EXCLUDED_DIRECTORIES = frozenset(
    ["test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages", "__pycache__"]
)
# Written when this Python was built or installed: they name paths of that machine, not of the language.
EXCLUDED_FILES = ("_sysconfigdata*.py", "sitecustomize.py", "usercustomize.py", "config-*/*")

VALIDATION_SHARE = 20


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, with "/", and its bytes."""

    path: str
    text: bytes = field(repr=False)

    @property
    def split(self) -> str:
        """ "validation" for about one path in twenty, by a hash of the path alone: stable over versions."""
        digest = hashlib.sha256(self.path.encode()).digest()
        return "validation" if int.from_bytes(digest) % VALIDATION_SHARE == 0 else "train"


@dataclass(frozen=True)
class Corpus:
    """All documents, sorted by path."""

    documents: tuple[Document, ...] = field(repr=False)
    python: str

    @cached_property
    def sha256(self) -> str:
        """Of every path, split and text: the same hash means the same splits, byte for byte."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.path}\0{document.split}\0{len(document.text)}\0".encode())
            digest.update(document.text)
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """E.g. "py3.12.1-0f4c2a9b61d3": another Python, or another text, has another name."""
        return f"py{self.python}-{self.sha256[:12]}"

    def split(self, name: str) -> list[Document]:
        return [document for document in self.documents if document.split == name]


def read_corpus(root: str | os.PathLike | None = None) -> Corpus:
    """Reads the .py files below root (by default this Python's standard library), without tests.

    Raises:
      UsageError: if there are none: this Python was installed without its sources.
    """
    top = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    documents = []
    for directory, subdirectories, files in os.walk(top):
        subdirectories[:] = [name for name in subdirectories if name not in EXCLUDED_DIRECTORIES]
        for file in files:
            path = (Path(directory) / file).relative_to(top).as_posix()
            if file.endswith(".py") and not any(fnmatch.fnmatch(path, pattern) for pattern in EXCLUDED_FILES):
                documents.append(Document(path, (top / path).read_bytes()))
    splits = {document.split for document in documents}
    if splits != {"train", "validation"}:
        raise UsageError(
            f"data.name='stdlib_text': {len(documents)} Python sources in {top}: this Python comes without "
            "those of its standard library; use another, or data.name=markov_text, which needs nothing"
        )
    return Corpus(tuple(sorted(documents, key=lambda document: document.path)), platform.python_version())
