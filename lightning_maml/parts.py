"""Which parameters adapt in the inner loop: all of them, the head alone (ANIL), or the body alone (BOIL)."""

from typing import Literal

from torch import nn

from lightning_maml.functional import Params

PartName = Literal["all", "head", "body"]


def adapting(network: nn.Module, part: PartName, head: str | None = None) -> Params:
    """Return the trainable parameters of a part of ``network``.

    Args:
        network: Any module.
        part: ``"all"``; ``"head"``, as in ANIL (Raghu et al. 2020); ``"body"``, all but the head, as in BOIL (Oh et al. 2021).
        head: Name of the submodule that is the head; by default the last one that has trainable parameters of its own.

    Raises:
        ValueError: If ``part`` is none of the three, or if the head or the body has no trainable parameters.
    """
    if part not in ("all", "head", "body"):
        raise ValueError(f"Expected `adapt` to be 'all', 'head' or 'body' but got {part!r}.")
    params: Params = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if part == "all":
        return params
    owners = [name for name, module in network.named_modules() if any(p.requires_grad for p in module.parameters(recurse=False))]
    last = owners[-1] if head is None else head
    of_head = {name for name in params if name.startswith(f"{last}.")}
    if not of_head or len(of_head) == len(params):
        which = "trainable parameters of its own" if not of_head else "a part of the trainable parameters, with a body before it,"
        raise ValueError(f"Expected `head` to name a submodule that has {which} but got {last!r}; those that do are {owners}.")
    return {name: p for name, p in params.items() if (name in of_head) == (part == "head")}
