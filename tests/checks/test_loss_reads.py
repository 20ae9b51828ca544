"""Losses that read what a pass of the network leaves in its attributes."""

import copy
from collections import Counter, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import make_episodes, relative_error
from lightning_maml import MAML, ProtoNet


class Hidden(nn.Module):
    """A network that keeps its hidden layer."""

    def __init__(self, returned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.returned = nn.Linear(64, 8), nn.Linear(8, 3), returned

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        self.hidden = torch.tanh(self.body(x.flatten(1)))
        logits = self.head(self.hidden)
        return {"logits": logits, "hidden": self.hidden} if self.returned else logits


def square(network: Hidden, outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) + network.hidden.square().mean()


def by_function(network: Hidden, outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) + torch.mean(network.hidden)


def by_index(network: Hidden, outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) + network.hidden[0].sum()


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("loss", [square, by_function, by_index])
def test_they_are_refused(loss: Callable[..., Tensor], called_before: bool) -> None:
    network, episodes = Hidden().double(), make_episodes()
    if called_before:
        network(episodes.query_x[0])
    with pytest.raises(ValueError, match=r"reads an attribute .* sets \(hidden\).* dict with `log"):
        MAML(network, 0.1, loss=lambda o, y: loss(network, o, y)).meta_loss(episodes)
    assert hasattr(network, "hidden") == called_before


def test_the_way_out_that_is_named_is_one() -> None:
    """A network that returns what the loss reads, against autograd for one task of one step."""
    network, episodes = Hidden(returned=True).double(), make_episodes()

    def loss(outputs: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], y) + outputs["hidden"].square().mean()

    model = MAML(network, 0.1, 1, loss=loss)
    model.meta_loss(episodes).backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    w, total = dict(network.named_parameters()), 0.0
    for x, y, query_x, query_y in zip(*episodes, strict=True):
        value = loss(torch.func.functional_call(network, w, (x,)), y)
        gradient = torch.autograd.grad(value, [*w.values()], create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(w.items(), gradient, strict=True)}
        total = total + loss(torch.func.functional_call(network, moved, (query_x,)), query_y)
    right = torch.autograd.grad(total / len(episodes.query_y), [*w.values()])
    assert relative_error(found, dict(zip(w, right, strict=True))) < 1e-12


def test_losses_that_fail_in_any_case_are_for_other_checks() -> None:
    def broken(outputs: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("a fault of its own")

    with pytest.raises(ValueError, match="a fault of its own"):
        MAML(Hidden().double(), 0.1, loss=broken).meta_loss(make_episodes())


class Storing(nn.Module):
    """A network that writes to a dict which others know too."""

    def __init__(self, store: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.store = nn.Linear(64, 3), store

    def forward(self, x: Tensor) -> Tensor:
        self.store["logits"] = self.layer(x.flatten(1))
        return self.store["logits"]


def test_what_network_and_loss_share_is_no_way_round() -> None:
    store: dict[str, Tensor] = {}
    network, episodes = Storing(store).double(), make_episodes()
    network(episodes.query_x[0])
    before = dict(store)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + store["logits"].square().mean()

    with pytest.raises(ValueError, match=r"reads an attribute .* sets \(store\)"):
        MAML(network, 0.1, loss=loss).meta_loss(episodes)
    assert store.keys() == before.keys()
    assert store["logits"] is before["logits"]


def test_copies_of_the_network_are_no_way_round() -> None:
    network, episodes = Hidden().double(), make_episodes()
    network(episodes.query_x[0])

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return square(network, outputs, y)

    message = r"reads an attribute .* sets \(hidden\)"
    with pytest.raises(ValueError, match=message):
        MAML(network, 0.1, loss=loss).adapt(episodes.support_x[0], episodes.support_y[0])
    with pytest.raises(ValueError, match=message):
        MAML(network, 0.1, loss=loss, query_in_eval=True).meta_loss(episodes)


def test_a_loss_that_keeps_what_it_reads_is_given_nothing_else() -> None:
    network, episodes, seen = Hidden().double(), make_episodes(), []
    network(episodes.query_x[0])

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        seen.append(network.hidden)
        return F.cross_entropy(outputs, y)

    MAML(network, 0.1, loss=loss).meta_loss(episodes)
    assert all(isinstance(value, Tensor) for value in seen)


class Filling(Hidden):
    """A network that leaves what it computed in a list, in a dict or as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Tensor] = []
        self.parts: dict[str, Tensor] = {}
        self.size, self.examples, self.few = 0.0, 0, False
        self.state, self.queue = SimpleNamespace(aux=None), deque(maxlen=2)
        self.calls, self.settings = Counter(passes=1), {"alpha": 0.5}
        self.register_buffer("balance", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.flatten(1)))
        self.layers = [hidden]
        self.parts["hidden"] = hidden
        self.size, self.examples = float(hidden.square().mean().detach()), len(x)
        self.few = len(x) < 8
        self.state.aux = hidden
        self.queue.append(hidden)
        self.balance = hidden.mean(0).square().sum()
        self.calls["passes"] += 1
        self.settings["examples"] = len(x)
        return self.head(hidden)


PENALTIES = {
    "layers": lambda network: sum(hidden.square().mean() for hidden in network.layers),
    "parts": lambda network: network.parts["hidden"].square().mean(),
    "size": lambda network: network.size,
    "examples": lambda network: 0.1 * network.examples,
    "few": lambda network: 1.0 if network.few is True else 0.0,
    "state": lambda network: 0 if network.state.aux is None else network.state.aux.mean(),
    "queue": lambda network: sum(hidden.mean() for hidden in network.queue),
    "balance": lambda network: network.balance,
}


@pytest.mark.parametrize("called_before", ["not", "with the support set", "with queries"])
@pytest.mark.parametrize("what", PENALTIES)
def test_losses_that_read_anything_else_of_a_pass_are_refused(
    what: str, called_before: str
) -> None:
    network, episodes = Filling().double(), make_episodes()
    if called_before == "with the support set":
        network(episodes.support_x[0])
    elif called_before == "with queries":
        network(episodes.query_x[0])
    before = {key: copy.copy(value) for key, value in vars(network).items() if key[0] != "_"}
    balance = network.balance.detach().clone()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + PENALTIES[what](network)

    with pytest.raises(ValueError, match=rf"reads an attribute .* sets \({what}\)"):
        MAML(network, 0.1, loss=loss).meta_loss(episodes)
    assert {key: value for key, value in vars(network).items() if key[0] != "_"} == before
    assert torch.equal(network.balance, balance)


class OfNetwork(nn.Module):
    """A loss with a parameter that knows a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.scale, self.box = nn.Parameter(torch.ones(())), [network]

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * outputs, y) + self.box[0].hidden.square().mean()


@pytest.mark.parametrize("called_before", [False, True])
def test_losses_with_parameters_of_their_own_are_no_way_round(called_before: bool) -> None:
    network, episodes = Hidden().double(), make_episodes()
    if called_before:
        network(episodes.query_x[0])
    with pytest.raises(ValueError, match=r"reads an attribute .* sets \(hidden\)"):
        MAML(network, 0.1, loss=OfNetwork(network).double()).meta_loss(episodes)


def test_losses_may_read_what_no_pass_sets_and_call_frozen_parts() -> None:
    network, episodes = Filling().double(), make_episodes()
    for p in network.body.parameters():
        p.requires_grad = False

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        frozen = network.body(torch.ones(2, 64, dtype=torch.float64)).mean()
        counted = 0.0 * network.calls["passes"]
        return F.cross_entropy(outputs, y) * network.settings["alpha"] + frozen.detach() + counted

    plain = Filling().double()
    MAML(network, 0.1, loss=loss).meta_loss(episodes)
    MAML(plain, 0.1).meta_loss(episodes)
    assert network.calls == plain.calls


def of_outputs_alone(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y)


def test_others_may_be_kept_by_the_network() -> None:
    MAML(Filling().double(), 0.1, loss=of_outputs_alone).meta_loss(make_episodes())


class InPlace(Hidden):
    """A network that writes to a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.size = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.flatten(1)))
        self.size.copy_(hidden.detach().square().mean())
        return self.head(hidden)


class WithGradients(Hidden):
    """A network that keeps something only where gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.flatten(1)))
        if torch.is_grad_enabled():
            self.size = hidden.square().mean()
        return self.head(hidden)


@pytest.mark.parametrize("kind", [InPlace, WithGradients])
def test_what_is_written_in_place_or_with_gradients_is_found(kind: type[Hidden]) -> None:
    network: Any = kind().double()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + network.size

    with pytest.raises(ValueError, match=r"reads an attribute .* sets \(size\)"):
        MAML(network, 0.1, loss=loss).meta_loss(make_episodes())


class Averaging(Hidden):
    """A network with a frozen average that each pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.average = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.flatten(1)))
        self.average.lerp_(hidden.detach().mean(), 0.1)
        return self.head(hidden)


def test_the_check_leaves_frozen_parameters_as_they_are() -> None:
    averages = []
    for loss in (F.cross_entropy, of_outputs_alone):
        network = Averaging().double()
        MAML(network, 0.1, loss=loss).meta_loss(make_episodes())
        averages.append(network.average)
    assert torch.equal(*averages)


def test_prototypical_networks_refuse_them_too() -> None:
    network = Hidden().double()
    with pytest.raises(ValueError, match=r"reads an attribute .* sets \(hidden\)"):
        ProtoNet(network, loss=lambda outputs, y: square(network, outputs, y)).meta_loss(
            make_episodes()
        )
    ProtoNet(network, loss=of_outputs_alone).meta_loss(make_episodes())
