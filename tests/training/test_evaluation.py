"""Held-out losses: which windows count, and what the two forward passes say."""

import jax
import numpy as np
import pytest

from lowprec.training.evaluation import MeanLoss, evaluate
from lowprec.training.program import Program


def test_the_mean_and_its_standard_error():
    windows = np.array([1.0, 2.0, 4.0])
    mean = MeanLoss.of(windows)
    assert mean.loss == pytest.approx(7 / 3)
    assert mean.sem == pytest.approx(np.sqrt(((windows - 7 / 3) ** 2).sum() / 2 / 3))
    assert MeanLoss.of(np.array([2.0])) == MeanLoss(2.0, 0.0)


def test_windows_of_weight_zero_do_not_count():
    tokens = np.arange(12).reshape(4, 3)
    losses = lambda params, tokens, key: np.stack([tokens[:, 0] * 1.0, tokens[:, 0] * 2.0])
    batches = [
        {"tokens": tokens[:2], "weight": np.array([1.0, 1.0])},
        {"tokens": tokens[2:], "weight": np.array([1.0, 0.0])},
    ]
    result = evaluate(losses, None, batches, jax.random.key(0))
    assert (result.quantized.loss, result.full_precision.loss, result.gap.loss) == (3.0, 6.0, -3.0)
    assert result.tokens == 3 * 2


def test_the_gap_is_exactly_zero_without_quantization(program_of):
    program, state = program_of("f32")
    result = program.evaluate(state.variables)
    assert result.gap == MeanLoss(0.0, 0.0)
    assert result.quantized == result.full_precision
    assert result.tokens == 2 * 4 * 16
    # Tokens of the synthetic language are bytes.
    assert result.metrics(program.data)["eval_bits_per_byte"] == pytest.approx(result.quantized.loss / np.log(2))


def test_both_passes_see_the_same_parameters_and_windows(program_of):
    exact, state = program_of("f32")
    coarse, _ = program_of("fwd=int2@tensor")
    first, second = exact.evaluate(state.variables), coarse.evaluate(state.variables)
    assert second.full_precision == first.full_precision
    assert second.quantized != first.quantized
    assert second.gap.loss == pytest.approx(second.quantized.loss - second.full_precision.loss)


def test_evaluation_does_not_depend_on_accumulation(program_of, tiny):
    """The same windows in smaller pieces, up to the order of float32 sums inside a window."""
    whole, state = program_of("f32")
    parts = Program(tiny({"recipe": "f32", "train.accumulate": 4}))
    first, second = whole.evaluate(state.variables), parts.evaluate(state.variables)
    assert first.tokens == second.tokens
    assert first.quantized.loss == pytest.approx(second.quantized.loss, rel=1e-6)
