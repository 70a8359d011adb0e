"""Adam and AdamW whose moments are stored in few bits, or in float32."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowprec.errors import unknown
from lowprec.optim.descent import Mask, as_float32, descent
from lowprec.optim.labels import Chain, Elementwise, chain, elementwise
from lowprec.optim.specs import AdamSpec
from lowprec.optim.state_formats import StateFormat
from lowprec.optim.stored_moments import MomentStore
from lowprec.typing import Array, Float

RESETS = ("paper", "repo")


class ScaleByAdamState(NamedTuple):
    """Moments in the structure of the parameters, arrays or `StateTensor`s.

    Attributes:
      count: updates so far.
      resets: how often the moments were set to zero.
    """

    count: jax.Array  # type: ignore[assignment]  # tuples have a method of this name
    mu: Any
    nu: Any
    resets: jax.Array


def bias_correction(decay: float | Array, count: Array) -> Float[Array, ""]:
    """1 - decay^count, which float32 would cancel for a decay near 1."""
    if isinstance(decay, int | float):
        return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))
    return -jnp.expm1(count * jnp.log(decay))


def corrections(b1: float | Array, b2: float | Array, steps: Array) -> tuple[Array, Array]:
    """What moments are multiplied by in their update number `steps`: 1 / (1 - b1^t), 1 / (1 - b2^t).

    As optax has it, whose updates these are: `bias_correction` is exact, and 1e-5 off of the first of them. Products
    with reciprocals: XLA rewrites quotients by scalars, in one program so and in another otherwise.
    """
    return 1 / (1 - b1**steps), 1 / (1 - b2**steps)


def since_reset(count: Array, every: int | None) -> Array:
    """The number of an update, which starts at 1 again with each update that is a multiple of `every`."""
    return count if every is None else jnp.where(count < every, count, count % every + 1)


def scale_by_adam(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    *,
    mu_format: str | StateFormat | None = None,
    nu_format: str | StateFormat | None = None,
    min_size: int | None = None,
    skip: str | None = None,
    reset_every: int | None = None,
    reset: str = "paper",
    seed: int | Array = 0,
) -> Elementwise:
    """Adam (Kingma & Ba, arXiv 1412.6980), its moments in state formats. Of each element, t = 1, 2, …:

        m ← b1·m + (1 - b1)·g,  v ← b2·v + (1 - b2)·g²
        update = (m / (1 - b1^t)) / (√(v / (1 - b2^t)) + eps)

    The update uses the new moments as they are before they are stored. All in float32, also for bfloat16 gradients.

    A second moment that is stored with rounding to nearest cannot decay where half the spacing of its format is
    larger than 1 - b2: it freezes. "log8(stochastic)" and "log4(stochastic)" do not.

    Every `reset_every` updates the moments are set to zero and t starts at 1 again (Stable-SPAM, arXiv 2502.17055):
    before this update, as the paper has it. In the authors' code this update is made from the old moments with t = 1,
    its gradient is lost, and the next update has t = 2.

    Args:
      b1: a number, or a schedule by the number of updates before; the correction is that of the current value.
      mu_format: of m, e.g. "de4", "cmp8@128"; None: float32.
      nu_format: of v, e.g. "log4(stochastic)"; None: float32.
      min_size: leaves of fewer elements stay in float32; None: of fewer than 4096. `optax.inject_hyperparams` would
        trace a number: name it there among the static_args.
      skip: regular expression of paths that do.
      reset_every: updates between resets; None: there are none.
      reset: "paper" or "repo".
      seed: of stochastic rounding; the noise depends on it, the step, the path and the index of the element alone.
    Raises:
      UsageError: (a ValueError) for an unknown format or reset.
    """
    if reset not in RESETS:
        raise unknown("reset", reset, RESETS)
    first = MomentStore("mu", mu_format, True, min_size, skip, seed)
    second = MomentStore("nu", nu_format, False, min_size, skip, seed)

    def init(params):
        return ScaleByAdamState(jnp.int32(0), first.zeros(params), second.zeros(params), jnp.int32(0))

    def update(updates, state, params=None, *, rows=None, **extra):
        del params, extra
        count = optax.safe_increment(state.count)
        resets = jnp.bool_(False) if reset_every is None else count % reset_every == 0
        cleared = lambda moment: moment if reset_every is None else jax.tree.map(lambda x: _unless(resets, x), moment)
        decay = b1(state.count) if callable(b1) else b1
        grads, mu, nu = as_float32(updates), first.load(state.mu), second.load(state.nu)
        if reset == "paper":
            mu, nu = cleared(mu), cleared(nu)
        mu = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, nu, grads)
        if rows is not None:
            # Those of a few rows are small; XLA would compute them again for each of their codes, scales and uses.
            mu, nu = lax.optimization_barrier((mu, nu))
        steps = since_reset(count, reset_every)
        correct1, correct2 = corrections(decay, b2, steps)
        scaled = jax.tree.map(lambda m, v: m * correct1 / (jnp.sqrt(v * correct2) + eps), mu, nu)
        if reset == "repo":
            mu, nu = cleared(mu), cleared(nu)
        stored = (first.store(mu, state.mu, count, rows), second.store(nu, state.nu, count, rows))
        return scaled, ScaleByAdamState(count, *stored, state.resets + resets)

    spec = AdamSpec(b1, b2, eps, first, second, reset_every)
    return elementwise(optax.GradientTransformationExtraArgs(init, update), spec)


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    mask: Mask = None,
    mu_format: str | StateFormat | None = None,
    nu_format: str | StateFormat | None = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """w ← w - lr · (Adam + weight_decay · w): `scale_by_adam`, then decay that is decoupled (arXiv 1711.05101).

    Without formats it is `optax.adam`, whose moments follow the dtype of the parameters, which these never do.

    Args:
      mask: of the parameters that decay, as in `optax.adamw`.
      mu_format, nu_format, min_size, skip, seed: see `scale_by_adam`.
    """
    rule = scale_by_adam(b1, b2, eps, mu_format=mu_format, nu_format=nu_format, min_size=min_size, skip=skip, seed=seed)
    return chain(rule, *descent(learning_rate, weight_decay, mask))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    *,
    mask: Mask = None,
    mu_format: str | StateFormat | None = None,
    nu_format: str | StateFormat | None = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """`adam` with the decay of `optax.adamw`."""
    return adam(
        learning_rate, b1, b2, eps, weight_decay, mask=mask,
        mu_format=mu_format, nu_format=nu_format, min_size=min_size, skip=skip, seed=seed,
    )  # fmt: skip


def adam8(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    mask: Mask = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """`adam` with 2.03 bytes of state a parameter: m companded, to nearest; v in powers of 2^(1/16), stochastically.

    Both decode without a table. The blocks of m, 128, are longer than those of FlashOptim, whose map it is.
    """
    return adam(
        learning_rate, b1, b2, eps, weight_decay, mask=mask,
        mu_format="cmp8@128", nu_format="log8(stochastic)", min_size=min_size, skip=skip, seed=seed,
    )  # fmt: skip


def adam4(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    mask: Mask = None,
    min_size: int | None = None,
    skip: str | None = None,
    seed: int | Array = 0,
) -> Chain:
    """`adam` with 1.06 bytes of state a parameter: m in the dynamic exponent map, v in powers of two, stochastically.

    `stable_adam4` has what makes it robust.
    """
    return adam(
        learning_rate, b1, b2, eps, weight_decay, mask=mask,
        mu_format="de4", nu_format="log4(stochastic)", min_size=min_size, skip=skip, seed=seed,
    )  # fmt: skip


def _unless(condition, x):
    return jnp.where(condition, 0, x)
