"""A pretrained network with frozen batch norm: dropout in the inner steps, inductive evaluation."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

WAYS = 3
Task = tuple[Tensor, Tensor, Tensor, Tensor, list[int]]


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.silu(self.norm(self.conv(x))) + self.shortcut(x), 2)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 6), Block(6, 8))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, WAYS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))

    def train(self, mode: bool = True) -> "ResNet":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # the pretrained averages stay
        return self


def pretrained() -> ResNet:
    torch.manual_seed(0)
    network = ResNet().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    return network


def loader(tasks: int, seed: int) -> Iterator[Task]:
    """Tasks as a sampler's collate function gives them, with the classes that were drawn."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(tasks):
        x = torch.rand(WAYS * 5, 3, 8, 8, dtype=torch.float64, generator=random)
        y = torch.arange(WAYS).repeat(5)
        yield x[: WAYS * 2], y[: WAYS * 2], x[WAYS * 2 :], y[WAYS * 2 :], [4, 1, 7]


def adapted(network: ResNet, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
    w = dict(network.named_parameters())
    network.train()
    for _ in range(3):
        loss = F.cross_entropy(functional_call(network, w, support_x), support_y)
        gradient = torch.autograd.grad(loss, [*w.values()], create_graph=True)
        w = {name: p - 0.1 * g for (name, p), g in zip(w.items(), gradient, strict=True)}
    network.eval()
    return w


def run(folder: Path) -> dict[str, Tensor]:
    network = pretrained()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(1)
    for support_x, support_y, query_x, query_y, _ in loader(4, seed=0):
        optimizer.zero_grad()
        w = adapted(network, support_x, support_y)
        F.cross_entropy(functional_call(network, w, query_x), query_y).backward()
        optimizer.step()
    torch.manual_seed(2)
    logits = []
    for support_x, support_y, query_x, _, _ in loader(3, seed=9):
        w = adapted(network, support_x, support_y)
        logits.append(torch.cat([functional_call(network, w, x[None]) for x in query_x]))
    return {**dict(network.named_parameters()), "logits": torch.stack(logits)}
