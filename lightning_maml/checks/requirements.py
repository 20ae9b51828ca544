"""Requirements of networks and losses that can be checked before anything runs."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.trees import tensors
from lightning_maml.errors import UserTypeError, UserValueError
from lightning_maml.networks.attributes import trainable_besides_parameters
from lightning_maml.networks.functional_network import BatchNormPolicy, FunctionalNetwork
from lightning_maml.networks.versions import Versions

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_BATCH_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")


def check_network(network: nn.Module, batch_norm: BatchNormPolicy) -> None:
    """Check that copies of a network can be run with other parameters.

    Warns if it was given to ``torch.compile``.

    Args:
        network: The network.
        batch_norm: The batch-norm policy.

    Raises:
        TypeError: If it is no module.
        ValueError: If it is spread over devices, does not fit the batch-norm policy, or if its
            trainable tensors are not all parameters that are leaves and have shapes.
    """
    if not isinstance(network, nn.Module):
        is_class = isinstance(network, type)
        got = f"the class {network.__name__}" if is_class else type(network).__name__
        raise UserTypeError(
            f"Expected `network` to be a module but got {got}; give a made one, "
            f"{network.__name__ if is_class else 'Network'}()."
        )
    if parallel := [part for part in network.modules() if isinstance(part, _PARALLEL)]:
        kind = type(parallel[0]).__name__
        raise UserValueError(
            f"Expected a network that runs on one device but got {kind}, whose copies on "
            "other devices would not get a task's parameters; give its `.module`, and the trainer "
            "strategy='ddp'."
        )
    # the constructor refuses a network that the policy does not fit
    FunctionalNetwork(network, batch_norm)
    _warn_if_compiled(network)
    _refuse_lazy(network)
    _refuse_scripted_batch_norm(network, batch_norm)
    if computed := [name for name, p in network.named_parameters() if not p.is_leaf]:
        raise UserValueError(
            "Expected a network whose parameters are leaves, which can be trained, but "
            f"{computed} were computed from others; so they are if a module of TorchScript is "
            "deep-copied: copy it before it is scripted."
        )
    if trainable := trainable_besides_parameters(network):
        raise UserValueError(
            f"Expected trainable tensors of the network to be parameters but {trainable} are "
            "none, and would get no gradient; make them nn.Parameter, or give them detached."
        )


def check_loss_is_callable(loss: Any, name: str = "loss") -> None:
    """Check that a model's argument is a loss, a function or a module.

    Args:
        loss: The argument.
        name: What it is called.

    Raises:
        TypeError: If it is neither, or a class of modules.
    """
    if callable(loss) and not isinstance(loss, type):
        return
    got = f"the class {loss.__name__}" if isinstance(loss, type) else repr(loss)
    raise UserTypeError(
        f"Expected `{name}` to be a function or a module but got {got}; give "
        "torch.nn.functional.cross_entropy, or a made module, nn.MSELoss()."
    )


def check_factory(make: Any, name: str, example: str) -> None:
    """Check that a model's argument builds an optimizer or a scheduler.

    Args:
        make: The argument.
        name: What it is called.
        example: What might be given.

    Raises:
        TypeError: If it cannot be called, because it is one already for instance.
    """
    if not callable(make):
        got = repr(make) if isinstance(make, str) else f"a {type(make).__name__}"
        raise UserTypeError(
            f"Expected `{name}` to be a function that makes one but got {got}; give the class, or "
            f"{example}."
        )


def refuse_without_gradient(without_gradient: list[str]) -> None:
    """Refuse parameters that the optimizer was given but that get no gradient.

    Args:
        without_gradient: Their names.

    Raises:
        ValueError: If there are any.
    """
    if without_gradient:
        raise UserValueError(
            "Expected a gradient for every parameter that the optimizer was given but "
            f"{without_gradient} get none; put them into the network, or into a loss that is an "
            "nn.Module, or freeze them."
        )


def _warn_if_compiled(network: nn.Module) -> None:
    for part in network.modules():
        if isinstance(part, OptimizedModule) or part._compiled_call_impl is not None:
            rank_zero_warn(
                "The network was given to torch.compile, but tasks run it as it was before, "
                "because each runs a copy with other parameters; give it uncompiled. "
                "`compiled=True` compiles the whole meta-gradient, for the algorithms that have it."
            )
            return


def _refuse_lazy(network: nn.Module) -> None:
    if lazy := [name for name, p in network.named_parameters() if is_lazy(p)]:
        raise UserValueError(
            f"Expected a network whose parameters have shapes but {lazy} are lazy; run it once on "
            "an example, network(x), before the model is made."
        )


def _refuse_scripted_batch_norm(network: nn.Module, policy: BatchNormPolicy) -> None:
    norms = {}
    for name, part in network.named_modules():
        is_batch_norm = getattr(part, "original_name", "") in _BATCH_NORMS
        if isinstance(part, torch.jit.ScriptModule) and is_batch_norm:
            norms[name] = part
    if norms and (policy != "running" or any(part.training for part in norms.values())):
        raise UserValueError(
            "Expected batch norm as nn.BatchNorm layers, whose statistics `batch_norm` decides, "
            f"but {[*norms]} are TorchScript's; script the network after training, or put a frozen "
            "one into evaluation mode and use `batch_norm='running'`."
        )


class Unwritten:
    """Detects writes to tensors that a step must leave as they are.

    Args:
        tensors: The tensors by name.

    Examples:
        >>> import torch
        >>> from lightning_maml.checks.requirements import Unwritten
        >>> x = torch.ones(3)
        >>> unwritten = Unwritten({"x": x})
        >>> unwritten.check()
        >>> x += 1
        >>> unwritten.check()  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        UserValueError: Expected a network and a loss that leave parameters and inputs as they are
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._versions = Versions(tensors.items())

    def check(self) -> None:
        """Check that no tensor was written to since this was made.

        Raises:
            ValueError: If one was.
        """
        if written := self._versions.changed():
            raise UserValueError(
                "Expected a network and a loss that leave parameters and inputs as they are but "
                f"they wrote to {written}, which are no longer what they were; let them work on "
                "copies, x.clone()."
            )


def refuse_differentiable(episodes: AnyEpisodes) -> None:
    """Refuse episodes whose tensors require a gradient, as they would get none.

    Raises:
        ValueError: If one of them does.
    """
    made = [
        name
        for name, part in episodes._asdict().items()
        if any(tensor.requires_grad for tensor in tensors(part))
    ]
    if made:
        raise UserValueError(
            f"Expected episodes that need no gradient but {made} do, and would get none; put what "
            "makes them into the network, or give them detached, x.detach()."
        )
