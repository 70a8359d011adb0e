"""Runs whose optimizer has its state, or the weights themselves, in few bits."""

import json
import os
import platform
import subprocess
import sys
from itertools import islice

import fused_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowprec import optim
from lowprec.errors import UsageError
from lowprec.training import train
from lowprec.training.checkpoints import Checkpoints
from lowprec.training.config import OptimizerConfig
from lowprec.training.metrics import read_lines
from lowprec.training.optimizer import build_optimizer, fused_optimizer, optimizer_measures, reset_moments
from lowprec.training.program import Program
from lowprec.training.update_rules import names
from lowprec.training.weight_storage import names as storages
from lowprec.training.weight_storage import read_weights

# Everything in few bits, however small it is.
SMALL = {"optimizer.settings": "min_size=0", "eval.every": 0, "checkpoint.every": 0}


def trained(program, steps):
    """(state, losses) after so many steps."""
    state, losses = program.initial_state(), []
    for batch in islice(program.batches(), steps):
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(program.now.read_metrics(np.asarray(metrics))["loss"])
    return state, losses


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def matrices():
    draw = np.random.default_rng(0)
    return {"up": {"kernel": jnp.asarray(draw.normal(size=(64, 64)), jnp.float32)}, "norm": {"scale": jnp.ones(64)}}


# Updates of orthogonal matrices, and of few directions, are small.
RATES = {"muon": 0.3, "muon8": 0.3, "galore": 0.5, "q_galore": 0.5}


@pytest.mark.parametrize("name", names())
def test_every_optimizer_goes_down_a_parabola(name):
    """Half of the mean squared distance to the target in 40 steps."""
    settings = "rank=16 gap=5" if "galore" in name else ""
    config = OptimizerConfig(name, lr=RATES.get(name, 0.05), weight_decay=0.0, clip=0.0, settings=settings)
    weights, optimizer = matrices(), build_optimizer(config, 40)

    @jax.jit
    def step(weights, state):
        updates, state = optimizer.update(jax.tree.map(lambda w: w - 0.1, weights), state, weights)
        return jax.tree.map(jnp.add, weights, updates), state

    state, distance = optimizer.init(weights), lambda weights: float(jnp.mean((weights["up"]["kernel"] - 0.1) ** 2))
    start = distance(weights)
    for _ in range(40):
        weights, state = step(weights, state)
    assert distance(weights) < start / 2


@pytest.mark.parametrize("name", ["adam8", "stable_adam4", "muon8", "q_galore", "spam"])
def test_decay_and_learning_rate_are_those_of_the_run(name):
    """Without gradients kernels shrink by lr · decay and nothing else moves."""
    config = OptimizerConfig(name, lr=0.5, weight_decay=0.1, warmup_fraction=0.0, final_fraction=1.0)
    optimizer, weights = build_optimizer(config, 10), matrices()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["up"]["kernel"], -0.05 * weights["up"]["kernel"], rtol=1e-6)
    assert not np.any(updates["norm"]["scale"])


def test_the_rule_is_the_optimizer_of_the_same_settings():
    config = OptimizerConfig(
        "stable_spam", lr=0.01, b2=0.99, weight_decay=0.0, clip=0.0, warmup_fraction=0.0, final_fraction=1.0,
        mu_format="de4", settings="gamma1=0.85, reset_every=3 reset=repo",
    )  # fmt: skip
    ours, weights = build_optimizer(config, 10, seed=7), matrices()
    settings = {"gamma1": 0.85, "reset_every": 3, "reset": "repo", "mu_format": "de4"}
    theirs = optim.stable_spam(0.01, b2=0.99, seed=7, **settings)
    states = [ours.init(weights), theirs.init(weights)]
    for step in range(7):
        gradients = jax.tree.map(lambda w, step=step: jnp.sin(w + step), weights)
        updates, states[0] = ours.update(gradients, states[0], weights)
        expected, states[1] = theirs.update(gradients, states[1], weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "stable_adam5"}, "unknown optimizer 'stable_adam5'; did you mean stable_adam4"),
        ({"name": "galore", "settings": "rnak=4"}, "unknown setting of galore 'rnak'; did you mean rank"),
        ({"name": "galore", "settings": "rank:4"}, "written like rank=64 gap=200, not 'rank:4'"),
        ({"name": "galore", "settings": "rank=4 gap=soon"}, "gap is like 200, not 'soon'"),
        ({"name": "stable_spam", "settings": "b1=0.8"}, "b1 is not set here"),
        ({"name": "sgd", "mu_format": "de4"}, "optimizer sgd has neither state formats nor settings"),
        ({"name": "sgd_sai", "nu_format": "log4"}, "sgd_sai has no nu_format; those that have are adam, adamw"),
        ({"name": "adam", "mu_format": "de5"}, "unknown state format 'de5'; did you mean de"),
        ({"weights": "bf15"}, "unknown way of storing weights 'bf15'"),
    ],
)
def test_what_does_not_exist_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        build_optimizer(OptimizerConfig(**config), 10)


@pytest.mark.parametrize("name", ["adam8", "stable_adam4", "spam", "q_galore", "muon8", "sgd_sai", "adam_mini"])
@pytest.mark.parametrize("weights", ["f32", "bf16_int16"])
def test_a_reset_forgets_the_moments_of_any_optimizer(name, weights):
    optimizer = build_optimizer(OptimizerConfig(name, weights=weights, clip=0.0), 10)
    params = matrices() if weights == "f32" else jax.tree.map(lambda w: w.astype(jnp.bfloat16), matrices())
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(params, state, params)
    fresh, start = reset_moments(optimizer, state, params), optimizer.init(params)
    before, after, first = ((s if weights == "f32" else s.inner) for s in (state, fresh, start))
    assert_equal(after[1], first[1])
    assert_equal(after[2:], before[2:])
    if weights != "f32":
        assert int(fresh.steps) == 3
        assert_equal(fresh.rest, state.rest)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flag is of x86")
@pytest.mark.parametrize("name", ["stable_adam4", pytest.param("adam8", marks=pytest.mark.slow)])
def test_fused_and_unfused_steps_of_a_run_are_the_same_bits(name, shared_directory):
    """Where the compiler does not make one operation of a·b + c in one program and two in the other."""
    flags = "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, fused_run.__file__, str(shared_directory / "data"), name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {name: []}


def test_float32_moments_are_not_fused():
    params = matrices()
    for config, fused in (
        (OptimizerConfig(), False),
        (OptimizerConfig("adam8"), True),
        (OptimizerConfig("adam"), False),
    ):
        assert (fused_optimizer(build_optimizer(config, 10), params) is not None) == fused


def slow(*variants):
    return [pytest.param(variant, marks=pytest.mark.slow) for variant in variants]


@pytest.mark.parametrize("weights", ["bf16_stochastic", *slow(*sorted({*storages()} - {"f32", "bf16_stochastic"}))])
def test_weights_without_a_float32_copy_learn(weights, tiny):
    """30 steps take the loss down as they do in float32, to within a quarter of what they gain."""
    changes = {"eval.every": 0, "checkpoint.every": 0, "train.steps": 30, "optimizer.lr": 2e-2}
    plain = Program(tiny(changes))
    _, losses = trained(plain, 30)
    program = Program(tiny({**changes, "optimizer.weights": weights}), plain.data)
    state, found = trained(program, 30)
    gain = losses[0] - np.mean(losses[-5:])
    assert gain > 0.3
    assert np.mean(found[-5:]) == pytest.approx(np.mean(losses[-5:]), abs=gain / 4)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert size < 0.8 * sum(leaf.size * 4 for leaf in jax.tree.leaves(read_weights(state.params)))
    evaluation = program.evaluate(state.variables)
    assert evaluation.quantized.loss < losses[0]


def test_weights_of_parts_of_a_model_are_float32(tiny):
    with pytest.raises(UsageError, match=r"trains weights in float32, not optimizer\.weights=int8"):
        Program(tiny({"optimizer.weights": "int8", "train.update": "layers/mlp/.*"}))


def test_the_log_has_what_the_optimizer_tells(tiny, tmp_path):
    changes = {"optimizer.name": "stable_spam", "optimizer.settings": "reset_every=4", "train.steps": 9}
    train(tiny({**SMALL, **changes}), tmp_path)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["resets"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert all(0 <= line["clip_rate"] <= 1 and 0 < line["norm_factor"] <= line["norm_factor_max"] for line in lines)
    assert dict(optimizer_measures(OptimizerConfig())) == {}
    assert "resets" not in dict(optimizer_measures(OptimizerConfig("stable_adam4")))


@pytest.mark.parametrize("weights", ["int8", *slow("f32", "bf16_stochastic")])
def test_a_run_of_four_bits_that_was_stopped_and_resumed_is_the_same_bits(weights, tiny, tmp_path):
    changes = {**SMALL, "optimizer.name": "stable_adam4", "optimizer.weights": weights}
    program = Program(tiny(changes))
    state, losses = program.initial_state(), []
    for step, batch in enumerate(islice(program.batches(), 8)):
        if step == 4:
            store = Checkpoints(tmp_path)
            store.save(4, state, {}, {"done": True})
            state = store.restore(program.abstract_state())[0].state
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(program.now.read_metrics(np.asarray(metrics))["loss"])
    expected, expected_losses = trained(program, 8)
    assert losses == expected_losses
    assert_equal(state, expected)


def test_a_checkpoint_is_not_read_in_another_state_format(tiny, tmp_path):
    changes = {**SMALL, "optimizer.name": "adam"}
    formats = [
        {"optimizer.mu_format": fmt, "optimizer.nu_format": "log8(stochastic)"} for fmt in ("de8", "cmp8@256/f32")
    ]
    first, second = (Program(tiny({**changes, **each})) for each in formats)
    state, _ = trained(first, 2)
    store = Checkpoints(tmp_path)
    store.save(2, state, {}, {})
    with pytest.raises(UsageError, match=r"saved as de8 and is to be restored as cmp8@256/f32.*convert_state"):
        store.restore(second.abstract_state())
    restored = store.restore(first.abstract_state())[0].state
    converted = optim.convert_state(restored.opt_state, jax.eval_shape(second.update.optimizer.init, restored.params))
    for batch in islice(second.batches(), 1):
        second.train_step(restored._replace(opt_state=converted), second.put(batch))
