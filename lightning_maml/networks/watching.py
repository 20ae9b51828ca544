"""Watch what a forward pass reads and does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_maml.core.params import Params
from lightning_maml.core.tensors import memory


class Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the tensors that are read, also through views of them.

    Args:
        params: The tensors to watch.
        seen: Where to add the names.

    Examples:
        >>> import torch
        >>> from lightning_maml.networks.watching import Reading
        >>> tensors, seen = {"a": torch.ones(2), "b": torch.ones(2)}, []
        >>> with Reading(tensors, seen):
        ...     _ = tensors["b"] + 1
        >>> seen
        ['b']
    """

    def __init__(self, params: Params, seen: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # views share memory with their tensor
        self._names = {memory(p): name for name, p in params.items()}
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = (memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self._seen += [self._names[place] for place in read if place in self._names]
        return func(*args, **(kwargs or {}))


@contextmanager
def reading(params: Params, seen: list[str]) -> Iterator[None]:
    """Add the names of the tensors that are read meanwhile to ``seen``.

    Compiled functions run uncompiled, because they cannot be watched.
    """
    with torch.compiler.set_stance("force_eager"), Reading(params, seen):
        yield


class Watching(TorchFunctionMode):
    """Finds operations of a forward pass whose results depend on how it is run.

    Attributes:
        views: Whether it reads tensors by strides (``as_strided``), which are others if images are
            channels-last in memory.
        hooks: Whether it registers hooks on tensors, which see stacked tasks as one, or not at all.

    Examples:
        >>> import torch
        >>> from lightning_maml.networks.watching import Watching
        >>> x = torch.ones(4)
        >>> with Watching() as watched:
        ...     _ = x.as_strided((2, 2), (1, 1))
        >>> watched.views, watched.hooks
        (True, False)
    """

    def __init__(self) -> None:
        super().__init__()
        self.views = self.hooks = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.hooks |= func is Tensor.register_hook
        self.views |= func in (Tensor.as_strided, torch.as_strided)
        return func(*args, **(kwargs or {}))
