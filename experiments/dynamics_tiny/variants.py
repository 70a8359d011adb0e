"""What the study compares: each variant is a value, and says which plain one it is to be compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lowprec import recipes
from lowprec.ops import GemmRule
from lowprec.quantizers import EXACT, REUSE, Quantizer
from lowprec.quantizers.learned_rules import LearnedStep
from lowprec.recipes import FormatSearch, Recipe, everywhere
from lowprec.recipes.library.bridged import bridged_weights
from lowprec.recipes.recipe import forward_only

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
    """How a model is trained.

    Args:
      recipe: or a schedule of recipes, by name, or a recipe that has none.
      baseline: the plain variant to compare it with; its own label where it is that.
      config: keys in which it differs from CONFIG.
      trained: whether it begins with the weights of the bf16 run of its seed, which is also the teacher of those
        objectives that have one.
    """

    recipe: str | Recipe
    baseline: str = "bf16"
    config: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = False


# Of a policy twenty times as fast as the paper's, which would still draw uniformly at the end of so short a run.
FAST_SEARCH = replace(recipes.get("fliqs_6"), control=FormatSearch(6.0, learning_rate=0.1))
TWO_BITS = everywhere(
    "2-bit weights", GemmRule(fwd=(EXACT, Quantizer("int2@row", scale=LearnedStep("gaussian"))), dgrad=(EXACT, REUSE))
)
# Five phases, the bridge is gone after 120 steps.
BRIDGE = bridged_weights("2-bit weights, bridge", "int2@row", "", interval=24)
DENSE_INT8 = forward_only("dense int8", Quantizer("int8@row"), Quantizer("int8@row"), "")
# With a name that a config takes, as the optimizer that freezes weights looks there for their grid.
THREE_BITS = "fwd=bf16,int3@row dgrad=bf16,reuse"

TWO_STAGES = {"optimizer.schedule": "bitnet"}
# λ has the paper's size after a third of the run.
MASKED_DECAY = {"optimizer.name": "sparse_adamw", "optimizer.masked_decay_steps": STEPS // 3}
NO_DECAY = {"optimizer.name": "sparse_adamw", "optimizer.masked_decay": 0.0}
WIDTHS = (8, 6, 4, 2)


def objective(name: str, **keys: Any) -> dict[str, Any]:
    """The config's keys of an objective."""
    return {"objective.name": name, **{f"objective.{key}": value for key, value in keys.items()}}


VARIANTS = {
    # Switches and controllers.
    "bf16": Variant("bf16"),
    "bitnet158": Variant("bitnet158"),
    "switch": Variant("bf16 then bitnet158 at 40%", "bitnet158"),
    "switch, ramp": Variant("bf16 then bitnet158 at 40% over 10%", "bitnet158"),
    "switch, reset": Variant("bf16 then bitnet158 at 40% reset", "bitnet158"),
    "int6_qat": Variant("int6_qat"),
    "adapt": Variant("adapt", "int6_qat"),
    "fliqs_6, fast": Variant(FAST_SEARCH, "int6_qat"),
    # Attention: "softmax" is "bf16", measured more closely.
    "softmax": Variant("bf16", "softmax"),
    "clipped": Variant("bf16", "softmax", {"model.attention": "clipped"}),
    "softpick": Variant("bf16", "softmax", {"model.attention": "softpick"}),
    "gate": Variant("bf16", "softmax", {"model.gate": "linear"}),
    # Layers and times in high precision.
    "nvfp4": Variant("nvfp4"),
    "nvfp4, late bf16": Variant("nvfp4 then bf16 at 90%", "nvfp4"),
    "nvfp4, first kept": Variant("nvfp4 keeping first 1", "nvfp4"),
    "nvfp4, last kept": Variant("nvfp4 keeping last 1", "nvfp4"),
    # Two stages of learning rate and weight decay.
    "bitnet158, two stages": Variant("bitnet158", "bitnet158", TWO_STAGES),
    "bf16, two stages": Variant("bf16", "bf16", TWO_STAGES),
    # From here on most begin with the weights of bf16: the first as a measure of what more steps alone bring.
    "bf16, longer": Variant("bf16", trained=True),
    # Objectives.
    "lsq_2": Variant("lsq_2", "bf16, longer", trained=True),
    "lsq_2, distillation": Variant("lsq_2", "lsq_2", objective("distillation", teacher="bf16"), trained=True),
    "lsq_2, intervention": Variant("lsq_2", "lsq_2", objective("teacher_intervention", teacher="bf16"), trained=True),
    "lsq_2, sam": Variant("lsq_2", "lsq_2", objective("sam"), trained=True),
    "lsq_2, gaqat": Variant("lsq_2", "lsq_2", objective("gaqat", window=STEPS // 6), trained=True),
    # Bridges.
    "2-bit weights": Variant(TWO_BITS, "bf16, longer", trained=True),
    "2-bit weights, bridge": Variant(BRIDGE, "2-bit weights", trained=True),
    # Sparsity.
    "dense int8": Variant(DENSE_INT8, "bf16, longer", trained=True),
    "2:4": Variant("ast_2_4", "bf16, longer", MASKED_DECAY, trained=True),
    "2:4, no masked decay": Variant("ast_2_4", "2:4", NO_DECAY, trained=True),
    "2:4 int8": Variant("ast_2_4_int8", "dense int8", MASKED_DECAY, trained=True),
    # Oscillations and clusters.
    "3-bit weights": Variant(THREE_BITS, "bf16, longer", trained=True),
    "3-bit weights, frozen": Variant(
        THREE_BITS, "3-bit weights", {"optimizer.freeze_oscillations": 0.02}, trained=True
    ),
    "dkm_3": Variant("dkm_3", "3-bit weights", trained=True),
    # A part of the parameters.
    "bf16, mlp alone": Variant("bf16", "bf16, longer", {"train.update": "layers/mlp/.*"}, trained=True),
    # One model, many widths: read at eight bits, trained at all; and a model for each.
    "nested, joint": Variant("nested_8", "nested_8", objective("widths"), trained=True),
    **{f"nested_{width}": Variant(f"nested_{width}", "bf16, longer", trained=True) for width in WIDTHS},
}
SWITCHES = ("switch", "switch, ramp", "switch, reset")
CONTROLLED = ("adapt", "fliqs_6, fast")
ATTENTION = ("softmax", "clipped", "softpick", "gate")
# What attention variants are evaluated under, untrained for it: weights and inputs alike.
UNTRAINED = {"int8": "fwd=int8@tensor", "int4": "fwd=int4@tensor"}

# (claim, of which number, the variant that should have more, the variant that should have less)
CLAIMS = (
    ("a switch beats 1.58 bits from the start", "loss", "bitnet158", "switch"),
    ("a ramp improves the end", "loss", "switch", "switch, ramp"),
    ("a ramp lowers the spike", "spike", "switch", "switch, ramp"),
    ("the optimizer's state is worth keeping", "loss", "switch, reset", "switch"),
    ("a reset raises the spike", "spike", "switch, reset", "switch"),
    ("switched word lengths beat six bits everywhere", "loss", "int6_qat", "adapt"),
    ("searched formats beat six bits everywhere", "loss", "int6_qat", "fliqs_6, fast"),
    *(
        (f"{name} loses less to {fmt}", f"cost of {fmt}", "softmax", label)
        for fmt in UNTRAINED
        for name, label in (("clipped softmax", "clipped"), ("softpick", "softpick"), ("a gate", "gate"))
    ),
    ("a bf16 end helps nvfp4", "loss", "nvfp4", "nvfp4, late bf16"),
    ("keeping the first layer helps nvfp4", "loss", "nvfp4", "nvfp4, first kept"),
    ("keeping the last layer helps nvfp4", "loss", "nvfp4", "nvfp4, last kept"),
    ("two stages help bitnet158", "loss", "bitnet158", "bitnet158, two stages"),
    ("two stages help bf16", "loss", "bf16", "bf16, two stages"),
    ("distillation helps two bits", "loss", "lsq_2", "lsq_2, distillation"),
    ("teacher intervention helps two bits", "loss", "lsq_2", "lsq_2, intervention"),
    ("SAM helps two bits", "loss", "lsq_2", "lsq_2, sam"),
    ("GAQAT helps two bits", "loss", "lsq_2", "lsq_2, gaqat"),
    ("holding scales helps SAM", "loss", "lsq_2, sam", "lsq_2, gaqat"),
    ("a bridge helps 2-bit weights", "loss", "2-bit weights", "2-bit weights, bridge"),
    ("2:4 loses to dense", "loss", "2:4", "bf16, longer"),
    ("2:4 loses to dense in int8", "loss", "2:4 int8", "dense int8"),
    ("masked decay helps 2:4", "loss", "2:4, no masked decay", "2:4"),
    ("masked decay settles the masks", "flips", "2:4, no masked decay", "2:4"),
    ("freezing helps 3-bit weights", "loss", "3-bit weights", "3-bit weights, frozen"),
    ("clusters beat 3-bit weights on a grid", "loss", "3-bit weights", "dkm_3"),
    ("the MLPs alone learn as much", "loss", "bf16, longer", "bf16, mlp alone"),
    *((f"joint widths lose at {width} bits", f"{width} bits", "nested, joint", f"nested_{width}") for width in WIDTHS),
)
