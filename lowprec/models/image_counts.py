"""Parameters and floating-point operations of models of images, from their config and the shape of an image."""

from lowprec.models.config import ModelConfig
from lowprec.models.counts import Counts
from lowprec.models.resnet import STAGES

Shape = tuple[int, ...]


def count_image_parameters(config: ModelConfig, classes: int, shape: Shape) -> Counts:
    """Counts the parameters of a resnet or a vit; the first layer and the head are "embedding".

    Args:
      shape: height, width and channels.
    """
    if config.name == "vit":
        return _vit(config, classes, shape)
    convs = _convolutions(config, shape)
    # With a norm of its own two a channel, else a bias.
    per_channel = 1 if config.batch_norm == "none" else 2
    sizes = [9 * inputs * outputs + per_channel * outputs for inputs, outputs, _ in convs]
    head = (convs[-1][1] + 1) * classes
    linear = sum(9 * inputs * outputs for inputs, outputs, _ in convs[1:])
    return Counts(non_embedding=sum(sizes[1:]), embedding=sizes[0] + head, linear=linear)


def flops_per_image(config: ModelConfig, classes: int, shape: Shape) -> int:
    """Floating-point operations of training on one image: 6 for each multiplication of the forward products."""
    if config.name == "vit":
        D, tokens = config.width, _patches(config, shape)
        kernels = _vit(config, classes, shape).linear + config.patch**2 * shape[-1] * D
        attention = 2 * config.layers * tokens**2 * D
        return 6 * (tokens * kernels + attention + D * classes)
    convs = _convolutions(config, shape)
    products = sum(9 * inputs * outputs * positions for inputs, outputs, positions in convs)
    return 6 * (products + convs[-1][1] * classes)


def _convolutions(config: ModelConfig, shape: Shape) -> list[tuple[int, int, int]]:
    """(inputs, outputs, positions of the output) of every convolution of a resnet."""
    height, width, channels = shape
    layers = [(channels, config.width, height * width)]
    for stage in range(STAGES):
        features = config.width * 2**stage
        if stage > 0:
            height, width = -(-height // 2), -(-width // 2)
        layers += [(features, features, height * width)] * (2 * config.layers)
        if stage > 0:
            layers[-2 * config.layers] = (features // 2, features, height * width)
    return layers


def _patches(config: ModelConfig, shape: Shape) -> int:
    return (shape[0] // config.patch) * (shape[1] // config.patch)


def _vit(config: ModelConfig, classes: int, shape: Shape) -> Counts:
    D, hidden = config.width, config.mlp_width or 4 * config.width
    linear = config.layers * (4 * D * D + 2 * D * hidden)
    biases = config.layers * (4 * D + hidden + D)
    norms = 2 * D * (2 * config.layers + 1)
    first = (config.patch**2 * shape[-1] + 1) * D
    return Counts(non_embedding=linear + biases + norms, embedding=first + (D + 1) * classes, linear=linear)
