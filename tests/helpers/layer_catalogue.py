"""Small networks around one layer or function each, with episodes for them.

The sweep over layers runs them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_maml import Episodes

TASKS, SHOTS, WORDS = 4, 6, 9


class Case(NamedTuple):
    """A network, the shape of its inputs and what is special about it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: bool = False
    smooth: bool = True
    random: bool = False


class Calls(nn.Module):
    """Calls a function with the inputs and some modules."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


class Reversed(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class Holding(nn.Module):
    """Holds its parameters in a list and a dict, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(8)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.rand(8))})
        self.register_buffer("mean", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scales[0] * self.scales[1] + self.shifts["a"]


class Tied(nn.Module):
    """Applies one linear layer twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def episodes_of(case: Case) -> Episodes:
    """Return the episodes of a case; with words, padding (0) occurs in every task."""
    generator = torch.Generator().manual_seed(1)

    def inputs() -> Tensor:
        if not case.words:
            return torch.randn(TASKS, SHOTS, *case.shape, generator=generator, dtype=torch.float64)
        words = torch.randint(0, WORDS, (TASKS, SHOTS, *case.shape), generator=generator)
        words[:, ::2, -1] = 0
        return words

    labels = torch.arange(3).repeat(TASKS, SHOTS // 3)
    return Episodes(inputs(), labels, inputs(), labels)


def network_of(case: Case) -> nn.Module:
    """Return a case's network in float64, its lazy layers filled."""
    torch.manual_seed(0)
    network = case.make().double()
    network(episodes_of(case).support_x[0])
    return network


def _between(
    before: Callable[[], nn.Module], layer: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(before(), layer(), nn.Flatten(), nn.LazyLinear(3))


def _image(layer: Callable[[], nn.Module], **special: bool) -> Case:
    return Case(_between(lambda: nn.Conv2d(2, 4, 3, padding=1), layer), (2, 8, 8), **special)


def _signal(layer: Callable[[], nn.Module], **special: bool) -> Case:
    return Case(_between(lambda: nn.Conv1d(2, 4, 3, padding=1), layer), (2, 10), **special)


def _volume(layer: Callable[[], nn.Module], **special: bool) -> Case:
    return Case(_between(lambda: nn.Conv3d(1, 4, 3, padding=1), layer), (1, 4, 4, 4), **special)


def _vector(layer: Callable[[], nn.Module], **special: bool) -> Case:
    return Case(_between(lambda: nn.Linear(6, 8), layer), (6,), **special)


def _sequence(layer: Callable[[], nn.Module], **special: bool) -> Case:
    return Case(_between(lambda: nn.Linear(4, 8), layer), (5, 4), **special)


def _words(layer: Callable[[], nn.Module], **special: bool) -> Case:
    make = lambda: nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(3))
    return Case(make, (7,), words=True, **special)


def _calls(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Calls(function)


def _set(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    x[:, 1] += x[:, 2]
    return x


def _hooked(x: Tensor) -> Tensor:
    x = x * 1.0
    if x.requires_grad:
        x.register_hook(lambda gradient: -0.5 * gradient)
    return x


def _causal(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


KINKED = {
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "RReLU",
    "Hardtanh",
    "Hardswish",
    "Hardsigmoid",
    "Hardshrink",
    "Softshrink",
    "PReLU",
    "Threshold",
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    name: getattr(nn, name)
    for name in (
        "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Tanh",
        "Sigmoid", "LogSigmoid", "Softplus", "Softsign", "Tanhshrink", "Hardtanh", "Hardswish",
        "Hardsigmoid", "Hardshrink", "Softshrink", "PReLU",
    )
}  # fmt: skip
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm2d tracking": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "LayerNorm of images": lambda: nn.LayerNorm([4, 8, 8]),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d plain": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "Conv2d": lambda: nn.Conv2d(4, 4, 3),
    "Conv2d groups": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "Conv2d depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2),
    "Conv2d circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "Conv2d reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "Conv2d replicate": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
    "Conv2d same": lambda: nn.Conv2d(4, 4, 4, padding="same"),
    "Conv2d stride": lambda: nn.Conv2d(4, 4, 1, stride=2, bias=False),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1),
    "ConvTranspose2d groups": lambda: nn.ConvTranspose2d(4, 4, 3, groups=2),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(3),
    "Upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "Upsample bicubic": lambda: nn.Upsample(scale_factor=1.5, mode="bicubic"),
    "Upsample nearest": lambda: nn.Upsample(size=11),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d(2),
    "ReplicationPad2d": lambda: nn.ReplicationPad2d(2),
    "ConstantPad2d": lambda: nn.ConstantPad2d(2, 0.5),
    "CircularPad2d": lambda: nn.CircularPad2d(2),
    "ZeroPad2d": lambda: nn.ZeroPad2d(1),
    "Unfold": lambda: nn.Unfold(3, stride=2),
    "Fold": lambda: nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2)),
    "Softmax2d": nn.Softmax2d,
    "GLU": lambda: nn.GLU(1),
    "grid_sample": _calls(
        lambda x: F.grid_sample(x, torch.tanh(x[:, :2].movedim(1, -1)), align_corners=False)
    ),
    "F.instance_norm": _calls(F.instance_norm),
    "channels last": _calls(lambda x: x.contiguous(memory_format=torch.channels_last).tanh()),
}
KINKED_IMAGES: dict[str, Callable[[], nn.Module]] = {
    "MaxPool2d ceil": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(3),
    "LPPool2d": lambda: nn.LPPool2d(2, 2),
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "LeakyReLU in place": lambda: nn.LeakyReLU(inplace=True),
    "PReLU of channels": lambda: nn.PReLU(4),
}
SIGNALS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d of signals": lambda: nn.BatchNorm1d(4),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4),
    "Conv1d dilated": lambda: nn.Conv1d(4, 4, 3, dilation=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 4, 3),
    "AvgPool1d": lambda: nn.AvgPool1d(2),
    "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(3),
    "ReflectionPad1d": lambda: nn.ReflectionPad1d(2),
    "Upsample linear": lambda: nn.Upsample(scale_factor=2, mode="linear"),
}
VOLUMES: dict[str, Callable[[], nn.Module]] = {
    "Conv3d": lambda: nn.Conv3d(4, 2, 3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 2, 2),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "AvgPool3d": lambda: nn.AvgPool3d(2),
    "Upsample trilinear": lambda: nn.Upsample(scale_factor=2, mode="trilinear"),
}
VECTORS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "F.batch_norm": _calls(lambda x: F.batch_norm(x, None, None, training=True)),
    "Bilinear": lambda: Calls(lambda x, layer: layer(x, x), nn.Bilinear(8, 8, 4)),
    "RNNCell": lambda: nn.RNNCell(8, 8),
    "GRUCell": lambda: nn.GRUCell(8, 8),
    "LSTMCell": lambda: Calls(lambda x, cell: cell(x)[0], nn.LSTMCell(8, 8)),
    "Softmax": lambda: nn.Softmax(1),
    "Softmin": lambda: nn.Softmin(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "parameters in lists": Holding,
    "tied weights": Tied,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "weight_norm old": lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral_norm old": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "checkpoint": lambda: Calls(
        lambda x, layer: checkpoint(layer, x, use_reentrant=False), nn.Linear(8, 8)
    ),
    "checkpoint old": lambda: Calls(
        lambda x, layer: checkpoint(layer, x, use_reentrant=True), nn.Linear(8, 8)
    ),
    "normalize": _calls(F.normalize),
    "einsum": _calls(lambda x: torch.einsum("ni,nj->nij", x, x)),
    "cumsum": _calls(lambda x: x.cumsum(1)),
    "cumprod": _calls(lambda x: x.cumprod(1)),
    "prod": _calls(lambda x: x.prod(1, keepdim=True)),
    "logsumexp": _calls(lambda x: x.logsumexp(1, keepdim=True)),
    "std": _calls(lambda x: (x - x.mean(0)) / (x.std(0) + 1e-3)),
    "fft": _calls(lambda x: torch.fft.rfft(x).real),
    "inverse": _calls(
        lambda x: torch.linalg.inv(torch.eye(8).double() + 0.01 * x[:, :, None] * x[:, None])
    ),
    "solve": _calls(
        lambda x: torch.linalg.solve(torch.eye(8).double() + 0.01 * x[:, :, None] * x[:, None], x)
    ),
    "det": _calls(
        lambda x: torch.linalg.det(torch.eye(8).double() + 0.1 * x[:, :, None] * x[:, None])[
            :, None
        ]
    ),
    "matrix_exp": _calls(lambda x: torch.matrix_exp(0.1 * x[:, :, None] * x[:, None])),
    "roll": _calls(lambda x: x.roll(1, 1)),
    "flip": _calls(lambda x: x.flip(1)),
    "diag_embed": _calls(torch.diag_embed),
    "index": _calls(lambda x: x[:, [0, 3, 3]]),
    "index_select": _calls(lambda x: x.index_select(1, torch.tensor([0, 3, 3]))),
    "index_fill": _calls(lambda x: x.index_fill(1, torch.tensor([0]), 0.0)),
    "index_add": _calls(
        lambda x: torch.zeros_like(x).index_add(1, torch.tensor([0, 1, 2, 3] * 2), x)
    ),
    "set an item": _calls(_set),
    "in place": _calls(lambda x: x.clone().mul_(2).add_(1)),
    "detach": _calls(lambda x: x * x.detach()),
    "hook": _calls(_hooked),
    "autograd.Function": _calls(Reversed.apply),
    "kron": _calls(lambda x: torch.kron(x, torch.ones(1, 2).double())),
    "repeat_interleave": _calls(lambda x: x.repeat_interleave(2, 1)),
    "stack and cat": _calls(lambda x: torch.cat([torch.stack([x, x * x], 1).flatten(1), x], 1)),
    "unfold of a tensor": _calls(lambda x: x.unfold(1, 3, 2)),
    "as_strided": _calls(lambda x: x.contiguous().as_strided((len(x), 4), (8, 2))),
    "chunk": _calls(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1]),
    "lerp": _calls(lambda x: torch.lerp(x, x * x, 0.3)),
    "addmm": _calls(lambda x: torch.addmm(x, x, torch.eye(8).double())),
    "pow": _calls(lambda x: x.pow(3)),
    "erf": _calls(torch.erf),
    "tril": _calls(lambda x: torch.tril(x[:, :, None] * x[:, None])),
    "item": _calls(lambda x: x / float(x.detach().abs().max().item())),
    "control flow": _calls(lambda x: x.tanh() if x.sum() > 0 else x.sin()),
    "mask of booleans": _calls(lambda x: x * (x > 0)),
    "boolean index": _calls(lambda x: torch.zeros_like(x).masked_scatter(x > 0, x[x > 0])),
}
KINKED_VECTORS: dict[str, Callable[[], nn.Module]] = {
    "Threshold": lambda: nn.Threshold(0.1, 0.2),
    "Maxout": _calls(lambda x: x.view(len(x), 4, 2).amax(-1)),
    "sort": _calls(lambda x: x.sort(1)[0]),
    "topk": _calls(lambda x: x.topk(4)[0]),
    "gather": _calls(lambda x: x.gather(1, x.argsort(1))),
    "take_along_dim": _calls(lambda x: torch.take_along_dim(x, x.argsort(1), 1)),
    "scatter_add": _calls(lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1), x)),
    "masked_fill": _calls(lambda x: x.masked_fill(x < 0, -0.1)),
    "where": _calls(lambda x: torch.where(x > 0, x, x.exp() - 1)),
    "max": _calls(lambda x: x.max(1, keepdim=True)[0]),
    "median": _calls(lambda x: x.median(1, keepdim=True)[0]),
    "clamp": _calls(lambda x: x.clamp(-0.5, 0.5)),
    "cdist": _calls(lambda x: torch.cdist(x, x.flip(0))),
    "fft abs": _calls(lambda x: torch.fft.rfft(x).abs()),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: Calls(lambda x, rnn: rnn(x)[0], nn.RNN(8, 4, batch_first=True)),
    "GRU": lambda: Calls(lambda x, rnn: rnn(x)[0], nn.GRU(8, 4, batch_first=True)),
    "LSTM": lambda: Calls(lambda x, rnn: rnn(x)[0], nn.LSTM(8, 4, batch_first=True)),
    "LSTM of two directions": lambda: Calls(
        lambda x, rnn: rnn(x)[0], nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)
    ),
    "MultiheadAttention": lambda: Calls(
        lambda x, a: a(x, x, x)[0], nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "MultiheadAttention no weights": lambda: Calls(
        lambda x, a: a(x, x, x, need_weights=False)[0],
        nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "attention causal": _calls(_causal),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(
        8, 2, 8, 0.0, "gelu", batch_first=True
    ),
    "TransformerEncoderLayer norm first": lambda: nn.TransformerEncoderLayer(
        8, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True
    ),
    "TransformerDecoderLayer": lambda: Calls(
        lambda x, d: d(x, x), nn.TransformerDecoderLayer(8, 2, 8, 0.0, "gelu", batch_first=True)
    ),
}
WORDED: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(WORDS, 6),
    "Embedding padding_idx": lambda: nn.Embedding(WORDS, 6, padding_idx=0),
    "Embedding scale_grad_by_freq": lambda: nn.Embedding(WORDS, 6, scale_grad_by_freq=True),
    "Embedding max_norm": lambda: nn.Embedding(WORDS, 6, max_norm=1.0),
    "Embedding sparse": lambda: nn.Embedding(WORDS, 6, sparse=True),
    "F.embedding padding_idx": lambda: Calls(
        lambda x, e: F.embedding(x, e.weight, padding_idx=0), nn.Embedding(WORDS, 6)
    ),
    "EmbeddingBag mean": lambda: nn.EmbeddingBag(WORDS, 6),
    "EmbeddingBag sum": lambda: nn.EmbeddingBag(WORDS, 6, mode="sum"),
    "EmbeddingBag padding_idx": lambda: nn.EmbeddingBag(WORDS, 6, padding_idx=0),
    "EmbeddingBag sparse": lambda: nn.EmbeddingBag(WORDS, 6, sparse=True, mode="sum"),
    "one_hot": _calls(lambda x: F.one_hot(x, WORDS).double()),
}
RANDOM: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.3),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.3),
    "F.dropout": _calls(lambda x: F.dropout(x, 0.3)),
    "noise": _calls(lambda x: x + 0.1 * torch.randn_like(x)),
    "stochastic depth": _calls(lambda x: x * (torch.rand(len(x), 1) > 0.3)),
    "gumbel_softmax": _calls(F.gumbel_softmax),
    "randperm": _calls(lambda x: x[:, torch.randperm(8)]),
}

NO_GRADIENT_OF_A_FUNCTION = (
    *("detach", "hook", "autograd.Function", "item", "spectral_norm", "spectral_norm old"),
    *("weight_norm", "weight_norm old"),
)
"""What torch differentiates otherwise than the function that it computes: its second derivatives
are not those of finite differences.  Those of weight norm are wrong (networks/kinks.py), the others
treat a part of the function as constant, or turn gradients around. """

CASES: dict[str, Case] = (
    {name: _vector(layer, smooth=name not in KINKED) for name, layer in ACTIVATIONS.items()}
    | {name: _image(layer) for name, layer in IMAGES.items()}
    | {name: _image(layer, smooth=False) for name, layer in KINKED_IMAGES.items()}
    | {name: _signal(layer) for name, layer in SIGNALS.items()}
    | {"MaxPool1d": _signal(lambda: nn.MaxPool1d(2), smooth=False)}
    | {name: _volume(layer) for name, layer in VOLUMES.items()}
    | {"MaxPool3d": _volume(lambda: nn.MaxPool3d(2), smooth=False)}
    | {
        name: _vector(layer, smooth=name not in NO_GRADIENT_OF_A_FUNCTION)
        for name, layer in VECTORS.items()
    }
    | {name: _vector(layer, smooth=False) for name, layer in KINKED_VECTORS.items()}
    | {name: _sequence(layer) for name, layer in SEQUENCES.items()}
    # max_norm writes to its weight
    | {name: _words(layer, smooth="max_norm" not in name) for name, layer in WORDED.items()}
    | {"EmbeddingBag max": _words(lambda: nn.EmbeddingBag(WORDS, 6, mode="max"), smooth=False)}
    | {name: _vector(layer, random=True) for name, layer in RANDOM.items()}
    | {"Dropout2d": _image(lambda: nn.Dropout2d(0.3), random=True)}
)
