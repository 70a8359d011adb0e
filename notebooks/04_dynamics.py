# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What changes while a model trains
#
# Recipes that follow one upon another, formats that a controller sets layer by layer, and attention that can say
# nothing. Everything here is a toy, less than a minute on an idle machine: it shows the mechanisms. What some of them
# earn, over three seeds, is in `experiments/dynamics_tiny`; formulas and sources are in `docs/dynamics.md`.
#
# Run it as a script, `python notebooks/04_dynamics.py` (figures go to a temporary folder, or to that named by
# `LOWPREC_FIGURES`), or as a notebook: `jupytext --to notebook notebooks/04_dynamics.py`.

# %%
from itertools import islice

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from lowprec.analysis.figures import show
from lowprec.analysis.trajectories import trajectory
from lowprec.training.config import resolve
from lowprec.training.program import Program

# A hundred steps take less time than LLVM would need to make them fast.
jax.config.update("jax_disable_most_optimizations", True)
STEPS = 100
CONFIG = {
    "data.name": "markov_text",
    "data.seq_len": 16,
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "train.steps": STEPS,
    "train.batch_size": 16,
}


def build(recipe, **model):
    return Program(resolve({**CONFIG, "recipe": recipe, **{f"model.{key}": value for key, value in model.items()}}))


def copied(state):
    return jax.tree.map(jnp.copy, state)


def advance(program, state, start=0, stop=STEPS):
    """(state, what each step measured) after the steps from start to stop; the state that is given is not kept."""
    measured = []
    for step, batch in enumerate(islice(program.batches(), start, stop), start):
        if step and program.next_start(None) == step:
            state = program.enter(program.stage + 1, state)
        state, metrics = program.train_step(state, program.put(batch))
        measured.append((program.now, metrics))
    lines = [stage.read_metrics(np.asarray(metrics)) for stage, metrics in measured]
    return state, [{"step": step, **line} for step, line in enumerate(lines, start + 1)]


# %% [markdown]
# ## From 16 bits to 1.58
#
# `bf16 then bitnet158 at 40%` trains in bf16 and rounds weights to {-1, 0, 1} from 40% of the steps on. `over 60%` goes
# there on a ramp, B(x) + λ · (Q(x) - B(x)) with λ from 0 to 1 at the last step. All runs see the same data, so that
# their losses can be subtracted; up to the switch they are one run.

# %%
SWITCH = 2 * STEPS // 5
SCHEDULES = ("bf16", "bf16 then bitnet158 at 40%", "bf16 then bitnet158 at 40% over 60%")

plain = build("bf16")
start = plain.initial_state()
at_switch, before = advance(plain, copied(start), stop=SWITCH)
ends, losses = {}, {}
for recipe in SCHEDULES:
    ends[recipe], after = advance(plain if recipe == "bf16" else build(recipe), copied(at_switch), SWITCH)
    losses[recipe] = np.array([line["loss"] for line in before + after])
figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
for recipe in SCHEDULES[1:]:
    excess = losses[recipe] - losses["bf16"]
    panel.plot(np.arange(1, STEPS + 1), excess, label=recipe)
    print(f"{recipe}: at most {excess.max():.3f} nats above bf16, {excess[-20:].mean():.3f} at the end")
panel.set(xlabel="step", ylabel="training loss minus that of bf16")
panel.legend()
show(figure, "switch")

# %% [markdown]
# ## Bits that are decided during training
#
# `adapt` shortens the fixed-point words of a layer's weights until their histogram suffers, once every fifty steps.
# What it decides is state of the training step, and stands in `metrics.jsonl`; nothing is compiled anew.

# %%
program = build("adapt")
_, lines = advance(program, program.initial_state())
found = trajectory(lines)
figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
for layer, bits in found.bits.items():
    panel.step(found.steps, bits, where="post", linewidth=0.8, label=layer)
panel.step(found.steps, found.mean, where="post", color="black", linewidth=1.5, label="mean")
panel.set(xlabel="step", ylabel="bits")
panel.legend(fontsize=6)
print({layer: f"{bits[0]:.0f} → {bits[-1]:.0f}" for layer, bits in found.bits.items()})
show(figure, "bits")

# %% [markdown]
# `fliqs_6` draws a format a layer and step, and learns by REINFORCE which ones pay, under a cost of six bits a weight.
# A hundred steps are far too few for it, its logits move by at most .005 a step; a faster one is in the figure of
# `experiments/dynamics_tiny`.
#
# ## Attention sinks
#
# Softmax hands out a whole unit of attention, whether there is anything to see or not. Heads learn to waste it on the
# first token. Softpick and clipped softmax can give weights that are exactly 0, and a gate can close a head. The sink
# rate is the fraction of heads that give the first token more than .3 on average; in windows of 16 uniform attention
# gives it .21.

# %%
FORMS = {
    "softmax": {},
    "clipped": {"attention": "clipped"},
    "softpick": {"attention": "softpick"},
    "gate": {"gate": "linear"},
}
for name, model in FORMS.items():
    program, state = plain, ends["bf16"]
    if model:
        program = build("bf16", **model)
        # Those without parameters of their own begin where softmax began.
        state, _ = advance(program, program.initial_state() if "gate" in model else copied(start))
    seen = program.measure_outliers(state.variables).by_number()
    print(name, {number: f"{np.mean(seen[number]):.3f}" for number in ("sink_rate", "sparsity", "residual_kurtosis")})

# %% [markdown]
# After so few steps none of them has sinks, but most weights of clipped softmax and softpick are exactly 0.
# Sinks and outliers grow over billions of tokens; here one sees how they are measured. In a run, `eval.outliers=true`
# writes these numbers with each evaluation, and `lowprec.analysis.outliers` draws them.
