"""Features before a head are computed once only where that changes nothing."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.networks import make_episodes, relative_error
from helpers.points import RATE, STEPS, WAYS, Plain, points, seeded, unrolled
from lightning_maml import ANIL
from lightning_maml.batches.trees import map_tensors


def test_features_that_depend_on_the_head_are_not_computed_once() -> None:
    class Scaled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)) / self.head.weight.norm())

    network = seeded(Scaled)
    expected = unrolled(network, names=["head.weight", "head.bias"])
    assert (
        relative_error(ANIL(network, RATE, STEPS, head="head").meta_gradient(points()), expected)
        < 1e-10
    )


def test_a_frozen_last_layer_is_not_passed_over_for_a_head() -> None:
    network = seeded(Plain)
    network.head.requires_grad_(False)
    with pytest.raises(
        ValueError, match="Expected `head` to be named, because the last layer, 'head', is frozen"
    ):
        ANIL(network, RATE)
    ANIL(network, RATE, head="body").meta_loss(points()).backward()


@pytest.mark.parametrize("way", ["flag", "hook", "size", "value"])
def test_features_are_not_computed_once_where_the_head_stops_ending_the_network(way: str) -> None:
    class Changing(Plain):
        hot = False

        def forward(self, x: Tensor) -> Any:
            z = super().forward(x)
            changes = {
                "flag": Changing.hot,
                "size": len(x) != 2 * WAYS,
                "value": bool((x > 50).any()),
                "hook": False,
            }
            return 4 * z if changes[way] else z

    network, found = seeded(Changing), points()
    model = ANIL(network, RATE, STEPS)
    model.meta_loss(found)
    Changing.hot = True
    if way == "hook":
        network.register_forward_hook(lambda module, inputs, outputs: 4 * outputs)
    if way == "size":
        found = found._replace(query_x=found.query_x[:, :WAYS], query_y=found.query_y[:, :WAYS])
    if way == "value":
        found.query_x[0, 0, 0] = 100
    names = ["head.weight", "head.bias"]
    start = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    values = []
    for support_x, support_y, query_x, query_y in zip(*found, strict=True):
        w = {name: p.view_as(p) for name, p in start.items()}
        for _ in range(STEPS):
            value = F.cross_entropy(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(value, [w[name] for name in names], create_graph=True)
            w = w | {name: w[name] - RATE * g for name, g in zip(names, gradient, strict=True)}
        values.append(F.cross_entropy(functional_call(network, w, (query_x,)), query_y))
    expected = dict(
        zip(start, torch.autograd.grad(torch.stack(values).mean(), [*start.values()]), strict=True)
    )
    assert relative_error(model.meta_gradient(found), expected) < 1e-10
    values = torch.stack([value.detach() for value in values])
    torch.testing.assert_close(model.evaluate(found).loss[:, -1], values)


class ScaledInPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.body(x)))
        logits /= 0.5
        return logits


class CosineHead(Plain):
    def forward(self, x: Tensor) -> Tensor:
        own = {"weight": F.normalize(self.head.weight, dim=1), "bias": self.head.bias}
        return functional_call(self.head, own, (torch.tanh(self.body(x)),))


class Gain(nn.Linear):
    gain: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class GivingItsHeadAGain(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.head = Gain(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x))
        self.head.gain = 1 + features[:, :1]
        return self.head(features)


class DoublingBeforeItsHead(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


@pytest.mark.parametrize("tasks", ["auto", "loop"])
@pytest.mark.parametrize(
    "network", [Plain, ScaledInPlace, CosineHead, GivingItsHeadAGain, DoublingBeforeItsHead]
)
def test_features_are_computed_once_only_if_the_head_alone_gives_the_outputs(
    network: type[nn.Module], tasks: str
) -> None:
    model = ANIL(seeded(network), RATE, STEPS, tasks=tasks, head="head")
    expected = unrolled(seeded(network), names=["head.weight", "head.bias"])
    assert relative_error(model.meta_gradient(points()), expected) < 1e-10
    assert (model._plan(points()).head is None) == (network is not Plain)


class Shrunk(nn.Module):
    """A head whose outputs are changed in place, by more than its digits but less than one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.body(x.flatten(1))))
        z /= 1.5
        return z


@pytest.mark.parametrize("autocast", [False, True])
def test_what_follows_the_head_is_seen_in_half_precision_too(autocast: bool) -> None:
    episodes = map_tensors(lambda x: x.float() if x.is_floating_point() else x, make_episodes())
    device = episodes.support_x.device.type
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        assert ANIL(Shrunk(), 0.4, 2, head="head")._plan(episodes).head is None
