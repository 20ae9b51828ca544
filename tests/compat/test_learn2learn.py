"""learn2learn's classes against autograd through the unrolled loop, and against learn2learn."""

import copy
from argparse import ArgumentParser
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.networks import IMAGE, WAYS, flat, relative_error
from helpers.pipelines import NoiseTaskset
from lightning_maml.compat.learn2learn import EpisodicBatcher, LightningANIL, LightningMAML

SHOTS, QUERIES, STEPS, RATE = 2, 3, 3, 0.3
SIZES = {
    "train_ways": WAYS,
    "train_shots": SHOTS,
    "train_queries": QUERIES,
    "test_ways": WAYS,
    "test_shots": SHOTS,
    "test_queries": QUERIES,
}


def features() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
    )


def classifier() -> nn.Module:
    return nn.Linear(4 * (IMAGE // 2) ** 2, WAYS)


def whole() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(features=features(), classifier=classifier())).double()


def split(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    parts = [tensor.unflatten(0, (WAYS, SHOTS + QUERIES)) for tensor in (x, y)]
    yield from (part[:, :SHOTS].flatten(0, 1) for part in parts)
    yield from (part[:, SHOTS:].flatten(0, 1) for part in parts)


def unrolled_maml(network: nn.Module, task: tuple[Tensor, Tensor]) -> Tensor:
    support_x, support_y, query_x, query_y = split(*task)
    w = dict(network.named_parameters())
    for _ in range(STEPS):
        loss = F.cross_entropy(torch.func.functional_call(network, w, (support_x,)), support_y)
        gradient = torch.autograd.grad(loss, list(w.values()), create_graph=True)
        w = {name: p - RATE * g for (name, p), g in zip(w.items(), gradient, strict=True)}
    return F.cross_entropy(torch.func.functional_call(network, w, (query_x,)), query_y)


def unrolled_anil(network: nn.Sequential, task: tuple[Tensor, Tensor]) -> Tensor:
    support_z, support_y, query_z, query_y = split(network.features(task[0]), task[1])
    weight, bias = network.classifier.parameters()
    for _ in range(STEPS):
        gradient = torch.autograd.grad(
            F.cross_entropy(F.linear(support_z, weight, bias), support_y),
            [weight, bias],
            create_graph=True,
        )
        weight, bias = weight - RATE * gradient[0], bias - RATE * gradient[1]
    return F.cross_entropy(F.linear(query_z, weight, bias), query_y)


def build(name: str, network: nn.Sequential, **arguments) -> LightningMAML | LightningANIL:
    arguments = {"adaptation_steps": STEPS, "adaptation_lr": RATE, **SIZES, **arguments}
    return (
        LightningMAML(network, **arguments)
        if name == "maml"
        else LightningANIL(network.features, network.classifier, **arguments)
    )


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_the_meta_gradient_is_that_of_the_unrolled_loop(name: str) -> None:
    network, reference, task = whole(), whole(), NoiseTaskset().sample()
    value = {"maml": unrolled_maml, "anil": unrolled_anil}[name](reference, task)
    value.backward()
    loss, accuracy = build(name, network).meta_learn(task, 0, WAYS, SHOTS, QUERIES)
    loss.backward()
    torch.testing.assert_close(loss, value)
    assert 0 <= accuracy <= 1
    gradients = [
        {key: p.grad for key, p in module.named_parameters()} for module in (network, reference)
    ]
    assert relative_error(*gradients) < 1e-12


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_loss_accuracy_and_gradients_are_learn2learns(name: str) -> None:
    pytest.importorskip(
        "learn2learn", reason="learn2learn is not installed; `make learn2learn` builds it"
    )
    from learn2learn.algorithms import LightningANIL as TheirANIL
    from learn2learn.algorithms import LightningMAML as TheirMAML

    network, reference, task = whole(), whole(), NoiseTaskset().sample()
    arguments = {"adaptation_steps": STEPS, "adaptation_lr": RATE, **SIZES}
    theirs = (
        TheirMAML(reference, **arguments)
        if name == "maml"
        else TheirANIL(reference.features, reference.classifier, **arguments)
    )
    ours = build(name, network)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    values = [module.meta_learn(task, 0, WAYS, SHOTS, QUERIES) for module in (ours, theirs)]
    for loss, _ in values:
        loss.backward()
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-10, atol=0)
    assert float(values[0][1]) == pytest.approx(float(values[1][1]))
    gradients = [{key: p.grad for key, p in module.named_parameters()} for module in (ours, theirs)]
    assert relative_error(*gradients) < 1e-10


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_evaluation_gives_the_adapted_loss_and_changes_no_state(name: str) -> None:
    network, reference, task = whole(), whole(), NoiseTaskset().sample()
    model = build(name, network).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = {"maml": unrolled_maml, "anil": unrolled_anil}[name](reference, task)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, _ = model.meta_learn(task, 0, WAYS, SHOTS, QUERIES)
        torch.testing.assert_close(loss, expected.detach())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_learn2learns_own_script_runs_with_other_imports(name: str, tmp_path: Path) -> None:
    parser = LightningMAML.add_model_specific_args(ArgumentParser())
    parser = LightningANIL.add_model_specific_args(parser)
    parser.add_argument("--meta_batch_size", type=int, default=4)
    options = " ".join(f"--{key} {value}" for key, value in SIZES.items())
    arguments = parser.parse_args(
        f"{options} --adaptation_steps 2 --adaptation_lr 0.2 --lr 0.01".split()
    )
    tasks = [NoiseTaskset(seed, torch.float32) for seed in range(3)]
    episodic_data = EpisodicBatcher(*tasks, epoch_length=arguments.meta_batch_size)
    network = whole().float()
    model = build(name, network, **vars(arguments))
    trainer = Trainer(
        accelerator="cpu",
        accumulate_grad_batches=arguments.meta_batch_size,
        max_epochs=3,
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[ModelCheckpoint(tmp_path, monitor="valid_accuracy", mode="max")],
    )
    before = flat(dict(network.named_parameters()))
    trainer.fit(model=model, datamodule=episodic_data)
    assert trainer.global_step == 3
    assert not torch.equal(before, flat(dict(network.named_parameters())))
    assert {
        "train_accuracy",
        "train_loss",
        "valid_loss",
        "valid_accuracy",
    } <= trainer.callback_metrics.keys()
    (tested,) = trainer.test(ckpt_path="best", datamodule=episodic_data)
    assert {"test_loss", "test_accuracy"} == tested.keys()
    assert model.hparams["adaptation_steps"] == 2


def test_frozen_features_use_batch_statistics_in_any_mode() -> None:
    network, reference, task = whole(), whole(), NoiseTaskset().sample()
    network.features.eval().requires_grad_(False)
    loss, _ = build("anil", network).meta_learn(task, 0, WAYS, SHOTS, QUERIES)
    loss.backward()
    torch.testing.assert_close(loss, unrolled_anil(reference, task))
    assert network.classifier.weight.grad.norm() > 0


def test_arguments_are_attributes() -> None:
    model = build("maml", whole())
    assert (model.adaptation_lr, model.adaptation_steps, model.train_ways, model.lr) == (
        RATE,
        STEPS,
        WAYS,
        0.001,
    )
    assert (LightningMAML.adaptation_lr, LightningMAML.train_ways) == (0.1, 5)


def test_attributes_may_be_set_later() -> None:
    longer, changed = (
        build("maml", whole(), adaptation_steps=7, adaptation_lr=0.01, lr=0.5),
        build("maml", whole()),
    )
    changed.adaptation_steps, changed.adaptation_lr, changed.lr = 7, 0.01, 0.5
    task = NoiseTaskset().sample()
    losses = [
        model.meta_learn(task, 0, WAYS, SHOTS, QUERIES)[0]
        for model in (longer, changed, build("maml", whole()))
    ]
    assert losses[0] == losses[1] != losses[2]
    (optimizer,), _ = changed.configure_optimizers()
    assert optimizer.defaults["lr"] == 0.5


def test_a_taskset_that_runs_dry_is_reported(tmp_path: Path) -> None:
    class Dry(NoiseTaskset):
        left = 3

        def sample(self) -> tuple[Tensor, Tensor]:
            if self.left == 0:
                raise StopIteration
            self.left -= 1
            return super().sample()

    run = Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(
        ValueError, match="Expected 4 tasks of the taskset but it gave no more at number 3"
    ):
        run.fit(
            build("maml", whole()),
            train_dataloaders=EpisodicBatcher(Dry(), epoch_length=4).train_dataloader(),
        )


def test_mismatched_sizes_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"Expected `train_ways` and `test_ways` to be the same, .* but got 5 and 3",
    ):
        LightningMAML(whole(), train_ways=5, test_ways=3)
    with pytest.raises(
        ValueError,
        match="Expected a task of 3 ways with 2 shots and 1 queries, 9 examples, but got 15",
    ):
        build("maml", whole()).meta_learn(NoiseTaskset().sample(), 0, WAYS, SHOTS, 1)


class Checkpointed(nn.Module):
    """A network that runs a layer again in the backward pass, with the parameters of then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda z: torch.tanh(self.first(z)), x, use_reentrant=False)
        return self.last(hidden)


def test_networks_and_orders_that_would_give_other_numbers_are_refused() -> None:
    x, y = torch.rand(12, 4), torch.arange(3).repeat_interleave(4)
    sizes = {"ways": 3, "shots": 1, "queries": 3}
    model = LightningMAML(Checkpointed(), train_ways=3, test_ways=3)
    with pytest.raises(ValueError, match="whose adapting layers run once but got one with check"):
        model.meta_learn((x, y), 0, **sizes)
    other_order = (x, torch.tensor([0, 1, 2, 0] * 3))
    for model in (
        LightningMAML(nn.Linear(4, 3), train_ways=3, test_ways=3),
        LightningANIL(nn.Linear(4, 5), nn.Linear(5, 3), train_ways=3, test_ways=3),
    ):
        with pytest.raises(ValueError, match=r"class by class .* labels \[0, 0, 0\] and the query"):
            model.meta_learn(other_order, 0, **sizes)
        # each class is in both sets, but not with as many examples
        uneven = (x, torch.tensor([0, 1, 2, 0, 1, 2, 0, 2, 1, 0, 2, 1]))
        with pytest.raises(ValueError, match=r"class by class .* labels \[0, 0, 1, 1, 1, 2\] and"):
            model.meta_learn(uneven, 0, ways=3, shots=2, queries=2)


class CheckpointedInTraining(Checkpointed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.training else self.last(torch.tanh(self.first(x)))


def test_networks_are_checked_in_each_mode_and_regressions_have_no_classes() -> None:
    task = torch.rand(12, 4), torch.arange(3).repeat_interleave(4)
    model = LightningMAML(CheckpointedInTraining(), train_ways=3, test_ways=3)
    model.eval().meta_learn(task, 0, ways=3, shots=1, queries=3)
    with pytest.raises(ValueError, match="whose adapting layers run once but got one with check"):
        model.train().meta_learn(task, 0, ways=3, shots=1, queries=3)
    model = LightningMAML(nn.Linear(4, 1), F.mse_loss, train_ways=1, test_ways=1)
    loss, _ = model.meta_learn((task[0], 9 * torch.randn(12, 1)), 0, ways=1, shots=4, queries=8)
    assert loss.isfinite()


def test_labels_without_an_output_are_refused() -> None:
    task = torch.rand(12, 4), torch.arange(4).repeat_interleave(3)
    model = LightningMAML(nn.Linear(4, 3), train_ways=4, test_ways=4)
    with pytest.raises(ValueError, match=r"Expected labels from 0 to 2, .* got 0 to 3"):
        model.meta_learn(task, 0, ways=4, shots=1, queries=2)


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * outputs, y)


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_the_parameters_of_a_loss_are_trained(name: str) -> None:
    torch.manual_seed(0)
    task, loss = NoiseTaskset().sample(), Scaled()
    model = build(name, whole(), loss=loss)
    meta_learn = partial(model.meta_learn, task, 0, WAYS, SHOTS, QUERIES)
    meta_learn()[0].backward()
    with torch.no_grad():
        loss.scale += 1e-6
        above = float(meta_learn()[0])
        loss.scale -= 2e-6
        below = float(meta_learn()[0])
    assert float(loss.scale.grad) == pytest.approx((above - below) / 2e-6, rel=1e-5)


def test_a_copy_knows_what_a_pass_changes() -> None:
    class Caching(nn.Linear):
        """A network that keeps its weight of the first pass in evaluation mode."""

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept.append(self.weight)
            return F.linear(x, self.weight if self.training else self.kept[0], self.bias)

    torch.manual_seed(0)
    task = torch.rand(6, 4), torch.arange(3).repeat_interleave(2)
    model = LightningMAML(Caching(), train_ways=3, test_ways=3, adaptation_lr=1.0).eval()
    right = model.meta_learn(task, 0, 3, 1, 1)[0]
    assert torch.equal(copy.deepcopy(model).meta_learn(task, 0, 3, 1, 1)[0], right)


class Keeping(nn.Linear):
    """A network that leaves its outputs in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.outputs = super().forward(x)
        return self.outputs


@pytest.mark.parametrize("name", ["maml", "anil"])
def test_losses_that_know_the_network_are_refused(name: str) -> None:
    known, last = Keeping(4, 8), nn.Linear(8, 3)
    task = torch.rand(6, 4), torch.arange(3).repeat_interleave(2)

    def of_outputs(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + known.outputs.square().mean()

    def of_weight(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + known.weight.square().mean()

    for loss, message in (of_outputs, "reads an attribute"), (of_weight, "reads the network's par"):
        if name == "maml":
            model = LightningMAML(nn.Sequential(known, last), loss, train_ways=3, test_ways=3)
        else:
            model = LightningANIL(known, last, loss, train_ways=3, test_ways=3)
        with pytest.raises(ValueError, match=message):
            model.meta_learn(task, 0, 3, 1, 1)


def test_a_loss_that_cannot_be_copied_is_named() -> None:
    loss = Scaled().float()
    loss.lock = Lock()
    model = LightningMAML(nn.Linear(4, 3), loss, train_ways=3, test_ways=3)
    task = torch.rand(6, 4), torch.arange(3).repeat_interleave(2)
    with pytest.raises(TypeError, match=r"\['lock'\] of Scaled cannot be"):
        model.meta_learn(task, 0, 3, 1, 1)


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_several_processes_are_refused_in_every_stage(stage: str) -> None:
    data = EpisodicBatcher(NoiseTaskset())
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="Expected one process but got 2"):
        getattr(data, f"{stage}_dataloader")()
