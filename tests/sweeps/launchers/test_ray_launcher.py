"""Sweeps on Ray: whatever dies, the table is that of workers which nobody disturbs."""

import pytest
from launcher_runs import attempts, launch_and_kill, make_plan, order_for, results, running, stop_after

from lowprec.errors import UsageError
from lowprec.sweeps.launchers.ray import RayLauncher
from lowprec.sweeps.store import Store

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def no_accounts():
    """Local clusters need no token in the home directory, and nobody is told of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


LOCAL = RayLauncher(address="local", object_store_mb=80)


@pytest.mark.parametrize(("runs", "kills"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_killed_workers_change_nothing(runs, kills, undisturbed, tmp_path):
    plan, expected = undisturbed(runs)
    tally, said = launch_and_kill(LOCAL, plan, tmp_path, kills)
    assert (tally.done, tally.left, tally.failed) == (runs, 0, 0), said
    assert results(plan, tmp_path) == expected
    assert runs <= attempts(plan, tmp_path) <= runs + kills  # a kill may have come just after the end of a run
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_stopped_driver_lets_its_workers_save(undisturbed, tmp_path):
    plan, expected = undisturbed(4)
    order, said = order_for(plan, tmp_path), []
    stop_after(lambda: len(running(plan, tmp_path, steps=1)) == 2)
    tally = LOCAL.launch(order, workers=2, say=said.append)
    assert tally.left > 0 and any("SIGINT: workers save" in line for line in said)
    states = [Store(tmp_path).state(run) for run in plan.runs]
    assert "interrupted" in states and "running" not in states and "stale" not in states
    assert LOCAL.launch(order, workers=2, say=said.append).done == 4
    assert results(plan, tmp_path) == expected


@pytest.mark.slow
def test_killed_workers_change_nothing_on_two_nodes(undisturbed, tmp_path):
    from ray.cluster_utils import Cluster

    plan, expected = undisturbed(24)
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        tally, said = launch_and_kill(RayLauncher(address=cluster.address), plan, tmp_path, kills=3)
    finally:
        cluster.shutdown()
    assert (tally.done, tally.left) == (24, 0), said
    assert results(plan, tmp_path) == expected
    assert 24 <= attempts(plan, tmp_path) <= 24 + 3


def test_options_are_fields():
    launcher = RayLauncher.from_options({"num_cpus": "2", "resources.TPU": "4", "environment.JAX_PLATFORMS": "tpu"})
    assert launcher == RayLauncher(num_cpus=2.0, resources=(("TPU", 4.0),), environment=(("JAX_PLATFORMS", "tpu"),))
    hash(launcher)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cpu": "2"}, "unknown option of launcher ray 'num_cpu'; did you mean num_cpus"),
        ({"num_cpus": "two"}, "launcher.num_cpus is a number, not 'two'"),
        ({"retries": "1.5"}, "launcher.retries is a whole number, not '1.5'"),
        ({"resources": "4"}, "launcher.resources: it is given as launcher.resources.NAME=VALUE"),
        ({"num_gpus.TPU": "4"}, "launcher.num_gpus.TPU: it is given as launcher.num_gpus=VALUE"),
        ({"retries": "-1"}, "launcher.retries is at least 0, not -1"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(UsageError) as refused:
        RayLauncher.from_options(options)
    assert message in str(refused.value)


def test_workers_compute_what_the_driver_would(monkeypatch):
    """Flags that change bits come along; what places the driver does not."""
    for name, value in {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_ENABLE_X64": "0",
        "TFDS_DATA_DIR": "/sets",
        "JAX_PLATFORMS": "cuda",
        "LOWPREC_COORDINATOR": "here:1",
    }.items():
        monkeypatch.setenv(name, value)
    found = RayLauncher()._variables()
    assert found["XLA_FLAGS"] == "--xla_backend_optimization_level=0" and found["TFDS_DATA_DIR"] == "/sets"
    assert found["JAX_PLATFORMS"] == "cpu" and "LOWPREC_COORDINATOR" not in found
    assert "JAX_PLATFORMS" not in RayLauncher(num_gpus=1)._variables()
    assert "JAX_PLATFORMS" not in RayLauncher(resources=(("TPU", 4.0),))._variables()
    assert RayLauncher(environment=(("XLA_FLAGS", "--x"),))._variables()["XLA_FLAGS"] == "--x"


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    plan = make_plan(1, tmp_path)
    with pytest.raises(UsageError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        RayLauncher(address="127.0.0.1:1").launch(order_for(plan, tmp_path), workers=1, say=print)
