"""What a training step frees on a CPU is there for the next one."""

import subprocess
import sys

import pytest

from lowprec.training.host_memory import keep_freed_memory

# As a step with 64 MB of temporary buffers. Prints how many pages the system had to clear after the first.
STEPS = """
import resource, sys
from lowprec.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: bytearray(b"x") * 2**26
step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def page_faults(mode):
    run = subprocess.run([sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc's malloc")
def test_pages_are_cleared_once():
    assert page_faults("keep") < page_faults("as_it_is") / 10
