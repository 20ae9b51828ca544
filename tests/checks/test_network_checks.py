"""What the looks at a network and its loss find on the first batch: closures, views, state, losses
that draw or write."""

import copy
import random
import threading
import weakref
from collections import deque
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from helpers.networks import relative_error
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import QUIET, on_device
from lightning_maml import ANIL, FOMAML, MAML, Episodes, ProtoNet
from lightning_maml.core.params import Params

RATE, STEPS, WAYS = 0.4, 2, 5


def points(tasks: int = 4) -> Episodes:
    random = torch.Generator().manual_seed(1)
    x = drawn_on_cpu(torch.randn, 2, tasks, 2 * WAYS, 8, dtype=torch.float64, generator=random)
    labels = torch.arange(WAYS).repeat(tasks, 2)
    return Episodes(x[0], labels, x[1], labels)


def unrolled(
    network: nn.Module, loss: Any = F.cross_entropy, names: list[str] | None = None
) -> Params:
    """Return the gradient by autograd through the unrolled loop, on a network that plain torch can
    call with other parameters."""
    start = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    values = []
    for support_x, support_y, query_x, query_y in zip(*points(), strict=True):
        w = {name: p.view_as(p) for name, p in start.items()}
        for _ in range(STEPS):
            at = names or [*w]
            value = loss(functional_call(network, w, (support_x,)), support_y)
            gradient = torch.autograd.grad(value, [w[name] for name in at], create_graph=True)
            w = w | {name: w[name] - RATE * g for name, g in zip(at, gradient, strict=True)}
        values.append(loss(functional_call(network, w, (query_x,)), query_y))
    return dict(
        zip(start, torch.autograd.grad(torch.stack(values).mean(), [*start.values()]), strict=True)
    )


def seeded(network: type[nn.Module], *arguments: Any) -> Any:
    torch.manual_seed(0)
    return network(*arguments).double()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.body(x)))


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


def test_views_of_parameters_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(8, WAYS, bias=False, dtype=torch.float64)
            self.flat = self.encoder.weight.view(-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x) * self.flat.square().sum()

    with pytest.raises(ValueError, match=r"reads \['encoder.weight'\] from elsewhere"):
        MAML(Tied(), RATE, STEPS).meta_loss(points())

    network = seeded(Plain)
    flat = network.head.weight.view(-1)
    with pytest.raises(
        ValueError, match=r"reads the network's parameters \['head.weight'\] from outside"
    ):
        MAML(
            network,
            RATE,
            STEPS,
            loss=lambda outputs, y: F.cross_entropy(outputs, y) + flat.square().sum(),
        ).meta_loss(points())


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


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_losses_that_draw_run_in_a_loop(draw: Any) -> None:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs * (0.2 + draw()), y)

    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 84 * 84, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    images, labels = torch.rand(8, 4, 3, 84, 84, dtype=torch.float64), torch.arange(2).repeat(8, 2)
    episodes = Episodes(images, labels, images, labels)

    def gradient(tasks: str) -> Params:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        return MAML(network, 0.01, 1, loss=loss, tasks=tasks).meta_gradient(episodes)

    assert relative_error(gradient("auto"), gradient("loop")) < 1e-12
    with pytest.raises(RuntimeError, match="draw from"):
        gradient("threads")


def test_a_loss_with_a_generator_of_its_own_is_refused() -> None:
    generator = np.random.default_rng(0)
    model = MAML(
        seeded(Plain),
        RATE,
        STEPS,
        loss=lambda outputs, y: F.cross_entropy(outputs * generator.random(), y),
    )
    with pytest.raises(
        ValueError, match="Expected a loss that returns the same for the same inputs"
    ):
        model.meta_loss(points())


class Averaged(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones((), dtype=torch.float64))
        self.in_place = in_place

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, y)
        if self.in_place:
            self.average.mul_(0.5).add_(0.5 * loss.detach())
        else:
            self.average = 0.5 * self.average + 0.5 * loss.detach()
        return loss / self.average.clone()


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads", "vmap"])
@pytest.mark.parametrize("in_place", [False, True])
def test_losses_that_write_are_refused_and_left_as_they_were(tasks: str, in_place: bool) -> None:
    loss = Averaged(in_place=in_place)
    with pytest.raises(ValueError, match="Expected a loss that"):
        MAML(seeded(Plain), RATE, STEPS, loss=loss, tasks=tasks).meta_loss(points())
    assert loss.average == 1


def test_what_becomes_trainable_is_compared_anew_before_it_is_stacked() -> None:
    class Scaling(Plain):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            if hidden.requires_grad:
                hidden.register_hook(lambda g: g / g.norm())
            return self.head(hidden)

    network = seeded(Scaling)
    network.body.requires_grad_(False)
    model = FOMAML(network, RATE, STEPS)
    model.meta_loss(points())
    network.body.requires_grad_(True)
    expected = FOMAML(network, RATE, STEPS, tasks="loop").meta_gradient(points())
    assert relative_error(model.meta_gradient(points()), expected) < 1e-10


class Several(NamedTuple):
    logits: Tensor
    other: Tensor


def test_support_statistics_need_outputs_with_the_examples_in_front() -> None:
    class WithCodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, WAYS)
            # as many as support and query examples together
            self.codes = nn.Parameter(torch.ones(4 * WAYS, 2))

        def forward(self, x: Tensor) -> Several:
            return Several(self.head(self.norm(x)), 2 * self.codes)

    with pytest.raises(
        ValueError, match="outputs with the examples in front for `batch_norm='support'`"
    ):
        MAML(WithCodes().double(), RATE, STEPS, batch_norm="support").meta_loss(points())


@pytest.mark.parametrize("policy", ["running", "support"])
def test_outputs_of_layers_are_no_look_at_other_examples(policy: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, WAYS)

        def forward(self, x: Tensor) -> Several:
            sequence, hidden = self.layers(x.view(len(x), 2, 4))
            return Several(self.head(sequence[:, -1]), hidden)

    MAML(Recurrent().double(), RATE, STEPS, batch_norm=policy).meta_loss(points()).backward()


def test_prototypes_have_losses_that_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match="Expected a loss of labels"):
        ProtoNet(nn.Linear(8, 4).double(), loss=F.mse_loss).meta_loss(points())


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


def test_dropout_in_the_loss_is_active_for_a_network_that_is_trained_in_evaluation_mode() -> None:
    class Dropping(nn.Module):
        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.dropout(outputs, 0.5, self.training), y)

    network = seeded(Plain).eval()
    model = MAML(network, RATE, STEPS, loss=Dropping())
    torch.manual_seed(3)
    expected = unrolled(network, Dropping())
    torch.manual_seed(3)
    assert relative_error(model.meta_gradient(points()), expected) < 1e-10


def test_adapted_networks_do_not_depend_on_dropout_in_the_loss() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.dropout(outputs), y)

    model = MAML(seeded(Plain), RATE, STEPS, loss=Dropping())
    adapted = [
        model.adapt(points().support_x[0], points().support_y[0]).state_dict() for _ in range(2)
    ]
    torch.testing.assert_close(adapted[0], adapted[1], rtol=0, atol=0)
    assert model.loss.training


def test_a_network_may_return_its_weights_to_the_loss() -> None:
    class Returning(Plain):
        def forward(self, x: Tensor) -> Several:
            return Several(super().forward(x), self.body.weight)

    def loss(outputs: Several, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, y) + 0.1 * outputs.other.square().sum()

    model = MAML(seeded(Returning), RATE, STEPS, loss=loss)
    assert relative_error(model.meta_gradient(points()), unrolled(seeded(Returning), loss)) < 1e-10


def quantile_loss(outputs: Tensor, y: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=outputs.dtype)
    away = y.expand_as(outputs) - outputs
    return torch.maximum(levels * away, (levels - 1) * away).mean()


def test_a_loss_that_expands_targets_itself_means_it() -> None:
    found = points()
    targets = found._replace(support_y=found.support_x[..., :1], query_y=found.query_x[..., :1])
    network = nn.Linear(8, 3).double()
    MAML(network, RATE, STEPS, loss=quantile_loss).meta_loss(targets).backward()
    with pytest.raises(ValueError, match=r"let it say so, y\.expand_as"):
        MAML(network, RATE, STEPS, loss=lambda outputs, y: (outputs - y).square().mean()).meta_loss(
            targets
        )


def test_a_loss_may_multiply_by_a_sparse_matrix() -> None:
    matrix = torch.eye(WAYS, dtype=torch.float64).to_sparse()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.sparse.mm(matrix, outputs.mT).mT, y)

    gradient = MAML(seeded(Plain), RATE, STEPS, loss=loss, tasks="loop").meta_gradient(points())
    assert relative_error(gradient, unrolled(seeded(Plain))) < 1e-10


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


def test_learned_rates_need_a_step() -> None:
    with pytest.raises(
        ValueError, match="`train_steps` to be at least 1 to train learned inner rates"
    ):
        MAML(seeded(Plain), RATE, 0, inner_rates="per_layer").meta_loss(points())


class OfAnySize(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(1, 4, 3), norm, nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.convolution(x))).mean((2, 3)))


def of_two_sizes() -> Episodes:
    x = torch.rand(2, 2 * WAYS, 1, 10, 10, dtype=torch.float64)
    labels = torch.arange(WAYS).repeat(2, 2)
    return Episodes(x[..., :8, :8], labels, x, labels)


def test_support_and_query_inputs_of_two_sizes() -> None:
    writes = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    for norm, policy in (
        (nn.BatchNorm2d(4), "batch"),
        (nn.BatchNorm2d(4), "running"),
        (writes, "batch"),
    ):
        MAML(OfAnySize(norm).double(), RATE, STEPS, batch_norm=policy).meta_loss(
            of_two_sizes()
        ).backward()
    assert writes.running_mean.any()
    for policy in ("support", "per_step"):
        with pytest.raises(ValueError, match=f"of one size for `batch_norm='{policy}'`"):
            MAML(OfAnySize(nn.BatchNorm2d(4)).double(), RATE, STEPS, batch_norm=policy).meta_loss(
                of_two_sizes()
            )


def test_batch_norm_with_a_forward_of_its_own_keeps_its_averages_in_training() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if not self.training:
                mean, variance = self.running_mean, self.running_var
            else:
                with torch.no_grad():
                    self.running_mean.mul_(0.9).add_(0.1 * mean)
            return (x - mean[:, None, None]) / (variance + self.eps).sqrt()[:, None, None]

    labels = torch.arange(WAYS).repeat(2, 2)
    x = torch.rand(2, 2 * WAYS, 1, 10, 10, dtype=torch.float64)
    torch.manual_seed(0)
    own = OfAnySize(Own(4)).double()
    torch.manual_seed(0)
    plain = OfAnySize(nn.BatchNorm2d(4, affine=False)).double()
    with pytest.raises(
        ValueError,
        match=r"`batch_norm='batch'` has it, but \['norm'\] need theirs; use "
        "`batch_norm='running'`",
    ):
        MAML(own, RATE, STEPS).meta_loss(Episodes(x, labels, x, labels))
    with pytest.raises(
        ValueError,
        match=r"`batch_norm='batch'` has it, but \['norm'\] need theirs; use "
        "`batch_norm='running'`",
    ):
        MAML(own, RATE, STEPS).meta_loss(Episodes(x, labels, x, labels))
    models = [
        MAML(network, RATE, STEPS, batch_norm="running", tasks="loop") for network in (own, plain)
    ]
    gradients = [model.meta_gradient(Episodes(x, labels, x, labels)) for model in models]
    assert relative_error({name: gradients[0][name] for name in gradients[1]}, gradients[1]) < 1e-10


def test_a_network_of_one_dict_is_told_how_it_is_called() -> None:
    class OfDict(Plain):
        def forward(self, batch: dict[str, Tensor]) -> Any:
            return super().forward(batch["points"])

    found = points()
    given = found._replace(support_x={"points": found.support_x}, query_x={"points": found.query_x})
    with pytest.raises(
        ValueError, match=r"takes its inputs as network\(\*\*x\) with 'points' but it does not"
    ):
        MAML(seeded(OfDict), RATE, STEPS).meta_loss(given)


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


def test_known_kinds_of_batch_are_not_looked_at_again() -> None:
    class Counting(Plain):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            Counting.calls += 1
            return super().forward(x)

    model = MAML(seeded(Counting), RATE, STEPS, tasks="loop")
    one = points()
    other = Episodes(*(part[:, :WAYS] for part in one))
    for episodes in (one, other):
        model.meta_loss(episodes)
    Counting.calls = 0
    for episodes in (one, other, one):
        model.meta_loss(episodes)
    assert Counting.calls == 3 * 4 * (STEPS + 1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, WAYS)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.words(ids).mean(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_token_ids_of_a_loader_are_tested_and_predicted(workers: int, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(WAYS).repeat(2)
    ids = drawn_on_cpu(torch.randint, 9, (8, 2 * WAYS, 4), generator=random)
    loader = DataLoader(
        [Episodes(x, labels, x, labels) for x in ids], batch_size=4, num_workers=workers
    )
    model = MAML(seeded(Words), RATE, STEPS)
    trainer = Trainer(default_root_dir=tmp_path, **on_device(), **QUIET)
    expected = model.eval().evaluate(Episodes(ids, labels.expand(8, -1), ids, labels.expand(8, -1)))
    (tested,) = trainer.test(model, loader, verbose=False)
    assert tested["test/loss"] == pytest.approx(float(expected.loss[:, -1].mean()))
    torch.testing.assert_close(torch.cat(trainer.predict(model, loader)), expected.aux[:, -1])


def test_a_task_of_inference_mode_is_adapted_to() -> None:
    model = MAML(seeded(Words), RATE, STEPS)
    ids, labels = torch.arange(40).view(10, 4) % 9, torch.arange(WAYS).repeat(2)
    expected = model.adapt(ids, labels)(ids)
    with torch.inference_mode():
        found = model.adapt(ids.clone(), labels.clone())(ids)
        many = model.adapt(ids[None].repeat(4, 1, 1), labels.repeat(4, 1))(
            ids[None].repeat(4, 1, 1)
        )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(many[0], expected)


def test_a_frozen_last_layer_is_not_passed_over_for_a_head() -> None:
    network = seeded(Plain)
    network.head.requires_grad_(False)
    with pytest.raises(
        ValueError, match="Expected `head` to be named, because the last layer, 'head', is frozen"
    ):
        ANIL(network, RATE)
    ANIL(network, RATE, head="body").meta_loss(points()).backward()


def test_parameters_in_the_closure_of_a_loss_are_refused() -> None:
    temperature = nn.Parameter(torch.zeros((), dtype=torch.float64))
    model = MAML(
        seeded(Plain),
        RATE,
        STEPS,
        loss=lambda outputs, y: F.cross_entropy(outputs * temperature.exp(), y),
    )
    with pytest.raises(ValueError, match="depends on one from elsewhere"):
        model.meta_loss(points())


@pytest.mark.parametrize("where", ["network", "loss"])
def test_a_loss_without_a_graph_is_said_to_be_so(where: str) -> None:
    class Detached(Plain):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                return super().forward(x)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(F.cross_entropy(outputs, y).item())

    model = (
        MAML(seeded(Detached), RATE, STEPS)
        if where == "network"
        else MAML(seeded(Plain), RATE, STEPS, loss=loss)
    )
    with pytest.raises(ValueError, match="depends on the network's parameters but nothing leads"):
        model.meta_loss(points())


def test_a_loss_that_was_not_made_is_refused() -> None:
    for wrong, got in ((nn.MSELoss, "the class MSELoss"), ("mse", "'mse'")):
        with pytest.raises(TypeError, match=f"`loss` to be a function or a module but got {got}"):
            MAML(seeded(Plain), RATE, loss=wrong)


def test_labels_in_a_list_are_refused_by_adapt() -> None:
    with pytest.raises(TypeError, match="Expected `support_y` to be a tensor but got list"):
        MAML(seeded(Plain), RATE).adapt(points().support_x[0], [0, 1])


def test_a_checkpoint_is_loaded_with_a_network(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"Expected the network, which a checkpoint does not hold.*network=\.\.\."
    ):
        MAML.load_from_checkpoint(tmp_path / "some.ckpt")


def test_dropout_of_nothing_draws_nothing() -> None:
    network = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.0), nn.Linear(6, WAYS)).double()
    MAML(network, RATE, compiled=True)
    with pytest.raises(ValueError, match="draws random numbers"):
        MAML(nn.Sequential(network, nn.Dropout(0.1)), RATE, compiled=True)


def test_many_networks_may_be_called_as_one_is() -> None:
    class Both(Plain):
        def forward(self, one: Tensor, other: Tensor) -> Any:
            return super().forward(one + other)

    found = points()
    x = {"one": found.support_x, "other": found.query_x}
    networks = MAML(seeded(Both), RATE).adapt(x, found.support_y)
    for outputs in (networks(**x), networks(found.support_x, found.query_x)):
        torch.testing.assert_close(outputs, networks(x), rtol=0, atol=0)


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


def test_a_loss_that_reads_parameters_is_refused_in_adaptation_and_evaluation_too() -> None:
    network = seeded(Plain)
    model = MAML(
        network,
        RATE,
        STEPS,
        loss=lambda outputs, y: F.cross_entropy(outputs, y) + network.head.weight.square().sum(),
    )
    for use in (
        lambda: model.adapt(points().support_x[0], points().support_y[0]),
        lambda: model.evaluate(points()),
    ):
        with pytest.raises(ValueError, match="reads the network's parameters"):
            use()


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


def images() -> Episodes:
    random = torch.Generator().manual_seed(2)
    x = drawn_on_cpu(torch.rand, 2, 2, WAYS, 1, 8, 8, dtype=torch.float64, generator=random)
    return Episodes(x[0], torch.arange(WAYS).repeat(2, 1), x[1], torch.arange(WAYS).repeat(2, 1))


@pytest.mark.parametrize("tasks", ["auto", "loop"])
def test_images_read_by_their_place_in_memory(tasks: str) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.convolution(x)).contiguous(memory_format=torch.preserve_format)
            return self.head(y.as_strided((len(y), 4 * 36), (4 * 36, 1)))

    class Flat(Strided):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.convolution(x)).flatten(1))

    found = [
        MAML(seeded(kind), RATE, STEPS, tasks=tasks).meta_gradient(images())
        for kind in (Strided, Flat)
    ]
    assert relative_error(*found) < 1e-10


def test_transforms_of_torch_func_around_convolutions() -> None:
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4 * 36, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            def of_half(half: Tensor) -> Tensor:
                return torch.tanh(self.convolution(half))

            halves = torch.func.vmap(of_half)(x.reshape(WAYS, 1, *x.shape[1:]))
            return self.head(halves.flatten(1))

    class Plainly(Each):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.convolution(x)).flatten(1))

    found = [MAML(seeded(kind), RATE, STEPS).meta_gradient(images()) for kind in (Each, Plainly)]
    assert relative_error({name: found[0][name] for name in found[1]}, found[1]) < 1e-10


def test_gradients_with_respect_to_own_weights_in_the_forward_pass() -> None:
    class Energy(Plain):
        def forward(self, x: Tensor) -> Any:
            with torch.enable_grad():
                energy = torch.tanh(self.body(x)).square().sum()
                (slope,) = torch.autograd.grad(energy, self.body.weight, create_graph=True)
            return self.head(torch.tanh(self.body(x))) * slope.mean()

    network = seeded(Energy)
    assert (
        relative_error(MAML(network, RATE, STEPS).meta_gradient(points()), unrolled(network))
        < 1e-10
    )


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


@pytest.mark.parametrize(
    ("made", "got"), [(lambda loss: loss.item(), "float"), (lambda loss: (loss, {}), "tuple")]
)
def test_a_loss_that_returns_no_tensor_is_refused(made: Any, got: str) -> None:
    model = MAML(
        seeded(Plain), RATE, STEPS, loss=lambda outputs, y: made(F.cross_entropy(outputs, y))
    )
    with pytest.raises(TypeError, match=f"loss of a task to be a scalar tensor but got {got}"):
        model.meta_loss(points())


def test_parameters_that_were_computed_are_refused() -> None:
    network = copy.deepcopy(torch.jit.script(nn.Linear(8, WAYS)))
    if all(p.is_leaf for p in network.parameters()):
        pytest.skip("this torch copies modules of TorchScript as they are")
    with pytest.raises(ValueError, match="parameters are leaves"):
        MAML(network, RATE)


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


class Checkpointed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Switched(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.mode = "plain"

    def forward(self, x: Tensor) -> Tensor:
        hidden = (
            self.body(x) if self.mode == "plain" else checkpoint(self.body, x, use_reentrant=False)
        )
        return self.head(torch.tanh(hidden))


@pytest.mark.parametrize("tasks", ["auto", "loop", "threads", "vmap"])
@pytest.mark.parametrize("change", ["layer", "word"])
def test_checkpoints_that_come_between_steps_are_refused(change: str, tasks: str) -> None:
    network = seeded(Switched)
    model = MAML(network, RATE, STEPS, tasks=tasks)
    model.meta_loss(points())
    if change == "layer":
        network.body = Checkpointed(8, 6).double()
    else:
        network.mode = "checkpointed"
    with pytest.raises(ValueError, match=r"torch\.utils\.checkpoint"):
        model.meta_loss(points())


@pytest.mark.parametrize("model", [MAML, FOMAML])
@pytest.mark.parametrize("without", ["weight", "bias"])
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_batch_norm_without_one_of_its_parameters(
    tasks: str, without: str, model: type[MAML]
) -> None:
    """Torch has no second derivative without a weight, so a weight of ones that does not adapt is
    the oracle."""

    def made(*, missing: bool) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WAYS)
        ).double()
        nn.init.normal_(network[1].bias if without == "weight" else network[1].weight)
        constant = torch.ones(6) if without == "weight" else torch.zeros(6)
        setattr(
            network[1],
            without,
            None if missing else nn.Parameter(constant.double(), requires_grad=False),
        )
        return network

    for policy in ("batch", "support"):
        found, expected = (
            model(made(missing=missing), RATE, STEPS, batch_norm=policy, tasks=tasks)
            for missing in (True, False)
        )
        gradients = found.meta_gradient(points()), expected.meta_gradient(points())
        assert relative_error(*gradients) < 1e-10
        torch.testing.assert_close(found.evaluate(points()).loss, expected.evaluate(points()).loss)


class MultiplyingOthers(Plain):
    """Multiplies the features of every other example, for which torch has no second derivative
    where several are zero."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).relu()
        group = (torch.arange(len(x)) % 2)[:, None].expand(-1, hidden.shape[1])
        products = torch.ones(2, hidden.shape[1], dtype=x.dtype).scatter_reduce(
            0, group, hidden, "prod"
        )
        return self.head(hidden + products[group[:, 0]])


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_operations_without_a_second_derivative_are_named_and_need_none_in_first_order(
    tasks: str,
) -> None:
    with pytest.raises(ValueError, match="train with FOMAML or HFMAML, which need none"):
        MAML(seeded(MultiplyingOthers), RATE, STEPS, tasks=tasks).meta_loss(points())
    of_loop = FOMAML(seeded(MultiplyingOthers), RATE, STEPS, tasks="loop").meta_gradient(points())
    assert (
        relative_error(
            FOMAML(seeded(MultiplyingOthers), RATE, STEPS, tasks=tasks).meta_gradient(points()),
            of_loop,
        )
        < 1e-10
    )


def fewer_queries() -> Episodes:
    return points()._replace(query_x=points().query_x[:, :7], query_y=points().query_y[:, :7])


class Distribution(Plain):
    def forward(self, x: Tensor) -> Any:
        return torch.distributions.Categorical(logits=super().forward(x))


def test_outputs_that_belong_to_their_examples_may_be_of_two_sizes() -> None:
    def likelihood(outputs: Any, y: Tensor) -> Tensor:
        return -outputs.log_prob(y).mean()

    model, plain = (
        MAML(seeded(Distribution), RATE, STEPS, loss=likelihood),
        MAML(seeded(Plain), RATE, STEPS),
    )
    assert (
        relative_error(model.meta_gradient(fewer_queries()), plain.meta_gradient(fewer_queries()))
        < 1e-10
    )


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_losses_of_each_example_are_refused(tasks: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"Expected the loss of a task to be a scalar but got shape \[10\]; use "
        "reduction='mean'",
    ):
        MAML(
            seeded(Plain), RATE, STEPS, loss=nn.CrossEntropyLoss(reduction="none"), tasks=tasks
        ).meta_loss(fewer_queries())


def test_a_network_that_differentiates_where_gradients_are_off_is_told_how() -> None:
    class Force(Plain):
        def forward(self, x: Tensor) -> Tensor:
            z = x.detach().requires_grad_()
            energy = torch.tanh(self.body(z)).square().sum()
            return self.head(torch.autograd.grad(energy, z, create_graph=True)[0][:, :6])

    class ForceAnywhere(Force):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x)

    with pytest.raises(
        ValueError, match=r"put `with torch.enable_grad\(\):` around what they differentiate"
    ):
        MAML(seeded(Force), RATE, STEPS).meta_loss(points())
    model = MAML(seeded(ForceAnywhere), RATE, STEPS)
    assert relative_error(model.meta_gradient(points()), unrolled(seeded(Force))) < 1e-10
    assert model.evaluate(points()).loss.isfinite().all()


def test_what_cannot_be_copied_is_named() -> None:
    network = seeded(Plain)
    network.body.lock = threading.Lock()
    with pytest.raises(
        TypeError, match=r"Expected a network, .* be copied .* but \['body.lock'\] of Plain cannot"
    ):
        MAML(network, RATE, STEPS).meta_loss(points())


def test_inputs_that_were_computed_from_parameters_are_refused() -> None:
    encoder = nn.Linear(8, 8).double()
    episodes = points()._replace(support_x=encoder(points().support_x))
    with pytest.raises(
        ValueError, match=r"Expected episodes that need no gradient but \['support_x'\] do"
    ):
        MAML(seeded(Plain), RATE, STEPS).meta_loss(episodes)
    ProtoNet(nn.Linear(8, 6).double()).meta_loss(episodes).backward()
    assert encoder.weight.grad is not None


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_trainable_tensors_that_are_no_parameters_are_refused(where: str) -> None:
    network = seeded(Plain)
    scale = torch.ones((), requires_grad=True)
    if where == "buffer":
        network.head.register_buffer("scale", scale)
    else:
        network.head.scale = scale
    with pytest.raises(ValueError, match=r"to be parameters but \['head.scale'\] are none"):
        MAML(network, RATE, STEPS)


@pytest.mark.parametrize("policy", ["batch", "support", "running"])
def test_batch_norm_of_torchscript_is_refused(policy: Any) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.script(
            nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, WAYS)).double()
        )
    with pytest.raises(
        ValueError, match=r"\['1'\] are TorchScript's; script the network after training"
    ):
        MAML(scripted, RATE, STEPS, batch_norm=policy)
    if policy == "running":
        network = nn.Sequential(scripted.eval(), nn.Linear(WAYS, WAYS).double())
        model = MAML(network.requires_grad_(True), RATE, STEPS, batch_norm=policy, tasks="loop")
        assert relative_error(model.meta_gradient(points()), unrolled(network)) < 1e-10


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


def test_words_that_change_in_every_step_are_forgotten() -> None:
    network = seeded(Plain)
    model = MAML(network, RATE, STEPS, tasks="loop", chunk_size=2)
    for step in range(70):
        network.phase = f"step {step}"
        model.meta_loss(points())
    assert len(model._findings) < 4 * 70


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
