"""Check that a network keeps what its batch-norm policy promises."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_maml.batches.episodes import AnyEpisodes, first_task
from lightning_maml.batches.outputs import tensors_in
from lightning_maml.batches.trees import Inputs, cat, count, detached, map_tensors, tensors
from lightning_maml.batches.trees import shapes as shapes_of
from lightning_maml.checks.first_pass import first_support, shifted
from lightning_maml.core.rng import generator_states, set_generator_states
from lightning_maml.errors import UserValueError
from lightning_maml.networks.batch_norm import batch_norms
from lightning_maml.networks.copies import copy_in_mode
from lightning_maml.networks.functional_network import FunctionalNetwork, norms_with_own_forward


def check_policy(functional: FunctionalNetwork, episodes: AnyEpisodes) -> None:
    """Refuse a network that does not keep what its batch-norm policy promises.

    ``"support"`` promises that queries do not see one another; ``"running"`` and ``"per_step"``
    promise it in evaluation mode. An output must then not change with the other inputs. ``"batch"``
    and ``"support"`` promise that no running averages are used.

    Args:
        functional: The network.
        episodes: The meta-batch; its first task is used.

    Raises:
        ValueError: If the network breaks such a promise.
    """
    policy = functional.batch_norm
    in_evaluation = FunctionalNetwork(copy_in_mode(functional.network, training=False), policy)
    with first_support(functional, episodes) as support, torch.no_grad():
        queries = detached(first_task(episodes).query_x)
        # a single query has no others that it could see
        x = queries if count(queries) > 1 else cat([queries, queries])
        statistics_of = support if functional.uses_support_statistics else None
        _check_sizes(functional, support, queries)
        if statistics_of is not None and not all(_outputs_of_examples(functional, x)):
            raise UserValueError(
                "Expected outputs with the examples in front for `batch_norm='support'`, which "
                "takes the queries' part of them, but one has another first dimension; leave it "
                "out, or use `batch_norm='batch'`."
            )
        if policy in ("batch", "support"):
            _check_that_no_averages_are_used(in_evaluation, x, statistics_of)
        # "support" promises it in training too
        promises = functional if policy == "support" else in_evaluation
        if policy != "batch" and sees_others(promises, x, statistics_of):
            raise UserValueError(
                "Expected outputs that do not depend on the other queries, as "
                f"`batch_norm={policy!r}` promises, but the first one changes with them: the "
                "network normalises by the batch, or looks at it, outside of batch-norm layers; "
                "use nn.BatchNorm layers for it, or `batch_norm='batch'`, whose figures are "
                "transductive."
            )


def _check_sizes(functional: FunctionalNetwork, support: Inputs, queries: Inputs) -> None:
    policy = functional.batch_norm
    runs_both_together = policy in ("support", "per_step") and batch_norms(functional.network)
    if runs_both_together and shapes_of(queries) != shapes_of(support):
        raise UserValueError(
            f"Expected support and query inputs of one size for `batch_norm={policy!r}`, "
            "which runs both together, but got others; pad them, or use `batch_norm='batch'`."
        )


def _check_that_no_averages_are_used(
    in_evaluation: FunctionalNetwork, x: Inputs, statistics_of: Inputs | None
) -> None:
    """Run a network in evaluation mode, where its layers would use running averages if any did."""
    policy = in_evaluation.batch_norm
    try:
        with _FunctionalBatchNorm() as calls:
            in_evaluation(in_evaluation.params, x, statistics_of=statistics_of)
    except (TypeError, AttributeError) as error:
        # the averages were taken from the layers, and a forward pass of their own may miss them
        network = in_evaluation.network
        own = norms_with_own_forward(network, batch_norms(network))
        if not own:
            raise
        raise UserValueError(
            "Expected batch norm that needs no running averages in evaluation, as "
            f"`batch_norm={policy!r}` has it, but {own} need theirs; use "
            "`batch_norm='running'`."
        ) from error
    if calls.with_running_averages:
        raise UserValueError(
            f"Expected batch norm that follows `batch_norm={policy!r}` but in evaluation "
            "mode the network calls torch.nn.functional.batch_norm with training=False, "
            "which uses running averages; use nn.BatchNorm layers, or "
            "`batch_norm='running'`."
        )


def sees_others(functional: FunctionalNetwork, x: Inputs, statistics_of: Inputs | None) -> bool:
    """Return whether the output for the first example depends on the other examples.

    It is computed again with all examples replaced by the first one, and compared up to rounding.

    Args:
        functional: The network.
        x: Inputs ``[B, ...]``.
        statistics_of: Inputs whose batch-norm statistics are used in place of those of ``x``.
    """
    params, device = functional.params, tensors(x)[0].device
    before = generator_states(device)
    has_examples = _outputs_of_examples(functional, x)

    def outputs(x: Inputs) -> list[Tensor]:
        set_generator_states(before, device)
        found = tensors_in(functional(params, x, statistics_of=statistics_of))
        return [
            tensor
            for tensor, of_examples in zip(found, has_examples, strict=True)
            if of_examples and tensor.is_floating_point()
        ]

    # a last layer of zeros would hide what the layers before it do
    if all(torch.equal(tensor, tensor[:1].expand_as(tensor)) for tensor in outputs(x)):
        params = shifted(params)
    first_alone = map_tensors(lambda tensor: tensor[:1].expand_as(tensor), x)
    pairs = zip(outputs(x), outputs(first_alone), strict=True)
    set_generator_states(before, device)
    for with_others, alone in pairs:
        difference = (with_others[0] - alone[0]).abs().max()
        rounding = torch.finfo(with_others.dtype).eps ** 0.5
        if difference > rounding * with_others[0].abs().max():
            return True
    return False


def _outputs_of_examples(functional: FunctionalNetwork, x: Inputs) -> list[bool]:
    """Return for each output tensor whether its first dimension is that of the examples.

    It is if it doubles with the number of examples.
    """
    number = count(x)
    once = tensors_in(functional(functional.params, x))
    lengths = [len(tensor) if tensor.ndim else 0 for tensor in once]
    try:
        twice = tensors_in(functional(functional.params, cat([x, x])))
    except Exception:  # noqa: BLE001 # a network may be made for this number of examples only
        return [length == number for length in lengths]
    doubled = [len(tensor) if tensor.ndim else 0 for tensor in twice]
    return [
        length == number and double == 2 * number
        for length, double in zip(lengths, doubled, strict=True)
    ]


class _FunctionalBatchNorm(TorchFunctionMode):
    """Records whether ``torch.nn.functional.batch_norm`` is called with running averages."""

    def __init__(self) -> None:
        super().__init__()
        self.with_running_averages = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.batch_norm:
            training = args[5] if len(args) > 5 else named.get("training", False)
            self.with_running_averages |= not training
        return func(*args, **named)
