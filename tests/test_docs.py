"""The examples of docs/differences.md run, and what they assert of lowprec and of other libraries is so."""

import importlib.metadata
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "differences.md"


def examples():
    """(heading, code) of each block."""
    heading = ""
    for match in re.finditer(r"^#+ ([^\n]*)$|^```python\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S):
        if match[2] is None:
            heading = match[1]
        else:
            yield pytest.param(match[2], id=heading)


def is_installed(name, version):
    try:
        return f"{importlib.metadata.version(name)}.".startswith(f"{version}.")
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("code", examples())
def test_an_example_holds(code):
    needed = re.match(r"# needs: (\S+) (\S+)\n", code)
    if needed and not is_installed(*needed.groups()):
        pytest.skip(" ".join(needed.groups()))
    assert "assert" in code
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
