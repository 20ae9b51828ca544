"""Copies compute what the network computes, and leave its tensors as they are."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torchvision.models.feature_extraction import create_feature_extractor

from helpers.networks import relative_error
from helpers.points import RATE, STEPS, WAYS, points, seeded
from lightning_maml import ANIL, HFMAML, MAML, ProtoNet
from lightning_maml.core.params import Params
from lightning_maml.errors import UserValueError
from lightning_maml.networks.copies import structural_copy


def unrolled_on_itself(network: nn.Module, adapting: list[str] | None = None) -> Params:
    """Return the meta-gradient of the network itself, not of a copy, which might differ."""
    start = dict(network.named_parameters())
    losses = []
    for support_x, support_y, query_x, query_y in zip(*points(), strict=True):
        w = dict(start)
        for _ in range(STEPS):
            names = adapting or [*w]
            loss = F.cross_entropy(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(loss, [w[name] for name in names], create_graph=True)
            w |= {name: w[name] - RATE * g for name, g in zip(names, gradient, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, w, (query_x,)), query_y))
    gradient = torch.autograd.grad(torch.stack(losses).mean(), [*start.values()])
    return dict(zip(start, gradient, strict=True))


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 6))


class Extracted(nn.Module):
    """Takes its features from torchvision's extractor, which copies lose the mode of."""

    def __init__(self) -> None:
        super().__init__()
        self.body = create_feature_extractor(body(), {"3": "features"})
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)["features"])

    def train(self, mode: bool = True) -> "Extracted":
        super().train(mode)
        self.body.eval()
        return self


class Traced(nn.Module):
    """Has a part that ``torch.fx`` made, with something added to it."""

    def __init__(self, add: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.body = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 6), nn.Tanh()))
        self.head = nn.Linear(6, WAYS)
        add(self.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self.body, "scale", 1.0) * self.body(x))


class Forgetful(nn.Linear):
    """Forgets a number when it is copied."""

    def __init__(self) -> None:
        super().__init__(8, WAYS)
        self.scale = 3.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.scale * x)


def with_hook(part: nn.Module) -> None:
    part.register_forward_hook(lambda _, inputs, outputs: 3 * outputs)


def with_hook_before(part: nn.Module) -> None:
    part.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def with_number(part: nn.Module) -> None:
    part.scale = 3.0


NETWORKS = {
    "extractor": Extracted,
    "hook": lambda: Traced(with_hook),
    "hook before": lambda: Traced(with_hook_before),
    "number": lambda: Traced(with_number),
    "setstate": Forgetful,
}


@pytest.mark.parametrize("tasks", ["auto", "loop"])
@pytest.mark.parametrize("made", NETWORKS)
def test_meta_gradients_are_those_of_the_network(made: str, tasks: Any) -> None:
    network = seeded(NETWORKS[made])
    network.train()
    found = MAML(network, RATE, STEPS, tasks=tasks).meta_gradient(points())
    assert relative_error(found, unrolled_on_itself(network)) < 1e-12


class Rebuilt(nn.Sequential):
    """Is built anew when it is copied."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, WAYS))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rebuilt":
        copied = Rebuilt().to(self[0].weight.dtype)
        for module, twin in zip(self, copied, strict=True):
            twin._parameters = {name: memo[id(p)] for name, p in module._parameters.items()}
        return copied


def test_parts_of_what_copies_itself_keep_their_modes() -> None:
    network = seeded(Rebuilt)
    network[2].eval()
    found = MAML(network, RATE, STEPS).meta_gradient(points())
    assert relative_error(found, unrolled_on_itself(network)) < 1e-12
    assert network.training


class WithCache(nn.Linear):
    """Forgets in training what it keeps in evaluation."""

    def __init__(self) -> None:
        super().__init__(8, WAYS)
        self.register_buffer("cache", torch.ones(2))
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def train(self, mode: bool = True) -> "WithCache":
        super().train(mode)
        self.cache = None
        return self


def test_buffers_that_are_replaced_and_of_rare_types_are_no_writes() -> None:
    network = seeded(WithCache).train()
    found = MAML(network, RATE, STEPS).meta_gradient(points())
    assert relative_error(found, unrolled_on_itself(network)) < 1e-12


def test_an_extractor_is_in_evaluation_mode_in_evaluation() -> None:
    network = seeded(Extracted)
    model = MAML(network, RATE, STEPS).eval()
    assert model.evaluate(points()).loss.equal(model.evaluate(points()).loss)
    adapted = model.adapt(points().support_x[0], points().support_y[0])
    assert not any(module.training for module in adapted.modules())


class Merging(nn.Linear):
    """LoRA that is merged into the frozen weight in evaluation mode, as in loralib."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.a = nn.Parameter(torch.randn(2, 8))
        self.b = nn.Parameter(torch.zeros(8, 2))
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Swapping(nn.Linear):
    """Puts averaged weights in place of its own in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.average = self.weight.data.double()

    def train(self, mode: bool = True) -> "Swapping":
        super().train(mode)
        self.weight.data, self.average = self.average, self.weight.data
        return self


USES = {
    "training": lambda model: model.meta_loss(points()),
    "adaptation": lambda model: model.adapt(points().support_x[0], points().support_y[0]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("algorithm", [MAML, ProtoNet])
@pytest.mark.parametrize("layer", [Merging, Swapping])
def test_weights_that_change_with_the_mode_are_refused(
    layer: type[nn.Module], algorithm: Any, use: str
) -> None:
    network = nn.Sequential(layer(), nn.Tanh(), nn.Linear(8, WAYS)).double()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserValueError, match=r"train\(\) and eval\(\) to leave the tensors"):
        USES[use](algorithm(network))
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


def test_query_in_eval_refuses_them_too() -> None:
    network = nn.Sequential(Merging(), nn.Tanh(), nn.Linear(8, WAYS)).double()
    before = network[0].weight.clone()
    with pytest.raises(UserValueError, match="merge_weights=False"):
        MAML(network, query_in_eval=True).meta_loss(points())
    assert network[0].weight.equal(before)


def plain() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, WAYS)))


BODY, HEAD = ["0.weight", "0.bias"], ["2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("before", "then", "adapting"),
    [("head", "all", None), ("head", ["0"], BODY), ("all", "head", HEAD), ("head", "body", BODY)],
)
def test_what_adapts_may_be_changed(before: Any, then: Any, adapting: Any) -> None:
    network = plain()
    model = MAML(network, RATE, STEPS, adapt=before)
    model.meta_gradient(points())
    model.adapted_part = then
    expected = unrolled_on_itself(network, adapting)
    assert relative_error(model.meta_gradient(points()), expected) < 1e-12


class Frequencies(nn.Module):
    """Its features are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), Magnitudes()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.rfft(torch.tanh(self.body(x))))


class Magnitudes(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs())


def test_features_may_be_complex() -> None:
    network = seeded(Frequencies)
    expected = unrolled_on_itself(network, ["head.weight", "head.bias"])
    assert relative_error(ANIL(network, RATE, STEPS).meta_gradient(points()), expected) < 1e-12


class Scaled(nn.Module):
    """A float32 network whose first parameter is a float64 number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.layers = plain().float()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * self.scale.float())


def test_the_probe_radius_is_that_of_the_coarsest_type() -> None:
    network = Scaled()
    episodes = points()
    episodes = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    exact = MAML(network, RATE, STEPS).meta_gradient(episodes)
    assert relative_error(HFMAML(network, RATE, STEPS).meta_gradient(episodes), exact) < 1e-3


class Constrained(nn.Linear):
    """Keeps its rows within the unit ball, in which they are at first."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(x)


def test_a_constraint_that_does_not_bind_yet_is_refused() -> None:
    network = nn.Sequential(Constrained(8, WAYS)).double()
    with torch.no_grad():
        network[0].weight /= 10
    with pytest.raises(UserValueError, match="leaves the network's parameters as they are"):
        MAML(network, RATE).meta_loss(points())


class FreezingItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return self.head(self.norm(x))


def test_batch_norm_that_changes_its_mode_in_a_pass_is_refused() -> None:
    with pytest.raises(UserValueError, match=r"changes that of \['norm'\]"):
        MAML(FreezingItsNorm().double(), RATE, batch_norm="running").meta_loss(points())
    MAML(FreezingItsNorm().double(), RATE).meta_loss(points())  # always the batch's own statistics


def test_functions_that_call_each_other_refer_to_the_copy() -> None:
    layer = nn.Linear(4, 4)

    def made() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        def outer(x: Tensor, deep: int = 2) -> Tensor:
            return inner(x, deep - 1) if deep else x

        def inner(x: Tensor, deep: int) -> Tensor:
            return outer(layer(x), deep)

        return outer, inner

    network = nn.Sequential(layer)
    network.act, _ = made()
    copied = structural_copy(network)
    copied[0].weight, copied[0].bias = (
        nn.Parameter(torch.zeros_like(p)) for p in layer.parameters()
    )
    x = torch.rand(2, 4)
    assert not copied.act(x).any()
    assert network.act(x).any()
