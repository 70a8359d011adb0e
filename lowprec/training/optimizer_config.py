"""The keys `optimizer.*` of a config."""

import math
from dataclasses import dataclass

from lowprec.errors import require


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule; the defaults are the set-up that QuEST and Quartet share, but for the learning rate.

    Attributes:
      name: one of `training.update_rules.names()`; `lowprec optimizers` lists those of `lowprec.optim`.
      lr: the peak learning rate.
      b1: decay of the first moment, momentum (sgd, sgd_sai).
      b2: decay of the second moment.
      eps: added to its root.
      weight_decay: decoupled, times the learning rate; not for norms and biases.
      schedule: of learning rate and weight decay, one of `training.schedules.names()`.
      warmup_fraction: of all steps, over which the learning rate rises from a hundredth.
      final_fraction: of the peak, to which it falls at the last step.
      clip: the largest global norm of the gradient; 0: no clipping.
      quant_lr: peak learning rate of learned quantizer parameters, relative to their size.
      quant_weight_decay: of learned quantizer parameters (PACT's clips, the bit widths of PQT).
      masked_decay: of sparse_adamw: the strength that pulls weights outside of the 2:4 mask towards zero.
      masked_decay_steps: over which it rises from 0.
      freeze_oscillations: weights whose codes oscillate more often than this (a frequency, e.g. 0.02) are frozen for
        the rest of the run; 0: none.
      freeze_oscillations_start: that frequency at the first step, e.g. 0.04, from which it falls along half a cosine
        to freeze_oscillations at the last one; 0: it is the same all along.
      mu_format: of first moments, a name of `optim.state_formats` such as "de4"; "": what the optimizer itself says.
      nu_format: of second moments, such as "log4(stochastic)".
      settings: of the optimizer, those that have no key here: "rank=64 gap=100", "gamma1=0.85 reset_every=500".
        `lowprec optimizers NAME` lists them.
      weights: how parameters are stored: one of `training.weight_storage.names()`.
    """

    name: str = "adamw"
    lr: float = 4e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: str = "one_cycle"
    warmup_fraction: float = 0.1
    final_fraction: float = 0.1
    clip: float = 1.0
    quant_lr: float = 4e-3
    quant_weight_decay: float = 0.0
    masked_decay: float = 6e-5
    masked_decay_steps: int = 10_000
    freeze_oscillations: float = 0.0
    freeze_oscillations_start: float = 0.0
    mu_format: str = ""
    nu_format: str = ""
    settings: str = ""
    weights: str = "f32"

    def __post_init__(self):
        for name in ("lr", "quant_lr"):
            rate = getattr(self, name)
            require(0 <= rate < math.inf, f"optimizer.{name}", "at least 0 and finite", rate)
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", "from 0 to below 1", getattr(self, name))
        require(self.eps > 0, "optimizer.eps", "above 0", self.eps)
        for name in ("weight_decay", "quant_weight_decay", "masked_decay"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", "at least 0", getattr(self, name))
        for name in ("warmup_fraction", "final_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", "from 0 to 1", getattr(self, name))
        require(self.clip >= 0, "optimizer.clip", "at least 0 (0: none)", self.clip)
        require(self.masked_decay_steps >= 1, "optimizer.masked_decay_steps", "at least 1", self.masked_decay_steps)
        limit, start = self.freeze_oscillations, self.freeze_oscillations_start
        require(0 <= limit < 1, "optimizer.freeze_oscillations", "from 0 (none) to below 1", limit)
        need = f"0, or from freeze_oscillations {limit} > 0 to 1"
        require(not start or 0 < limit <= start <= 1, "optimizer.freeze_oscillations_start", need, start)
