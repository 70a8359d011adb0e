"""What sweeps on other launchers are compared with."""

import os

import pytest
from launcher_runs import make_plan, order_for, results

from lowprec.sweeps.launchers.local import LocalLauncher
from lowprec.sweeps.plan import Plan


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The same for all workers of one test run: what one has trained or compiled, no other has to."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "launchers"


@pytest.fixture(scope="module")
def undisturbed(shared):
    """undisturbed(runs): a plan, and the results of a local sweep of it that was left alone.

    Workers, those too, compile without LLVM's optimizations, which take most of the time of runs this small, and keep
    what they compile.
    """

    def make(runs: int) -> tuple[Plan, dict]:
        plan, root = make_plan(runs, shared / "data"), shared / "undisturbed"
        # What was asked for before is not trained again.
        assert LocalLauncher().launch(order_for(plan, root), workers=2, say=print).done == runs
        return plan, results(plan, root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield make
