"""Hooks and functions that a network holds refer to the copy that runs."""

import threading
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.networks import relative_error
from helpers.points import RATE, STEPS, Plain, points, seeded, unrolled
from lightning_maml import MAML


class Hooked(Plain):
    """Takes its features from a hook, whose closure knows the module or what it holds, as feature
    extractors do."""

    def __init__(self, refers_to: str) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        features = self.features
        hooks = {
            "module": lambda _, inputs, outputs: self.features.update(found=outputs),
            "dict": lambda _, inputs, outputs: features.update(found=outputs),
            "default": lambda _, inputs, outputs, own=self: own.features.update(found=outputs),
            "keyword": lambda _, inputs, outputs, *, own=self: own.features.update(found=outputs),
        }
        self.body.register_forward_hook(hooks[refers_to])

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(torch.tanh(self.features["found"]))


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("tasks", ["auto", "loop", "threads"])
@pytest.mark.parametrize("refers_to", ["module", "dict", "default", "keyword"])
def test_hooks_refer_to_the_network_that_runs(refers_to: str, tasks: str, ran_before: bool) -> None:
    network = seeded(Hooked, refers_to)
    if ran_before:
        network(points().support_x[0])
    model = MAML(network, RATE, STEPS, tasks=tasks)
    assert relative_error(model.meta_gradient(points()), unrolled(seeded(Plain))) < 1e-10
    adapted = model.adapt(points().support_x[0], points().support_y[0])
    plain = MAML(seeded(Plain), RATE, STEPS).adapt(points().support_x[0], points().support_y[0])
    torch.testing.assert_close(adapted(points().query_x[0]), plain(points().query_x[0]))


def test_functions_in_attributes_refer_to_the_network_that_runs() -> None:
    class Encoding(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.encode = lambda x: self.dropout(self.body(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.encode(x)))

    model = MAML(seeded(Encoding), RATE, STEPS)
    model.meta_loss(points()).backward()
    adapted = model.adapt(points().support_x[0], points().support_y[0])
    torch.testing.assert_close(
        adapted(points().query_x[0]), adapted(points().query_x[0]), rtol=0, atol=0
    )


def test_tasks_with_hooks_on_tensors_are_not_stacked_even_if_the_hooks_do_nothing_yet() -> None:
    class Clipping(Plain):
        def forward(self, x: Tensor) -> Any:
            hidden = torch.tanh(self.body(x))
            if hidden.requires_grad:
                hidden.register_hook(lambda g: g * torch.clamp(100 / g.norm(), max=1))
            return self.head(hidden)

    model = MAML(seeded(Clipping), RATE, STEPS)
    assert model._execution(points()).tasks == "loop"
    with pytest.raises(ValueError, match="hooks on tensors, which would see all tasks as one"):
        MAML(seeded(Clipping), RATE, STEPS, tasks="vmap").meta_loss(points())


def test_hooks_of_parameters_that_adapt_are_said_to_miss_the_inner_steps() -> None:
    network = seeded(Plain)
    network.head.weight.register_hook(torch.zeros_like)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(network, RATE, STEPS, adapt=["body"])  # the head does not adapt
    with pytest.warns(UserWarning, match=r"hooks of the parameters \['head.weight'\] see the meta"):
        model = MAML(network, RATE, STEPS)
    model.meta_loss(points()).backward()
    assert network.head.weight.grad is not None
    assert not network.head.weight.grad.any()  # the meta-gradient is what the hook returns
    adapted = model.adapt(points().support_x[0], points().support_y[0])
    assert not torch.equal(adapted.head.weight, network.head.weight)  # inner steps are not


class CallingAFunction(Plain):
    """Calls a function that writes to a buffer and drops out in training, which it reaches in one
    of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

        def count(hidden: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(hidden, 0.5, self.training)

        def count_of_parent(hidden: Tensor) -> Tensor:
            parent = self.parent()
            parent.calls += 1
            return F.dropout(hidden, 0.5, parent.training)

        self.parent = weakref.ref(self)
        self.functions: Any = {
            "list": [count],
            "tuple": (None, count),
            "dict": {"of": {"lists": [count]}},
            "partial": [partial(count)],
            "argument": [partial(lambda hidden, of: of(hidden), of=count)],
            "weak reference": [count_of_parent],
        }[way]

    def forward(self, x: Tensor) -> Tensor:
        held = self.functions["of"]["lists"] if isinstance(self.functions, dict) else self.functions
        return self.head(held[-1](torch.tanh(self.body(x))))


@pytest.mark.parametrize("way", ["list", "tuple", "dict", "partial", "argument", "weak reference"])
def test_functions_that_a_network_holds_refer_to_the_network_that_runs(way: str) -> None:
    network = seeded(CallingAFunction, way)
    model = MAML(network, RATE, STEPS)
    for step in range(1, 4):
        model.meta_loss(points()).backward()
        assert network.calls == step
    model.evaluate(points())
    assert network.calls == 3
    adapted = model.adapt(points().support_x, points().support_y)
    torch.testing.assert_close(adapted(points().query_x), adapted(points().query_x), rtol=0, atol=0)


def centring(_: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    """A forward hook that registers a hook on tensors."""
    outputs = outputs.clone()
    if outputs.requires_grad:
        outputs.register_hook(lambda gradient: gradient - gradient.mean(0))
    return outputs


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_a_hook_that_is_added_between_steps_is_noticed(tasks: str) -> None:
    network, other = seeded(Plain), seeded(Plain)
    model = MAML(network, RATE, STEPS, tasks=tasks)
    model.meta_gradient(points())
    for changed in (network, other):
        changed.body.register_forward_hook(centring)
    if tasks == "vmap":
        with pytest.raises(ValueError, match="has hooks on tensors"):
            model.meta_gradient(points())
    else:
        assert relative_error(model.meta_gradient(points()), unrolled(other)) < 1e-10


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_a_hook_that_writes_and_is_added_between_steps_is_noticed(tasks: str) -> None:
    network = seeded(Plain)
    network.register_buffer("calls", torch.zeros(()))
    model = MAML(network, RATE, STEPS, tasks=tasks)
    model.meta_loss(points())
    network.body.register_forward_hook(lambda *_: network.calls.add_(1) and None)
    for step in (1, 2):
        model.meta_loss(points())
        assert network.calls == step


def test_what_cannot_be_copied_is_named() -> None:
    network = seeded(Plain)
    network.body.lock = threading.Lock()
    with pytest.raises(
        TypeError, match=r"Expected a network, .* be copied .* but \['body.lock'\] of Plain cannot"
    ):
        MAML(network, RATE, STEPS).meta_loss(points())


def test_a_dict_of_functions_that_holds_itself() -> None:
    class Registry(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.functions: dict[str, Any] = {"squash": lambda x: torch.tanh(self.body(x))}
            self.functions["all"] = self.functions

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.functions["all"]["squash"](x))

    assert (
        relative_error(
            MAML(seeded(Registry), RATE, STEPS).meta_gradient(points()), unrolled(seeded(Plain))
        )
        < 1e-10
    )
