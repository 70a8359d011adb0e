"""What a method changes in its own formats while it trains: settings of the controllers of the training step."""

from dataclasses import dataclass
from typing import Literal

from lowprec.errors import UsageError


@dataclass(frozen=True)
class PrecisionSwitching:
    """AdaPT (arXiv 2107.13490): word and fraction lengths of each layer's weights, decided anew after every window.

    Push down: the fewest bits whose weights have the histogram of the float32 ones, KL(w ‖ q(w)) <= `tolerance`. Push
    up: one bit more for each window in a row in which the loss did not fall by `progress` of itself while the gradients
    of the layer cancel: diversity Σ‖g‖² / ‖Σg‖² >= `diversity`, which is 1 of independent gradients and 1 / window of
    equal ones. As many integer bits as the largest weight needs; the rest are fraction bits.

    Args:
      window: steps between decisions.
      bins: of the histograms.
      tolerance: in nats.
      lowest, highest: word lengths.
    """

    window: int = 50
    bins: int = 64
    tolerance: float = 1e-2
    progress: float = 1e-3
    diversity: float = 1.0
    lowest: int = 2
    highest: int = 16

    def __post_init__(self):
        if self.window < 1 or self.bins < 2:
            raise UsageError(f"precision is switched after at least 1 step, by at least 2 bins, not {self}")
        if not 2 <= self.lowest <= self.highest <= 16:
            raise UsageError(f"word lengths lie between 2 and 16 bits, not {self.lowest} and {self.highest}")

    def __str__(self):
        return f"word lengths of weights decided every {self.window} steps, {self.lowest} to {self.highest} bits"


@dataclass(frozen=True)
class FormatSearch:
    """FLIQS (arXiv 2308.03290): a policy for each layer learns by REINFORCE, in one run, which format it gets.

    Each step draws a format a layer, which weights and inputs share. Its reward is -loss - strength·|cost/target - 1|;
    the policy takes Adam steps on -(reward - average)·mean log p + e·mean entropy, where e rises by half a cosine from
    0 to `entropy`: in the end each layer has one format, and nothing is trained again.

    Args:
      target: mean bits of a weight ("memory"); of "compute" the mean product of both operands' bits, as root.
      cost: "memory": bits · parameters; "compute": bits of weights · bits of inputs · multiplications.
      delay: share of the run with formats drawn uniformly, before the search begins.
      strength: of the cost in the reward.
      average: decay of the moving average of rewards.
      entropy: the last weight of the entropy.
      learning_rate: of Adam on the logits, which start at 0.5.
    """

    target: float
    cost: Literal["memory", "compute"] = "memory"
    delay: float = 0.1
    strength: float = 1.0
    average: float = 0.99
    entropy: float = 0.5
    learning_rate: float = 5e-3

    def __post_init__(self):
        if self.cost not in ("memory", "compute"):
            raise UsageError(f"the cost of a format is memory or compute, not {self.cost!r}")
        if not (self.target > 0 and 0 <= self.delay < 1 and 0 <= self.average < 1):
            raise UsageError(f"a search has a positive target, a delay and an average from 0 to below 1, not {self}")

    def __str__(self):
        return f"formats searched by REINFORCE under a {self.cost} of {self.target:g} bits a value"


Control = PrecisionSwitching | FormatSearch
