"""Seven formats at ¼ to 16 times bf16's best learning rate, five seeds: 245 runs of a very small Llama.

    lowprec sweep experiments/stability_tiny/sweep.py --root=runs/stability_tiny --workers=2 --pack=30
    python -m experiments.stability_tiny.study --store=runs/stability_tiny

Runs of one seed have the same initial values and data, whatever their format and rate.
"""

from lowprec import sweeps
from lowprec.training.config import default

SEEDS = 5
# bf16, seed 0, at 2e-3, 4e-3, … 6.4e-2: 2.233, 2.145, 2.280, 2.321, 2.442, 2.710.
BEST = 4e-3
# The protocol ends at 8, where bf16 is stable still: one more octave shows its end.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
FORMATS = {
    "bf16": "bf16",
    "fp8": "fp8",
    "int8": "int8",
    "nvfp4": "nvfp4",
    "int4 forward": "fwd=int4@row dgrad=exact,reuse wgrad=exact,reuse",
    "quest_2": "quest_2",
    # On purpose: gradients to nearest in 4 bits, a scale a tensor.
    "int4 both ways": "fwd=int4@tensor dgrad=int4@tensor wgrad=int4@tensor",
}


def get_config():
    config = default()
    config.data.seq_len = 32
    config.model.layers, config.model.width, config.model.heads = 2, 32, 2
    # After 150 even a model that has learned nothing but the frequencies of bytes is within half a nat of the best.
    config.train.steps, config.train.batch_size = 600, 8
    config.optimizer.clip = 0.0  # clipping hides what is asked for
    config.eval.every, config.eval.batches, config.eval.health, config.eval.sharpness = 0, 40, False, True
    config.checkpoint.every = 0
    return config


def get_sweep():
    rates = sweeps.learning_rates(*(BEST * factor for factor in FACTORS))
    return sweeps.recipes(*FORMATS.values()) * rates * sweeps.seeds(SEEDS)
