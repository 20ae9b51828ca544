"""Check that all that a network could train is among its parameters."""

import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.outputs import tensors_in
from lightning_maml.batches.trees import differentiable
from lightning_maml.checks.first_pass import first_support
from lightning_maml.core.tensors import nodes_of
from lightning_maml.errors import UserValueError
from lightning_maml.networks.functional_network import FunctionalNetwork


def check_hides_no_layers(functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Refuse a network with trainable tensors that its modules do not know, in a list for instance.

    They would neither adapt, nor be trained or saved.

    Args:
        functional: The network, or a copy of it, as a function.
        episodes: The meta-batch; its first task is used.

    Raises:
        ValueError: If the outputs depend on a trainable tensor that is no parameter.
    """
    params = {name: differentiable(p).requires_grad_() for name, p in functional.params.items()}

    def leaves() -> dict[int, Tensor]:
        """Return the leaves of a pass, whose ids nothing else has as long as they are kept."""
        # with inputs of its own, which it may make trainable
        with first_support(functional, episodes) as x, torch.enable_grad():
            outputs = tensors_in(functional(params, x))
        nodes = (node for output in outputs for node in nodes_of(output))
        return {id(node.variable): node.variable for node in nodes if hasattr(node, "variable")}

    # what a pass makes and differentiates by is another tensor in each
    once, again = leaves(), leaves()
    hidden = once.keys() & again.keys() - {id(p) for p in params.values()}
    if hidden:
        shapes = sorted(tuple(once[each].shape) for each in hidden)
        raise UserValueError(
            "Expected all trainable tensors of a network to be parameters of its modules but its "
            f"outputs depend on others, of the shapes {shapes}, which would neither adapt nor be "
            "trained or saved; keep layers in nn.ModuleList and tensors as nn.Parameter, or "
            "freeze them, requires_grad_(False)."
        )
