"""Do methods that change over time earn it? Against their plain baselines, three seeds, paired data.

    python -m experiments.dynamics_tiny.study

Trains a tiny Llama by every variant below; results are added to results.jsonl as they come, what is there is not
repeated. Prints the tables and the claims, and draws figure.png.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.paired import SEEDS, Gap, command_line, numbers, train_missing, verdict
from lowprec import recipes
from lowprec.recipes import FormatSearch, Recipe

STEPS, SWITCH, RAMP = 150, 60, 15
CONFIG = {
    "data.seq_len": 64,
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "train.steps": STEPS,
    "train.batch_size": 16,
    "optimizer.lr": 2e-3,  # the best for bf16 in experiments/recipes_tiny
    "eval.batches": 20,
}


@dataclass(frozen=True)
class Variant:
    """A recipe or a schedule of them, and the plain variant to compare it with."""

    recipe: str | Recipe
    baseline: str = "bf16"


# Of a policy twenty times as fast as the paper's, which would still draw uniformly at the end of so short a run.
FAST_SEARCH = replace(recipes.get("fliqs_6"), control=FormatSearch(6.0, learning_rate=0.1))

VARIANTS = {
    "bf16": Variant("bf16"),
    "bitnet158": Variant("bitnet158"),
    "switch": Variant("bf16 then bitnet158 at 40%", "bitnet158"),
    "switch, ramp": Variant("bf16 then bitnet158 at 40% over 10%", "bitnet158"),
    "switch, reset": Variant("bf16 then bitnet158 at 40% reset", "bitnet158"),
    "int6_qat": Variant("int6_qat"),
    "adapt": Variant("adapt", "int6_qat"),
    "fliqs_6, fast": Variant(FAST_SEARCH, "int6_qat"),
}
SWITCHES = ("switch", "switch, ramp", "switch, reset")
CONTROLLED = ("adapt", "fliqs_6, fast")

# (claim, of which number, the variant that should have more, the variant that should have less)
CLAIMS = (
    ("a switch beats 1.58 bits from the start", "loss", "bitnet158", "switch"),
    ("a ramp improves the end", "loss", "switch", "switch, ramp"),
    ("a ramp lowers the spike", "spike", "switch", "switch, ramp"),
    ("the optimizer's state is worth keeping", "loss", "switch, reset", "switch"),
    ("a reset raises the spike", "spike", "switch, reset", "switch"),
    ("switched word lengths beat six bits everywhere", "loss", "int6_qat", "adapt"),
    ("searched formats beat six bits everywhere", "loss", "int6_qat", "fliqs_6, fast"),
)


def run(label: str, seed: int) -> dict:
    """One run: its losses in nats a token and, of a controller, the mean bits of the layers at each step."""
    import numpy as np

    from lowprec.training.config import resolve
    from lowprec.training.program import Program

    program = Program(resolve({**CONFIG, "seed": seed}))
    stages = recipes.parse_schedule(VARIANTS[label].recipe).stages(STEPS, CONFIG["model.layers"])
    # A config takes recipes by name; the search here has none.
    program.stages = tuple(replace(program.now, stage=stage) for stage in stages)
    state, batches, measured = program.initial_state(), iter(program.batches()), []
    for step in range(STEPS):
        if step and program.next_start(None) == step:
            state = program.enter(program.stage + 1, state)
        state, metrics = program.train_step(state, program.put(next(batches)))
        measured.append((program.now, metrics))
    lines = [stage.read_metrics(np.asarray(metrics)) for stage, metrics in measured]
    record = {
        "variant": label,
        "seed": seed,
        "eval_loss": program.evaluate(state.variables).quantized.loss,
        "train_loss": [round(line["loss"], 4) for line in lines],
    }
    if "bits" in lines[-1]:
        record["bits"] = [round(sum(line["bits"].values()) / len(line["bits"]), 3) for line in lines]
    if "format_entropy" in lines[-1]:
        record["entropy"] = lines[-1]["format_entropy"]
    return record


def measures(path: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Number -> label -> seed -> value, from a results.jsonl.

    "loss" on held-out text; "spike": by how much the training loss exceeds that of bf16 on the same data at most, from
    the switch to ten steps after its ramp (in all variants, whether they have one or not).
    """
    training, window = numbers(path, "train_loss"), slice(SWITCH, SWITCH + RAMP + 10)
    spikes = {
        label: {seed: max(_minus(losses, training["bf16"][seed])[window]) for seed, losses in training[label].items()}
        for label in SWITCHES
    }
    return {"loss": numbers(path), "spike": spikes}


def report(path: Path) -> str:
    """The tables of losses, of spikes, of bits and of claims."""
    from lowprec.analysis.table import markdown_table

    found, bits, seeds = measures(path), numbers(path, "bits"), [f"seed {seed}" for seed in SEEDS]
    loss, rows = found["loss"], []
    for label, variant in VARIANTS.items():
        plain = "" if label == variant.baseline else variant.baseline
        gap = str(Gap.between(loss, label, plain)) if plain else ""
        rows.append((label, *(f"{loss[label][seed]:.4f}" for seed in SEEDS), plain, gap))
    tables = [markdown_table(("held-out loss", *seeds, "baseline", "minus it"), rows)]
    rows = [(label, *(f"{found['spike'][label][seed]:+.4f}" for seed in SEEDS)) for label in SWITCHES]
    tables.append(markdown_table(("spike", *seeds), rows))
    rows = []
    for label in CONTROLLED:
        means = [sum(bits[label][seed]) / STEPS for seed in SEEDS]
        rows.append((label, *(f"{bits[label][seed][-1]:.2f}" for seed in SEEDS), f"{sum(means) / len(means):.2f}"))
    tables.append(markdown_table(("bits at the end", *seeds, "mean over the run"), rows))
    verdicts = []
    for claim, number, more, less in CLAIMS:
        gap = Gap.between(found[number], more, less)
        verdicts.append((claim, str(gap), verdict(gap)))
    return "\n\n".join([*tables, markdown_table(("claim", "difference", "seen"), verdicts)])


def draw(path: Path, output: Path) -> None:
    """The loss around the switch, the distance of each variant from its baseline, and bits over the run."""
    from lowprec.analysis.figures import new_figure, save_figure

    figure = new_figure(13, 4.5)
    left, middle, right = figure.subplots(1, 3)
    training, loss, bits = numbers(path, "train_loss"), numbers(path), numbers(path, "bits")
    for color, label in enumerate((*SWITCHES, "bitnet158")):
        for seed in SEEDS:
            excess = _minus(training[label][seed], training["bf16"][seed])
            left.plot(excess, color=f"C{color}", linewidth=0.9, alpha=0.7, label="" if seed else label)
    left.axvline(SWITCH, color="0.6", linewidth=1)
    left.set(xlabel="step", ylabel="training loss minus that of bf16", xlim=(SWITCH - 15, STEPS))
    left.legend(fontsize=8)
    labels = [label for label, variant in VARIANTS.items() if label != variant.baseline]
    for row, label in enumerate(reversed(labels)):
        gaps = _minus(*([loss[each][seed] for seed in SEEDS] for each in (label, VARIANTS[label].baseline)))
        middle.plot(gaps, [row] * len(gaps), "o", color="C0", alpha=0.6)
    middle.set_yticks(range(len(labels)), [f"{label} − {VARIANTS[label].baseline}" for label in reversed(labels)])
    middle.tick_params(axis="y", labelsize=8)
    middle.axvline(0, color="0.6", linewidth=1)
    middle.set_xlabel("difference of held-out loss, nats/token")
    for color, label in enumerate(CONTROLLED):
        for seed in SEEDS:
            right.plot(bits[label][seed], color=f"C{color}", linewidth=0.9, alpha=0.7, label="" if seed else label)
    right.set(xlabel="step", ylabel="bits, mean over the layers")
    right.legend(fontsize=8)
    save_figure(figure, output)


def _minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command_line("dynamics_tiny", __doc__, argv)
    train_missing(arguments.results, run, VARIANTS, arguments.jobs)
    print(f"\n{report(arguments.results)}")
    draw(arguments.results, arguments.figure)
    print(f"\nfigure: {arguments.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
