"""Validate a network once per batch shape and dtype, before it is trained on such batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_maml.batches.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.checks.batch_norm_checks import check_policy
from lightning_maml.checks.first_pass import first_outputs, first_support, shifted
from lightning_maml.checks.hidden_layers import check_hides_no_layers
from lightning_maml.checks.logits_checks import check_logits
from lightning_maml.checks.repeated_passes import check_modes, check_writes, generators_of
from lightning_maml.core.tensors import raise_if_out_of_memory
from lightning_maml.errors import UserValueError
from lightning_maml.networks.functional_loss import FunctionalLoss
from lightning_maml.networks.functional_network import FunctionalHead, FunctionalNetwork
from lightning_maml.networks.head_body import Part, adapting, head_of
from lightning_maml.networks.stacking_trial import first_difference


class NetworkInfo(NamedTuple):
    """What the checks found out about a network.

    Attributes:
        outputs: Shape of the logits, or of a regression's outputs, for one example; None if they
            are not a tensor.
        ends_with_head: Whether the features before the head may be computed once per task: the
            output is that of the head, and no random numbers are drawn. Checked only where head
            or body adapt; else False.
        draws: Names of the random generators that the network and the loss draw from.
    """

    outputs: torch.Size | None
    ends_with_head: bool
    draws: tuple[str, ...] = ()


class NetworkChecks:
    """Checks whether a network can be trained with its loss on batches like a given one.

    Args:
        part: Which parameters adapt: ``"all"``, ``"head"`` or ``"body"``, or names of them.
        head: Name of the head; None for the last layer.
        logits: Takes the logits from what the network returns.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> from lightning_maml import MLP, Episodes
        >>> from lightning_maml.batches.outputs import logits_in
        >>> from lightning_maml.checks.network_checks import NetworkChecks
        >>> from lightning_maml.networks.functional_loss import FunctionalLoss
        >>> from lightning_maml.networks.functional_network import FunctionalNetwork
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> network, loss = MLP(4, 3), FunctionalLoss(F.cross_entropy, logits_in)
        >>> check = NetworkChecks("head", None, logits_in)
        >>> functional, episodes = FunctionalNetwork(network), Episodes(x, y, x, y)
        >>> check(network, functional, episodes, [loss], lambda outputs: None)
        NetworkInfo(outputs=torch.Size([3]), ends_with_head=True, draws=())
    """

    def __init__(self, part: Part, head: str | None, logits: Callable[[Any], Any]) -> None:
        self._part = part
        self._head = head
        self._logits = logits

    def __call__(
        self,
        network: nn.Module,
        functional: FunctionalNetwork,
        episodes: AnyEpisodes,
        losses: Sequence[FunctionalLoss],
        check_labels: Callable[[torch.Size | None], None],
    ) -> NetworkInfo:
        """Check the network on a meta-batch, and return what was found.

        Args:
            network: The model's network.
            functional: The network, or a copy of it, as a function.
            episodes: The meta-batch; its first task is used.
            losses: The model's losses.
            check_labels: Called with the shape of an example's outputs before a loss is called:
                labels that do not fit them would end all work on a GPU.

        Raises:
            ValueError: If layers that adapt run again in the backward pass, the batch-norm policy
                cannot govern the network, there are labels but no logits, a pass writes to
                parameters or inputs or cannot be repeated, or its mode is read past the modules.
        """
        info = self._inspected(functional, episodes, losses, check_labels)
        check_modes(network, functional, episodes)
        return info

    def _inspected(
        self,
        functional: FunctionalNetwork,
        episodes: AnyEpisodes,
        losses: Sequence[FunctionalLoss],
        check_labels: Callable[[torch.Size | None], None],
    ) -> NetworkInfo:
        # first, so that no other check changes the network
        check_writes(functional, episodes)
        check_hides_no_layers(functional, episodes)
        check_policy(functional, episodes)
        with first_support(functional, episodes) as x:
            run_again = tuple(functional.names_read_in_backward(x))
        adapted = adapting(functional.network, self._part, self._head)
        if any(name.startswith(run_again) for name in adapted):
            raise UserValueError(
                "Expected a network whose adapting layers run once but got one with checkpoints "
                "(torch.utils.checkpoint), which run them again with other parameters than the "
                "adapted ones; take the checkpoints out, and for memory use `chunk_size`."
            )
        outputs = first_outputs(functional, episodes)
        logits = self._logits(outputs)
        first = first_task(episodes)
        support_y, query_y = support_set(first)[1], first.query_y
        check_logits(logits, None if support_y.is_floating_point() else support_y)
        if query_y.shape[1:] != support_y.shape[1:] or query_y.dtype != support_y.dtype:
            of_queries = self._logits(first_outputs(functional, episodes, of_queries=True))
            check_logits(of_queries, None if query_y.is_floating_point() else query_y)
        shape = logits.shape[1:] if isinstance(logits, Tensor) else None
        check_labels(shape)
        draws = generators_of(functional, episodes, losses)
        ends = self._part in ("head", "body") and self._ends_with_head(functional, episodes)
        # with random numbers, features computed once would have one dropout mask for all steps
        if logits is not outputs or draws:
            ends = False
        if ends:
            ends = self._head_alone_gives_the_outputs(functional, episodes)
        return NetworkInfo(shape, ends, draws)

    def _ends_with_head(self, functional: FunctionalNetwork, episodes: AnyEpisodes) -> bool:
        head = head_of(functional.network, self._head)
        with first_support(functional, episodes) as x, torch.no_grad():
            ends = functional.ends_with(head, x, self._logits)
        if self._head is None and not ends:
            rank_zero_warn(
                f"The last layer with trainable parameters, {head!r}, is taken for the network's "
                "head, but what it gives are not the network's outputs; name the head: "
                f"`head={head!r}`, if it is that."
            )
        return ends

    def _head_alone_gives_the_outputs(
        self, functional: FunctionalNetwork, episodes: AnyEpisodes
    ) -> bool:
        """Compare the outputs of the whole network with those of the head on the features.

        The head gets other parameters for it. They differ if the outputs are changed in place, if
        the network calls the head with other weights, or if it leaves something in the head.
        """
        head = head_of(functional.network, self._head)
        with first_support(functional, episodes) as x, torch.no_grad():
            features = functional.features(functional.params, x, head)
            of_head = {
                name: p
                for name, p in shifted(functional.params).items()
                if name.startswith(f"{head}.")
            }
            try:
                whole = self._logits(functional(functional.params | of_head, x))
                alone = FunctionalHead(functional.network, head)(of_head, features)
            except Exception as error:  # noqa: BLE001 # at other parameters it may raise anything
                raise_if_out_of_memory(error)
                return False
        return first_difference({"outputs": whole}, {"outputs": alone}, 1e-3) is None
