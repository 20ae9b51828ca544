"""Time and memory of a task with a pretrained network, by what of it adapts.

Networks of torchvision and timm, with random weights, which take the same time as pretrained ones:
5-way 1-shot, 15 queries per class, 5 inner steps. Each row has a process of its own.

    python benchmarks/pretrained.py     # a quarter of an hour on 2 cores
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torchvision.models import resnet18
from tqdm import tqdm

from lightning_maml import MAML, Episodes, ProtoNet
from speed import peak_mb

WAYS, QUERIES, STEPS, REPEATS = 5, 15, 5, 3
RATE = 1e-3  # random weights do not bear more


class LowRank(nn.Module):
    """Adds a matrix of rank 4 to a weight (LoRA, Hu et al. 2022)."""

    def __init__(self, weight: Tensor) -> None:
        """Start with nothing added."""
        super().__init__()
        self.down = nn.Parameter(torch.randn(4, weight.shape[1]) / 4)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], 4))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with what is added."""
        return weight + self.up @ self.down


def resnet(size: int) -> nn.Module:
    """Return torchvision's ResNet-18, whatever the size of the images."""
    return resnet18(num_classes=WAYS)


def vit(size: int) -> nn.Module:
    """Return timm's smallest vision transformer for images of a size."""
    patch = 16 if size % 16 == 0 else 14
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=patch, num_classes=WAYS
    )


def head_of(network: nn.Module) -> str:
    """Return the name of the last layer."""
    return "fc" if hasattr(network, "fc") else "head"


def frozen(network: nn.Module, *but: str) -> nn.Module:
    """Freeze a network, but for parameters that end in one of these names, and the head."""
    for name, p in network.named_parameters():
        p.requires_grad_(name.endswith(but) or name.startswith(f"{head_of(network)}."))
    return network.eval()


def prototypes(network: nn.Module) -> ProtoNet:
    """ProtoNet on the features of a frozen network, which is not trained."""
    setattr(network, head_of(network), nn.Identity())
    return ProtoNet(network.requires_grad_(False).eval(), batch_norm="running")


def head(network: nn.Module) -> MAML:
    """ANIL on a frozen body."""
    return MAML(frozen(network), RATE, STEPS, adapt="head", batch_norm="running")


def biases(network: nn.Module) -> MAML:
    """The biases and the head adapt, and they alone are trained."""
    names = [head_of(network), "*.bias"]
    return MAML(frozen(network, ".bias"), RATE, STEPS, adapt=names, batch_norm="running")


def low_rank(network: nn.Module) -> MAML:
    """Low-rank additions to the linear layers, and the head, adapt and are trained."""
    for name, layer in [*network.named_modules()]:
        if isinstance(layer, nn.Linear) and name != head_of(network):
            register_parametrization(layer, "weight", LowRank(layer.weight))
    names = [head_of(network), "*.down", "*.up"]
    return MAML(frozen(network, ".down", ".up"), RATE, STEPS, adapt=names, batch_norm="running")


def everything(network: nn.Module) -> MAML:
    """All parameters adapt and are trained."""
    return MAML(network.eval(), RATE, STEPS, batch_norm="running")


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"resnet18": resnet, "vit_tiny": vit}
PARTS = {
    "prototypes": prototypes,
    "head": head,
    "biases": biases,
    "low_rank": low_rank,
    "everything": everything,
}
ROWS = [
    (network, size, part)
    for network in NETWORKS
    for size in (84, 224)
    for part in PARTS
    if (network, part) != ("resnet18", "low_rank")  # it has no linear layers but the head
]


def measure(network: str, size: int, part: str) -> tuple[float, float]:
    """Return the seconds of a task, and the memory in MB that it adds at its peak."""
    torch.manual_seed(0)
    model = PARTS[part](NETWORKS[network](size))
    labels = torch.arange(WAYS)[None]
    queries = labels.repeat(1, QUERIES)
    tasks = Episodes(
        torch.rand(1, WAYS, 3, size, size),
        labels,
        torch.rand(1, WAYS * QUERIES, 3, size, size),
        queries,
    )
    seconds = []

    def step() -> None:
        started = time.perf_counter()
        if part == "prototypes":
            model.evaluate(tasks)
        else:
            model.meta_loss(tasks).backward()
        seconds.append(time.perf_counter() - started)

    def steps() -> None:
        for _ in range(1 + REPEATS):  # the first one has the checks of the network
            step()

    peak = peak_mb(steps, "cpu")
    return statistics.median(seconds[1:]), peak


def main() -> None:
    """Measure each row in its own process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "SIZE", "PART"))
    one = parser.parse_args().one
    if one:
        print(*measure(one[0], int(one[1]), one[2]))
        return
    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}\n")
    print("| network | pixels | adapts | seconds per task | MB |")
    print("|---|---|---|---|---|")
    for network, size, part in tqdm(ROWS):
        command = [sys.executable, "-W", "ignore", __file__, "--one", network, str(size), part]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        cells = "failed | -"
        if done.returncode == 0:
            seconds, peak = map(float, done.stdout.split()[-2:])
            cells = f"{seconds:.2f} | {peak:.0f}"
        print(f"| {network} | {size} | {part} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
