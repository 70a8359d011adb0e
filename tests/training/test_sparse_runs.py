"""Sparse training by a config: the optimizer pulls just those weights to zero that the model does not multiply by."""

import jax
import numpy as np
import pytest

from lowprec.quantizers.sparsity import SQUARES
from lowprec.training.program import Program

SPARSE = {
    "optimizer.name": "sparse_adamw",
    "optimizer.masked_decay": 0.05,
    "optimizer.masked_decay_steps": 1,
    "optimizer.lr": 0.05,
    "optimizer.warmup_fraction": 0.0,
    "model.layers": 3,
}


def top_two(scores):
    """(…, K, N) -> the two largest of every four along K."""
    groups = np.moveaxis(scores, -2, -1).reshape(*scores.shape[:-2], scores.shape[-1], -1, 4)
    mask = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1) < 2
    return np.moveaxis(mask.reshape(*scores.shape[:-2], scores.shape[-1], -1), -1, -2)


@pytest.mark.parametrize(
    "recipe",
    [
        "ast_2_4_wanda",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("ast_2_4_wanda keeping first 1", "ast_2_4_slorb")),
    ],
)
def test_the_masks_of_the_optimizer_are_those_of_the_model(recipe, tiny):
    program = Program(tiny({**SPARSE, "recipe": recipe}))
    state, batches, rates = program.initial_state(), program.batches(), []
    for _ in range(3):
        kernel = np.asarray(state.params["layers"]["mlp"]["up"]["kernel"], np.float64)
        learned = jax.tree.map(np.asarray, state.quantizers.params["layers"])
        state, metrics = program.train_step(state, program.put(next(batches)))
        rates.append(program.now.read_metrics(np.asarray(metrics))["flip_rate"])
        norms = np.ones(kernel.shape[:2])
        for run, tree in learned.items():
            start, stop = map(int, run.split(":"))
            before = tree["mlp"]["up"]["fwd.w"].get(SQUARES)
            if before is not None:
                norms[start:stop] = np.sqrt(np.asarray(before, np.float64))
                after = state.quantizers.params["layers"][run]["mlp"]["up"]["fwd.w"][SQUARES]
                np.testing.assert_array_equal(after, before)  # no gradient moves them
        expected = top_two(np.abs(kernel) * norms[..., None])
        masks = next(part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "masks"))
                     if hasattr(part, "masks")).masks  # fmt: skip
        np.testing.assert_array_equal(masks["layers/mlp/up/kernel"], expected)
    assert rates[0] == 0 and rates[-1] > 0
    measured = any(SQUARES in tree["mlp"]["up"]["fwd.w"] for tree in learned.values())
    assert measured == ("wanda" in recipe)
