"""Tasks in threads, which share whatever is outside of the network and the loss."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lightning_maml import MAML, Episodes

EXAMPLES, WIDTH = 60, 200


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def episodes() -> Episodes:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, EXAMPLES, WIDTH, generator=random)
    y = (torch.arange(EXAMPLES) % 3).repeat(8, 1)
    return Episodes(x[0], y, x[1], y)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 400), nn.Tanh(), nn.Linear(400, 3))


class Entropic(nn.Module):
    """A loss that keeps what it computes in an attribute between two lines."""

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.log_p = outputs.log_softmax(-1)
        error = F.nll_loss(self.log_p, y)
        return error + 0.1 * (self.log_p.exp() * self.log_p).sum(-1).mean()


class PlainEntropic:
    """The same, as an object that is no module."""

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return Entropic.forward(self, outputs, y)


KEPT: dict[str, Tensor] = {}
LAST = torch.zeros(())


def of_kept(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) + KEPT["hidden"].square().mean()


def of_last(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) + LAST.square().mean()


def keep(module: nn.Module, inputs: Any, outputs: Tensor) -> None:
    KEPT["hidden"] = outputs


def keep_last(module: nn.Module, inputs: Any, outputs: Tensor) -> None:
    global LAST  # as scripts do
    LAST = outputs


class ByGlobal(nn.Module):
    """A network whose layers hand on what they computed by a global variable."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        KEPT["x"] = x
        hidden = self.layers[1](self.layers[0](x))
        return self.layers[2](hidden) * (1 + KEPT["x"].mean())


def hooked(hook: Callable[..., None]) -> nn.Module:
    with_hook = network()
    with_hook[1].register_forward_hook(hook)
    return with_hook


MEETING = {
    "attribute of a loss": lambda: (network(), Entropic()),
    "attribute of an object": lambda: (network(), PlainEntropic()),
    "dict that a hook knows": lambda: (hooked(keep), of_kept),
    "global variable of a hook": lambda: (hooked(keep_last), of_last),
    "global variable of the network": lambda: (ByGlobal(), F.cross_entropy),
}


@pytest.mark.parametrize("case", MEETING)
def test_tasks_that_would_meet_in_threads_are_run_in_a_loop(case: str) -> None:
    model_of = MEETING[case]
    (of_auto, loss), (of_loop, same_loss), (of_threads, _) = (model_of() for _ in range(3))
    auto = MAML(of_auto, 0.1, 2, loss=loss)
    found = {float(auto.meta_loss(episodes()).detach()) for _ in range(3)}
    assert auto._executor._last.tasks == "loop"
    loop = MAML(of_loop, 0.1, 2, loss=same_loss, tasks="loop")
    right = float(loop.meta_loss(episodes()).detach())
    assert [*found] == [pytest.approx(right, rel=1e-5)]
    with pytest.raises(ValueError, match="write to nothing outside of the network with `tasks='t"):
        MAML(of_threads, 0.1, 2, loss=loss, tasks="threads").meta_loss(episodes())


class Logging(nn.Module):
    """A loss that writes to a list which it never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, y)
        self.values.append(float(loss.detach()))
        return loss


class OfNetwork(nn.Sequential):
    """A network with a hook that knows what the network holds, each copy its own."""

    def __init__(self) -> None:
        super().__init__(*network())
        self.found = found = {}
        self[1].register_forward_hook(lambda *given: found.update(hidden=given[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.found["hidden"].mean()


def normed() -> nn.Module:
    with_norm = network()
    with_norm[0] = weight_norm(with_norm[0])
    return with_norm


@pytest.mark.parametrize(
    ("made", "loss"),
    [
        (network, F.cross_entropy),
        (network, Logging()),
        (OfNetwork, F.cross_entropy),
        (normed, F.cross_entropy),
    ],
)
def test_others_are_run_in_threads(made: Callable[[], nn.Module], loss: Any) -> None:
    model = MAML(made(), 0.1, 2, loss=loss)
    found = float(model.meta_loss(episodes()).detach())
    assert model._executor._last.tasks == "threads"
    loop = MAML(made(), 0.1, 2, loss=loss, tasks="loop")
    assert found == pytest.approx(float(loop.meta_loss(episodes()).detach()), rel=1e-5)


def test_networks_adapted_to_many_tasks_do_not_meet_either() -> None:
    of_many, of_one = (MAML(ByGlobal(), 0.1, 2) for _ in range(2))
    x, y, query_x, _ = episodes()
    found = of_many.adapt(x, y)(query_x)
    for task in range(len(x)):
        alone = of_one.adapt(x[task], y[task])(query_x[task])
        torch.testing.assert_close(found[task], alone, rtol=1e-3, atol=1e-4)
