"""Small texts for the tests of lowprec.data; nothing here touches the user's data directory."""

import numpy as np
import pytest

from lowprec.data import DataConfig, TextData, load
from lowprec.data.tokenizer import ByteTokenizer


@pytest.fixture(autouse=True)
def no_data_directory_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default_data_dir"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_home"))


@pytest.fixture(scope="session")
def prepared_stdlib(tmp_path_factory) -> str:
    """A data directory in which stdlib_text is prepared."""
    directory = str(tmp_path_factory.mktemp("stdlib"))
    load(DataConfig("stdlib_text", data_dir=directory, max_bytes=1000))
    return directory


@pytest.fixture(scope="session")
def numbered():
    """numbered(windows, seq_len): data whose window i starts with token i·seq_len: every window is recognisable."""

    def make(windows: int, seq_len: int, sha256: str = "numbered") -> TextData:
        tokens = np.arange(windows * seq_len + 1, dtype=np.uint16)
        size = tokens.size
        return TextData("numbered/1.0.0", 2**16, tokens, tokens, size, size, sha256, None, ByteTokenizer())

    return make
