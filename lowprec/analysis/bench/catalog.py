"""Which cases there are on a machine."""

from collections.abc import Callable

from lowprec.analysis.bench import (
    adam_cases,
    llama_steps,
    optimizer_steps,
    products,
    quantizer_cases,
    recipe_steps,
    xla_products,
)
from lowprec.analysis.bench.case import Case, by_name
from lowprec.analysis.bench.runner import Results
from lowprec.pallas.target import Target

# Of a device's usual rates; below, it is throttled, shared, or not what it says.
_USUAL = 0.8


def cpu_cases() -> dict[str, Case]:
    """Steps of recipes and of optimizers, as ratios; by their names."""
    return by_name([*recipe_steps.recipe_steps(), *optimizer_steps.optimizer_steps()])


def accelerator_cases() -> dict[str, Case]:
    """By their names, what matters most first: a device may be lent for minutes."""
    return by_name(
        [
            *xla_products.calibration(),
            *products.correctness(),
            *quantizer_cases.correctness(),
            *adam_cases.correctness(),
            *xla_products.xla_products(),
            *products.block_products(),
            *quantizer_cases.quantizers(),
            *adam_cases.adam_cases(),
            *products.other_products(),
            *llama_steps.llama_steps(),
        ]
    )


def cases_of(device: Target) -> dict[str, Case]:
    """Those that make sense on a device."""
    return cpu_cases() if device.platform == "cpu" else accelerator_cases()


def is_calibration(name: str) -> bool:
    """Whether the tables of other cases refer to it."""
    return name.startswith("calibration/")


def warn_if_slow(results: Results, say: Callable[[str], None] = print) -> None:
    """Notes which of its usual rates the device does not reach by a fifth, where they are known."""
    from lowprec.analysis.bench.machine import peaks_of

    peaks = peaks_of(results.machine.get("device"))
    if peaks is None:
        return
    for name, rate, usual in (
        (xla_products.COPY, "gbps", (peaks.usual_copy or 0) / 1e9),
        (xla_products.BFLOAT16, "tflops", (peaks.usual_bfloat16 or 0) / 1e12),
    ):
        found = results.measured(name, rate)
        if found and found < _USUAL * usual:
            text = f"{name} reaches {found:,.0f} of the usual {usual:,.0f} {rate}: this device is slower than others"
            if text not in results.notes:
                results.note(text)
                say(f"warning: {text}")
