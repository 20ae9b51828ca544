"""MAML++ on load forecasts of households with histories of different length, with an LSTM."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

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


class MetaLearner(nn.Module):
    def __init__(self, network: nn.Module, multi_step_epochs: int) -> None:
        super().__init__()
        self.network, self.multi_step_epochs = network, multi_step_epochs
        shape = (STEPS,)
        self.rates = nn.ParameterList(
            nn.Parameter(torch.full(shape, 0.1, dtype=p.dtype)) for p in network.parameters()
        )

    def weights(self, epoch: int) -> list[float]:
        early = max(0.0, 1 - epoch / self.multi_step_epochs) / STEPS
        return [early] * (STEPS - 1) + [1 - early * (STEPS - 1)]

    def query_losses(self, task: tuple[Tensor, ...]) -> list[Tensor]:
        support_x, support_y, query_x, query_y = task
        w, losses = dict(self.network.named_parameters()), []
        for step in range(STEPS):
            loss = F.mse_loss(functional_call(self.network, w, support_x), support_y)
            gradient = torch.autograd.grad(loss, [*w.values()], create_graph=True)
            w = {
                name: p - rate[step] * g
                for (name, p), rate, g in zip(w.items(), self.rates, gradient, strict=True)
            }
            losses.append(F.mse_loss(functional_call(self.network, w, query_x), query_y))
        return losses


def run(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    train = DataLoader(Households(0, 12), batch_size=4, collate_fn=list)
    test = DataLoader(Households(50, 5), batch_size=5, collate_fn=list)
    model = MetaLearner(Forecast().double(), multi_step_epochs=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(3):
        weights = model.weights(epoch)
        for batch in train:
            optimizer.zero_grad()
            for task in batch:
                losses = model.query_losses(task)
                total = sum(a * loss for a, loss in zip(weights, losses, strict=True))
                (total / len(batch)).backward()
            optimizer.step()
    tested = [model.query_losses(task)[-1].detach() for task in next(iter(test))]
    rates = dict(enumerate(model.rates))
    loss = torch.stack(tested).mean()
    return {**dict(model.network.named_parameters()), **rates, "loss": loss}
