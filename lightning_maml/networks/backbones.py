"""The networks of the MAML papers and their smooth versions."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import DropBlock2d

from lightning_maml.errors import UserValueError

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
    """Four 3x3 convolutions with batch norm, and a linear head.

    The network of Finn et al. 2017, section 5.2, and of its published code:

    - Omniglot: ``downsample="stride"``, 64 channels; the head reads the mean over space.
    - mini-ImageNet: ``downsample="max"``, 32 channels; the head reads the flattened map (5 x 5 x 32
      from 84 x 84).
    - smooth, as HF-MAML needs it: ``activation="gelu"`` (or softplus, SiLU, tanh) with ``"stride"``
      or ``"avg"``.

    Args:
        in_channels: 1 for grey, 3 for colour.
        ways: Outputs, one per class of an episode; None for the features, without a head.
        image_size: Height and width of the images, in pixels.
        channels: Filters of each convolution.
        activation: One of relu, leaky_relu, gelu, silu, softplus, tanh.
        downsample: How each block halves the image: ``"stride"`` of the convolution, or ``"max"``
            or ``"avg"`` pooling after the activation. ``"max"`` comes before ReLU and leaky ReLU,
            which gives the same in less time.

    Raises:
        ValueError: If a size is not positive, the image is too small to be pooled four times, or a
            name is unknown.

    Examples:
        >>> import torch
        >>> from lightning_maml import Conv4
        >>> network = Conv4(in_channels=1, ways=5, image_size=28, activation="gelu")
        >>> network(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        in_channels: int,
        ways: int | None,
        image_size: int,
        channels: int = 64,
        activation: ActivationName = "relu",
        downsample: Literal["stride", "max", "avg"] = "stride",
    ) -> None:
        super().__init__()
        _check_positive(
            in_channels=in_channels,
            ways=1 if ways is None else ways,
            image_size=image_size,
            channels=channels,
        )
        if downsample not in ("stride", "max", "avg"):
            raise UserValueError(
                f"Expected `downsample` to be 'stride', 'max' or 'avg' but got {downsample!r}."
            )
        if downsample != "stride" and image_size < 16:
            raise UserValueError(
                "Expected `image_size` to be at least 16 for four poolings by 2 but got "
                f"{image_size}."
            )
        inputs = [in_channels, channels, channels, channels]
        self.features = nn.Sequential(
            *(_conv_block(n, channels, activation, downsample) for n in inputs)
        )
        mean_over_space = downsample == "stride"
        self.pool = nn.AdaptiveAvgPool2d(1) if mean_over_space else nn.Identity()
        pixels = 1 if mean_over_space else (image_size // 16) ** 2  # halved four times
        self.head = _head(channels * pixels, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, ways]``, or the features, of images ``[B, C, H, W]``."""
        logits: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return logits


class ResNet12(nn.Module):
    """Four residual blocks, the mean over space, and a linear head.

    The ResNet-12 of Oreshkin et al. 2018 and Lee et al. 2019, with three 3x3 convolutions in each
    block.
    Smooth, as HF-MAML needs it, with ``activation="gelu"`` (or softplus, SiLU, tanh) and
    ``downsample="avg"``.

    Args:
        in_channels: 1 for grey, 3 for colour.
        ways: Outputs, one per class of an episode; None for the features, without a head.
        widths: Filters of the blocks' convolutions.
        activation: One of relu, leaky_relu (of slope 0.1), gelu, silu, softplus, tanh.
        downsample: How each block halves the image: ``"max"`` or ``"avg"`` pooling, in the order of
            :class:`Conv4`. Images need 16 pixels or more.
        drop_block: Probability of DropBlock (Ghiasi et al. 2018) in training, after the last two
            blocks; 0 for none.
        drop_block_size: Height and width of the squares that it drops, an odd number, in pixels of
            feature maps that are an 8th and a 16th of the image's size. 5 is for images of 80
            pixels or more.

    Raises:
        ValueError: If a size is not positive, ``drop_block`` is not at least 0 and less than 1,
            ``drop_block_size`` is even, there are no ``widths``, or a name is unknown.

    Examples:
        >>> import torch
        >>> from lightning_maml import ResNet12
        >>> network = ResNet12(in_channels=3, ways=5, widths=(8, 16))
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_channels: int,
        ways: int | None,
        widths: Sequence[int] = (64, 160, 320, 640),
        activation: ActivationName = "leaky_relu",
        downsample: Literal["max", "avg"] = "max",
        drop_block: float = 0.0,
        drop_block_size: int = 5,
    ) -> None:
        super().__init__()
        if not widths:
            raise UserValueError(
                "Expected `widths` to hold the filters of at least one block but it is empty."
            )
        _check_positive(
            in_channels=in_channels,
            ways=1 if ways is None else ways,
            drop_block_size=drop_block_size,
        )
        _check_positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        if downsample not in ("max", "avg"):
            raise UserValueError(
                f"Expected `downsample` to be 'max' or 'avg' but got {downsample!r}."
            )
        if not 0 <= drop_block < 1:
            raise UserValueError(
                f"Expected `drop_block` to be at least 0 and less than 1 but got {drop_block}."
            )
        if drop_block_size % 2 == 0:
            raise UserValueError(f"Expected `drop_block_size` to be odd but got {drop_block_size}.")
        blocks = [
            _residual_block(n, m, activation, downsample)
            for n, m in pairwise([in_channels, *widths])
        ]
        if drop_block > 0:
            for block in blocks[-2:]:
                block.append(DropBlock2d(drop_block, drop_block_size))
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = _head(widths[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, ways]``, or the features, of images ``[B, C, H, W]``."""
        logits: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return logits


class _Residual(nn.Module):
    """Three convolutions with batch norm, and a 1x1 convolution as the shortcut around them."""

    def __init__(self, in_channels: int, channels: int, activation: str) -> None:
        super().__init__()

        def conv(inputs: int, size: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, channels, size, padding=size // 2, bias=False),
                nn.BatchNorm2d(channels),
            ]

        first, second = (
            [*conv(inputs, 3), _leaky(activation)] for inputs in (in_channels, channels)
        )
        self.main = nn.Sequential(*first, *second, *conv(channels, 3))
        self.shortcut = nn.Sequential(*conv(in_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.main(x) + self.shortcut(x)
        return output


def _residual_block(
    in_channels: int, channels: int, activation: str, downsample: str
) -> nn.Sequential:
    pooling = nn.MaxPool2d(2) if downsample == "max" else nn.AvgPool2d(2)
    residual = _Residual(in_channels, channels, activation)
    return nn.Sequential(residual, *_in_cheaper_order(_leaky(activation), pooling))


def _leaky(activation: str) -> nn.Module:
    """Return the activation, where LeakyReLU has the slope of ResNet-12."""
    if activation == "leaky_relu":
        # in place, second derivatives take a fifth less memory
        return nn.LeakyReLU(0.1, inplace=True)
    return _activation(activation)


class MLP(nn.Module):
    """Fully connected layers over the flattened input.

    Args:
        in_features: Size of the flattened input.
        ways: Outputs: classes of an episode, or dimensions of a regression target.
        hidden: Widths of the hidden layers.
        activation: One of relu, leaky_relu, gelu, silu, softplus, tanh.

    Raises:
        ValueError: If a size is not positive or the activation is unknown.

    Examples:
        >>> import torch
        >>> from lightning_maml import MLP
        >>> MLP(4, 3, hidden=[8])(torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        ways: int,
        hidden: Sequence[int] = (40, 40),
        activation: ActivationName = "relu",
    ) -> None:
        super().__init__()
        _check_positive(
            in_features=in_features,
            ways=ways,
            **{f"hidden[{i}]": width for i, width in enumerate(hidden)},
        )
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
    norm = nn.BatchNorm2d(channels)
    if downsample == "stride":
        return nn.Sequential(conv, norm, _activation(activation))
    pooling = nn.MaxPool2d(2) if downsample == "max" else nn.AvgPool2d(2)
    return nn.Sequential(conv, norm, *_in_cheaper_order(_activation(activation), pooling))


def _in_cheaper_order(activation: nn.Module, pooling: nn.Module) -> list[nn.Module]:
    """Return both, maximum pooling before ReLU and leaky ReLU.

    Outputs and derivatives are the same, and the activation has a quarter of the pixels. Others
    stay first: with activations that are not monotonic, like GELU, the order matters.
    """
    if isinstance(pooling, nn.MaxPool2d) and isinstance(activation, nn.ReLU | nn.LeakyReLU):
        return [pooling, activation]
    return [activation, pooling]


def _head(features: int, ways: int | None) -> nn.Module:
    return nn.Identity() if ways is None else nn.Linear(features, ways)


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise UserValueError(
            f"Expected `activation` to be one of {sorted(_ACTIVATIONS)} but got {name!r}."
        )
    return _ACTIVATIONS[name]()


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserValueError(f"Expected `{name}` to be at least 1 but got {size}.")
