"""The meta-gradient of the textbooks: autograd through the unrolled inner loop.

It takes one task after another, in plain torch.

It is slow, keeps the graph of all inner steps, and shares no code with
:func:`lightning_maml.meta_gradient`, which it is there to judge.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_maml.batches.episodes import Episodes
from lightning_maml.batches.outputs import map_outputs
from lightning_maml.batches.trees import Inputs, call, cat, count, map_tensors
from lightning_maml.core.inner_optimizers import InnerOptimizer
from lightning_maml.networks.copies import deep_copy

Loss = Callable[[Any, Any], Tensor]
Params = dict[str, Tensor]
Rates = Mapping[str, Tensor | float]


def unrolled_gradient(
    network: nn.Module,
    loss: Loss,
    episodes: Episodes,
    rates: Sequence[Rates],
    *,
    optimizer: InnerOptimizer | None = None,
    batch_norm: str = "batch",
    query_in_eval: bool = False,
    curved: bool = True,
    query_loss: Loss | None = None,
    besides: Params | None = None,
) -> Params:
    """Return the mean over tasks of the gradient of the query loss after adaptation.

    The gradient is that of the network's trainable parameters.

    Every evaluation starts from the network's buffers as they are, and what it writes to them is
    dropped.

    Args:
        network: Its parameters are the meta-parameters.
        loss: Maps outputs and labels to their mean loss.
        episodes: The tasks.
        rates: For each inner step the rates of the parameters that adapt.
        optimizer: What an inner step does with the gradient; by default gradient descent.
        batch_norm: ``"batch"``, ``"support"`` or ``"running"``, see :class:`lightning_maml.MAML`.
        query_in_eval: See there.
        curved: Differentiate through the inner steps too; if not, the gradient is first-order.
        query_loss: The loss of the query sets, if it is another.
        besides: Other tensors, on which the loss and the rates depend, by name: their gradients are
            returned too.

    Returns:
        The gradient; nan if the network reads its parameters from where a copy of it cannot be
        given other ones.
    """
    network, w = _emptied(network, batch_norm)
    leaves = w | (besides or {})
    of_queries = loss if query_loss is None else query_loss
    total = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for number in range(len(episodes.query_y)):
        task = map_tensors(lambda tensor, number=number: tensor[number], episodes)
        # the only attention with a second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            if query_in_eval:
                network.train()
            adapted = _adapted(network, loss, task, w, rates, optimizer, curved)
            if query_in_eval:
                network.eval()
            value = of_queries(_query_outputs(network, adapted, task, batch_norm), task.query_y)
            gradient = torch.autograd.grad(value, [*leaves.values()], materialize_grads=True)
        total = {name: total[name] + _dense(g) for name, g in zip(leaves, gradient, strict=True)}
    return {name: g / len(episodes.query_y) for name, g in total.items()}


def unrolled_way_back(
    network: nn.Module,
    loss: Loss,
    episodes: Episodes,
    rates: Sequence[Rates],
    *,
    optimizer: InnerOptimizer | None = None,
    batch_norm: str = "batch",
    query_in_eval: bool = False,
) -> Params:
    """Return the mean over tasks of ``w_0 - w_N``, which is Reptile's gradient.

    Takes the arguments of :func:`unrolled_gradient`.
    """
    network, w = _emptied(network, batch_norm)
    total = {name: torch.zeros_like(p) for name, p in w.items()}
    for number in range(len(episodes.query_y)):
        task = map_tensors(lambda tensor, number=number: tensor[number], episodes)
        with torch.enable_grad():
            if query_in_eval:
                network.train()
            adapted = _adapted(network, loss, task, w, rates, optimizer, curved=False)
        with torch.no_grad():
            # for the random numbers that it draws
            if query_in_eval:
                network.eval()
            _query_outputs(network, adapted, task, batch_norm)
        total = {name: total[name] + (w[name] - adapted[name]).detach() for name in w}
    return {name: g / len(episodes.query_y) for name, g in total.items()}


def _adapted(
    network: nn.Module,
    loss: Loss,
    task: Episodes,
    w: Params,
    rates: Sequence[Rates],
    optimizer: InnerOptimizer | None,
    curved: bool,
) -> Params:
    """Return ``w_N``: the inner steps on the support loss."""
    state: dict[str, tuple[Tensor, ...]] = {}
    for number, rates_of_step in enumerate(rates):
        value = loss(_outputs(network, w, task.support_x), task.support_y)
        at = [w[name] for name in rates_of_step]
        gradient = torch.autograd.grad(value, at, create_graph=curved, materialize_grads=True)
        before, w = w, dict(w)
        for name, g in zip(rates_of_step, gradient, strict=True):
            rate, p = rates_of_step[name], before[name]
            if optimizer is None:
                w[name] = p - rate * _dense(g)
                continue
            here = p if curved else p.detach()
            slots = state[name] if number else optimizer.start(here.detach())
            moved, slots = optimizer.step(here, _dense(g), rate, slots, number)
            # first order takes the gradient at w_N for that at w_0, whatever a step does
            w[name] = moved if curved else p + (moved - here)
            state[name] = slots if curved else tuple(slot.detach() for slot in slots)
    return w


def _query_outputs(network: nn.Module, w: Params, task: Episodes, batch_norm: str) -> Any:
    if batch_norm != "support" or not any(
        isinstance(module, _BatchNorm) for module in network.modules()
    ):
        return _outputs(network, w, task.query_x)
    shots = len(task.support_y)
    outputs = _outputs(network, w, cat([task.support_x, task.query_x]), shots)
    return map_outputs(lambda tensor: tensor[shots:], outputs)


def _outputs(network: nn.Module, w: Params, x: Inputs, shots: int | None = None) -> Any:
    """Return the network's outputs with the parameters ``w``.

    A deep copy to which ``w`` was given in place of the parameters has it wherever the network
    holds them, and buffers of its own.
    """
    own = deep_copy(
        network, {id(p): w[name] for name, p in network.named_parameters() if name in w}
    )
    for module in own.modules():
        if isinstance(module, _BatchNorm):
            module.support = 1.0 if shots is None else shots / count(x)  # type: ignore[assignment]
    return call(own, x)


def _emptied(network: nn.Module, batch_norm: str) -> tuple[nn.Module, Params]:
    """Return a copy of the network without its trainable parameters, and these parameters.

    The copy holds nan in their place, so that none is read by mistake.
    """
    network = deep_copy(network)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    w = {name: p.detach().clone().requires_grad_() for name, p in trainable.items()}
    for p in trainable.values():
        p.detach().fill_(float("nan"))
    for module in network.modules():
        if isinstance(module, _BatchNorm) and batch_norm != "running":
            module.running_mean = module.running_var = module.num_batches_tracked = None
            module.track_running_stats = False
            if batch_norm == "support":
                module.register_forward_hook(_normalised_by_support)
    return network, w


def _normalised_by_support(norm: Any, arguments: tuple[Tensor, ...], _: Tensor) -> Tensor:
    """Normalise all samples by the mean and variance of the support set, which comes first."""
    (x,) = arguments
    support = x[: round(norm.support * len(x))]
    axes = [0, *range(2, x.ndim)]
    mean, variance = support.mean(axes, keepdim=True), support.var(axes, correction=0, keepdim=True)
    normalised: Tensor = (x - mean) / (variance + norm.eps).sqrt()
    if not norm.affine:
        return normalised
    weight, bias = (p.view(1, -1, *[1] * (x.ndim - 2)) for p in (norm.weight, norm.bias))
    return torch.addcmul(bias, normalised, weight)


def _dense(gradient: Tensor) -> Tensor:
    # embeddings may have sparse ones
    return gradient.to_dense() if gradient.is_sparse else gradient
