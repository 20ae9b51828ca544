"""The parameters that adapt in the inner loop: all, head (ANIL), body (BOIL), or those named."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_maml.core.params import Params
from lightning_maml.errors import UserValueError

PartName = Literal["all", "head", "body"]
Part = PartName | Sequence[str]
"""A part of the network, or names of parameters and modules, which may be patterns of the shell:
``*`` stands for anything, dots included, ``?`` for one character, ``[01]`` for one of these."""


def plain_part(part: Part) -> PartName | list[str]:
    """Return ``"all"``, ``"head"``, ``"body"`` or a list of names.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(part, str) and part in ("all", "head", "body"):
        return cast(PartName, part)
    names = [*part] if isinstance(part, Iterable) and not isinstance(part, str) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise UserValueError(
            "Expected `adapt` to be 'all', 'head', 'body' or a list of names of parameters and "
            f"modules but got {part!r}; if it is a name, put it in a list."
        )
    return names


def adapting(network: nn.Module, part: Part, head: str | None = None) -> Params:
    """Return the trainable parameters of ``network`` that adapt in the inner loop, by name.

    Args:
        network: Any module.
        part: ``"all"``; ``"head"``, as in ANIL (Raghu et al. 2020); ``"body"``, all but the head,
            as in BOIL (Oh et al. 2021); or a list of names of parameters and modules, such as
            ``["layer4", "*.bias"]``.
        head: Name of the submodule that is the head; by default the last one that has trainable
            parameters of its own. Those of its parametrisations (weight norm) belong to it.

    Raises:
        ValueError: If ``part`` is none of these, if the network, the part that adapts or one of the
            names has no trainable parameters, or if head and body share some.

    Examples:
        >>> from lightning_maml import MLP
        >>> from lightning_maml.networks.head_body import adapting
        >>> list(adapting(MLP(4, 3, hidden=[8]), ["*.bias"]))
        ['layers.1.bias', 'layers.3.bias']
    """
    part = plain_part(part)
    params: Params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not params:
        raise UserValueError(
            "Expected `network` to have trainable parameters but all of them are frozen, or "
            "there are none; unfreeze them, model.unfreeze() for instance: adaptation "
            "leaves them as they are."
        )
    if part == "all":
        return params
    if not isinstance(part, str):
        if head is not None:
            raise UserValueError(
                f"Expected no `head` where `adapt` names what adapts but got {head!r}; leave it "
                "out, or say adapt='head'."
            )
        return _named(network, part)
    if head is None:
        _check_that_last_layer_trains(network)
    name_of_head = head_of(network, head)
    prefix = f"{name_of_head}."
    in_head = {name for name in params if name.startswith(prefix)}
    if not in_head or (part == "body" and len(in_head) == len(params)):
        raise UserValueError(
            "Expected `head` to name a submodule that has some of the trainable parameters, but "
            f"not all, but got {name_of_head!r}; the layers that have any are {_owners(network)}, "
            "and with one alone there is no other part than 'all'."
        )
    # a shared parameter has a name in the head and one in the body
    every = dict(network.named_parameters(remove_duplicate=False))
    ids_in_head = {id(p) for name, p in every.items() if name.startswith(prefix)}
    shared = [
        name for name, p in every.items() if id(p) in ids_in_head and not name.startswith(prefix)
    ]
    if shared:
        raise UserValueError(
            f"Expected head and body to share no parameters but {shared} are in the head "
            f"{name_of_head!r} too; use adapt='all'."
        )
    return {name: p for name, p in params.items() if (name in in_head) == (part == "head")}


def _named(network: nn.Module, patterns: Sequence[str]) -> Params:
    """Return the trainable parameters that fit one of the patterns by any of their names.

    Raises:
        ValueError: If there is no pattern, or no trainable parameter fits one of them.
    """
    if not patterns:
        raise UserValueError(
            "Expected `adapt` to name at least one parameter or module but got none; say 'all' for "
            "all of them."
        )
    every = dict(network.named_parameters(remove_duplicate=False))
    adapting_ids: set[int] = set()
    for pattern in patterns:
        fitting = [every[name] for name in _fitting(every, pattern)]
        trainable = {id(p) for p in fitting if p.requires_grad}
        if not trainable:
            found = "frozen ones only" if fitting else "none"
            raise UserValueError(
                "Expected each name in `adapt` to fit trainable parameters, such as "
                f"{_like(pattern, network)!r}, but got {pattern!r}, which fits {found}; "
                "network.named_parameters() lists them."
            )
        adapting_ids |= trainable
    return {name: p for name, p in network.named_parameters() if id(p) in adapting_ids}


def _like(pattern: str, network: nn.Module) -> str:
    """Return the trainable parameter, or module of such, whose name is most like a pattern."""
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    modules = {name.rpartition(".")[0] for name in names} | {name.split(".")[0] for name in names}
    close = get_close_matches(pattern.rstrip(".*"), [*names, *sorted(modules)], n=1)
    return (close or names)[0]


def frozen_that_fit(network: nn.Module, part: Part) -> list[str]:
    """Return a line for each pattern that fits frozen parameters beside trainable ones.

    Args:
        network: Any module.
        part: As in :func:`adapting`; names without ``*``, ``?`` or ``[`` are no patterns.
    """
    lines = []
    for pattern in [] if isinstance(part, str) else part:
        every = dict(network.named_parameters())
        fitting = {every[name]: name for name in _fitting(every, pattern)}
        frozen = [name for p, name in fitting.items() if not p.requires_grad]
        if frozen and set("*?[") & set(pattern):
            lines.append(
                f"{pattern!r} fits {len(fitting)} parameters, of which {len(frozen)} are frozen "
                f"and do not adapt, {frozen[0]!r} for instance"
            )
    return lines


def _fitting(names: Iterable[str], pattern: str) -> list[str]:
    """Return the parameters that are called so, or lie in a module that is; else by the pattern."""
    called = [name for name in names if name == pattern or name.startswith(f"{pattern}.")]
    return called or [
        name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    ]


def head_of(network: nn.Module, head: str | None = None) -> str:
    """Return ``head`` or, if it is None, the name of the last layer with trainable parameters."""
    return _owners(network)[-1] if head is None else head


def _check_that_last_layer_trains(network: nn.Module) -> None:
    """Refuse to guess the head if the last layer is frozen: it may be that one or the one before.

    Raises:
        ValueError: If it is frozen.
    """
    with_parameters = [
        name for name, module in network.named_modules() if [*module.parameters(recurse=False)]
    ]
    last_layer, last_trainable = with_parameters[-1], head_of(network)
    if _layer_of(last_layer, _parametrizations(network)) != last_trainable:
        raise UserValueError(
            f"Expected `head` to be named, because the last layer, {last_layer!r}, is frozen, but "
            "got none; unfreeze that layer if it is the head, or name another, "
            f"head={last_trainable!r} for instance."
        )


def _owners(network: nn.Module) -> list[str]:
    """Return the names of the layers with trainable parameters of their own, first to last."""
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
    """Return the name of the layer that a parametrisation belongs to.

    Args:
        name: Name of a module. If it is part of no parametrisation, it is returned.
        parametrized: Names of the network's parametrisation lists, from the outside in.
    """
    for parametrization in parametrized:
        if f"{name}.".startswith(f"{parametrization}."):
            return parametrization.rpartition("parametrizations.")[0].removesuffix(".")
    return name
