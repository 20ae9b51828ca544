"""Tasks in threads, which share whatever is outside of the network and the loss."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from lightning_maml import MAML, Episodes
from lightning_maml.networks.attributes import hooks_know_others

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


def losses(tasks: str, repeats: int) -> set[float]:
    model = MAML(network(), 0.1, 2, loss=Entropic(), tasks=tasks)
    found = {round(float(model.meta_loss(episodes()).detach()), 5) for _ in range(repeats)}
    assert model._executor._last.tasks == ("loop" if tasks == "loop" else "threads")
    return found


@pytest.mark.parametrize("tasks", ["auto", "threads"])
def test_each_thread_has_a_loss_of_its_own(tasks: str) -> None:
    assert losses(tasks, 8) == losses("loop", 1)


def test_networks_with_hooks_are_not_run_in_threads() -> None:
    hooked, activations = network(), {}
    hooked[1].register_forward_hook(lambda *given: activations.update(hidden=given[-1]))

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + activations["hidden"].square().mean()

    model = MAML(hooked, 0.1, 2, loss=loss)
    model.meta_loss(episodes())
    assert model._executor._last.tasks == "loop"
    with pytest.raises(
        ValueError, match="hooks that know nothing outside of the network with `tasks='threads'`"
    ):
        MAML(hooked, 0.1, 2, loss=loss, tasks="threads").meta_loss(episodes())


def test_hooks_of_torchs_own_do_not_keep_networks_out_of_threads() -> None:
    normed = network()
    normed[0] = weight_norm(normed[0])
    model = MAML(normed, 0.1, 2)
    model.meta_loss(episodes())
    assert model._executor._last.tasks == "threads"


KEPT: list[Tensor] = []


class Recorder:
    def __call__(self, *given: Tensor) -> None:
        self.last = given[-1]


class OfNetwork(nn.Sequential):
    """A network with hooks that know the network and what it holds, each copy its own."""

    def __init__(self) -> None:
        super().__init__(*network())
        self.found = found = {}
        self[0].register_forward_hook(self.keep)
        self[1].register_forward_hook(lambda *given: found.update(hidden=given[-1]))
        self[2].register_forward_hook(lambda *given: self.found.clear())

    def keep(self, *given: Tensor) -> None:
        self.found["first"] = given[-1]


@pytest.mark.parametrize(
    ("hook", "know"),
    [
        (lambda *given: KEPT.append(given[-1]), True),
        (Recorder(), True),
        (Recorder().__call__, True),
        (lambda *given, store=KEPT: store.append(given[-1]), True),
        (lambda *given: torch.is_tensor(given[-1]), False),
        (lambda *given: None, False),
    ],
)
def test_what_hooks_know_is_found(hook, know: bool) -> None:
    hooked = network()
    hooked[1].register_forward_pre_hook(hook)
    assert hooks_know_others(hooked) is know
    assert not hooks_know_others(OfNetwork())
