"""The mean meta-gradient of a meta-batch as other libraries and plain torch.func compute it.

Each takes a network whose batch norm keeps no running averages, the mean loss, the tasks, the inner
rate and the inner steps.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_maml import Episodes
from lightning_maml.core.params import Params

Loss = Callable[[Tensor, Tensor], Tensor]
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def learn2learn(
    network: nn.Module,
    loss: Loss,
    episodes: Episodes,
    rate: float,
    steps: int,
    first_order: bool = False,
) -> Params:
    """Clone, adapt, backward: the loop of learn2learn's examples."""
    from learn2learn.algorithms import MAML

    maml = MAML(network, lr=rate, first_order=first_order)

    def query_loss(task: Task) -> Tensor:
        functional = maml.clone()
        for _ in range(steps):
            functional.adapt(loss(functional(task[0]), task[1]))
        return loss(functional(task[2]), task[3])

    return _accumulated(
        network, map(query_loss, zip(*episodes, strict=True)), len(episodes.support_x)
    )


def learn2learn_fo(
    network: nn.Module, loss: Loss, episodes: Episodes, rate: float, steps: int
) -> Params:
    """Do the same with ``first_order=True``."""
    return learn2learn(network, loss, episodes, rate, steps, first_order=True)


def higher(network: nn.Module, loss: Loss, episodes: Episodes, rate: float, steps: int) -> Params:
    """Use ``innerloop_ctx`` for each task, as in higher's ``maml-omniglot.py``."""
    import higher as library

    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    network.zero_grad()
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        with library.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (
            functional,
            inner,
        ):
            for _ in range(steps):
                inner.step(loss(functional(support_x), support_y))
            (loss(functional(query_x), query_y) / len(episodes.support_x)).backward()
    return {name: p.grad for name, p in network.named_parameters()}


def torchopt(network: nn.Module, loss: Loss, episodes: Episodes, rate: float, steps: int) -> Params:
    """Use ``MetaSGD``, with the state saved and restored around each task.

    This is how torchopt's few-shot example does it.
    """
    import torchopt as library

    params = dict(network.named_parameters())
    inner = library.MetaSGD(network, lr=rate)
    state, inner_state = (library.extract_state_dict(of, by="reference") for of in (network, inner))
    for p in params.values():
        p.grad = None
    for support_x, support_y, query_x, query_y in zip(*episodes, strict=True):
        for _ in range(steps):
            inner.step(loss(network(support_x), support_y))
        (loss(network(query_x), query_y) / len(episodes.support_x)).backward()
        library.recover_state_dict(network, state)
        library.recover_state_dict(inner, inner_state)
    return {name: p.grad for name, p in params.items()}


def autograd(
    network: nn.Module,
    loss: Loss,
    episodes: Episodes,
    rate: float,
    steps: int,
    first_order: bool = False,
) -> Params:
    """Use ``torch.autograd.grad`` through an inner loop of itself: the plainest loop."""
    params = dict(network.named_parameters())

    def query_loss(task: Task) -> Tensor:
        w = params
        for _ in range(steps):
            value = loss(functional_call(network, w, (task[0],)), task[1])
            gradient = torch.autograd.grad(value, list(w.values()), create_graph=not first_order)
            w = {
                name: tensor - rate * g
                for (name, tensor), g in zip(w.items(), gradient, strict=True)
            }
        return loss(functional_call(network, w, (task[2],)), task[3])

    return _accumulated(
        network, map(query_loss, zip(*episodes, strict=True)), len(episodes.support_x)
    )


def autograd_fo(
    network: nn.Module, loss: Loss, episodes: Episodes, rate: float, steps: int
) -> Params:
    """Do the same without second derivatives."""
    return autograd(network, loss, episodes, rate, steps, first_order=True)


def torch_func(
    network: nn.Module,
    loss: Loss,
    episodes: Episodes,
    rate: float,
    steps: int,
    first_order: bool = False,
) -> Params:
    """Use ``grad`` through an inner loop of ``grad``, one task after the other.

    ``vmap`` over tasks fails at batch norm.
    """
    params = {name: p.detach() for name, p in network.named_parameters()}

    def query_loss(w: Params, task: Task) -> Tensor:
        for _ in range(steps):
            gradient = torch.func.grad(
                lambda w: loss(functional_call(network, w, (task[0],)), task[1])
            )(w)
            w = {
                name: w[name] - rate * (gradient[name].detach() if first_order else gradient[name])
                for name in w
            }
        return loss(functional_call(network, w, (task[2],)), task[3])

    gradients = [torch.func.grad(query_loss)(params, task) for task in zip(*episodes, strict=True)]
    return {
        name: torch.stack([gradient[name] for gradient in gradients]).mean(0) for name in params
    }


def _accumulated(network: nn.Module, losses: Iterator[Tensor], tasks: int) -> Params:
    network.zero_grad()
    for value in losses:
        (value / tasks).backward()
    return {name: p.grad for name, p in network.named_parameters()}


PEERS = {
    "learn2learn": learn2learn,
    "learn2learn-fo": learn2learn_fo,
    "higher": higher,
    "torchopt": torchopt,
    "torch-func": torch_func,
    "autograd": autograd,
    "autograd-fo": autograd_fo,
}
