"""Tasks in threads, which share whatever is outside of the network and the loss."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lightning_maml import MAML, Episodes, InnerOptimizer, InnerSGD
from lightning_maml.checks.shared_state import share_state

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


SHARING = {
    "attribute of a loss": lambda: (network(), Entropic()),
    "attribute of an object": lambda: (network(), PlainEntropic()),
    "dict that a hook knows": lambda: (hooked(keep), of_kept),
    "global variable of a hook": lambda: (hooked(keep_last), of_last),
    "global variable of the network": lambda: (ByGlobal(), F.cross_entropy),
}


@pytest.mark.parametrize("case", SHARING)
def test_tasks_that_would_share_state_in_threads_are_run_in_a_loop(case: str) -> None:
    model_of = SHARING[case]
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


def test_networks_adapted_to_many_tasks_share_nothing_either() -> None:
    of_many, of_one = (MAML(ByGlobal(), 0.1, 2) for _ in range(2))
    x, y, query_x, _ = episodes()
    found = of_many.adapt(x, y)(query_x)
    for task in range(len(x)):
        alone = of_one.adapt(x[task], y[task])(query_x[task])
        torch.testing.assert_close(found[task], alone, rtol=1e-3, atol=1e-4)


class Remembering(nn.Module):
    """A network that shares what it keeps if gradients are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.layers(x)
        KEPT["x"] = x
        outputs = self.layers(x)
        return outputs * (1 + KEPT["x"].mean())


def test_what_is_written_with_gradients_alone_is_found() -> None:
    model = MAML(Remembering(), 0.1, 2)
    model.meta_loss(episodes())
    assert model._executor._last.tasks == "loop"


@pytest.mark.parametrize("later", [False, True])
def test_what_the_support_loss_alone_shares_is_found(later: bool) -> None:
    model: Any = MAML(network(), 0.1, 2, support_loss=F.cross_entropy if later else Entropic())
    model.meta_loss(episodes())
    if later:
        assert model._executor._last.tasks == "threads"
        model.support_loss = Entropic()
        model.meta_loss(episodes())
    assert model._executor._last.tasks == "loop"


def test_a_batch_of_one_task_says_nothing_of_several() -> None:
    model = MAML(network(), 0.1, 2, tasks="threads", loss=Entropic())
    model.meta_loss(Episodes(*(tensor[:1] for tensor in episodes())))
    with pytest.raises(ValueError, match="write to nothing outside of the network"):
        model.meta_loss(episodes())


def test_that_threads_are_not_used_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = MAML(ByGlobal(), 0.1, 2)
    with caplog.at_level("INFO"):
        for _ in range(3):
            model.meta_loss(episodes())
    assert caplog.text.count("Tasks are not run in threads") == 1


def test_no_memory_for_two_tasks_at_once_is_said() -> None:
    def full() -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        share_state(lambda: torch.ones(()) + 1, full)


class Noting(InnerOptimizer):
    """A rule that keeps what it computes in an attribute between two lines."""

    def step(self, w: Tensor, gradient: Tensor, rate: Any, slots: Any, number: int) -> Any:
        self.norm = gradient.norm()
        bounded = (gradient * 3).tanh()
        return w - rate * bounded / (self.norm + 1), slots


class NotingInDict(InnerOptimizer):
    """The same in a dict."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def step(self, w: Tensor, gradient: Tensor, rate: Any, slots: Any, number: int) -> Any:
        self.kept["norm"] = gradient.norm()
        bounded = (gradient * 3).tanh()
        return w - rate * bounded / (self.kept["norm"] + 1), slots


class NotingInClass(InnerOptimizer):
    """The same in the class."""

    norm = torch.ones(())

    def step(self, w: Tensor, gradient: Tensor, rate: Any, slots: Any, number: int) -> Any:
        NotingInClass.norm = gradient.norm()
        bounded = (gradient * 3).tanh()
        return w - rate * bounded / (self.norm + 1), slots


def test_inner_rules_that_write_to_their_class_are_run_in_a_loop() -> None:
    model = MAML(network(), 0.1, 2, inner_optimizer=NotingInClass())
    model.meta_loss(episodes())
    assert model._executor._last.tasks == "loop"


@pytest.mark.parametrize("kind", [Noting, NotingInDict])
def test_inner_rules_that_write_to_themselves_are_run_in_a_loop(kind: type[InnerOptimizer]) -> None:
    model = MAML(network(), 0.1, 2, inner_optimizer=kind())
    model.meta_loss(episodes())
    assert model._executor._last.tasks == "loop"
    model = MAML(network(), 0.1, 2, inner_optimizer=InnerSGD(momentum=0.9))
    model.meta_loss(episodes())
    assert model._executor._last.tasks == "threads"
    with pytest.raises(ValueError, match="leaves its attributes as they are with `compiled=True`"):
        MAML(network(), 0.1, 2, inner_optimizer=kind(), compiled=True).meta_loss(episodes())
