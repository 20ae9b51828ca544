"""How many kernels a training step starts, and how often it waits for a GPU.

They are counted on the CPU, as calls of torch's operators that are not views: on a GPU each starts
about one kernel. Counts do not depend on sizes, so the networks are small.
"""

from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_maml import FOMAML, HFMAML, MAML, Conv4, Episodes, ProtoNet
from lightning_maml.theory.curvature import smoothness

WAITING = (
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)
"""Operators whose results the host waits for, as shapes or numbers."""


FETCHING = {"tolist", "cpu", "numpy", "unique", "unique_consecutive"}
"""Names of functions for which the host waits too, without such an operator on the CPU."""


class _Fetching(TorchFunctionMode):
    """Counts calls of these functions on tensors of other than integers.

    Counts by lengths in a tensor, too, whose sum is the shape of the result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        is_number = isinstance(first, Tensor) and first.dtype != torch.long
        name = getattr(func, "__name__", "")
        by_lengths = name == "repeat_interleave" and any(
            isinstance(given, Tensor) for given in (*args[1:], *kwargs.values())
        )
        to_cpu = name == "to" and any("cpu" in str(given) for given in args[1:2])
        self.calls += ((name in FETCHING or to_cpu) and is_number) or by_lengths
        return func(*args, **kwargs)


class Counting(TorchDispatchMode):
    """Counts operators, and numbers that are fetched from tensors of other than integers."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self._of_operators, self._functions = 0, 0, _Fetching()

    @property
    def fetched(self) -> int:
        return self._of_operators + self._functions.calls

    def __enter__(self) -> Self:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._of_operators += args[0].dtype != torch.long  # labels are read on the CPU
        elif func in WAITING or _indexes_by_mask(func, args):
            self._of_operators += 1
        elif not any(result.alias_info for result in func._schema.returns):
            self.operators += 1
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(func: Any, args: Any) -> bool:
    is_indexing = func is torch.ops.aten.index.Tensor
    return is_indexing and any(i is not None and i.dtype == torch.bool for i in args[1])


def episodes(ways: int, shots: int, shape: tuple[int, int, int]) -> Episodes:
    random = torch.Generator().manual_seed(0)
    y = torch.arange(ways).repeat(4, shots)
    x = torch.rand(2, 4, ways * shots, *shape, generator=random)
    return Episodes(x[0], y, x[1], y)


def strided(ways: int) -> Conv4:
    return Conv4(1, ways, 28, channels=4)


def pooled(ways: int) -> Conv4:
    return Conv4(3, ways, 32, channels=4, downsample="max")


MOST = {
    ("omniglot_5w1s", MAML): 393,
    ("omniglot_5w1s", FOMAML): 214,
    ("omniglot_20w1s", MAML): 1389,
    ("omniglot_20w1s", FOMAML): 522,
    ("mini_5w1s", MAML): 1551,
    ("mini_5w1s", FOMAML): 589,
    ("mini_5w5s", MAML): 1551,
    ("mini_5w5s", FOMAML): 589,
    ("omniglot_5w1s", HFMAML): 448,
}
"""Operators of a training step of each workload; fewer are better, and then go here."""

WORKLOADS = {
    "omniglot_5w1s": (strided, 5, 1, (1, 28, 28), 1),
    "omniglot_20w1s": (strided, 20, 1, (1, 28, 28), 5),
    "mini_5w1s": (pooled, 5, 1, (3, 32, 32), 5),
    "mini_5w5s": (pooled, 5, 5, (3, 32, 32), 5),
}


@pytest.mark.filterwarnings("ignore:HFMAML needs a twice differentiable network")
@pytest.mark.parametrize(("workload", "algorithm"), MOST)
def test_a_step_starts_no_more_kernels_than_it_did(workload: str, algorithm: type[MAML]) -> None:
    network, ways, shots, shape, steps = WORKLOADS[workload]
    model = algorithm(network(ways), inner_lr=0.01, train_steps=steps, tasks="vmap")
    batch = episodes(ways, shots, shape)
    model.meta_loss(batch).backward()
    with Counting() as counted:
        model.meta_loss(batch).backward()
    assert counted.fetched == 1
    assert counted.operators <= MOST[workload, algorithm]


def test_a_step_of_protonet_waits_for_whether_it_is_finite() -> None:
    model, batch = (
        ProtoNet(Conv4(1, None, 28, channels=4), tasks="vmap"),
        episodes(5, 1, (1, 28, 28)),
    )
    model.meta_loss(batch).backward()
    with Counting() as counted:
        model.meta_loss(batch).backward()
    assert counted.fetched == 1 + 1  # of the labels, which are known on the CPU
    assert counted.operators <= 133


def test_measuring_curvature_fetches_one_number_for_each_product() -> None:
    network = strided(5)
    x, y = torch.rand(5, 1, 28, 28), torch.arange(5)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(network, params, (x,)), y)

    w = {name: p.detach() for name, p in network.named_parameters()}
    with Counting() as counted:
        found = smoothness(loss, w)
    products = (found.gradient_evaluations - 1) / 2
    # two of each, and one at the end, are of a small matrix, which lies on the CPU
    assert counted.fetched == products + 2 * products + 1


def test_the_count_sees_what_is_fetched() -> None:
    with Counting() as counted:
        tensor: Tensor = torch.ones(3) + 1
        tensor.view(3, 1).sum().item()
    assert (counted.operators, counted.fetched) == (3, 1)
    with Counting() as counted:
        tensor[tensor > 1], tensor.nonzero(), torch.equal(tensor, tensor)
    assert counted.fetched == 3
    with Counting() as counted:
        tensor.tolist(), tensor.cpu(), tensor.to("cpu"), tensor.numpy(), tensor.unique()
        tensor.repeat_interleave(torch.tensor([1, 0, 2])), tensor.repeat_interleave(2)
    assert counted.fetched == 6
