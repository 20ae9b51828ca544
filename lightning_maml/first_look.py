"""A look at a network on the first batch of each kind: whether it can be trained on such batches, and what it returns."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_maml.episodes import AnyEpisodes, first_task, support_set
from lightning_maml.functional import differentiable
from lightning_maml.learner import Learner, writes
from lightning_maml.parts import PartName, adapting, head_of
from lightning_maml.randomness import generator_states, generators_drawn_from, set_generator_states
from lightning_maml.trial import first_difference

_OF_TYPES = re.compile("same dtype|expected scalar type|should be the same|not implemented for '")
"""What torch's errors say if a layer does not accept its inputs' type."""


class Seen(NamedTuple):
    """What a look at a network found.

    Attributes:
        outputs: Shape of the outputs for one example; None if they are not a tensor.
        ends_with_head: Whether the outputs are those of the head alone; False if this was not checked because all parameters adapt.
        draws: Names of the random generators that the network draws from.
    """

    outputs: torch.Size | None
    ends_with_head: bool
    draws: tuple[str, ...] = ()


class FirstLook:
    """Looks at a network if a batch is of another kind than the last one, and otherwise returns what it saw before.

    Kinds differ by the types and shapes of inputs and parameters, and by the network's mode.

    Args:
        part: Which parameters adapt.
        head: Name of the head, if one was given.
    """

    def __init__(self, part: PartName, head: str | None) -> None:
        self._part: PartName = part
        self._head = head
        self._kind: tuple[Any, ...] = ()
        self._seen = Seen(None, False)

    def __call__(
        self, network: nn.Module, learner: Learner, episodes: AnyEpisodes, inspect: Callable[[Callable[[], Tensor]], None]
    ) -> Seen:
        """Return what was seen.

        Args:
            network: The model's network, by which to tell whether it is still the same.
            learner: The learner of this network, or of a copy.
            episodes: The batch.
            inspect: Looks at the network while it runs; it is given a function that runs it.

        Raises:
            ValueError: If layers that adapt run again in the backward pass, or there are labels but no logits.
        """
        shapes, are_labels = tuple(p.shape for p in learner.params.values()), not episodes.support_y.is_floating_point()
        of_inputs = (episodes.support_x.dtype, episodes.support_x.shape[1:])
        kind = (network, network.training, learner.network.training, of_inputs, shapes, are_labels)
        if self._kind != kind or writes(learner.network) is None:
            self._seen = self._look(learner, episodes, are_labels)
            with first_support(learner, episodes) as x:
                inspect(partial(learner, learner.params, x))
            self._kind = kind
        return self._seen

    def _look(self, learner: Learner, episodes: AnyEpisodes, are_labels: bool) -> Seen:
        look_for_writes(learner, episodes)
        with first_support(learner, episodes) as x:
            again = tuple(learner.names_read_in_backward(x))
        if any(name.startswith(again) for name in adapting(learner.network, self._part, self._head)):
            raise ValueError(
                "Expected a network whose adapting layers run once but got one with checkpoints (torch.utils.checkpoint), which run "
                "them again with other parameters than the adapted ones; take the checkpoints out, and for memory use `chunk_size`."
            )
        ends = self._part != "all" and self._ends_with_head(learner, episodes)
        outputs = first_outputs(learner, episodes, are_logits=are_labels)
        draws = generators_of(learner, episodes)
        return Seen(outputs.shape[1:] if isinstance(outputs, Tensor) else None, ends, draws)

    def _ends_with_head(self, learner: Learner, episodes: AnyEpisodes) -> bool:
        head = head_of(learner.network, self._head)
        with first_support(learner, episodes) as x, torch.no_grad():
            ends = learner.ends_with(head, x)
        if self._head is None and not ends:
            rank_zero_warn(
                f"The last layer with trainable parameters, {head!r}, is taken for the network's head, but what it gives are not the "
                f"network's outputs; name the head: `head={head!r}`, if it is that."
            )
        return ends


def look_for_writes(learner: Learner, episodes: AnyEpisodes) -> None:
    """Find out what a forward pass changes in the network; the first of all looks, so that no other changes it.

    Raises:
        ValueError: If it writes to a trainable parameter.
    """
    with first_support(learner, episodes) as x, torch.no_grad():
        learner.look_for_writes(x)


def first_outputs(learner: Learner, episodes: AnyEpisodes, *, are_logits: bool = True) -> Any:
    """Return the network's outputs for the first task's support set.

    Raises:
        ValueError: If they are to be logits and are not ``[S, D]``.
    """
    with first_support(learner, episodes) as x, torch.no_grad():
        outputs = learner(learner.params, x)
    if are_logits and (not isinstance(outputs, Tensor) or outputs.ndim != 2):
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"Expected `network` to return one tensor of logits [examples, ways] but got {got}; wrap it in a module that does."
        )
    return outputs


def generators_of(learner: Learner, episodes: AnyEpisodes) -> tuple[str, ...]:
    """Return the names of the random generators that the network draws from.

    Raises:
        ValueError: If it does not return the same again from the same random state: derivatives need evaluations that can be repeated.
    """
    device = episodes.support_x.device
    before = generator_states(device)
    with first_support(learner, episodes) as x, torch.no_grad():
        outputs = learner(learner.params, x)
        draws = tuple(generators_drawn_from(before, device))
        set_generator_states(before, device)
        again = learner(learner.params, x)
    if first_difference(_floats(outputs), _floats(again)) is not None:
        raise ValueError(
            "Expected a network that returns the same for the same inputs, parameters and random state but got other outputs the second "
            "time; let it draw from the global random generators of torch, numpy or Python, not from one of its own, and keep what it "
            "remembers between calls in buffers."
        )
    return draws


def _floats(outputs: Any) -> dict[str, Tensor]:
    leaves = enumerate(torch.utils._pytree.tree_leaves(outputs))
    return {str(number): leaf for number, leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}


@contextmanager
def first_support(learner: Learner, episodes: AnyEpisodes) -> Iterator[Tensor]:
    """Give the first task's support inputs for a look at the network; the random state is restored after it.

    Raises:
        ValueError: If the network fails because their type is not that of its parameters.
    """
    device = episodes.support_x.device
    before = generator_states(device)  # a resumed run looks once more
    with torch.inference_mode(False):
        x = differentiable(support_set(first_task(episodes))[0])
        try:
            yield x
        except RuntimeError as error:
            dtype = next((p.dtype for p in learner.network.parameters()), x.dtype)
            if x.dtype == dtype or not _OF_TYPES.search(str(error)):
                raise
            of_bytes = " / 255" if x.dtype == torch.uint8 else ""
            raise ValueError(
                f"Expected inputs of the network's type, {dtype}, but it fails on {x.dtype}; give it x.to({dtype}){of_bytes}."
            ) from error
        finally:
            set_generator_states(before, device)
