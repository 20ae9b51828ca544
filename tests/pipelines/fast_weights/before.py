"""A network that takes its weights as a list, and a class that does everything (first order)."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Meta(nn.Module):
    def __init__(self, update_lr: float, update_step: int, update_step_test: int) -> None:
        super().__init__()
        self.update_lr = update_lr
        self.update_step, self.update_step_test = update_step, update_step_test
        self.net = Learner()
        self.meta_optim = torch.optim.Adam(self.net.parameters(), lr=0.01)

    def forward(self, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> None:
        task_num = len(x_spt)
        loss_q = torch.zeros(())
        for i in range(task_num):
            fast_weights = list(self.net.parameters())
            for _ in range(self.update_step):
                loss = F.cross_entropy(self.net(x_spt[i], fast_weights), y_spt[i])
                grad = torch.autograd.grad(loss, fast_weights)
                fast_weights = [
                    p - self.update_lr * g for g, p in zip(grad, fast_weights, strict=True)
                ]
            loss_q = loss_q + F.cross_entropy(self.net(x_qry[i], fast_weights), y_qry[i])
        self.meta_optim.zero_grad()
        (loss_q / task_num).backward()
        self.meta_optim.step()

    def finetunning(self, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Tensor:
        net = deepcopy(self.net)
        fast_weights = list(net.parameters())
        corrects = []
        for _ in range(self.update_step_test + 1):
            with torch.no_grad():
                right = net(x_qry, fast_weights).argmax(1) == y_qry
            corrects.append(right.sum())
            loss = F.cross_entropy(net(x_spt, fast_weights), y_spt)
            grad = torch.autograd.grad(loss, fast_weights)
            fast_weights = [p - self.update_lr * g for g, p in zip(grad, fast_weights, strict=True)]
        return torch.stack(corrects).double() / len(y_qry)


def batch(tasks: int, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = [torch.rand(tasks, 3 * n, 1, 8, 8, dtype=torch.float64, generator=random) for n in (1, 4)]
    y = [torch.arange(3).repeat(n).expand(tasks, -1) for n in (1, 4)]
    return [x[0], y[0], x[1], y[1]]


def run(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    maml = Meta(update_lr=0.4, update_step=3, update_step_test=5).double()
    for step in range(4):
        maml(*batch(4, seed=step))
    accs = [maml.finetunning(*(part[0] for part in batch(1, 100 + i))) for i in range(6)]
    found = {name: p for name, p in maml.net.named_parameters() if p.requires_grad}
    return {**found, "accuracies": torch.stack(accs).mean(0)}
