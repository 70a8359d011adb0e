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
# # Optimizers of few bits
#
# Why a second moment that is rounded to nearest freezes, what a spike of the gradient does to Adam, and where the
# memory goes. Toys, seconds each; whether it matters to a language model is asked by `experiments/optimizers_tiny`, and
# formulas and sources are in `docs/optimizers.md`.
#
# Run it as a script, `python notebooks/02_optimizers.py` (figures go to a temporary folder, or to that named by
# `LOWPREC_FIGURES`), or as a notebook: `jupytext --to notebook notebooks/02_optimizers.py`.

# %%
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from lowprec import optim

# What runs here takes less time than LLVM would need to make it fast.
jax.config.update("jax_disable_most_optimizations", True)
FIGURES = Path(os.environ.get("LOWPREC_FIGURES") or tempfile.mkdtemp(prefix="lowprec-figures-"))
FIGURES.mkdir(parents=True, exist_ok=True)


def show(figure, name):
    figure.savefig(FIGURES / f"{name}.png", dpi=110)
    if matplotlib.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)
    print(f"figure: {FIGURES / name}.png")


# %% [markdown]
# ## Second moments freeze
#
# Adam's `v` is an average of `g²` over 1 / (1 - b2) steps. In each step it shrinks by at most the fraction 1 - b2, here
# a thousandth. If that is less than half the spacing of the format it is stored in, rounding to nearest puts it back
# where it was. Below, gradients are 1 at first; then all but one of each block fall to .1. Float32 follows.

# %%
STEPS, FALL = 2500, 500
FORMATS = ("f32", "de8", "cmp8@128", "lin4", "log8(stochastic)", "log4(stochastic)")


def trajectory(nu_format):
    """v of the elements whose gradient falls, a number a step."""
    rule = optim.scale_by_adam(0.9, 0.999, nu_format=nu_format, min_size=0)
    ones = jnp.ones((16, 128))
    fallen = ones.at[:, 1:].set(0.1)

    def step(state, t):
        _, state = rule.update({"w": jnp.where(t < FALL, ones, fallen)}, state)
        return state, jnp.mean(optim.load(state.nu["w"])[:, 1:])

    return np.asarray(jax.lax.scan(step, rule.init({"w": ones}), jnp.arange(STEPS))[1])


found = {name: trajectory(name) for name in FORMATS}
figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
for name, v in found.items():
    panel.plot(v, label=name, color="black" if name == "f32" else None)
    print(f"{name:18} v at the end {v[-1]:.3f}, {v[-1] / found['f32'][-1]:.2f} of float32's")
panel.set(xlabel="step", ylabel="v", yscale="log")
panel.legend()
show(figure, "freezing")

# %% [markdown]
# To nearest, codes stay where they were when gradients fell, not because 8 bits are few, but because they always round
# back. As the largest element of a block goes on rising, and with it the scale, the others even rise with it: with
# `de8` and `lin4`, whose lines are one, v ends 15 times too large, and the step of these weights four times too small.
# The scales of `cmp8` are bfloat16 to nearest and freeze themselves: its v cannot even rise. Stochastic rounding, with
# scales in float32, follows on average, with noise: that of powers of two is larger than that of powers of 2^(1/16).
#
# ## A spike
#
# 4096 gradients of noise, and in one step a whole tensor of them a thousand times larger. Adam moves six times as far
# as usual at once and then hardly at all, for v remembers the spike for a thousand steps. Stable-SPAM scales the
# tensor down to its usual norm first.

# %%
SPIKE, AFTER = 200, 60
OPTIMIZERS = {
    "adam": optim.adam(1.0),
    "stable_spam": optim.stable_spam(1.0),
    "stable_adam4, b2 0.999": optim.stable_adam4(1.0, b2=0.999, min_size=0),
}
noise = 1e-3 * jax.random.normal(jax.random.key(0), (SPIKE + AFTER, 1, 4096))
noise = noise.at[SPIKE].multiply(1000)

figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
for name, optimizer in OPTIMIZERS.items():
    weights = {"w": jnp.zeros((1, 4096))}

    def step(state, g, optimizer=optimizer, weights=weights):
        updates, state = optimizer.update({"w": g}, state, weights)
        return state, jnp.sqrt(jnp.mean(updates["w"] ** 2))

    sizes = np.asarray(jax.lax.scan(step, optimizer.init(weights), noise)[1])
    panel.plot(np.arange(-30, AFTER), sizes[SPIKE - 30 :], label=name)
    before = sizes[SPIKE - 30 : SPIKE].mean()
    at, later = sizes[SPIKE] / before, sizes[SPIKE + 40] / before
    print(f"{name:23} at the spike {at:.2f} of before, 40 steps later {later:.2f}")
panel.set(xlabel="steps after the spike", ylabel="root mean square update / learning rate", yscale="log")
panel.legend()
show(figure, "spike")

# %% [markdown]
# ## Memory
#
# Bytes of state a parameter, of a matrix of a million. Nothing is allocated: shapes are enough.

# %%
million = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
sizes = {}
for name in optim.names():
    state = jax.eval_shape(optim.get(name)(1e-3).init, million)
    sizes[name] = optim.state_bytes(state) / 2**20
figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
names = sorted(sizes, key=sizes.get, reverse=True)
panel.barh(names, [sizes[name] for name in names])
for name in names:
    print(f"{name:12} {sizes[name]:.3f}")
panel.set(xlabel="bytes a parameter")
show(figure, "memory")

# %% [markdown]
# That saves nothing if a step loads all moments at once. `optim.fused_step` takes one parameter after the other; what
# XLA needs for it beside its arguments is a fraction of what the plain update needs.

# %%
layers = {f"layer{i}": {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)} for i in range(6)}
optimizer = optim.adam4(1e-3)
fused = optim.fused_step(optimizer)
state = jax.eval_shape(optimizer.init, layers)


def plain(params, grads, state):
    updates, state = optimizer.update(grads, state, params)
    return optim.apply_updates(params, updates), state


for name, function in (("plain", plain), ("fused", fused.step)):
    compiled = jax.jit(function, donate_argnums=(0, 2)).lower(layers, layers, state).compile()
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{name}: {megabytes:.1f} MiB beside its arguments; the moments in float32 would be {6 * 2:.0f} MiB")
