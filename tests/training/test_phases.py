"""Runs of several recipes: what changes at a switch, what does not, and that a run resumed anywhere is the same run."""

import json
import shutil

import jax
import numpy as np
import pytest

from lowprec.errors import UsageError
from lowprec.optim.paths import leaves_by_path
from lowprec.training import train
from lowprec.training.health import Health
from lowprec.training.metrics import TIMINGS, read_lines
from lowprec.training.program import Program
from lowprec.training.stages import StageProgram
from lowprec.training.standalone_evaluation import evaluate_run

RAMP = "bf16 then bitnet158 at 4 over 3 reset"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(shared_directory):
    """Programs that are built again are not compiled again."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(shared_directory / "compiled_phases"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def steps_of(program, state, count, batches):
    """The state after so many steps, entering stages where they begin."""
    for _ in range(count):
        if program.next_start(None) == int(state.step):
            state = program.enter(program.stage + 1, state)
        state, _ = program.train_step(state, program.put(next(batches)))
    return state


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def assert_close(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), first, second)


FIRST_STEPS = [
    ("bf16", "bfloat16"),
    *(pytest.param(before, "float32", marks=pytest.mark.slow) for before in ("bf16", "f32")),
]


@pytest.mark.parametrize(("before", "dtype"), FIRST_STEPS)
def test_the_first_step_of_a_ramp_is_that_of_the_recipe_before(tiny, before, dtype):
    ramp = Program(tiny({"recipe": f"{before} then bitnet158 at 2 over 4", "model.dtype": dtype}))
    plain = Program(tiny({"recipe": before, "model.dtype": dtype}), ramp.data)
    after = [steps_of(program, program.initial_state(), 3, program.batches()) for program in (ramp, plain)]
    assert ramp.stage == 1 and int(after[0].step) == 3
    assert_equal((after[0].params, after[0].opt_state), (after[1].params, after[1].opt_state))
    onward = lambda program, state: steps_of(program, state, 1, program.batches()).params["layers"]
    fourth = onward(ramp, after[0]), onward(plain, after[1])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), *fourth)))


@pytest.mark.slow
@pytest.mark.parametrize("before", ["lsq_4", "fp8_delayed"])
def test_a_ramp_goes_on_with_what_the_recipe_before_has_learned_and_remembered(tiny, before):
    """Its first step is that of the recipe before, up to the last bits, in which two compiled programs may differ."""
    ramp = Program(tiny({"recipe": f"{before} then bitnet158 at 2 over 4"}))
    plain = Program(tiny({"recipe": before}), ramp.data)
    found, expected = (steps_of(program, program.initial_state(), 3, program.batches()) for program in (ramp, plain))
    assert ramp.stage == 1
    assert_close((found.params, found.opt_state), (expected.params, expected.opt_state))
    for ours, theirs in (
        (found.quantizers.params, expected.quantizers.params),
        (found.quantizers.state, expected.quantizers.state),
    ):
        ours, theirs = leaves_by_path(ours), leaves_by_path(theirs)
        own = {path.replace("/before_", "/"): leaf for path, leaf in ours.items() if "/before_" in path}
        own |= {path: leaf for path, leaf in ours.items() if "dgrad.dy" in path}
        assert set(own) == set(theirs)
        assert_close(own, theirs)
    if before == "fp8_delayed":
        ended = steps_of(ramp, found, 4, ramp.batches())
        assert ramp.stage == 2 and not jax.tree.leaves((ended.quantizers.params, ended.quantizers.state))


@pytest.mark.slow
def test_the_last_step_of_a_ramp_would_be_that_of_the_recipe_after(tiny):
    """With λ = 1, but for the order of sums in the derivative of BitNet's norm."""
    ramp = Program(tiny({"recipe": "f32 then bitnet158 at 2 over 4"}))
    plain = Program(tiny({"recipe": "bitnet158"}), ramp.data)
    state = ramp.enter(1, ramp.initial_state())
    done = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 4 if path[-1].key == "blend_steps" else leaf, state.quantizers.state
    )
    state = state._replace(quantizers=state.quantizers._replace(state=done))
    found = steps_of(ramp, state, 1, ramp.batches()).params
    expected = steps_of(plain, plain.initial_state(), 1, plain.batches()).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, expected)


def test_a_step_is_compiled_once_a_stage(tiny):
    program = Program(tiny({"recipe": RAMP}))
    assert [str(stage.recipe) for stage in program.stages] == ["bf16", "bf16 to bitnet158", "bitnet158"]
    steps_of(program, program.initial_state(), 9, program.batches())
    assert [stage.train_step._cache_size() for stage in program.stages] == [1, 1, 1]


def test_a_reset_and_learned_parameters_at_a_switch(tiny):
    program = Program(tiny({"recipe": "f32 then lsq_4 at 2 over 2 reset then lsq_8 at 8"}))
    state = steps_of(program, program.initial_state(), 2, program.batches())
    moments = lambda state: [leaf for leaf in jax.tree.leaves(state.opt_state[1]) if leaf.ndim]
    assert any(np.any(leaf) for leaf in moments(state))
    entered = program.enter(1, state)
    assert not any(np.any(leaf) for leaf in moments(entered))
    assert_equal((entered.params, entered.opt_state[2:]), (state.params, state.opt_state[2:]))
    trained = steps_of(program, entered, 2, program.batches())
    ended = program.enter(2, trained)  # the end of the ramp: nothing starts anew
    assert_equal((ended.opt_state, ended.quantizers.params), (trained.opt_state, trained.quantizers.params))
    assert_equal(ended.quantizers.opt_state, trained.quantizers.opt_state)
    again = program.enter(3, ended)
    fresh = program.initial_variables(ended.params)
    assert_equal(again.quantizers.params, fresh["quant_params"])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), again.quantizers.params, ended.quantizers.params)
    assert all(jax.tree.leaves(changed))


KEPT = [
    pytest.param("teacher_intervention", "bf16 then nvfp4 at 4", True, marks=pytest.mark.slow),
    ("gaqat", "lsq_4 then lsq_2 at 4", True),
    ("gaqat", "lsq_4 then lsq_plus_4 at 4", False),
]


@pytest.mark.parametrize(("name", "recipe", "kept"), KEPT)
def test_the_memory_of_an_objective_outlives_a_phase_where_it_fits_the_next(name, recipe, kept, tiny):
    """That of GAQAT is about learned scales: where there are others, it starts anew."""
    data = Program(tiny()).data
    objective = {"objective.name": name, **({"objective.teacher": "there"} if "teacher" in name else {})}
    program = Program(tiny({"recipe": recipe, **objective}), data)
    state = program.initial_state()
    used = jax.tree.map(lambda leaf: leaf + 1, state.quantizers.objective)
    entered = program.enter(1, state._replace(quantizers=state.quantizers._replace(objective=used)))
    anew = program.now.objective.init(entered.quantizers.params)
    assert jax.tree.leaves(used)
    assert_equal(entered.quantizers.objective, used if kept else anew)


def without_timings(workdir):
    lines = read_lines(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def killed_after(step, workdir, target):
    """A copy of a run as if it had been killed after its checkpoint of that step."""
    shutil.copytree(workdir, target)
    (target / "summary.json").unlink()
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return target


def assert_resumes(config, tmp_path, steps):
    """Trains once, then again from each of these checkpoints; returns the lines of its metrics."""
    expected = train(config, tmp_path / "run")
    for step in steps:
        target = killed_after(step, tmp_path / "run", tmp_path / str(step))
        found = train(config, target)
        assert found["state_sha256"] == expected["state_sha256"], step
        assert without_timings(target) == without_timings(tmp_path / "run"), step
    return without_timings(tmp_path / "run")


EVERY_STEP = {"checkpoint.every": 1, "checkpoint.keep": 20, "train.steps": 9}


@pytest.mark.slow
def test_a_run_resumed_before_at_and_after_each_switch_is_the_same(tiny, tmp_path):
    config = tiny({"recipe": RAMP, **EVERY_STEP})
    lines = assert_resumes(config, tmp_path, (3, 4, 5, 7))
    assert [line["phase"] for line in lines] == [0] * 4 + [1] * 3 + [2] * 2
    progress = tmp_path / "run" / "checkpoints" / "4" / "progress" / "metadata"
    assert json.loads(progress.read_text())["stage"] is None  # saved before the switch
    assert "recipe bf16 to bitnet158," in evaluate_run(tmp_path / "run", step=5)
    assert "recipe bitnet158," in evaluate_run(tmp_path / "run")
    assert "recipe nvfp4," in evaluate_run(tmp_path / "run", recipe="nvfp4")


@pytest.mark.slow
def test_a_triggered_switch(tiny, tmp_path, monkeypatch):
    """Gradients drown from the second evaluation on, after 4 steps: the fifth is that of the next stage."""
    measured = []

    def drowning(self):
        measured.append(self)
        return self.layers["layers/0/mlp/up"]["fwd.x"].sqnr_db > 0 and evaluations[0] >= 2

    evaluations = [0]
    measure = StageProgram.measure_health

    def counted(self, variables, examples):
        evaluations[0] += 1
        return measure(self, variables, examples)

    monkeypatch.setattr(Health, "drowning", drowning)
    monkeypatch.setattr(StageProgram, "measure_health", counted)
    text = "fp4_all_the_way then fp4_all_the_way forward only when drowned"
    config = tiny({"recipe": text, **EVERY_STEP, "train.steps": 6, "eval.every": 2, "eval.health": True})
    expected = train(config, tmp_path / "run")
    lines = without_timings(tmp_path / "run")
    assert [line["phase"] for line in lines] == [0] * 4 + [1] * 2
    for step, seen in ((3, 1), (4, 2), (5, 2)):
        evaluations[0] = seen
        target = killed_after(step, tmp_path / "run", tmp_path / str(step))
        assert train(config, target)["state_sha256"] == expected["state_sha256"]
        assert without_timings(target) == lines
    backward = lambda line: {name for name in line["quantization"]["layers/0/mlp/up"] if not name.startswith("fwd")}
    assert backward(lines[1]) and not backward(lines[-1])


@pytest.mark.parametrize(
    ("fmt", "drown"), [("int2@tensor", True), pytest.param("int8@tensor", False, marks=pytest.mark.slow)]
)
def test_the_monitor_ends_a_phase_when_gradients_lie_below_their_noise(fmt, drown, tiny, tmp_path):
    """With a scale a tensor, 2 bits leave most gradients to noise, whose square is that of the largest; 8 bits do not.

    The evaluation that finds more than half of them below √3 times their noise ends the phase.
    """
    text = f"fwd=bf16 dgrad={fmt}(stochastic),bf16 wgrad={fmt}(stochastic),bf16 then f32 when drowned"
    changes = {"recipe": text, "train.steps": 10, "eval.every": 4, "eval.health": True, "checkpoint.every": 0}
    summary = train(tiny(changes), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    below = {}
    for line in lines:
        if "quantization" in line:
            gradients = [of[name]["sqnr_db"] for of in line["quantization"].values() for name in of if "dy" in name]
            assert len(gradients) == 14
            below[line["step"]] = sum(10 ** (db / 20) < 3**0.5 for db in gradients)
    assert [line["phase"] for line in lines] == ([0] * 4 + [1] * 6 if drown else [0] * 10)
    # f32 has no operands to measure.
    assert list(below) == ([4] if drown else [4, 8, 10])
    assert all((count > 7) == drown for count in below.values())
    if not drown:
        assert len(summary["health"]["drowned"]) == below[10]


def test_the_monitor_asks_for_more_than_half_of_the_gradients(program_of):
    program, state = program_of("fp4_all_the_way")
    measured = program.measure_health(state.variables)
    ratios = [ratio for ratio, _ in measured._gradients_to_noise()]
    assert len(ratios) == 14 and measured.drowning() == (sum(ratio < 3**0.5 for ratio in ratios) > 7)
    assert not Health({}).drowning()


def test_what_cannot_be_scheduled_is_refused(tiny):
    with pytest.raises(UsageError, match=r"set eval\.every, and eval\.health=True"):
        Program(tiny({"recipe": "nvfp4 then nvfp4 forward only when drowned"}))
    with pytest.raises(UsageError, match="begins after 12 steps, but the run ends after 12"):
        Program(tiny({"recipe": "bf16 then nvfp4 at 12"}))
    with pytest.raises(UsageError, match="leaves no layer to quantize in a model of 1"):
        Program(tiny({"recipe": "nvfp4 keeping first 1 then bf16 at 6"}))


def test_kept_layers_are_those_of_the_model(tiny):
    program = Program(tiny({"recipe": "nvfp4 keeping first 1 last 1", "model.layers": 3}))
    rules = program.now.quantized.layers(program._inputs)
    quantized = {path.split("/")[1] for path, rule in rules.items() if not rule.exact}
    assert quantized == {"1"}


@pytest.mark.slow
def test_adapt_decides_and_resumes(tiny, tmp_path):
    """The window is 50 steps: the formats of step 51 are others than those of step 50."""
    changes = {"recipe": "adapt", "train.steps": 54, "checkpoint.every": 7, "checkpoint.keep": 9, "eval.every": 0}
    lines = assert_resumes(tiny(changes), tmp_path, (49,))
    bits = [line["bits"] for line in lines]
    parts = ("query", "key", "value", "out")
    products = {*(f"attention/{part}" for part in parts), "mlp/gate", "mlp/up", "mlp/down"}
    assert set(bits[0]) == {f"layers/0/{product}" for product in products}
    assert all(value == 16 for line in bits[:50] for value in line.values())
    assert all(2 <= value < 16 for line in bits[50:] for value in line.values())


@pytest.mark.slow
def test_fliqs_draws_and_resumes(tiny, tmp_path):
    changes = {"recipe": "fliqs_6", **EVERY_STEP, "train.steps": 6}
    lines = assert_resumes(tiny(changes), tmp_path, (3,))
    drawn = {value for line in lines for value in line["bits"].values()}
    assert drawn <= {4, 5, 6, 7, 8} and len(drawn) > 2
    assert all(line["format_entropy"] <= np.log(5) + 1e-5 for line in lines)
    assert {"format_reward", "format_cost"} <= set(lines[0])


@pytest.mark.slow
def test_formats_that_change_do_not_recompile(tiny):
    program = Program(tiny({"recipe": "fliqs_6"}))
    steps_of(program, program.initial_state(), 4, program.batches())
    assert program.train_step._cache_size() == 1
