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
# # What recipes do to one product
#
# A linear layer computes y = x · w; training needs dx = dy · wᵀ and dw = xᵀ · dy as well. A recipe says how each of the
# six operands is quantized. Here we look at one such product: how large the errors are, which of them average away,
# and how the gradient passes through a rounding. No model is trained.
#
# Run it as a script, `python notebooks/01_recipes.py` (figures go to a temporary folder, or to that named by
# `LOWPREC_FIGURES`), or as a notebook: `jupytext --to notebook notebooks/01_recipes.py`. It takes less than a minute.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from lowprec import recipes
from lowprec.analysis.figures import show
from lowprec.analysis.product_errors import product_errors
from lowprec.quantizers import Clip, DifferentiableGradient, Quantizer, StraightThrough, Trust

# %% [markdown]
# ## One draw
#
# Relative squared error, Σ(found − exact)² / Σ exact², of y, dx and dw for M = K = N = 256. Left: Gaussian operands.
# Right: the same with two of the features of x and two of the rows of dy fifty times as large, as activations and
# gradients of trained models have them.

# %%
NAMES = ("bf16", "fp8", "mxfp8", "int8_full", "nvfp4", "quartet2", "quartet", "quest_4")
PRODUCTS = ("y", "dx", "dw")

figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for panel, data in zip(panels, ("gaussian", "outliers"), strict=True):
    found = {name: product_errors(name, data) for name in NAMES}
    for offset, product in zip((-0.22, 0, 0.22), PRODUCTS, strict=True):
        heights = [getattr(found[name], product) for name in NAMES]
        panel.bar(np.arange(len(NAMES)) + offset, heights, width=0.2, label=product)
    panel.set(yscale="log", title=data, xticks=range(len(NAMES)), ylim=(1e-6, 1))
    panel.set_xticklabels(NAMES, rotation=35, ha="right")
    print(data, {name: f"{errors.y:.2g} {errors.dx:.2g} {errors.dw:.2g}" for name, errors in found.items()})
panels[0].set_ylabel("relative squared error")
panels[0].legend()
show(figure, "errors")

# %% [markdown]
# - Eight-bit floats with three bits of mantissa (`fp8` forward, .0014) lie between bfloat16 and four bits; its
#   gradients have two bits of mantissa (e5m2) and more error.
# - `int8_full` has the least error of the 8-bit recipes on Gaussian data. Its range is what it lacks: outliers
#   multiply the errors of y and dw by ten. Floats hardly notice.
# - `mxfp8` is no better than `fp8`, though its blocks are 32 values. The scale is a power of two rounded down (OCP
#   Microscaling), and what then exceeds 448 saturates. `fwd=e4m3fn@1x32/e8m0.ceil` does without that.
# - `quartet` (MXFP4, arXiv 2505.14669) has by far the largest errors: its forward scale, a power of two from the
#   standard deviation of the block, rounded down, clips and shrinks. Its gradients are those of the clipped values.
# - `quest_4` (arXiv 2502.05003) quantizes the forward product alone. Its rotation by blocks of 128 makes it indifferent
#   to the outliers.

# %% [markdown]
# ## What averages away
#
# Training sums gradients over many steps. Noise averages away, a bias does not. Below: the error of the *mean* of n
# backward passes with different keys, about the exact gradient of the same quantized forward product, so that the
# error of the backward pass stands alone. Without bias it falls as 1/n (dotted); a bias is a floor.

# %%
STOCHASTIC = ("nvfp4", "quartet2", "tetrajet", "quartet", "quartet_rtn", "int8_full")
DRAWS = 256

means = {name: product_errors(name, draws=DRAWS, size=128) for name in STOCHASTIC}
counts = np.arange(1, DRAWS + 1)
figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for panel, product in zip(panels, ("dx", "dw"), strict=True):
    for name, errors in means.items():
        panel.loglog(counts, getattr(errors, f"mean_{product}"), label=name)
    panel.loglog(counts, 0.05 / counts, "k:", label="1/n")
    panel.set(title=product, xlabel="n")
panels[0].set_ylabel("error of the mean of n draws")
panels[0].legend()
show(figure, "bias")

for name, errors in means.items():
    pairs = ((errors.mean_dx[0], errors.mean_dx[-1]), (errors.mean_dw[0], errors.mean_dw[-1]))
    print(name.ljust(12), "  ".join(f"{first:.2g} → {last:.2g} (÷ {first / last:.0f})" for first, last in pairs))

# %% [markdown]
# - `quartet2` (arXiv 2601.22813), `tetrajet` and `quartet` follow the line to the end: no bias. `quartet2` starts
#   lower, since it rounds to nearest and corrects the scales of rotated blocks (MS-EDEN), where the others round each
#   value at random.
# - `quartet_rtn` rounds to nearest after a rotation with new signs. It starts at half the error of `quartet` and
#   flattens: values of e2m1 rounded to nearest shrink, signs or not. Beyond a hundred draws `quartet` is better.
# - `nvfp4` (arXiv 2509.25149): dx nearly follows the line; its stochastic rounding clips a little where the scale of a
#   block was rounded down. dw has a floor: x is taken anew from the original and rounded to nearest, so it is the
#   gradient of another forward product.
# - `int8_full`: dy is rounded stochastically, w and x once more to nearest along another axis. That error does not
#   average, but it is small.
#
# Which matters more in training, the noise of a draw or the bias, is a question for experiments: the authors' logs of
# Quartet II have `quartet_rtn` ahead of `quartet`, whatever the theory. `experiments/recipes_tiny` has ours.

# %% [markdown]
# ## How the gradient passes
#
# Rounding has no useful derivative, so recipes replace it. Four factors by which the gradient of a rounded value is
# multiplied, on the grid of e2m1 (values 0, ½, 1, 1½, 2, 3, 4, 6):

# %%
ESTIMATORS = {
    "straight-through": StraightThrough(),
    "clip": Clip(),
    "trust, 6/15": Trust(6 / 15),
    "dge, k = 5, cap 3": DifferentiableGradient(),
}

x = jnp.linspace(-8, 8, 4001)
rounded = Quantizer("e2m1fn").round(x, -1)
figure, panels = plt.subplots(len(ESTIMATORS), 1, figsize=(9, 8), sharex=True, layout="constrained")
for panel, (name, estimator) in zip(panels, ESTIMATORS.items(), strict=True):
    factor = estimator.factor(x, rounded)
    factor = np.ones(x.shape) if factor is None else np.asarray(factor, np.float64)
    panel.plot(x, factor, color="C3")
    panel.set(ylabel=name, ylim=(-0.1, 3.2))
    inner = np.abs(np.asarray(x)) < 6
    print(f"{name}: mean inside the range {factor[inner].mean():.3f}")
panels[-1].set_xlabel("scaled value")
panels[0].plot(x, rounded.values / 2, color="0.7", label="rounded value / 2")
panels[0].set_ylim(-3.2, 3.2)
panels[0].legend(loc="lower right")
show(figure, "estimators")

# %% [markdown]
# - **Clip** stops the gradient of what saturated (`quartet`).
# - **Trust** (QuEST, arXiv 2502.05003) stops it wherever rounding moved a value too far: on this grid also inside the
#   range, in the wide cells from 2 on. On equally spaced grids it is clip with a margin of half a step.
# - **The differentiable gradient** (arXiv 2501.17116, `ms_fp4`) is large between two values and small at them. Its mean
#   over a cell is 0.59 with the published cap, not 1: gradients of weights shrink. Adam does not see that, SGD does.

# %% [markdown]
# ## Two recipes side by side
#
# What is different between two methods is a difference of two values. `lowprec recipes compare nvfp4 quartet2` prints
# the same.

# %%
print(recipes.comparison(["nvfp4", "quartet2"]))

# %% [markdown]
# Pages on all recipes, with formulas, sources and traps, and how to write one's own: `docs/recipes`.
