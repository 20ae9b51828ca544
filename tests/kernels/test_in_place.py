"""Layers that write in place, with gradients taken as an accelerator's autograd thread takes them.

There a graph's nodes are numbered from 0 in another thread, so that a second derivative ran through
what an in-place layer had replaced, "backward through the graph a second time".
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.random_numbers import drawn_on_cpu
from lightning_maml import MAML, Episodes, ResNet12


@pytest.fixture
def in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the gradients that are differentiated again in a thread of their own."""
    grad = torch.autograd.grad

    def of_thread(*arguments: Any, **options: Any) -> Any:
        if not options.get("create_graph"):
            return grad(*arguments, **options)
        found: list[Any] = []

        def run() -> None:
            with torch.enable_grad():
                found.append(grad(*arguments, **options))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    monkeypatch.setattr(torch.autograd, "grad", of_thread)


class Shortcut(nn.Module):
    """A block whose shortcut adds what its activation has written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.activation, self.convolution = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.convolution(self.activation(x)) + x
        return found


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    whole = nn.Sequential(
        nn.Conv2d(1, 4, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    return whole.double()


def episodes() -> Episodes:
    random = torch.Generator().manual_seed(0)
    x = drawn_on_cpu(torch.rand, 2, 3, 10, 1, 20, 20, generator=random, dtype=torch.float64)
    y = torch.arange(5).repeat(3, 2)
    return Episodes(x[0], y, x[1], y)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: network(nn.ReLU(inplace=True)),
    "norm": lambda: network(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "silu": lambda: network(nn.BatchNorm2d(4), nn.SiLU(inplace=True)),
    "hardtanh": lambda: network(nn.Hardtanh(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU6(True)),
    "resnet12": lambda: ResNet12(1, 5, widths=(4, 4)).double(),
}


def out_of_place(whole: nn.Module) -> nn.Module:
    for module in whole.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return whole


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    far = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (far / sum(float(tensor.square().sum()) for tensor in other.values())) ** 0.5


@pytest.mark.parametrize("keep_graphs", ["always", "never"])
@pytest.mark.parametrize("name", NETWORKS)
def test_stacked_tasks_are_exact(name: str, keep_graphs: Any, in_another_thread: None) -> None:
    whole = NETWORKS[name]()
    model = MAML(whole, 0.1, 2, tasks="vmap", keep_graphs=keep_graphs)
    expected = MAML(out_of_place(copy.deepcopy(whole)), 0.1, 2, tasks="loop")
    found = model.meta_gradient(episodes())
    assert relative_difference(found, expected.meta_gradient(episodes())) < 1e-11
    assert all(module.inplace for module in whole.modules() if isinstance(module, nn.ReLU)), (
        "the user's own network stays as it is"
    )


def test_a_network_that_needs_the_writing_is_not_stacked() -> None:
    whole = network(Shortcut())
    found = MAML(whole, 0.1, 2).meta_gradient(episodes())
    expected = MAML(copy.deepcopy(whole), 0.1, 2, tasks="loop").meta_gradient(episodes())
    assert relative_difference(found, expected) < 1e-12
    with pytest.raises(ValueError, match=r"as one, their .* differs from what each gives alone"):
        MAML(copy.deepcopy(whole), 0.1, 2, tasks="vmap").meta_gradient(episodes())
