"""Objectives against their formulas in numpy and against what they must leave alone."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lowprec import models
from lowprec.errors import UsageError
from lowprec.models import ModelConfig
from lowprec.nn import linen
from lowprec.nn.capture import by_layer, capture
from lowprec.training.distillation import hidden_error, logit_divergence, top_divergence
from lowprec.training.objectives import Distillation, JointWidths, TaskLoss, TeacherIntervention
from lowprec.training.sharpness import SharpnessAware
from lowprec.training.step import Gradients

STUDENT, TEACHER = (3 * jax.random.normal(jax.random.key(seed), (5, 7)) for seed in (0, 1))
LLAMA = models.build(ModelConfig(layers=3, width=16, heads=2, mlp_width=24), 11)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 9), dtype=np.int32))
KEY = jax.random.key(9)


def probabilities(logits, T):
    z = np.exp(np.asarray(logits, np.float64) / T)
    return z / z.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(LLAMA.init)({"params": jax.random.key(3)}, TOKENS[:, :-1])


@pytest.fixture(scope="module")
def other_variables(variables):
    return jax.tree.map(lambda w: 1.5 * w[..., ::-1], variables)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_of_logits_is_its_formula(temperature):
    p, q = probabilities(TEACHER, temperature), probabilities(STUDENT, temperature)
    expected = temperature**2 * np.sum(p * np.log(p / q), axis=-1)
    np.testing.assert_allclose(logit_divergence(STUDENT, TEACHER, temperature), expected, rtol=1e-5)
    gradient = jax.grad(lambda s: jnp.sum(logit_divergence(s, TEACHER, temperature)))(STUDENT)
    np.testing.assert_allclose(gradient, temperature * (q - p), atol=1e-5)


def test_no_gradient_reaches_a_teacher():
    teacher_gradient = jax.grad(lambda t: jnp.sum(logit_divergence(STUDENT, t) + top_divergence(STUDENT, t, 2)))
    assert not np.any(teacher_gradient(TEACHER))
    assert not np.any(jax.grad(lambda t: hidden_error(STUDENT, t))(TEACHER))


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_the_divergence_of_the_top_lumps_all_others(k):
    p, q = probabilities(TEACHER, 2.0), probabilities(STUDENT, 2.0)
    order = np.argsort(-p, axis=-1)
    lump = lambda d: np.concatenate(
        [np.take_along_axis(d, order[:, :k], -1), np.take_along_axis(d, order[:, k:], -1).sum(-1, keepdims=True)], -1
    )
    a, b = lump(p), lump(q)
    expected = 4 * np.sum(np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(b > 0, b, 1)), 0), axis=-1)
    np.testing.assert_allclose(top_divergence(STUDENT, TEACHER, k, 2.0), expected, rtol=1e-5)
    # of one set of outcomes lumped into fewer, never more (data processing), and all are the full one
    full = logit_divergence(STUDENT, TEACHER, 2.0)
    assert np.all(top_divergence(STUDENT, TEACHER, k, 2.0) <= full + 1e-6)
    gradient = jax.grad(lambda s: jnp.sum(top_divergence(s, TEACHER, k, 2.0)))(STUDENT)
    assert np.all(np.isfinite(gradient)) and np.allclose(jnp.sum(gradient, -1), 0, atol=1e-5)


def test_the_top_of_more_logits_than_there_are_is_refused():
    with pytest.raises(UsageError, match="the 8 largest of 7 logits"):
        top_divergence(STUDENT, TEACHER, 8)


def test_the_error_of_hidden_states_is_relative():
    s, t = np.asarray(STUDENT, np.float64), np.asarray(TEACHER, np.float64)
    np.testing.assert_allclose(hidden_error(STUDENT, TEACHER), ((s - t) ** 2).sum() / (t**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(hidden_error(8 * STUDENT, 8 * TEACHER), hidden_error(STUDENT, TEACHER), rtol=1e-5)
    assert float(hidden_error(STUDENT, jnp.zeros_like(STUDENT))) > 1e6  # of nothing: large, but a number


@partial(jax.jit, static_argnums=(0, 1))
def loss_of(objective, model, variables, memory=(), constants=()):
    return objective.loss(model, variables, TOKENS, KEY, memory, constants)[0]


# One program each; not jitted, a gradient is a hundred of them.
gradient_of_loss = jax.jit(jax.value_and_grad(loss_of, argnums=2), static_argnums=(0, 1))
captured_of = jax.jit(
    lambda model, variables, pattern: capture(model, variables, TOKENS[:, :-1], pattern=pattern), static_argnums=(0, 2)
)


def test_distillation_from_oneself_is_the_share_of_the_task(variables):
    task = float(loss_of(TaskLoss(), LLAMA, variables))
    objective = Distillation(LLAMA, alpha=0.25, hidden=1.0)
    found = loss_of(objective, LLAMA, variables, constants=variables)
    np.testing.assert_allclose(found, 0.75 * task, rtol=1e-6)


def test_distillation_adds_its_three_parts(variables, other_variables):
    student, teacher = (jax.jit(LLAMA.apply)(v, TOKENS[:, :-1]) for v in (variables, other_variables))
    task = float(loss_of(TaskLoss(), LLAMA, variables))
    states = [by_layer(captured_of(LLAMA, v, r"layers/\d+")[2]) for v in (variables, other_variables)]
    assert sorted(states[0]) == [f"layers/{i}/output" for i in range(3)]
    hidden = np.mean([float(hidden_error(states[0][path], states[1][path])) for path in states[0]])
    divergence = float(jnp.mean(logit_divergence(student, teacher, 3.0)))
    objective = Distillation(LLAMA, alpha=0.3, temperature=3.0, hidden=0.5)
    found = loss_of(objective, LLAMA, variables, constants=other_variables)
    np.testing.assert_allclose(found, 0.7 * task + 0.3 * divergence + 0.5 * hidden, rtol=1e-5)
    top = Distillation(LLAMA, alpha=1.0, temperature=3.0, top=2)
    expected = float(jnp.mean(top_divergence(student, teacher, 2, 3.0)))
    np.testing.assert_allclose(loss_of(top, LLAMA, variables, constants=other_variables), expected, rtol=1e-5)


def test_hidden_states_are_those_of_the_layers_one_after_the_other(variables):
    """Captured through the scan; the last one, normed and multiplied by the head, is the output."""
    logits, _, captured = captured_of(LLAMA, variables, r"layers/\d+")
    np.testing.assert_array_equal(logits, jax.jit(LLAMA.apply)(variables, TOKENS[:, :-1]))
    last = by_layer(captured)["layers/2/output"]
    normed = nn.RMSNorm(epsilon=LLAMA.config.norm_epsilon).apply({"params": variables["params"]["final_norm"]}, last)
    np.testing.assert_allclose(normed @ variables["params"]["head"]["kernel"], logits, atol=1e-5)
    with pytest.raises(UsageError, match="no module whose output could be captured matches 'blocks'"):
        capture(LLAMA, variables, TOKENS[:, :-1], pattern="blocks")


def test_recipes_with_runs_of_their_own_are_captured_alike(variables):
    """A stack in three runs and a stack in one: the same paths, and what quantizes nothing changes nothing."""
    from lowprec.recipes import KEEP, GemmRule, Quantizer, Recipe

    quantized = GemmRule(fwd=(Quantizer("bfloat16"), Quantizer("bfloat16")))
    model = linen.quantize(LLAMA, Recipe("middle", {"layers/1/.*": quantized, ".*": KEEP}))
    pattern = r"layers/\d+|layers/\d+/attention/map"
    found, plain = (by_layer(captured_of(m, variables, pattern)[2]) for m in (model, LLAMA))
    assert sorted(found) == sorted(plain) and len(found) == 6
    np.testing.assert_array_equal(found["layers/0/output"], plain["layers/0/output"])
    assert np.any(found["layers/1/output"] != plain["layers/1/output"])


class Bigram(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(11, name="next")(nn.Embed(11, 8, name="embed")(tokens))


def test_joint_widths_sum_the_losses_of_their_variants():
    variables = Bigram().init({"params": jax.random.key(3)}, TOKENS)
    variants = tuple(linen.quantize(Bigram(), recipe) for recipe in ("fwd=int8@row", "fwd=int4@row", "f32"))
    found = loss_of(JointWidths(variants, (1.0, 0.5, 2.0)), Bigram(), variables)
    losses = [loss_of(TaskLoss(), variant, variables) for variant in variants]
    np.testing.assert_allclose(found, np.dot((1.0, 0.5, 2.0), losses), rtol=1e-6)
    assert len({float(loss) for loss in losses}) == 3
    with pytest.raises(UsageError, match="3 variants of a model have 2 weights"):
        JointWidths(variants, (1.0, 2.0))


# Sharpness: L(w, s) with known gradients.

TARGETS = jnp.array([3.0, -1.0])


def quadratic(trained):
    """L = ½ Σ c (w - t)² + s · (‖w - t‖ - 1): the scale's gradient changes sign where w is one away from the target."""
    curvature = jnp.array([1.0, 10.0])

    def loss(trained):
        distance = jnp.sqrt(jnp.sum((trained.params["w"] - TARGETS) ** 2))
        return 0.5 * jnp.sum(curvature * (trained.params["w"] - TARGETS) ** 2) + trained.quant_params["s"] @ jnp.stack(
            [distance - 1, distance + 1]
        )

    value, gradients = jax.value_and_grad(loss)(trained)
    return value, (), gradients


def trained_at(w, s=(0.0, 0.0)):
    return Gradients({"w": jnp.asarray(w)}, {"s": jnp.asarray(s)}, ())


def test_the_gradient_is_that_at_the_moved_weights():
    objective, at = SharpnessAware(radius=0.1), trained_at([1.0, 2.0])
    found = objective.gradient(quadratic, at, objective.init(at.quant_params))
    gradient = np.array([1.0, 10.0]) * (np.array([1.0, 2.0]) - np.array([3.0, -1.0]))
    moved = np.array([1.0, 2.0]) + 0.1 * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(found.gradients.params["w"], [1.0, 10.0] * (moved - np.array([3.0, -1.0])), rtol=1e-6)
    np.testing.assert_allclose(found.loss, quadratic(at)[0])
    higher = float(quadratic(trained_at(moved.astype(np.float32)))[0] - found.loss)
    np.testing.assert_allclose(found.metrics["sharpness"], higher, rtol=1e-4)
    assert higher > 0
    still = lambda trained: (jnp.float32(1), (), jax.tree.map(jnp.zeros_like, trained))
    resting = objective.gradient(still, at, objective.init(at.quant_params))
    np.testing.assert_array_equal(resting.gradients.params["w"], [0, 0])


def run(objective, steps, learning_rate=0.001):
    """SGD with momentum on the scales: what is held must not move by momentum either."""
    at = trained_at([3.9, -1.0], (1.0, 1.0))
    optimizer = optax.sgd(learning_rate, momentum=0.9)
    memory, state = objective.init(at.quant_params), optimizer.init(at.quant_params)

    @jax.jit
    def step(at, memory, state):
        found = objective.gradient(quadratic, at, memory)
        updates, state = optimizer.update(found.gradients.quant_params, state)
        held = objective.hold(updates, found.memory)
        # The weights stand still, so that each scale has the same two gradients for ever.
        return at._replace(quant_params=optax.apply_updates(at.quant_params, held)), found.memory, state

    trail = [np.asarray(at.quant_params["s"])]
    for _ in range(steps):
        at, memory, state = step(at, memory, state)
        trail.append(np.asarray(at.quant_params["s"]))
    return np.stack(trail), memory


def test_a_scale_whose_gradients_disagree_is_held_and_no_other():
    """‖w - t‖ is .9 and, moved by .2, 1.1: the first scale's gradients are -.1 and .1, the second's 1.9 and 2.1."""
    trail, memory = run(SharpnessAware(radius=0.2, threshold=0.5, window=4), 12)
    assert np.all(np.diff(trail[:4, 0]) != 0)  # the first window only measures
    assert np.all(np.diff(trail[3:, 0]) == 0)  # from its end on held
    assert np.all(np.diff(trail[:, 1]) != 0)
    np.testing.assert_array_equal(memory.frozen["s"], [True, False])


def test_with_threshold_one_nothing_is_ever_held():
    """Bitwise SAM-QAT: the same numbers as where no window ever ends."""
    trail, memory = run(SharpnessAware(radius=0.2, threshold=1.0, window=4), 12)
    plain, _ = run(SharpnessAware(radius=0.2, threshold=0.0, window=10**6), 12)
    np.testing.assert_array_equal(trail, plain)
    assert not np.any(memory.frozen["s"])


def test_a_held_scale_is_measured_again_and_let_go():
    """Held after a window of disagreement; the weights then move to where the gradients agree."""
    objective = SharpnessAware(radius=0.2, threshold=0.5, window=3)
    near, far = trained_at([3.9, -1.0], (1.0, 1.0)), trained_at([6.0, -1.0], (1.0, 1.0))
    memory = objective.init(near.quant_params)
    frozen = []
    for at in [near] * 3 + [far] * 6:
        memory = objective.gradient(quadratic, at, memory).memory
        frozen.append(bool(memory.frozen["s"][0]))
    assert frozen == [False, False, True, True, True, False, False, False, False]


# Teacher intervention.

PLACES = {"outputs": r"layers/\d+/attention", "maps": r"layers/\d+/attention/map", "inputs": r"layers/\d+"}


@pytest.mark.parametrize("place", PLACES)
def test_the_teacher_stands_in_at_its_places_and_leaves_without_a_trace(place, variables, other_variables):
    objective = TeacherIntervention(LLAMA, ((PLACES[place], 2),))
    model = linen.quantize(LLAMA, "fwd=int4@row")
    at = lambda step: loss_of(objective, model, variables, {"step": jnp.int32(step), "inner": ()}, other_variables)
    replaced, after = at(0), at(2)
    np.testing.assert_array_equal(after, loss_of(TaskLoss(), model, variables))
    assert float(replaced) != float(after)
    np.testing.assert_array_equal(at(1), replaced)


def test_layers_behind_a_replaced_output_have_no_gradient(variables, other_variables):
    """TI-O: nothing before the outputs of attention is trained; TI-M: queries and keys are not, values are."""

    def gradient(place):
        objective = TeacherIntervention(LLAMA, ((PLACES[place], 1),))
        memory = {"step": jnp.int32(0), "inner": ()}
        return gradient_of_loss(objective, LLAMA, variables, memory, other_variables)[1]["params"]["layers"]

    zero = lambda tree, name: not np.any(tree["attention"][name]["kernel"])
    outputs, maps = gradient("outputs"), gradient("maps")
    assert all(zero(outputs, name) for name in ("query", "key", "value", "out"))
    assert np.all(np.any(np.asarray(outputs["mlp"]["down"]["kernel"]), axis=(1, 2)))
    assert zero(maps, "query") and zero(maps, "key") and not zero(maps, "value")


def test_given_every_input_the_student_is_the_teacher_layer_by_layer(variables, other_variables):
    """The last layer's output is the teacher's: so are the logits, up to the head's parameters."""
    mixed = {"params": {**other_variables["params"], "layers": variables["params"]["layers"]}}
    objective = TeacherIntervention(LLAMA, ((PLACES["inputs"], 1),))
    memory = {"step": jnp.int32(0), "inner": ()}
    found = loss_of(objective, LLAMA, mixed, memory, other_variables)
    np.testing.assert_allclose(found, loss_of(TaskLoss(), LLAMA, other_variables), rtol=1e-6)
    inner = Distillation(LLAMA, alpha=0.0, hidden=1.0)
    objective = TeacherIntervention(LLAMA, ((PLACES["inputs"], 1),), inner=inner)
    gradient = gradient_of_loss(objective, LLAMA, mixed, memory, other_variables)[1]["params"]["layers"]
    assert np.all(np.any(np.asarray(gradient["mlp"]["down"]["kernel"]), axis=(1, 2)))


def test_the_share_of_the_teacher_fades_place_by_place(variables):
    objective = TeacherIntervention(LLAMA, ((PLACES["inputs"], 4), (PLACES["outputs"], 8)), fade=4)
    shares = [[float(share) for _, share in objective.shares(step)] for step in (0, 2, 4, 6, 8, 9)]
    assert shares == [[1, 1], [0.5, 1], [0, 1], [0, 0.5], [0, 0], [0, 0]]
    memory = objective.init(())
    gradient_of = partial(lambda trained: (jnp.float32(0), (), trained))
    found = objective.gradient(gradient_of, Gradients((), (), ()), memory)
    assert int(found.memory["step"]) == 1 and float(found.metrics["teacher_share"]) == 1
