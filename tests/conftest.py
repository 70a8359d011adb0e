"""One CPU device; what one process of the test run has compiled is kept for the others, and small programs are not
optimized where neither bits nor errors of arithmetic are the question."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Workers and the programs that tests start inherit these. Many tests compile the same tiny models; the machine code is
# the same, wherever it comes from. What compiles faster than it is read stays out.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_MADE_HERE = _CACHE not in os.environ
if _MADE_HERE:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="lowprec-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# LLVM's optimizations take half of the time of programs this small. They stay in the rooms below, whose tests compare
# the numbers of compiled programs with those of others, and with those of the same program step by step.
UNOPTIMIZED = {"analysis", "cli", "data", "models", "nn", "sweeps", "training"}


def pytest_configure(config):
    config.addinivalue_line("markers", "optimized: compiled as a user's programs are, whatever its directory")
    config.addinivalue_line("markers", "unoptimized: compiled without LLVM's optimizations, whatever its directory")


def _unoptimized(item) -> bool:
    mark = item.get_closest_marker("optimized") or item.get_closest_marker("unoptimized")
    room = item.path.relative_to(Path(__file__).parent).parts[0]
    return mark.name == "unoptimized" if mark else room in UNOPTIMIZED


def _optimize(wanted: bool) -> None:
    import jax  # Not above: it reads the environment, also that of tests/multidevice.

    if wanted and jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not wanted)


def pytest_collectstart():
    _optimize(False)  # what modules make when they are imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    _optimize(not _unoptimized(item))


def pytest_unconfigure(config):
    if _MADE_HERE:
        shutil.rmtree(os.environ[_CACHE], ignore_errors=True)
