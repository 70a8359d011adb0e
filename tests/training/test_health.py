"""Quantization health: what the taps say during training is what quantizing the operands by hand gives."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lowprec
from lowprec.quantizers import OPERANDS, OperandStatistics
from lowprec.training.health import Health

INNER = ("attention/key", "attention/out", "attention/query", "attention/value", "mlp/down", "mlp/gate", "mlp/up")
LAYERS = [f"layers/0/{name}" for name in INNER]


@pytest.fixture(scope="module")
def measured(program_of):
    program, state = program_of("fwd=int4@row dgrad=int8@row,int4@row wgrad=int8@tensor")
    return program.measure_health(state.variables), state.params


def test_every_operand_of_every_quantized_layer_is_there(measured):
    health, _ = measured
    assert sorted(health.layers) == LAYERS
    assert all(set(of_layer) == set(OPERANDS) for of_layer in health.layers.values())


def test_the_error_of_a_weight_is_that_of_quantizing_it(measured):
    health, params = measured
    weight = params["layers"]["mlp"]["gate"]["kernel"][0]
    error = lowprec.fake_quant(weight, "int4@row", axis=0) - weight
    expected = 10 * np.log10(float(jnp.sum(weight**2) / jnp.sum(error**2)))
    found = health.layers["layers/0/mlp/gate"]["fwd.w"]
    assert found.sqnr_db == pytest.approx(expected, rel=1e-4)
    assert found.amax == pytest.approx(float(jnp.max(jnp.abs(weight))))


def test_eight_bits_are_cleaner_than_four_and_four_bits_have_their_known_noise(measured):
    """int4, one scale a row, on Gaussian rows of 16 weights: 16 dB or a little more; int8 24 dB better."""
    by_operand = measured[0].by_operand()
    assert 15 < by_operand["fwd.w"]["sqnr_db"] < 23
    assert by_operand["dgrad.dy"]["sqnr_db"] - by_operand["dgrad.w"]["sqnr_db"] > 15


def statistics(sqnr, amax=1.0):
    return OperandStatistics(amax, sqnr, 0.9, 0.01, 0.02, 1.0)


def test_means_leave_out_exact_operands_and_the_worst_is_named():
    health = Health({"a": {"fwd.x": statistics(20.0), "fwd.w": statistics(np.inf, amax=3.0)},
                     "b": {"fwd.x": statistics(10.0, amax=2.0)}})  # fmt: skip
    assert health.overall()["sqnr_db"] == 15.0
    assert health.overall()["amax"] == 3.0
    assert health.by_operand()["fwd.x"] == {
        "sqnr_db": 15.0, "cosine": 0.9, "clipped": 0.01, "underflowed": 0.02, "amax": 2.0,
    }  # fmt: skip
    assert health.by_operand()["fwd.w"]["sqnr_db"] is None
    assert health.worst() == ("b", "fwd.x", 10.0)


def test_metrics_are_json_without_infinities():
    health = Health({"a": {"fwd.x": statistics(np.inf)}})
    text = json.dumps([health.metrics(), health.summary()], allow_nan=False)
    assert json.loads(text)[0]["quantization"]["a"]["fwd.x"]["sqnr_db"] is None


def test_without_a_quantized_layer_there_is_nothing_to_measure(program_of):
    program, state = program_of("f32")
    assert program.measure_health(state.variables).metrics() == {} == Health({}).summary()
    assert Health({}).worst() is None


def test_gradients_that_drown_in_their_rounding_noise_are_named():
    """‖g‖ / ‖noise‖ < √3 is less than 4.77 dB; of weights and activations nobody asks."""
    health = Health({"a": {"fwd.x": statistics(1.0), "dgrad.dy": statistics(4.76), "wgrad.dy": statistics(4.78)},
                     "b": {"dgrad.dy": statistics(3.0)}})  # fmt: skip
    assert health.drowned() == ["b dgrad.dy", "a dgrad.dy"] == health.summary()["drowned"]
