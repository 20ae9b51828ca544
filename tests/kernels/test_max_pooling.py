"""Max pooling and its derivatives: against torch's layer and against central differences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.networks import make_episodes
from lightning_maml import MAML
from lightning_maml.kernels.max_pooling import MaxPooling, Windows

LAYERS = {
    "plain": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "of two sizes, rounded up": nn.MaxPool2d((3, 2), (1, 2), (1, 0), ceil_mode=True),
    "dilated": nn.MaxPool2d(2, stride=1, dilation=2),
}
FORMATS = (torch.contiguous_format, torch.channels_last)


def images(*shape: int, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return x.contiguous(memory_format=memory_format).requires_grad_()


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 7, 6), (1, 3, 7, 6), (2, 1, 7, 6), (2, 3, 3, 3)])
def test_it_is_torchs(shape: tuple[int, ...], memory_format: Any, case: str) -> None:
    layer, x = LAYERS[case], images(*shape, memory_format=memory_format)
    pooling = lambda x: MaxPooling.apply(x, Windows.of(layer))
    assert torch.equal(pooling(x), layer(x))
    assert gradcheck(pooling, x)
    assert gradgradcheck(pooling, x)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_its_third_derivative_is_torchs(memory_format: Any, case: str) -> None:
    layer, x = LAYERS[case], images(2, 3, 7, 6, memory_format=memory_format)
    g = torch.randn_like(layer(x)).requires_grad_()
    v = torch.randn_like(x).requires_grad_()
    derivatives = []
    for pooling in (layer, lambda x: MaxPooling.apply(x, Windows.of(layer))):
        (by_x,) = torch.autograd.grad(pooling(x), x, g, create_graph=True)
        (by_g,) = torch.autograd.grad(by_x, g, v, create_graph=True)
        derivatives.append([by_x, by_g, *torch.autograd.grad(by_g.square().sum(), v)])
    for expected, found in zip(*derivatives, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("format_of_v", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_its_second_derivative_has_the_format_of_the_images(
    memory_format: Any, format_of_v: Any
) -> None:
    x = images(2, 3, 6, 6, memory_format=memory_format)
    y = MaxPooling.apply(x, Windows.of(nn.MaxPool2d(2)))
    g = torch.randn_like(y).requires_grad_()
    (by_x,) = torch.autograd.grad(y, x, g, create_graph=True)
    v = torch.randn_like(x).contiguous(memory_format=format_of_v)
    (by_g,) = torch.autograd.grad(by_x, g, v)
    assert by_x.stride() == x.stride()
    assert by_g.stride() == y.stride()


def test_it_keeps_no_images() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda nothing: nothing):
        MaxPooling.apply(images(2, 3, 6, 6), Windows.of(nn.MaxPool2d(2)))
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 3, 3, 3)]


class TwoFormats(TorchDispatchMode):
    """Counts the sums, and the gradients of ReLU, whose tensors have different memory formats."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.in_two_formats = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator in (torch.ops.aten.add.Tensor, torch.ops.aten.threshold_backward.default):
            tensors = [x for x in args if isinstance(x, Tensor) and x.ndim == 4]
            of_images = [x for x in tensors if 0 not in x.stride()]  # not a bias, expanded
            formats = {x.is_contiguous(memory_format=torch.channels_last) for x in of_images}
            self.count += len(of_images) == 2
            self.in_two_formats += len(formats) > 1
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_no_layer_beside_it_meets_two_formats(tasks: str) -> None:
    def block(channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, 4, 3, padding=1)
        return [convolution, nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()]

    ending = [nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)]
    network = nn.Sequential(*block(1), *block(4), *ending).double()
    model = MAML(network, 0.1, 2, loss=F.cross_entropy, tasks=tasks)
    model.meta_gradient(make_episodes())  # with the checks of the first batch
    with TwoFormats() as formats:
        model.meta_gradient(make_episodes())
    assert formats.count > 0
    assert formats.in_two_formats == 0
