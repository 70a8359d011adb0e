"""The statistics of batch norms are those of the whole microbatch, on however many devices it lies."""

import jax
import numpy as np
import pytest

from lowprec.training.config import resolve
from lowprec.training.program import Program
from lowprec.training.step import STEP_METRICS

CONFIG = {
    "data.name": "digits",
    "data.shift": 1,
    "model.name": "resnet",
    "model.layers": 1,
    "model.width": 8,
    "train.batch_size": 32,
    "train.accumulate": 2,
    "eval.batches": 1,
}


def two_steps(recipe, devices, data_dir):
    program = Program(resolve({**CONFIG, "recipe": recipe, "mesh.data": devices, "data.data_dir": str(data_dir)}))
    state, batches = program.initial_state(), program.batches()
    for _ in range(2):
        state, metrics = program.train_step(state, program.put(next(batches)))
    batches.close()
    return jax.device_get((metrics[STEP_METRICS.index("loss")], state.model_state))


@pytest.mark.parametrize("recipe", ["f32", "dfp16"])
def test_losses_and_running_statistics_do_not_depend_on_the_mesh(recipe, tmp_path):
    """Statistics of the four images of one device would differ from those of 16 by tens of percent."""
    pytest.importorskip("sklearn")
    loss, statistics = two_steps(recipe, 1, tmp_path)
    found_loss, found = two_steps(recipe, 4, tmp_path)
    assert found_loss == pytest.approx(loss, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, statistics)
