"""CUDA graphs on a real GPU: the same steps as without, and captured at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_maml import FOMAML, HFMAML, MAML, Conv4, Episodes, ResNet12

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WAYS, STEPS = 3, 2


def batch(seed: int) -> Episodes:
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 2 * WAYS, 3, 32, 32, generator=random, dtype=torch.float64).cuda()
    y = torch.arange(WAYS).repeat(3, 2).cuda()
    return Episodes(x[0], y, x[1], y)


def trained(
    algorithm: type[MAML], network: Callable[[], nn.Module], captures: bool, **options: Any
) -> tuple[dict[str, Tensor], int]:
    """Return the weights after some steps, and how many graphs there are."""
    torch.manual_seed(0)
    model = algorithm(network(), 0.05, STEPS, cuda_graphs=captures, **options).double().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)
    for step in range(6):
        optimizer.zero_grad()
        model.meta_loss(batch(step)).backward()
        optimizer.step()
    return dict(model.state_dict()), len(model._cuda_graphs._captured) if captures else 0


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
@pytest.mark.parametrize(
    ("network", "options"),
    [
        (lambda: Conv4(3, WAYS, 32, channels=8, activation="gelu"), {}),
        (lambda: Conv4(3, WAYS, 32, channels=8, activation="gelu"), {"tasks": "loop"}),
        (
            lambda: ResNet12(3, WAYS, (8, 16), activation="gelu", downsample="avg"),
            {"batch_norm": "running"},
        ),
    ],
)
def test_steps_on_a_gpu_are_the_same_by_graphs(
    algorithm: type[MAML], network: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    by_graphs, graphs = trained(algorithm, network, True, **options)
    usual, _ = trained(algorithm, network, False, **options)
    assert graphs == 1
    for name, tensor in usual.items():
        assert torch.allclose(by_graphs[name], tensor, rtol=1e-9, atol=1e-12), name


def test_compiled_steps_on_a_gpu_are_the_same_by_graphs() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.Tanh(), nn.Linear(8, WAYS))

    by_graphs, graphs = trained(MAML, network, True, compiled=True)
    usual, _ = trained(MAML, network, False)
    assert graphs == 1
    for name, tensor in usual.items():
        assert torch.allclose(by_graphs[name], tensor, rtol=1e-9, atol=1e-12), name


def test_networks_that_fetch_from_a_gpu_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    class Fetching(nn.Linear):
        """Scales its outputs by a number that it fetches."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)) / (1 + self.bias.detach().abs().max().item())

    before = torch.cuda.current_stream()
    with caplog.at_level("INFO"):
        _, graphs = trained(MAML, lambda: Fetching(3 * 32 * 32, WAYS), True, tasks="loop")
    assert graphs == 0
    assert "is not run as a CUDA graph: called a synchronizing CUDA operation" in caplog.text
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
