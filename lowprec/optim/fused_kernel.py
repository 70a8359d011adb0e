"""Adam, decay and learning rate of one parameter as one operation: `lowprec.pallas.adam_update` in a fused step.

What a chain computes its parts say (`specs`); whether there is a kernel for it is asked here, for a chain and for each
of its parameters. What no kernel serves stays with the parts, with the same states and the same results.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import optax

from lowprec.errors import unknown
from lowprec.formats.types import TableFormat
from lowprec.optim.adam import corrections
from lowprec.optim.partial_state import ParameterTree, Part
from lowprec.optim.specs import AdamSpec, DecaySpec, IdentitySpec, RateSpec
from lowprec.optim.state_scales import AbsMax
from lowprec.optim.state_tensor import StateTensor, leaf_key
from lowprec.optim.stochastic_weights import Stochastic
from lowprec.pallas.adam_arithmetic import AdamScalars, Moment, MomentCode
from lowprec.pallas.adam_update import adam_update, why_not_adam_update
from lowprec.pallas.dispatch import IMPLS, choose, say_once
from lowprec.quantizers.qtensor import is_qtensor
from lowprec.typing import Array

_NAME = "the fused step"


class AdamKernel:
    """Of the last parts of a chain.

    Args:
      tree: the parameters.
      parts: all elementwise.
      storage: of the weights; None: they are as they are.
      impl: of `IMPLS`.
    """

    def __init__(self, tree: ParameterTree, parts: list[Part], storage: Any, impl: str):
        if impl not in IMPLS:
            raise unknown("implementation", impl, IMPLS)
        self.tree, self.parts, self.storage, self.impl = tree, parts, storage, impl
        self.specs = [getattr(part.tx, "spec", None) for part in parts]
        self.reason = None if impl == "xla" else self._why_not_chain()

    @cached_property
    def shared(self) -> list[list[Any]]:
        """Of each part, what its state has for no parameter, after the step."""
        return [part.shared_after() for part in self.parts]

    def serves(self, w: Any, update: Any, moments: list[list[Any]]) -> bool:
        """Whether the operation has a kernel for a parameter; if not, says once why."""
        if self.impl == "xla":
            return False
        reasons = self._why_not(w, update, moments) if self.reason is None else dict.fromkeys(_kernels(), self.reason)
        if self.impl == "auto":
            return choose(_NAME, "auto", reasons) != "xla"
        reason = reasons.get(self.impl, next(iter(reasons.values())))
        if reason is not None:
            say_once(_NAME, reason)
        return reason is None

    def update(
        self, index: int, w: Array, update: Array, moments: list[list[Any]], noise: Any
    ) -> tuple[Array, list[list[Any]]]:
        """(w, moments of each part) after the step.

        Args:
          noise: the key of the parameter; None where it is not rounded.
        """
        place, spec = self._place(AdamSpec), self._of(AdamSpec)
        state = self.parts[place].seen(index, moments[place])
        mu, nu = moments[place]
        count, path = optax.safe_increment(state.count), self.tree.paths[index]
        keys = [leaf_key(store.seed, count, path, store.role).words for store in (spec.first, spec.second)]
        words = jnp.stack([*keys, jnp.zeros_like(keys[0]) if noise is None else noise.words])
        w, *new = adam_update(
            w, update, _moment(mu), _moment(nu), self._scalars(index, state), words,
            mu_code=_code(mu), nu_code=_code(nu), impl=self.impl,
        )  # fmt: skip
        stored = [replace(old, codes=x.codes, scales=(x.scales,)) for old, x in zip((mu, nu), new, strict=True)]
        return w, [stored if i == place else old for i, old in enumerate(moments)]

    def _why_not_chain(self):
        kinds = [type(spec) for spec in self.specs if not isinstance(spec, IdentitySpec)]
        if kinds != [AdamSpec, DecaySpec, RateSpec]:
            return "it is not a chain of Adam, decay and learning rate"
        if self._of(RateSpec).learning_rate is None:
            return "it has no learning rate"
        if self._of(AdamSpec).reset_every is not None:
            return "its moments are reset"
        if not (self.storage is None or (isinstance(self.storage, Stochastic) and self.storage.fmt is None)):
            return f"weights are stored by {type(self.storage).__name__}"
        if self.tree.is_like(0):
            return "the parameters are one array, not a tree"
        return None

    def _why_not(self, w, update, moments):
        of_adam = moments[self._place(AdamSpec)]
        for moment in of_adam:
            if not isinstance(moment, StateTensor):
                return dict.fromkeys(_kernels(), "moments are arrays")
            if _code(moment) is None:
                return dict.fromkeys(_kernels(), f"moments are stored in {moment.fmt}")
        if is_qtensor(w):
            return dict.fromkeys(_kernels(), "weights are quantized")
        if w.dtype != jnp.float32 and self.storage is None:
            return dict.fromkeys(_kernels(), f"updates are rounded to {w.dtype} before they are added")
        return why_not_adam_update(w, update, *map(_code, of_adam))

    def _scalars(self, index, state):
        spec, count = self._of(AdamSpec), optax.safe_increment(state.count)
        b1 = spec.b1(state.count) if callable(spec.b1) else spec.b1
        decay, rate = self._of(DecaySpec).weight_decay, self._of(RateSpec).learning_rate
        never = isinstance(decay, int | float) and decay == 0
        values = (
            b1, 1 - b1, spec.b2, 1 - spec.b2, spec.eps, *corrections(b1, spec.b2, count),
            -1 * self._now(RateSpec, index, rate),
            None if never or not self._decays[index] else self._now(DecaySpec, index, decay),
        )  # fmt: skip
        return AdamScalars(*(None if value is None else jnp.asarray(value, jnp.float32) for value in values))

    @cached_property
    def _decays(self):
        return self._of(DecaySpec).leaves(self.tree.join(self.tree.leaves))

    def _now(self, kind, index, value):
        """A number, or what a schedule gives for the updates that a part has seen."""
        if not callable(value):
            return value
        return value(optax.tree_utils.tree_get(self.parts[self._place(kind)].seen(index, []), "count"))

    def _place(self, kind):
        return next(i for i, spec in enumerate(self.specs) if isinstance(spec, kind))

    def _of(self, kind) -> Any:
        return self.specs[self._place(kind)]


def _code(moment: StateTensor) -> MomentCode | None:
    """How a moment is stored, in the words of the kernels; None if they have none for it."""
    fmt, scales = moment.fmt, moment.fmt.scales
    if not isinstance(fmt.element, TableFormat) or not isinstance(scales, AbsMax) or scales.root or moment.size is None:
        return None
    block = min(scales.block, moment.size)
    return MomentCode(fmt.element, block, scales.dtype, scales.signed, fmt.stochastic, fmt.keeps_positive)


def _moment(stored: StateTensor) -> Moment:
    return Moment(stored.codes, stored.scales[0])


def _kernels():
    return [impl for impl in IMPLS if impl.startswith("mosaic")]
