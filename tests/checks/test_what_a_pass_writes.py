"""What a pass writes and keeps is put back, or refused."""

from collections import deque
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers.networks import relative_error
from helpers.points import (
    RATE,
    STEPS,
    WAYS,
    Plain,
    points,
    seeded,
    unrolled,
)
from lightning_maml import ANIL, MAML, Episodes


@pytest.mark.parametrize("in_place", [False, True])
def test_state_in_plain_tensors_is_refused_and_activations_are_not(in_place: bool) -> None:
    class Averaging(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(6, dtype=torch.float64)

        def forward(self, x: Tensor) -> Any:
            hidden = torch.tanh(self.body(x))
            if in_place:
                self.seen.mul_(0.9).add_(0.1 * hidden.mean(0).detach())
            else:
                self.seen = 0.9 * self.seen + 0.1 * hidden.mean(0).detach()
            return self.head(hidden)

    with pytest.raises(
        ValueError, match="has the attribute 'seen', a plain tensor, for it; make it a buffer"
    ):
        MAML(seeded(Averaging), RATE, STEPS, tasks="loop").meta_loss(points())

    class Keeping(Plain):
        def forward(self, x: Tensor) -> Any:
            self.last = torch.tanh(self.body(x))
            return self.head(self.last)

    model = MAML(seeded(Keeping), RATE, STEPS)
    assert relative_error(model.meta_gradient(points()), unrolled(seeded(Plain))) < 1e-10


def test_a_parameter_that_is_nan_is_not_said_to_be_written() -> None:
    network = seeded(Plain)
    with torch.no_grad():
        network.head.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="Expected a finite query loss"):
        MAML(network, RATE, STEPS, tasks="loop").meta_loss(points())


def test_a_network_that_writes_to_its_inputs_is_refused_before_it_does() -> None:
    class Halving(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.div_(2))

    found, before = points(), points()
    with pytest.raises(ValueError, match="leaves its inputs as they are"):
        MAML(seeded(Halving), RATE, STEPS).meta_loss(found)
    torch.testing.assert_close(tuple(found), tuple(before), rtol=0, atol=0)


class Condition(Plain):
    """Writes into a buffer in training if gradients are wanted, or if a large number comes
    along."""

    def __init__(self, condition: str) -> None:
        super().__init__()
        self.condition = condition
        self.register_buffer("written", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        met = torch.is_grad_enabled() if self.condition == "gradients" else bool((x > 50).any())
        if self.training and met:
            self.written += 1
        return super().forward(x)


def test_layers_that_write_only_with_gradients_are_seen() -> None:
    network = seeded(Condition, "gradients")
    MAML(network, RATE, STEPS, tasks="loop").meta_loss(points()).backward()
    assert network.written == 1


def test_layers_that_write_only_at_some_values_are_seen_when_they_do() -> None:
    network = seeded(Condition, "values")
    model = MAML(network, RATE, STEPS, tasks="loop")
    model.meta_loss(points()).backward()
    assert network.written == 0
    large = points()
    large.support_x[0, 0, 0] = 100
    model.meta_loss(large).backward()
    assert network.written == 1


@pytest.mark.parametrize("written", ["inputs", "parameters"])
def test_what_is_written_later_stops_the_run(written: str) -> None:
    class Later(Plain):
        begun = False

        def forward(self, x: Tensor) -> Any:
            if Later.begun:
                with torch.no_grad():
                    (x if written == "inputs" else self.body.weight).mul_(0.99)
            return super().forward(x)

    model = MAML(seeded(Later), RATE, STEPS, tasks="loop")
    model.meta_loss(points())
    Later.begun = True
    with pytest.raises(
        ValueError, match="leave parameters and inputs as they are but they wrote to"
    ):
        model.meta_loss(points())


def test_buffers_that_are_replaced_later_are_kept() -> None:
    class Later(Plain):
        begun = False

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            hidden = torch.tanh(self.body(x))
            if Later.begun and self.training:
                self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0).detach()
            return self.head(hidden)

    network = seeded(Later)
    model = MAML(network, RATE, STEPS, tasks="loop")
    model.meta_loss(points())
    assert not network.mean.any()
    Later.begun = True
    model.meta_loss(points())
    assert network.mean.any()


def test_a_sparse_buffer() -> None:
    class Graph(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("neighbours", torch.eye(WAYS, dtype=torch.float64).to_sparse())

        def forward(self, x: Tensor) -> Any:
            return torch.sparse.mm(self.neighbours, super().forward(x).mT).mT

    assert (
        relative_error(
            MAML(seeded(Graph), RATE, STEPS).meta_gradient(points()), unrolled(seeded(Plain))
        )
        < 1e-10
    )


@pytest.mark.usefixtures("two_threads")
def test_torchs_cache_of_parametrizations_is_not_shared_by_threads() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(30000, 4)
            parametrize.register_parametrization(self.layer, "weight", nn.Tanh())
            self.head = nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            with parametrize.cached():
                return self.head(torch.tanh(self.layer(x) + self.layer(-x / 2)))

    x, labels = torch.rand(4, WAYS, 30000, dtype=torch.float64), torch.arange(WAYS).repeat(4, 1)
    model = MAML(seeded(Cached), RATE, 1)
    assert model._execution(Episodes(x, labels, x, labels)).tasks == "loop"
    with pytest.raises(ValueError, match=r"parametrize\.cached, a cache for all threads"):
        MAML(seeded(Cached), RATE, 1, tasks="threads").meta_loss(Episodes(x, labels, x, labels))


def test_a_buffer_that_is_written_past_the_modules_is_refused() -> None:
    class Counter:
        __slots__ = ("counted",)

        def __init__(self, counted: Tensor) -> None:
            self.counted = counted

        def __deepcopy__(self, memo: Any) -> "Counter":
            return self

    class Counted(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.counter = Counter(self.calls)

        def forward(self, x: Tensor) -> Tensor:
            self.counter.counted += 1
            return super().forward(x)

    torch.manual_seed(0)
    network = Counted()
    episodes = Episodes(
        *(tensor.float() if tensor.is_floating_point() else tensor for tensor in points())
    )
    with pytest.raises(
        ValueError,
        match=r"reaches its buffers through its modules but .* writes to \['calls'\] from "
        "elsewhere",
    ):
        MAML(network, RATE, STEPS).meta_loss(episodes)


class Caching(Plain):
    """Keeps the sum of its weights from its first pass, which it should compute in each."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.found = None
        self.nested: dict[str, Any] = {"found": {}}
        self.held = SimpleNamespace(found=None)

    @lru_cache(None)  # noqa: B019
    def total(self) -> Tensor:
        return self.body.weight.sum()

    def scale(self) -> Tensor:
        if self.where == "nowhere":
            return self.body.weight.sum()
        if self.where == "lru_cache":
            return self.total()
        holder = (
            self.nested["found"]
            if self.where == "nested dict"
            else vars(self.held if self.where == "object" else self)
        )
        if holder.get("found") is None:
            holder["found"] = self.body.weight.sum()
        return holder["found"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) * self.scale()))


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads"])
def test_what_a_network_keeps_from_its_last_pass_is_put_back_or_refused(tasks: str) -> None:
    expected = unrolled(seeded(Caching, "nowhere"))
    assert (
        relative_error(
            MAML(seeded(Caching, "attribute"), RATE, STEPS, tasks=tasks).meta_gradient(points()),
            expected,
        )
        < 1e-10
    )
    for where in ("nested dict", "object", "lru_cache"):
        with pytest.raises(ValueError, match="compute anew what depends on its parameters"):
            MAML(seeded(Caching, where), RATE, STEPS, tasks=tasks).meta_loss(points())


def test_buffers_that_torchscript_writes_are_kept() -> None:
    class Counting(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(torch.tanh(self.body(x)))

    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.script(seeded(Counting))
    model = MAML(scripted, RATE, STEPS, tasks="loop")
    for _ in range(2):
        model.meta_loss(points())
    assert scripted.calls == 2


class Definite(Plain):
    """Has a head that fails at parameters some hundredths away from its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, WAYS, bias=False)
        self.register_buffer("start", self.head.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        if bool((self.head.weight - self.start).abs().max() > 0.01):
            raise ArithmeticError("too far from the start")
        return self.head(hidden)


@pytest.mark.parametrize("algorithm", [MAML, ANIL])
@pytest.mark.parametrize("tasks", ["auto", "loop", "threads"])
def test_networks_that_fail_at_other_parameters_are_not_refused(
    algorithm: type[MAML], tasks: str
) -> None:
    assert algorithm(seeded(Definite), 1e-9, STEPS, tasks=tasks).meta_loss(points()).isfinite()


def test_state_is_seen_in_a_network_that_fails_at_other_parameters() -> None:
    class CountingDefinite(Definite):
        def __init__(self) -> None:
            super().__init__()
            self.held: dict[str, Any] = {"of": {"calls": 0}}

        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            self.held["of"]["calls"] += 1
            return outputs / self.held["of"]["calls"]

    with pytest.raises(ValueError, match="got another result the second time"):
        MAML(seeded(CountingDefinite), 1e-9, STEPS).meta_loss(points())


@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize(
    "holder", [lambda f: deque([f]), lambda f: SimpleNamespace(f=f)], ids=["deque", "object"]
)
def test_a_mode_that_is_read_past_the_modules_is_refused(holder: Any, adapts: bool) -> None:
    class Dropping(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.held = holder(lambda hidden: F.dropout(hidden, 0.5, self.training))

        def forward(self, x: Tensor) -> Tensor:
            drop = self.held[0] if isinstance(self.held, deque) else self.held.f
            return self.head(drop(torch.tanh(self.body(x))))

    network = seeded(Dropping)
    model = MAML(network, RATE, STEPS)
    with pytest.raises(ValueError, match="reads its mode from its own modules"):
        model.adapt(points().support_x, points().support_y) if adapts else model.meta_loss(points())
    assert all(module.training for module in network.modules())


class Queue(nn.Linear):
    """A network that remembers all examples in a tensor which grows."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.seen = torch.empty(0, 4, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x])
        return super().forward(x) + self.seen.mean()


def test_a_tensor_that_grows_is_refused() -> None:
    x, y = torch.rand(2, 6, 4, dtype=torch.float64), (torch.arange(6) % 3).repeat(2, 1)
    with pytest.raises(ValueError, match="has the attribute 'seen', a plain tensor"):
        MAML(Queue().double()).meta_loss(Episodes(x, y, x, y))
