"""ResNet-20 on CIFAR-10 (He et al., arXiv 1512.03385, §4.2): pad and crop by 4 pixels, flip, batches of 128.

    lowprec train --config=configs/cifar.py --config.recipe=int8_full
    lowprec train --config=configs/cifar.py:vit

Needs the TFDS set cifar10, prepared as array_record (`--config.data.download=True` fetches it, where there is a
network). Not run yet: there is no result to show. The paper has an error of 8.75 % after 64k updates with SGD.
"""

from lowprec.errors import unknown
from lowprec.training.config import default


def get_config(model="resnet"):
    config = default()
    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.data.shift = 4
    config.data.flip = True
    config.model.name = model
    config.train.batch_size = 128
    config.train.steps = 64_000
    if model == "resnet":
        config.model.layers = 3
        config.model.width = 16
        config.optimizer.name = "sgd"
        config.optimizer.lr = 0.1
        config.optimizer.b1 = 0.9
        config.optimizer.weight_decay = 1e-3  # decoupled; in the momentum, as in the paper, it is 1e-4
        config.optimizer.clip = 0.0
        config.optimizer.warmup_fraction = 0.01
        config.optimizer.final_fraction = 0.0
    elif model == "vit":
        config.model.layers = 6
        config.model.width = 192
        config.model.heads = 3
        config.model.patch = 4
        config.optimizer.lr = 1e-3
    else:
        raise unknown("model", model, ("resnet", "vit"))
    config.eval.every = 2000
    config.eval.batches = 79
    config.checkpoint.every = 2000
    return config
