"""The same with the library's MAML++ and a trainer."""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_maml import MAMLPlusPlus

STEPS, HOURS = 3, 6


class Households(Dataset):
    """Windows of a household's load, and the next value of each; later windows are queries."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.first + number)
        days = 12 + 3 * (number % 3)  # some have been measured for longer than others
        phase = 6 * torch.rand((), generator=random)
        load = torch.sin(torch.arange(days + HOURS) / 3 + phase).double()
        x, y = load.unfold(0, HOURS, 1)[:days, :, None], load[HOURS:, None]
        support = days - 8
        return x[:support], y[:support], x[support:], y[support:]


class Forecast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 5, batch_first=True)
        self.out = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def run(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    train = DataLoader(Households(0, 12), batch_size=4, collate_fn=list)
    test = DataLoader(Households(50, 5), batch_size=5, collate_fn=list)
    model = MAMLPlusPlus(Forecast().double(), 0.1, STEPS, multi_step_epochs=4, loss=F.mse_loss)
    trainer = Trainer(max_epochs=3, precision="64-true", default_root_dir=folder, accelerator="cpu")
    trainer.fit(model, train)
    trainer.test(model, test)
    rates = dict(enumerate(model.learned_rates.values))
    loss = model.adaptation.mean[-1]
    return {**dict(model.network.named_parameters()), **rates, "loss": loss}
