"""A LightningModule with manual optimization, and torchopt's differentiable Adam inside."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchopt
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader


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


class Manual(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.automatic_optimization = False

    def query_loss(self, task: tuple[Tensor, ...]) -> Tensor:
        support_x, support_y, query_x, query_y = task
        inner = torchopt.MetaAdam(self.network, lr=0.05, eps=1e-2)
        before = torchopt.extract_state_dict(self.network, by="reference")
        for _ in range(3):
            inner.step(F.cross_entropy(self.network(support_x), support_y))
        loss = F.cross_entropy(self.network(query_x), query_y)
        torchopt.recover_state_dict(self.network, before)
        return loss

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for task in zip(*batch, strict=True):
            self.manual_backward(self.query_loss(task) / len(batch[0]))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_test_start(self) -> None:
        self.losses: list[Tensor] = []

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        with torch.enable_grad():
            self.losses += [self.query_loss(task).detach() for task in zip(*batch, strict=True)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def run(folder: Path) -> dict[str, Tensor]:
    model = Manual()
    trainer = Trainer(
        max_epochs=2,
        precision="64-true",
        default_root_dir=folder,
        accelerator="cpu",
        inference_mode=False,
    )
    trainer.fit(model, DataLoader(batches(4, seed=1), batch_size=None))
    trainer.test(model, DataLoader(batches(2, seed=2), batch_size=None))
    losses = torch.stack(model.losses)
    return {**dict(model.network.named_parameters()), "loss": losses.mean()}
