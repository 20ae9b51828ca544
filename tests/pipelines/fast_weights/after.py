"""The same network in the library's model."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_maml import FOMAML, Episodes


class Learner(nn.Module):
    """Layers as functions of ``vars``."""

    def __init__(self) -> None:
        super().__init__()
        self.vars, self.vars_bn = nn.ParameterList(), nn.ParameterList()
        for inside, outside in ((1, 4), (4, 4)):
            w = nn.Parameter(torch.ones(outside, inside, 3, 3))
            nn.init.kaiming_normal_(w)
            self.vars.append(w)
            self.vars.extend(
                [nn.Parameter(torch.ones(outside)), nn.Parameter(torch.zeros(outside))]
            )
            mean = nn.Parameter(torch.zeros(outside), requires_grad=False)
            variance = nn.Parameter(torch.ones(outside), requires_grad=False)
            self.vars_bn.extend([mean, variance])
        w = nn.Parameter(torch.ones(3, 16))
        nn.init.kaiming_normal_(w)
        self.vars.extend([w, nn.Parameter(torch.zeros(3))])

    def forward(self, x: Tensor, vars: Any = None, bn_training: bool = True) -> Tensor:
        vars = self.vars if vars is None else vars
        for layer in range(2):
            w, scale, shift = (vars[3 * layer + number] for number in range(3))
            x = F.conv2d(x, w, stride=2, padding=1)
            mean, variance = self.vars_bn[2 * layer], self.vars_bn[2 * layer + 1]
            x = F.relu(F.batch_norm(x, mean, variance, scale, shift, training=bn_training))
        return F.linear(x.flatten(1), vars[6], vars[7])

    def parameters(self, recurse: bool = True) -> Any:
        return self.vars


def batch(tasks: int, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = [torch.rand(tasks, 3 * n, 1, 8, 8, dtype=torch.float64, generator=random) for n in (1, 4)]
    y = [torch.arange(3).repeat(n).expand(tasks, -1) for n in (1, 4)]
    return [x[0], y[0], x[1], y[1]]


def run(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    maml = FOMAML(Learner(), inner_lr=0.4, train_steps=3, test_steps=5).double()
    optimizer = torch.optim.Adam(maml.network.parameters(), lr=0.01)
    for step in range(4):
        optimizer.zero_grad()
        maml.meta_loss(batch(4, seed=step)).backward()
        optimizer.step()
    tests = [Episodes(*batch(1, 100 + i)) for i in range(6)]
    accs = [(maml.evaluate(t).aux.argmax(-1) == t.query_y).double().mean((0, 2)) for t in tests]
    found = {name: p for name, p in maml.network.named_parameters() if p.requires_grad}
    return {**found, "accuracies": torch.stack(accs).mean(0)}
