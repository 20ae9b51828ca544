"""The same with the library's model and the trainer's own optimization."""

from functools import partial
from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_maml import MAML, Episodes, InnerAdam


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.rand(3, 12, 5, dtype=torch.float64, generator=random)
        y = torch.arange(3).repeat(4).expand(3, -1)
        found.append((x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]))
    return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def run(folder: Path) -> dict[str, Tensor]:
    optimizer = partial(torch.optim.Adam, lr=0.01)
    model = MAML(network(), 0.05, 3, optimizer=optimizer, inner_optimizer=InnerAdam(eps=1e-2))
    trainer = Trainer(
        max_epochs=2,
        precision="64-true",
        default_root_dir=folder,
        accelerator="cpu",
        gradient_clip_val=0.1,
    )
    trainer.fit(model, DataLoader(batches(4, seed=1), batch_size=None))
    losses = torch.cat([model.evaluate(Episodes(*batch)).loss[:, -1] for batch in batches(2, 2)])
    return {**dict(model.network.named_parameters()), "loss": losses.mean()}
