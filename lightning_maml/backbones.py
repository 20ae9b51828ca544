"""The networks of the MAML papers and their smooth versions."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

ActivationName = Literal["relu", "leaky_relu", "gelu", "silu", "softplus", "tanh"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class Conv4(nn.Module):
    """Four 3x3 convolutions with batch norm, and a linear head (Finn et al. 2017, section 5.2 and its published code).

    - Omniglot: ``downsample="stride"``, 64 channels; the head reads the mean over space.
    - mini-ImageNet: ``downsample="max"``, 32 channels; the head reads the flattened map (5 x 5 x 32 from 84 x 84).
    - smooth, as HF-MAML needs it: ``activation="gelu"`` (or softplus, SiLU, tanh) with ``"stride"`` or ``"avg"``.

    Args:
        in_channels: 1 for grey, 3 for colour.
        ways: Outputs, one per class of an episode.
        image_size: Height and width of the images, in pixels.
        channels: Filters of each convolution.
        activation: One of relu, leaky_relu, gelu, silu, softplus, tanh.
        downsample: How each block halves the image: ``"stride"`` of the convolution, or ``"max"`` or ``"avg"`` pooling after it.

    Raises:
        ValueError: If a size is not positive, the image is too small to be pooled four times, or a name is unknown.
    """

    def __init__(
        self,
        in_channels: int,
        ways: int,
        image_size: int,
        channels: int = 64,
        activation: ActivationName = "relu",
        downsample: Literal["stride", "max", "avg"] = "stride",
    ) -> None:
        super().__init__()
        _check_positive(in_channels=in_channels, ways=ways, image_size=image_size, channels=channels)
        if downsample not in ("stride", "max", "avg"):
            raise ValueError(f"Expected `downsample` to be 'stride', 'max' or 'avg' but got {downsample!r}.")
        if downsample != "stride" and image_size < 16:
            raise ValueError(f"Expected `image_size` to be at least 16 for four poolings by 2 but got {image_size}.")
        inputs = [in_channels, channels, channels, channels]
        self.features = nn.Sequential(*(_conv_block(n, channels, activation, downsample) for n in inputs))
        mean_over_space = downsample == "stride"
        self.pool = nn.AdaptiveAvgPool2d(1) if mean_over_space else nn.Identity()
        self.head = nn.Linear(channels if mean_over_space else channels * (image_size // 16) ** 2, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, ways]`` of images ``[B, C, H, W]``."""
        logits: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return logits


class MLP(nn.Module):
    """Fully connected layers over the flattened input.

    Args:
        in_features: Size of the flattened input.
        ways: Outputs: classes of an episode, or dimensions of a regression target.
        hidden: Widths of the hidden layers.
        activation: One of relu, leaky_relu, gelu, silu, softplus, tanh.

    Raises:
        ValueError: If a size is not positive or the activation is unknown.
    """

    def __init__(self, in_features: int, ways: int, hidden: Sequence[int] = (40, 40), activation: ActivationName = "relu") -> None:
        super().__init__()
        _check_positive(in_features=in_features, ways=ways, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m), _activation(activation)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], ways))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, ways]`` for inputs ``[B, ...]``."""
        outputs: Tensor = self.layers(x)
        return outputs


def _conv_block(in_channels: int, channels: int, activation: str, downsample: str) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, stride=2 if downsample == "stride" else 1, padding=1)
    pooling: dict[str, list[nn.Module]] = {"stride": [], "max": [nn.MaxPool2d(2)], "avg": [nn.AvgPool2d(2)]}
    return nn.Sequential(conv, nn.BatchNorm2d(channels), _activation(activation), *pooling[downsample])


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"Expected `activation` to be one of {sorted(_ACTIVATIONS)} but got {name!r}.")
    return _ACTIVATIONS[name]()


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Expected `{name}` to be at least 1 but got {size}.")
