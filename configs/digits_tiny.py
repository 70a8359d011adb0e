"""ResNet-8 of width 16 on scikit-learn's 1797 handwritten digits of 8×8 pixels, 76k parameters.

lowprec train --config=configs/digits_tiny.py --config.recipe=dfp16

Seen on two cores, means of five seeds: f32 96.4 %, dfp16 96.9 %, int8_full 96.5 %, lsq_4 96.1 % of the held-out
images in 10 to 60 seconds (experiments/digits_tiny).
"""

from lowprec.training.config import default


def get_config():
    config = default()
    config.data.name = "digits"
    config.data.shift = 1
    config.model.name = "resnet"
    config.model.layers = 1
    config.model.width = 16
    config.train.steps = 400
    config.train.batch_size = 32
    config.optimizer.lr = 4e-3  # the best of 2e-3, 4e-3, 1e-2 for f32 (three seeds)
    config.eval.every = 100
    config.eval.batches = 10
    config.checkpoint.every = 100
    return config
