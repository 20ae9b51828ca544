"""What the looks at a network find on its first batch, and between steps."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from helpers.networks import build, make_episodes, relative_error
from helpers.points import (
    RATE,
    STEPS,
    WAYS,
    Plain,
    images,
    points,
    seeded,
    unrolled,
)
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import QUIET, on_device
from lightning_maml import FOMAML, MAML, Episodes, ProtoNet
from lightning_maml.batches.trees import map_tensors


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


def test_learned_rates_need_a_step() -> None:
    with pytest.raises(
        ValueError, match="`train_steps` to be at least 1 to train learned inner rates"
    ):
        MAML(seeded(Plain), RATE, 0, inner_rates="per_layer").meta_loss(points())


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


def test_parameters_that_were_computed_are_refused() -> None:
    network = copy.deepcopy(torch.jit.script(nn.Linear(8, WAYS)))
    if all(p.is_leaf for p in network.parameters()):
        pytest.skip("this torch copies modules of TorchScript as they are")
    with pytest.raises(ValueError, match="parameters are leaves"):
        MAML(network, RATE)


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


def test_inputs_that_were_computed_from_parameters_are_refused() -> None:
    encoder = nn.Linear(8, 8).double()
    episodes = points()._replace(support_x=encoder(points().support_x))
    with pytest.raises(
        ValueError, match=r"Expected episodes that need no gradient but \['support_x'\] do"
    ):
        MAML(seeded(Plain), RATE, STEPS).meta_loss(episodes)
    ProtoNet(nn.Linear(8, 6).double()).meta_loss(episodes).backward()
    assert encoder.weight.grad is not None


def test_words_that_change_in_every_step_are_forgotten() -> None:
    network = seeded(Plain)
    model = MAML(network, RATE, STEPS, tasks="loop", chunk_size=2)
    for step in range(70):
        network.phase = f"step {step}"
        model.meta_loss(points())
    assert len(model._findings) < 4 * 70


class InAList(nn.Module):
    """Keeps a layer, or a tensor, where torch does not look for it."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        self.head = nn.Linear(64, WAYS)
        self.hidden = [nn.Linear(64, 64) if hides == "layer" else torch.ones(64).requires_grad_()]
        if hides == "frozen":
            self.hidden = [nn.Linear(64, 64).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        x, [hidden] = x.flatten(1).to(self.head.weight.dtype), self.hidden
        return self.head(x * hidden if isinstance(hidden, Tensor) else hidden(x))


@pytest.mark.parametrize("model", [MAML, ProtoNet])
@pytest.mark.parametrize("hides", ["layer", "tensor", "frozen"])
def test_layers_that_modules_do_not_know_are_refused(hides: str, model: Any) -> None:
    episodes = map_tensors(lambda x: x.float() if x.is_floating_point() else x, make_episodes())
    network = InAList(hides)
    network.hidden = [
        each.to(network.head.weight.device) if isinstance(each, nn.Module) else each
        for each in network.hidden
    ]
    refusal = pytest.raises(ValueError, match="to be parameters of its modules but its outputs")
    with nullcontext() if hides == "frozen" else refusal:
        model(network).meta_loss(episodes)


class OfAnEnergy(nn.Sequential):
    """Outputs that are derivatives by an input, or by a copy of it that each pass makes."""

    def __init__(self, *layers: nn.Module, copies: bool) -> None:
        super().__init__(*layers)
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.flatten(1).detach() if self.copies else x
            x.requires_grad_()
            energy = super().forward(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return (force + x).flatten(1)[:, :WAYS]


@pytest.mark.parametrize("copies", [False, True])
def test_a_leaf_that_a_pass_makes_is_no_hidden_layer(copies: bool) -> None:
    layers = nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1)
    MAML(OfAnEnergy(*layers, copies=copies).double(), 0.1).meta_loss(make_episodes())


def test_networks_on_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got DataParallel, .* give its `.module`, and the tr"):
        MAML(nn.DataParallel(build("mlp")))


class Contiguous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(), "as its kernel needs"
        return x.relu()


@pytest.mark.cpu_only
def test_a_layer_may_assert_the_memory_format() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), Contiguous(), nn.Flatten(), nn.Linear(108, WAYS)
    ).double()
    plain = nn.Sequential(network[0], nn.ReLU(), *network[2:])
    found, expected = (MAML(each, 0.1).meta_gradient(make_episodes()) for each in (network, plain))
    assert relative_error(found, expected) < 1e-12
