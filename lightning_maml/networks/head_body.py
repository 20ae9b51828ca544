"""Which parameters adapt in the inner loop: all of them, the head alone (ANIL), or the body alone (BOIL)."""

from typing import Literal

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_maml.core.params import Params

PartName = Literal["all", "head", "body"]


def adapting(network: nn.Module, part: PartName, head: str | None = None) -> Params:
    """Return the trainable parameters of a part of ``network``.

    Args:
        network: Any module.
        part: ``"all"``; ``"head"``, as in ANIL (Raghu et al. 2020); ``"body"``, all but the head,
            as in BOIL (Oh et al. 2021).
        head: Name of the submodule that is the head; by default the last one that has trainable
            parameters of its own, to which those of its parametrisations (weight norm) belong.

    Raises:
        ValueError: If ``part`` is none of the three, if the network, the head or a body that is to
            adapt has no trainable parameters, or if head and body share some.
    """
    if part not in ("all", "head", "body"):
        raise ValueError(f"Expected `adapt` to be 'all', 'head' or 'body' but got {part!r}.")
    params: Params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(
            "Expected `network` to have trainable parameters but all of them are frozen, or "
            "there are none."
        )
    if part == "all":
        return params
    last = head_of(network, head)
    with_parameters = [
        name for name, module in network.named_modules() if [*module.parameters(recurse=False)]
    ]
    if head is None and not _layer_of(with_parameters[-1], _parametrizations(network)) == last:
        raise ValueError(
            f"Expected `head` to be named, because the last layer, {with_parameters[-1]!r}, is "
            "frozen, but got none; unfreeze that layer if it is the head, or name another, "
            f"head={last!r} for instance."
        )
    of_head = {name for name in params if name.startswith(f"{last}.")}
    if not of_head or (part == "body" and len(of_head) == len(params)):
        raise ValueError(
            "Expected `head` to name a submodule that has some of the trainable parameters, but "
            f"not all, but got {last!r}; the layers that have any are {_owners(network)}, and "
            "with one alone there is no other part than 'all'."
        )
    every = dict(network.named_parameters(remove_duplicate=False))
    heads = {id(p) for name, p in every.items() if name.startswith(f"{last}.")}
    if shared := [
        name for name, p in every.items() if id(p) in heads and not name.startswith(f"{last}.")
    ]:
        raise ValueError(
            f"Expected head and body to share no parameters but {shared} are in the head {last!r} "
            "too; use adapt='all'."
        )
    return {name: p for name, p in params.items() if (name in of_head) == (part == "head")}


def head_of(network: nn.Module, head: str | None = None) -> str:
    """Return the name of the head: as given, or the last submodule that has trainable parameters of its own."""
    return _owners(network)[-1] if head is None else head


def _owners(network: nn.Module) -> list[str]:
    """Return the names of the layers that have trainable parameters of their own, from first to last."""
    parametrized = _parametrizations(network)
    names = [
        name
        for name, module in network.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    owners = {_layer_of(name, parametrized) for name in names}
    return [name for name, _ in network.named_modules() if name in owners]


def _parametrizations(network: nn.Module) -> list[str]:
    return [
        name for name, module in network.named_modules() if isinstance(module, ParametrizationList)
    ]


def _layer_of(name: str, parametrized: list[str]) -> str:
    """Return the layer whose parametrisations a module is in, the outermost if they are nested, or else the module."""
    for of_tensor in parametrized:  # from the outside in
        if f"{name}.".startswith(f"{of_tensor}."):
            return of_tensor.rpartition("parametrizations.")[0].removesuffix(".")
    return name
