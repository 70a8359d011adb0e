"""Which arrays are split over which devices, and that 8 devices train as 1 does."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lowprec.errors import UsageError
from lowprec.training.metrics import read_lines
from lowprec.training.sharding import make_mesh, state_shardings


def spec_of(path: str, shape: tuple[int, ...], fsdp: int, min_elements: int = 1) -> PartitionSpec:
    """The sharding of a leaf under that path."""
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    mesh = AbstractMesh((2, fsdp), ("data", "fsdp"))
    return jax.tree.leaves(state_shardings(mesh, tree, min_elements=min_elements))[0].spec


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((12, 64), 4, PartitionSpec(None, "fsdp")),
        ((64, 12), 4, PartitionSpec("fsdp")),
        ((8, 64, 64), 4, PartitionSpec(None, None, "fsdp")),
        ((66, 12), 4, PartitionSpec(None, "fsdp")),
        ((7, 9), 4, PartitionSpec()),
        ((), 4, PartitionSpec()),
        ((64, 64), 1, PartitionSpec()),
    ],
)
def test_the_longest_axis_that_divides_is_split(shape, fsdp, expected):
    assert spec_of("opt_state/mu/mlp/kernel", shape, fsdp) == expected


def test_small_arrays_and_norms_stay_whole():
    assert spec_of("mlp/kernel", (64, 64), 4, min_elements=2**13) == PartitionSpec()
    assert spec_of("final_norm/scale", (4096,), 4) == PartitionSpec()


def test_a_mesh_that_does_not_fit_is_refused(tiny):
    with pytest.raises(UsageError, match=r"mesh.data=1 × mesh.fsdp=4 needs 4 devices; there are 1 \(cpu\)"):
        make_mesh(tiny({"mesh.fsdp": 4}))
    assert dict(make_mesh(tiny({})).shape) == {"data": 1, "fsdp": 1}


# As wide as it takes for the embedding to be split; noise in each product.
CHANGES = {
    "model.width": 64, "train.batch_size": 8, "train.steps": 6, "checkpoint.every": 3, "eval.every": 3,
    "recipe": "fwd=int8@row(stochastic)",
}  # fmt: skip


def finished(process, status=0):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    return errors


def losses(workdir):
    lines = read_lines(workdir / "metrics.jsonl")
    return [line["loss"] for line in lines] + [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_eight_devices_train_as_one_and_their_checkpoint_goes_on_there(training_command, tmp_path):
    """The rounding noise is that of the global index. float32 sums in another order move losses by a few 2^-24, and a
    value that they push over its rounding threshold, by a step of int8, moves them by less than 1e-4."""
    spread = {**CHANGES, "mesh.data": 2, "mesh.fsdp": 4}
    eight, one = training_command(tmp_path / "eight", spread, devices=8), training_command(tmp_path / "one", CHANGES)
    assert "2×4" in finished(eight)
    finished(one)
    assert json.loads((tmp_path / "eight/summary.json").read_text())["mesh"] == {"data": 2, "fsdp": 4}
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "eight")[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(losses(tmp_path / "eight"), expected, rtol=1e-4)

    shutil.rmtree(tmp_path / "eight/checkpoints/6")
    (tmp_path / "eight/summary.json").unlink()
    assert "going on from the checkpoint of step 3" in finished(training_command(tmp_path / "eight", CHANGES))
    np.testing.assert_allclose(losses(tmp_path / "eight"), expected, rtol=1e-4)


def test_a_batch_that_devices_cannot_share_is_refused(training_command, tmp_path):
    changes = {"train.batch_size": 4, "mesh.data": 8}
    errors = finished(training_command(tmp_path / "run", changes, devices=8), 2)
    assert "a microbatch of 4 windows" in errors and "choose a multiple of 8" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()
