"""Compile the meta-gradient of stacked tasks as a whole, with the derivatives inside it."""

import time
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.core.inner_rates import Rates
from lightning_maml.core.params import Params
from lightning_maml.core.rng import generator_states, generators_drawn_from
from lightning_maml.errors import UserValueError
from lightning_maml.networks.attributes import modes

OfTasks = Callable[[Params, Sequence[Rates], AnyEpisodes], Any]
"""Maps parameters, each step's rates and tasks to tensors in dicts, lists and tuples."""


class Compiler:
    """Calls functions of tasks through programs that it compiles.

    There is one program for each setting and for each shape, type and device of the tensors.

    A program is traced: what the function reads besides its tensors (numbers, attributes of a
    network) stays as it was at that time. Copies of a compiler start without programs.

    Raises:
        ValueError: In a call, if the function draws random numbers.
    """

    def __init__(self) -> None:
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def __reduce__(self) -> tuple[type["Compiler"], tuple[()]]:
        return Compiler, ()

    def __call__(
        self,
        setting: Hashable,
        function: OfTasks,
        params: Params,
        rates: Sequence[Rates],
        task: AnyEpisodes,
    ) -> Any:
        """Return ``function(params, rates, task)``, compiled.

        Args:
            setting: Stands for everything else that the function depends on.
            function: The function.
            params: The meta-parameters.
            rates: Those of each inner step.
            task: The tasks; their inputs in plain dicts, lists and tuples, as
                :func:`lightning_maml.batches.trees.map_tensors` returns them.
        """
        leaves, structure = tree_flatten((params, list(rates), task))
        device = task.support_y.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = (setting, autocast, repr(structure), *map(kind_of_leaf, leaves))
        tensors = tensors_among(leaves)
        with torch.no_grad():
            if kind not in self._programs:
                self._programs[kind] = _compiled(function, leaves, structure)
            if autocast is None:
                return self._programs[kind](tensors)
            with torch.autocast(device, enabled=False):  # its casts are in the program
                return self._programs[kind](tensors)


def state_of(module: Any) -> tuple[Any, ...]:
    """Return what decides whether a compiled program can be used again.

    That is the module's parts, their modes and hooks, and the tensors that they hold.
    """
    if not isinstance(module, nn.Module):
        return (module,)
    parts = tuple(
        (part, *map(id, chain(part._parameters.values(), part._buffers.values())))
        for part in module.modules()
    )
    return *parts, *modes(module)


def kind_of_leaf(leaf: Any) -> Hashable:
    """Return what a program depends on: all of a number, and all but the values of a tensor."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf  # type: ignore[no-any-return]


def tensors_among(leaves: list[Any]) -> list[Tensor]:
    """Return those of the leaves that are tensors."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _compiled(
    function: OfTasks, leaves: list[Any], structure: TreeSpec
) -> Callable[[list[Tensor]], Any]:
    """Return the compiled program, which has run once, as a function of the tensors.

    Args:
        function: Of parameters, rates and tasks.
        leaves: The tensors and numbers in these. Numbers stay in the program.
        structure: How the leaves make up the arguments.
    """
    of_result: list[TreeSpec] = []
    tensors = tensors_among(leaves)

    def of_tensors(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found, result = tree_flatten(function(*tree_unflatten(filled, structure)))
        of_result.append(result)
        return found

    start = time.perf_counter()
    device = tensors[-1].device
    before = generator_states(device)
    traced = make_fx(of_tensors, {torch.ops.aten.convolution.default: _bias_apart})(*tensors)
    if generators_drawn_from(before, device):
        raise UserValueError(
            "Expected a network and a loss that draw no random numbers with `compiled=True` but "
            "they drew some; leave it uncompiled."
        )
    program = torch.compile(traced)
    with torch.autocast(device.type, enabled=False):
        _check_program(program, traced, tensors)
    rank_zero_info(
        f"Compiled the meta-gradient in {time.perf_counter() - start:.0f} s; it is used for "
        "batches of the same shapes."
    )
    return lambda tensors: tree_unflatten(program(*tensors), of_result[0])


def _check_program(
    program: Callable[..., list[Any]], traced: Callable[..., list[Any]], tensors: list[Tensor]
) -> None:
    """Check that the program gives what it was compiled from.

    Rounding is what the result changes by if the tensors change in their last digits: at large
    inner rates, it grows with every step.

    Raises:
        ValueError: If it gives something else.
    """
    found, right = _as_row(program(*tensors)), _as_row(traced(*tensors))
    away = torch.linalg.vector_norm(found - right)
    size = torch.linalg.vector_norm(right)
    eps = torch.finfo(right.dtype).eps
    if away <= 1000 * eps * size or not size.isfinite():
        return
    nearby = [tensor * (1 + eps) if tensor.is_floating_point() else tensor for tensor in tensors]
    rounding = torch.linalg.vector_norm(_as_row(traced(*nearby)) - right)
    if away > 100 * rounding + 1e-2 * size:
        raise UserValueError(
            "Expected the compiled meta-gradient to be what it was compiled from but it differs "
            f"by {float(away / size):.1g} of it; leave it uncompiled."
        )


def _as_row(results: list[Any]) -> Tensor:
    floats = [leaf for leaf in results if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    dtype = max((leaf.dtype for leaf in floats), key=lambda dtype: dtype.itemsize)
    return torch.cat([leaf.flatten().to(dtype) for leaf in floats])


def _bias_apart(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
    """Compute a convolution, then add its bias.

    Compilers up to torch 2.9 at least reject a bias that is a view, as it is in a stack.
    """
    if bias is None:
        return NotImplemented  # it is traced as it is
    return torch.convolution(x, weight, None, *options) + bias.view(-1, *[1] * (x.ndim - 2))
