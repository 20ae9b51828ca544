"""Convolution and batch norm with written-out second derivatives: against torch's layers and
against central differences."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.networks import build, make_episodes
from lightning_maml import FOMAML, HFMAML, MAML
from lightning_maml.core.context import evaluating, evaluation
from lightning_maml.functional.meta_gradient import meta_gradient
from lightning_maml.kernels.double_backward import BatchNorm, Convolution
from lightning_maml.networks.functional_network import FunctionalNetwork

CONVOLUTIONS = {
    "plain": ((2, 4, 6, 5), (3, 4, 3, 2), ((1, 1), (1, 1), (1, 1), 1)),
    "strided": ((2, 4, 6, 5), (3, 4, 3, 2), ((2, 3), (2, 0), (1, 1), 1)),
    "dilated": ((2, 4, 6, 5), (3, 4, 3, 2), ((1, 2), (1, 1), (2, 1), 1)),
    "in groups": ((2, 4, 6, 5), (6, 2, 3, 2), ((2, 1), (1, 1), (1, 1), 2)),
    "of sequences": ((2, 4, 6), (3, 4, 3), ((2,), (1,), (1,), 1)),
    "of volumes": ((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), ((1, 2, 1), (1, 0, 1), (1, 1, 1), 1)),
}


def random(*shape: int, needs_gradient: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(needs_gradient)


def second_derivatives_are_right(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Check those of each gradient, and of all gradients together, which ``gradgradcheck`` takes
    one at a time."""
    output, needing = function(*inputs), [x for x in inputs if x.requires_grad]
    directions = [torch.randn_like(x) for x in needing]

    def together(g: Tensor, *_: Tensor) -> Tensor:
        gradients = torch.autograd.grad(function(*inputs), needing, g, create_graph=True)
        return torch.stack(
            [
                (gradient * direction).sum()
                for gradient, direction in zip(gradients, directions, strict=True)
            ]
        ).sum()

    g = torch.randn_like(output).requires_grad_()
    return gradgradcheck(function, inputs) and gradcheck(together, (g, *needing))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_torchs(case: str) -> None:
    torch.manual_seed(0)
    x_shape, weight_shape, geometry = CONVOLUTIONS[case]
    x, weight, bias = random(*x_shape), random(*weight_shape), random(weight_shape[0])
    of_torch = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    convolution = lambda *tensors: Convolution.apply(*tensors, geometry)
    torch.testing.assert_close(convolution(x, weight, bias), of_torch(x, weight, bias, *geometry))
    assert gradcheck(convolution, (x, weight, bias))
    assert second_derivatives_are_right(convolution, x, weight, bias)


@pytest.mark.parametrize(
    "needing",
    [(True, False, False), (False, True, False), (False, True, True), (True, True, False)],
)
def test_a_convolution_of_which_parts_are_frozen(needing: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    shapes = (2, 4, 6, 5), (3, 4, 3, 2), (3,)
    x, weight, bias = (
        random(*shape, needs_gradient=needs) for shape, needs in zip(shapes, needing, strict=True)
    )
    geometry = ((2, 1), (1, 1), (1, 1), 1)
    assert second_derivatives_are_right(
        lambda *tensors: Convolution.apply(*tensors, geometry), x, weight, bias
    )


def test_a_convolution_without_bias() -> None:
    torch.manual_seed(0)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    assert second_derivatives_are_right(
        lambda x, weight: Convolution.apply(x, weight, None, geometry),
        random(2, 2, 4, 4),
        random(2, 2, 3, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_weight_for_all_tasks_has_the_gradients_of_each(
    has_bias: bool,
    groups: int,
    channels: int,
    size: int,
    images: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    tasks, geometry = 3, ((2, 1), (1, 1), (1, 1), groups)
    x = torch.randn(images, tasks * groups * channels, size, size, dtype=dtype).contiguous(
        memory_format=memory_format
    )
    weight, bias = (
        torch.randn(4, channels, 3, 2, dtype=dtype),
        torch.randn(4, dtype=dtype) if has_bias else None,
    )

    def derivatives(of_each: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        leaves = [
            x.detach().requires_grad_(),
            *(of_each(p).requires_grad_() for p in (weight, bias) if p is not None),
        ]
        y = Convolution.apply(*leaves, *([] if has_bias else [None]), geometry)
        first = torch.autograd.grad(
            y.square().mul(torch.randn(y.shape)).sum(), leaves, create_graph=True
        )
        return [
            y,
            *first,
            *torch.autograd.grad(first, leaves, [torch.randn(g.shape, dtype=dtype) for g in first]),
        ]

    shared, own = (
        derivatives(lambda p: p.expand(tasks, *p.shape)),
        derivatives(lambda p: p.repeat(tasks, *[1] * p.ndim)),
    )
    torch.testing.assert_close(
        shared,
        own,
        rtol=1e-4 if dtype == torch.float32 else 1e-10,
        atol=1e-4 if dtype == torch.float32 else 1e-10,
    )
    of_task = F.conv2d(x.unflatten(1, (tasks, -1))[:, 1], weight, bias, *geometry)
    torch.testing.assert_close(shared[0].unflatten(1, (tasks, -1))[:, 1], of_task)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_images_are_convolved_to_none(memory_format: torch.memory_format) -> None:
    shared = torch.randn(4, 2, 3, 3).expand(3, -1, -1, -1, -1)
    x = torch.randn(0, 6, 8, 8).contiguous(memory_format=memory_format)
    assert Convolution.apply(x, shared, None, ((1, 1), (1, 1), (1, 1), 1)).shape == (0, 12, 8, 8)


class Groups(TorchDispatchMode):
    """Notes the groups of the convolutions, and of their gradients with respect to images."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator is torch.ops.aten.convolution.default:
            self.found.append(args[8])
        if operator is torch.ops.aten.convolution_backward.default and args[10][0]:
            self.found.append(args[9])
        return operator(*args, **kwargs or {})


class NormsInTwoFormats(TorchDispatchMode):
    """Counts batch norm's gradients, and those of them for which images with channels last came
    with a gradient in another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.in_two_formats = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator is torch.ops.aten.native_batch_norm_backward.default:
            g, x = (tensor.is_contiguous(memory_format=torch.channels_last) for tensor in args[:2])
            self.count += 1
            self.in_two_formats += x and not g
        return operator(*args, **kwargs or {})


class FunctionalMaxPooling(nn.Module):
    """Max pooling that is no layer, and so is computed by torch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
@pytest.mark.parametrize("order", ["norm, pooling", "pooling, norm"])
def test_batch_norm_beside_pooling_has_its_gradients_in_one_memory_format(
    order: str, tasks: str, algorithm: type[MAML]
) -> None:
    # torch's second derivative of pooling is contiguous whatever came in, and batch norm's gradient
    # takes several times as long for images and a gradient in different formats
    def block(channels: int) -> list[nn.Module]:
        pooling = nn.AvgPool2d(2) if algorithm is HFMAML else FunctionalMaxPooling()
        pair = [nn.BatchNorm2d(4), pooling]
        ordered = pair if order == "norm, pooling" else pair[::-1]
        return [nn.Conv2d(channels, 4, 3, padding=1), *ordered, nn.GELU()]

    ending = [nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)]
    network = nn.Sequential(*block(1), *block(4), *ending).double()
    model = algorithm(network, 0.1, 2, loss=F.cross_entropy, tasks=tasks)
    model.meta_gradient(make_episodes())  # with the checks of the first batch
    with NormsInTwoFormats() as norms:
        model.meta_gradient(make_episodes())
    assert norms.count >= 2 * 2
    assert norms.in_two_formats == 0


@pytest.mark.parametrize(
    ("size", "memory_format"),
    [
        ((9,), torch.contiguous_format),
        ((9, 9), torch.contiguous_format),
        ((9, 9), torch.channels_last),
        ((5, 5, 5), torch.contiguous_format),
    ],
)
def test_one_weight_for_all_tasks_needs_no_groups(
    size: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    tasks, dimensions = 3, len(size)
    x = torch.randn(2, tasks * 4, *size).contiguous(memory_format=memory_format).requires_grad_()
    shared = torch.randn(6, 4, *[3] * dimensions).expand(tasks, *[-1] * (dimensions + 2))
    ones = (1,) * dimensions
    with Groups() as groups:
        y = Convolution.apply(x, shared, None, (ones, ones, ones, 1))
        torch.autograd.grad(y.sum(), x)
    assert groups.found == [1, 1]


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 5), (3, 3, 2, 4), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_is_torchs(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, weight, bias = random(*shape), random(3), random(3)
    if len(shape) == 4:
        x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    norm = lambda *tensors: BatchNorm.apply(*tensors, 1e-3)
    torch.testing.assert_close(
        norm(x, weight, bias), F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-3)
    )
    assert gradcheck(norm, (x, weight, bias))
    assert second_derivatives_are_right(norm, x, weight, bias)


@pytest.mark.parametrize(
    "needing", [(True, False, False), (False, True, True), (False, True, False)]
)
def test_batch_norm_of_which_parts_are_frozen(needing: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        random(*shape, needs_gradient=needs)
        for shape, needs in zip([(4, 3, 2, 2), (3,), (3,)], needing, strict=True)
    )
    assert second_derivatives_are_right(partial(_batch_norm, eps=1e-3), x, weight, bias)


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    normalised: Tensor = BatchNorm.apply(x, weight, bias, eps)
    return normalised


def test_in_float32_it_errs_no_more_than_torch() -> None:
    torch.manual_seed(0)
    x, g, v = (torch.randn(25, 8, 20, 20) + shift for shift in (3.0, 0.5, 0.0))
    weight, bias = torch.rand(8) + 0.5, torch.rand(8)

    def product(norm: Any, dtype: torch.dtype) -> Tensor:
        at, of_weight, of_bias = (tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias))
        gradient = torch.autograd.grad(
            norm(at, of_weight, of_bias), (at, of_weight), g.to(dtype), create_graph=True
        )
        return torch.autograd.grad(gradient, at, (v.to(dtype), torch.ones(8, dtype=dtype)))[
            0
        ].double()

    torchs = lambda *tensors: F.batch_norm(tensors[0], None, None, *tensors[1:], training=True)
    right = product(torchs, torch.float64)
    errors = [
        float((product(norm, torch.float32) - right).norm())
        for norm in (partial(_batch_norm, eps=1e-5), torchs)
    ]
    assert errors[0] < 3 * errors[1]


def test_the_announcement_is_of_one_thread_and_ends() -> None:
    assert evaluation().derivatives == 0
    with evaluating(derivatives=1):
        with evaluating(derivatives=2):
            assert evaluation().derivatives == 2
        assert evaluation().derivatives == 1
    assert evaluation().derivatives == 0


def test_an_exact_meta_gradient_uses_both_and_the_others_batch_norm_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    functional, used = FunctionalNetwork(build("conv_batch_norm")), []
    for kind in (Convolution, BatchNorm):
        forward = kind.forward
        monkeypatch.setattr(
            kind,
            "forward",
            staticmethod(lambda *a, kind=kind, forward=forward: used.append(kind) or forward(*a)),
        )
    loss = lambda w, x, y: F.cross_entropy(functional(w, x), y)
    for curvature in ("none", "finite_difference"):
        meta_gradient(
            loss,
            functional.params,
            make_episodes(tasks=1),
            inner_lr=0.1,
            steps=2,
            curvature=curvature,
        )
    assert set(used) == {BatchNorm}  # torch's own is wrong for some gradients on a CPU
    used.clear()
    meta_gradient(loss, functional.params, make_episodes(tasks=1), inner_lr=0.1, steps=2)
    # two inner steps and the query loss with one derivative, and the way back through both steps
    assert used == [*3 * [BatchNorm], *2 * [Convolution, BatchNorm]]


def test_under_torch_func_a_learner_has_torchs_layers() -> None:
    functional, x, y = (
        FunctionalNetwork(build("conv_batch_norm")),
        make_episodes().support_x[0],
        make_episodes().support_y[0],
    )
    gradient = torch.func.grad(lambda w: F.cross_entropy(functional(w, x), y))(functional.params)
    assert gradient["0.weight"].norm() > 0
    assert isinstance(build("conv_batch_norm"), nn.Sequential)


def third_derivative(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2).requires_grad_()
    derivative = function(x).pow(3).sum()
    for _ in range(2):
        derivative = torch.autograd.grad(derivative, x, create_graph=True)[0].pow(2).sum()
    return torch.autograd.grad(derivative, x)[0]


def test_a_third_derivative_of_a_convolution_is_right() -> None:
    torch.manual_seed(0)
    weight = random(2, 3, 2, 2, needs_gradient=False)
    ours = third_derivative(
        lambda x: Convolution.apply(x, weight, None, ((1, 1), (1, 1), (1, 1), 1))
    )
    torch.testing.assert_close(ours, third_derivative(lambda x: F.conv2d(x, weight, padding=1)))


def test_a_third_derivative_of_batch_norm_is_refused() -> None:
    with pytest.raises(RuntimeError, match="at most two derivatives of batch norm"):
        third_derivative(
            lambda x: _batch_norm(x, torch.ones(3).double(), torch.zeros(3).double(), 1e-3)
        )


def test_under_a_compiler_a_learner_has_torchs_layers() -> None:
    class Compiled(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        @torch.compile(backend="eager")
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

    network = build("conv_batch_norm")
    functional, compiled = FunctionalNetwork(network), FunctionalNetwork(Compiled(network))
    loss = lambda w, x, y: F.cross_entropy(compiled(w, x), y)
    found = meta_gradient(loss, compiled.params, make_episodes(tasks=1), inner_lr=0.1, steps=1).grad
    expected = meta_gradient(
        lambda w, x, y: F.cross_entropy(functional(w, x), y),
        functional.params,
        make_episodes(tasks=1),
        inner_lr=0.1,
        steps=1,
    ).grad
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"network.{name}"], tensor)
