"""What follows from the constants of a law: compute-optimal sizes, critical data sizes, best precisions, crossovers.

Each function takes constants by name, so that `Bootstrap.derived_interval` gives its interval:

    boot.derived_interval(lambda p: compute_optimal(p, 1e21).tokens)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from lowprec.errors import UsageError, require

Params = Mapping[str, float]
# Products in FP4 against FP8; a training step is one forward product and two backward ones.
FP4_SPEEDUP = 2.0
PAIRS = ("fp8:fp8", "fp4:fp8", "fp8:fp4", "fp4:fp4")


@dataclass(frozen=True)
class Optimum:
    """The split of a budget of compute with the least loss.

    Args:
      parameters: N.
      tokens: D.
    """

    parameters: float
    tokens: float

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters


def compute_optimal(params: Params, compute: float, flops: float = 6.0) -> Optimum:
    """The N and D with the least A N^-alpha + B D^-beta at compute = flops · N · D (arXiv 2203.15556, equation 4).

    An outer exponent does not move it. A law with one exponent has beta = alpha.

    Args:
      params: A, B, alpha and beta.
      compute: budget in FLOP.
      flops: FLOP per parameter and token.
    """
    require(compute > 0, "compute", "positive", compute)
    a, b = _need(params, "A"), _need(params, "B")
    alpha = _need(params, "alpha")
    beta = params.get("beta", alpha)
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    share = beta / (alpha + beta)
    return Optimum(g * (compute / flops) ** share, (compute / flops) ** (1 - share) / g)


def critical_tokens(params: Params, parameters: float, exponent: float, mantissa: float, block: float) -> float:
    """The tokens beyond which training in a floating-point format makes the loss worse (arXiv 2501.02423, equation 13).

    Args:
      params: of the law `capybara`.
      parameters: N.
      exponent: bits.
      mantissa: bits, without the sign.
      block: elements that share a scale, at least 2.
    """
    require(block > 1, "block", "above 1; single elements lose nothing", block)
    resolution = (exponent + 0.5) ** params["delta"] * (mantissa + 0.5) ** params["nu"]
    robust = params["d"] * params["gamma"] * parameters ** params["alpha"] * resolution / np.log2(block)
    return float(robust ** (1 / (2 * params["beta"])))


def critical_tokens_ptq(base: Params, gap: Params, parameters: float, bits: float) -> float:
    """The tokens beyond which more training hurts a model that is quantized afterwards (arXiv 2411.04330, §3).

    Args:
      base: B and beta of the loss before.
      gap: of the law `kumar_ptq`.
      parameters: N.
      bits: width after training.
    """
    beta = base.get("beta", base.get("alpha"))
    numerator = base["B"] * beta * parameters ** gap["gamma_N"] * np.exp(bits / gap["gamma_post"])
    return float((numerator / (gap["gamma_D"] * gap["C"])) ** (1 / (gap["gamma_D"] + beta)))


def best_split(params: Params, bits: float) -> tuple[float, float]:
    """The exponent and mantissa bits of the best format of a width, one bit for the sign (arXiv 2501.02423).

    Args:
      params: delta and nu of the law `capybara`.
      bits: of the format, with the sign.
    """
    share = params["delta"] / (params["delta"] + params["nu"])
    return share * bits - 0.5, (1 - share) * bits - 0.5


def retention(params: Params, bits: Mapping[str, float]) -> float:
    """The share of the parameters that remain effective: prod (1 - exp(-bits_x / gamma_x)) (arXiv 2411.04330).

    Args:
      params: of the law `kumar` or `kumar_joint`.
      bits: by the name of its sensitivity, e.g. {"gamma_w": 4}.
    """
    return float(np.prod([-np.expm1(-width / _need(params, name)) for name, width in bits.items()]))


def cheapest_width(params: Params) -> float:
    """The width that costs least for the same loss where cost is N · D · bits: the least bits / retention.

    Args:
      params: of the law `kumar` (all widths equal) or `kumar_joint`.
    """
    names = [name for name in params if name.startswith("gamma")]
    if not names:
        raise UsageError(f"no sensitivity gamma among {', '.join(params)}")
    cost = lambda width: width / retention(params, dict.fromkeys(names, width))
    return float(minimize_scalar(cost, bounds=(0.05, 64), method="bounded").x)


def optimal_precision(params: Params, compute: float, block: float = 128.0) -> float:
    """The width with the least loss at compute = 6/16 · bits · N · D, its bits split best (arXiv 2501.02423, §5).

    Args:
      params: of the law `capybara`.
      compute: budget in FLOP of 16-bit products.
      block: elements that share a scale.
    """

    def least_loss(bits: float) -> float:
        e, m = best_split(params, bits)

        def loss(log_n: float) -> float:
            n = np.exp(log_n)
            row = {"N": n, "D": compute * 16 / (6 * bits * n), "E": e, "M": m, "block": block}
            return _capybara_loss(params, row)

        grid = np.linspace(np.log(1e4), np.log(1e18), 200)
        at = int(np.argmin([loss(x) for x in grid]))
        ends = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
        return float(minimize_scalar(loss, bounds=ends, method="bounded").fun)

    return float(minimize_scalar(least_loss, bounds=(2.1, 24.0), method="bounded").x)


def pair_losses(params: Params, parameters: float, ratio: float, eff_n: float, eff_d: float) -> dict[str, float]:
    """The loss of each forward:backward pair of FP8 and FP4 under two budgets, both counted as if in FP8.

    Serving allows `parameters`, twice as many in FP4; training allows `ratio` tokens per parameter, more where products
    are faster (arXiv 2505.14669, §4.2).

    Args:
      params: A, B, E, alpha, beta and gamma of the base.
      parameters: N that serving allows in FP8.
      ratio: tokens per parameter that training allows in FP8.
      eff_n: efficiency of parameters in FP4 forward.
      eff_d: efficiency of data in FP4 backward.
    """
    losses = {}
    for pair in PAIRS:
        forward, backward = (FP4_SPEEDUP if side == "fp4" else 1.0 for side in pair.split(":"))
        training = 1 / (1 / (3 * forward) + 2 / (3 * backward))
        n = parameters * forward * (eff_n if forward > 1 else 1.0)
        d = parameters * ratio * training / forward * (eff_d if backward > 1 else 1.0)
        inner = params["A"] * n ** -params["alpha"] + params["B"] * d ** -params["beta"]
        losses[pair] = float(params["E"] + inner ** params.get("gamma", 1.0))
    return losses


def best_pair(params: Params, parameters: float, ratio: float, eff_n: float, eff_d: float) -> str:
    """The pair of `pair_losses` with the least loss, e.g. "fp4:fp4"."""
    losses = pair_losses(params, parameters, ratio, eff_n, eff_d)
    return min(losses, key=losses.__getitem__)


def crossover(params: Params, parameters: float, eff_n: float, eff_d: float) -> float:
    """The tokens per parameter from which FP4 in all products is best; nan if that never changes from 0.01 to 1e6.

    Args are those of `pair_losses`.
    """

    def lead(log_ratio: float) -> float:
        losses = pair_losses(params, parameters, np.exp(log_ratio), eff_n, eff_d)
        full = losses.pop("fp4:fp4")
        return full - min(losses.values())

    low, high = np.log(1e-2), np.log(1e6)
    if np.sign(lead(low)) == np.sign(lead(high)):
        return float("nan")
    return float(np.exp(brentq(lead, low, high)))


def _capybara_loss(params: Params, row: Mapping[str, float]) -> float:
    # In numpy: thousands of evaluations of one row.
    knowledge = row["D"] ** params["beta"] / row["N"] ** params["alpha"]
    resolution = (row["E"] + 0.5) ** params["delta"] * (row["M"] + 0.5) ** params["nu"]
    base = params["n"] * row["N"] ** -params["alpha"] + params["d"] * row["D"] ** -params["beta"]
    return params["epsilon"] + base + knowledge * np.log2(row["block"]) / (params["gamma"] * resolution)


def _need(params: Params, name: str) -> float:
    if name not in params:
        raise UsageError(f"no constant {name} among {', '.join(params)}")
    return params[name]
