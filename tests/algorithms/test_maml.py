"""The Lightning modules under real trainers."""

import math
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from helpers import another_process
from helpers.networks import (
    IMAGE,
    WAYS,
    build,
    conv_batch_norm,
    flat,
    make_episodes,
    relative_error,
)
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import trainer
from lightning_maml import (
    ANIL,
    FOMAML,
    HFMAML,
    MAML,
    MLP,
    AdaptiveMetaStepsize,
    Conv4,
    Episodes,
    InnerAdam,
    InnerSGD,
    ProtoNet,
    meta_gradient,
)
from lightning_maml.callbacks import EpisodePictures
from lightning_maml.core import meta_gradient as core_meta_gradient
from lightning_maml.core.params import Params
from lightning_maml.datamodules import CIFARFSDataModule, GlyphsDataModule, OmniglotDataModule
from lightning_maml.functional import meta_gradient as functional_meta_gradient
from lightning_maml.networks.functional_network import FunctionalNetwork

ALGORITHMS = [MAML, FOMAML, HFMAML]


def single(episodes: Episodes) -> Episodes:
    return episodes._replace(support_x=episodes.support_x.float(), query_x=episodes.query_x.float())


def loader(count: int = 2, tasks: int = 3, first_seed: int = 0) -> DataLoader[Episodes]:
    return DataLoader(
        [single(make_episodes(tasks, seed=first_seed + k)) for k in range(count)], batch_size=None
    )


def parameters(module: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def sgd(**arguments) -> partial:
    return partial(torch.optim.SGD, **({"lr": 1.0} | arguments))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("batch_norm", ["batch", "support"])
def test_one_sgd_step_is_the_meta_gradient(
    tmp_path: Path, algorithm: type[MAML], batch_norm: str
) -> None:
    network = build("conv_batch_norm")
    before = parameters(network)
    functional = FunctionalNetwork(build("conv_batch_norm"), batch_norm)
    episodes = make_episodes()

    def query_loss(w: Params, task: Episodes) -> Tensor:
        statistics_of = task.support_x if batch_norm == "support" else None
        return F.cross_entropy(
            functional(w, task.query_x, statistics_of=statistics_of), task.query_y
        )

    expected = meta_gradient(
        lambda w, x, y: F.cross_entropy(functional(w, x), y),
        functional.params,
        episodes,
        inner_lr=0.3,
        steps=2,
        curvature=algorithm.curvature,
        query_loss=query_loss,
    ).grad
    # as above
    module = algorithm(
        network, inner_lr=0.3, train_steps=2, optimizer=sgd(), batch_norm=batch_norm, tasks="loop"
    )
    trainer(tmp_path, precision="64-true").fit(module, DataLoader([episodes], batch_size=None))
    moved = {name: before[name] - p for name, p in parameters(network).items()}
    assert relative_error(moved, expected) < 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fit_validate_test_and_predict(tmp_path: Path, algorithm: type[MAML]) -> None:
    module = algorithm(conv_batch_norm(), inner_lr=0.1, train_steps=2, test_steps=3)
    run = trainer(tmp_path, log_every_n_steps=1)
    run.fit(module, loader(), loader())
    names = {"loss", "accuracy", "loss_before", "accuracy_before"}
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= set(
        run.callback_metrics
    )
    run.validate(module, loader(), verbose=False)
    validated = dict(run.callback_metrics)
    run.test(module, loader(), verbose=False)
    for name in names:
        torch.testing.assert_close(validated[f"val/{name}"], run.callback_metrics[f"test/{name}"])
    assert run.callback_metrics["test/loss_before"] != run.callback_metrics["test/loss"]
    assert (
        run.callback_metrics["test/accuracy_before"]
        == run.callback_metrics["test/accuracy_step_00"]
    )
    assert {"test/accuracy_ci95", *(f"test/accuracy_step_{k:02}" for k in range(4))} <= set(
        run.callback_metrics
    )
    predictions = run.predict(module, loader())
    assert [prediction.shape for prediction in predictions] == [(3, 9, WAYS)] * 2


def test_the_logged_and_returned_losses_are_the_query_loss(tmp_path: Path) -> None:
    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen.append((outputs["loss"].item(), trainer.callback_metrics["train/loss"].item()))

    seen: list[tuple[float, float]] = []
    network = build("mlp").float()
    functional = FunctionalNetwork(build("mlp").float())
    episodes = single(make_episodes())
    expected = meta_gradient(
        lambda w, x, y: F.cross_entropy(functional(w, x), y),
        functional.params,
        episodes,
        inner_lr=0.1,
        steps=1,
    ).query_loss.mean()
    trainer(tmp_path, callbacks=[Watch()]).fit(
        MAML(network, inner_lr=0.1), DataLoader([episodes], batch_size=None)
    )
    assert seen == [(pytest.approx(expected.item()), pytest.approx(expected.item()))]


def test_the_test_reports_mean_and_confidence_interval_over_all_tasks(tmp_path: Path) -> None:
    module = MAML(build("mlp").float(), inner_lr=0.5, train_steps=1, test_steps=4)
    batches = [single(make_episodes(tasks, seed=tasks)) for tasks in (5, 2, 4)]
    per_task = []
    for batch in batches:
        for t in range(len(batch.support_x)):
            w = {
                name: p.detach().clone().requires_grad_()
                for name, p in module.network.named_parameters()
            }
            accuracies = []
            for _ in range(5):
                logits = torch.func.functional_call(module.network, w, (batch.query_x[t],))
                accuracies.append(float((logits.argmax(-1) == batch.query_y[t]).float().mean()))
                loss = F.cross_entropy(
                    torch.func.functional_call(module.network, w, (batch.support_x[t],)),
                    batch.support_y[t],
                )
                gradient = torch.autograd.grad(loss, list(w.values()))
                w = {
                    name: (p - 0.5 * g).detach().requires_grad_()
                    for (name, p), g in zip(w.items(), gradient, strict=True)
                }
            per_task.append(accuracies)
    expected = torch.tensor(per_task)
    run = trainer(tmp_path)
    run.test(module, DataLoader(batches, batch_size=None), verbose=False)
    metrics = run.callback_metrics
    for step in range(5):
        assert metrics[f"test/accuracy_step_{step:02}"].item() == pytest.approx(
            expected[:, step].mean().item(), abs=1e-6
        )
    assert metrics["test/accuracy"].item() == pytest.approx(expected[:, -1].mean().item(), abs=1e-6)
    assert metrics["test/accuracy_ci95"].item() == pytest.approx(
        1.96 * expected[:, -1].std().item() / math.sqrt(11), abs=1e-6
    )
    assert module.adaptation.tasks == 11


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
def test_every_execution_evaluates_alike(tasks: str) -> None:
    episodes = make_episodes(tasks=4)
    arguments = {"inner_lr": 0.2, "test_steps": 3}
    expected = MAML(build("conv_batch_norm"), **arguments, tasks="loop").evaluate(episodes)
    with torch.inference_mode():
        actual = MAML(
            build("conv_batch_norm"),
            **arguments,
            tasks=tasks,
            chunk_size=3 if tasks == "vmap" else None,
        ).evaluate(episodes)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "tasks",
    ["vmap", *(pytest.param(tasks, marks=pytest.mark.slow) for tasks in ("loop", "threads"))],
)
def test_regression_by_mean_squared_error_learns_a_sinusoid(
    tmp_path: Path, algorithm: type[MAML], tasks: str
) -> None:
    random = torch.Generator().manual_seed(0)

    def sinusoids() -> Episodes:
        amplitude, phase = (
            drawn_on_cpu(torch.rand, 2, 25, 1, 1, generator=random)
            * torch.tensor([4.9, math.pi])[:, None, None, None]
        )
        x = drawn_on_cpu(torch.rand, 2, 25, 10, 1, generator=random) * 10 - 5
        y = (amplitude + 0.1) * torch.sin(x - phase)
        return Episodes(x[0], y[0], x[1], y[1])

    torch.manual_seed(0)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    module = algorithm(
        MLP(1, 1, activation="tanh"),
        inner_lr=0.02,
        loss=F.mse_loss,
        optimizer=optimizer,
        tasks=tasks,
    )
    batches = [sinusoids() for _ in range(150)]
    run = trainer(tmp_path)
    run.test(module, DataLoader(batches[:5], batch_size=None), verbose=False)
    before = run.callback_metrics["test/loss"]
    run.fit(module, DataLoader(batches[5:], batch_size=None))
    run.test(module, DataLoader(batches[:5], batch_size=None), verbose=False)
    assert run.callback_metrics["test/loss"] < 0.8 * before
    assert not any("accuracy" in name for name in run.callback_metrics)


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_regression_by_the_cross_entropy_of_one_output_is_refused(loss) -> None:
    episodes = Episodes(
        torch.rand(2, 5, 3), torch.rand(2, 5, 1), torch.rand(2, 5, 3), torch.rand(2, 5, 1)
    )
    with pytest.raises(
        ValueError, match=r"integer labels for the cross-entropy .* give the model `loss=torch"
    ):
        MAML(MLP(3, 1), loss=loss).meta_loss(episodes)
    with pytest.raises(ValueError, match="but got floats, one per example; if these are classes"):
        MAML(MLP(3, 1), loss=loss).meta_loss(
            episodes._replace(
                support_y=episodes.support_y[..., 0], query_y=episodes.query_y[..., 0]
            )
        )


@pytest.mark.parametrize("loss", [F.mse_loss, nn.L1Loss()])
def test_targets_that_would_be_broadcast_are_refused(loss) -> None:
    episodes = Episodes(
        torch.rand(2, 5, 3), torch.rand(2, 5), torch.rand(2, 4, 3), torch.rand(2, 4)
    )
    model = MAML(MLP(3, 1), loss=loss)
    fitting = episodes._replace(
        support_y=episodes.support_y[..., None], query_y=episodes.query_y[..., None]
    )
    model.meta_loss(fitting).backward()
    for wrong, size in (
        (episodes, 5),
        (fitting._replace(query_y=episodes.query_y), 4),
        (fitting._replace(support_y=episodes.support_y), 5),
    ):
        with pytest.raises(
            ValueError,
            match=rf"shape of the network's outputs, \[examples, 1\], but got \[{size}\]; reshape them",
        ):
            model.meta_loss(wrong)
    MAML(
        MLP(3, 1),
        loss=lambda outputs, y: F.mse_loss(outputs, y) + F.mse_loss(outputs.mean(), y.mean()),
    ).meta_loss(fitting).backward()


@pytest.mark.parametrize(
    ("dtype", "cure"),
    [(torch.float64, r"x.to\(torch.float32\)\."), (torch.uint8, r"x.to\(torch.float32\) / 255")],
)
@pytest.mark.parametrize("name", ["mlp", "conv_batch_norm"])
@pytest.mark.parametrize("algorithm", [MAML, ProtoNet])
def test_inputs_of_another_type_than_the_networks_are_refused(
    algorithm: type[MAML], name: str, dtype: torch.dtype, cure: str
) -> None:
    model, episodes = algorithm(build(name).float()), single(make_episodes())
    other = episodes._replace(
        support_x=episodes.support_x.to(dtype), query_x=episodes.query_x.to(dtype)
    )
    for act in (model.meta_loss, model.evaluate, lambda episodes: model.adapt(*episodes[:2])):
        act(episodes)
        with pytest.raises(
            ValueError,
            match=f"Expected inputs of the network's type, torch.float32, but it fails on {dtype}; "
            f".*{cure}",
        ):
            act(other)
        with pytest.raises(
            ValueError, match="all inputs of `episodes` to be of one type but got torch"
        ):
            model.meta_loss(episodes._replace(query_x=other.query_x))


def test_other_faults_of_a_network_of_integers_are_its_own() -> None:
    words, labels = torch.randint(7, (2, 6, 3)), torch.arange(2).repeat(2, 3)
    network = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(11, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        MAML(network).meta_loss(Episodes(words, labels, words, labels))


def test_a_batch_that_is_not_episodes_is_refused(tmp_path: Path) -> None:
    images, labels = torch.rand(2, 6, 3), torch.arange(2).repeat(2, 3)
    batch = {"train": (images, labels), "test": (images, labels)}
    message = (
        r"Expected a batch of `lightning_maml.Episodes` but got dict; let the loader return "
        r"Episodes\(support_x, .*, or just these four"
    )
    with pytest.raises(TypeError, match=message):
        MAML(MLP(3, 2)).meta_loss(batch)
    with pytest.raises(TypeError, match=r"Expected a batch of .* but got a tuple of 2; let"):
        MAML(MLP(3, 2)).meta_loss((images, labels))
    batches = DataLoader([batch], batch_size=None)
    for name in ("fit", "validate", "test", "predict"):
        with pytest.raises(TypeError, match=message):
            getattr(trainer(tmp_path), name)(MAML(MLP(3, 2)), batches)


def test_a_non_finite_loss_stops_before_the_optimizer(tmp_path: Path) -> None:
    network = build("mlp").float()
    good, bad = single(make_episodes()), single(make_episodes())
    bad.query_x[1] = torch.nan
    module = MAML(network, inner_lr=0.25, train_steps=3, optimizer=sgd())
    stepped: list[Params] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            stepped.append(parameters(network))

    message = r"finite query loss but got \[nan\] in tasks \[1\] at step 1 \(inner_lr=0.25, train_steps=3\)"
    with pytest.raises(FloatingPointError, match=message):
        trainer(tmp_path, callbacks=[Watch()]).fit(module, DataLoader([good, bad], batch_size=None))
    assert len(stepped) == 1
    assert torch.equal(flat(stepped[0]), flat(parameters(network)))


def test_a_non_finite_meta_gradient_stops_before_the_optimizer(tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            # its slope at 0 is infinite, its value is not
            return x.flatten(1)[:, :WAYS] * self.scale.abs().sqrt()

    module = MAML(Root(), train_steps=0, test_steps=0)
    with pytest.raises(
        FloatingPointError, match=r"meta-gradient but it is not finite in \['scale'\] at step 0"
    ):
        trainer(tmp_path).fit(module, loader(1))
    assert module.network.scale == 0


@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_a_network_with_fewer_outputs_than_ways(tmp_path: Path, stage: str) -> None:
    with pytest.raises(
        ValueError, match="labels from 0 to 1, the outputs of `network`, but got 0 to 2"
    ):
        getattr(trainer(tmp_path), stage)(MAML(MLP(64, 2)), loader())


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_head(tmp_path: Path, label: int) -> None:
    episodes = single(make_episodes())
    episodes.query_y[0, 0] = label
    with pytest.raises(
        ValueError,
        match=f"labels from 0 to 2, the outputs of `network`, but got {min(label, 0)} to "
        f"{max(label, 2)}",
    ):
        trainer(tmp_path).fit(MAML(MLP(64, 3)), DataLoader([episodes], batch_size=None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner_lr": -1.0}, "`inner_lr`"),
        ({"train_steps": -1}, "`train_steps` to be at least 0 but got -1"),
        ({"test_steps": -2}, "`test_steps` to be at least 0 but got -2"),
        (
            {"batch_norm": "none"},
            "`batch_norm` to be 'batch', 'support', 'running' or 'per_step' but got 'none'",
        ),
        ({"chunk_size": 0}, "`chunk_size` to be at least 1 but got 0"),
        ({"tasks": "fast"}, "`tasks` to be 'auto', 'loop', 'threads' or 'vmap' but got 'fast'"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arguments_out_of_range_are_refused(
    algorithm: type[MAML], arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(MLP(64, 3, activation="gelu"), **arguments)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: MAML(MLP(4, 3), cuda_graphs="False"), "cuda_graphs"),
        (lambda: MAML(MLP(4, 3), compiled="no"), "compiled"),
        (lambda: MAML(MLP(4, 3), query_in_eval="false"), "query_in_eval"),
        (lambda: AdaptiveMetaStepsize(keep_largest="no"), "keep_largest"),
        (lambda: CIFARFSDataModule(download="False"), "download"),
        (lambda: OmniglotDataModule(download="no"), "download"),
        (lambda: InnerSGD(momentum=0.5, nesterov="no"), "nesterov"),
        (lambda: InnerAdam(decoupled_weight_decay="no"), "decoupled_weight_decay"),
    ],
)
def test_strings_in_place_of_true_and_false_are_refused(made, name: str) -> None:
    with pytest.raises(TypeError, match=f"Expected `{name}` to be True or False but got"):
        made()


@pytest.mark.parametrize("radius", [0.0, -1e-3])
def test_a_probe_radius_that_is_not_positive_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match="`probe_radius`"):
        HFMAML(MLP(64, 3, activation="gelu"), probe_radius=radius)


def test_hf_maml_warns_about_kinks_by_name_and_not_about_smooth_networks() -> None:
    with pytest.warns(UserWarning, match=r"features.0.2 \(MaxPool2d\), features.0.3 \(ReLU\)"):
        HFMAML(Conv4(1, 3, 16, downsample="max"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HFMAML(Conv4(1, 3, 16, activation="gelu", downsample="avg"))
        MAML(Conv4(1, 3, 16, downsample="max"))


@pytest.mark.parametrize(
    ("layer", "warns"),
    [(nn.SELU(), True), (nn.ELU(2.0), True), (nn.ELU(), False), (nn.CELU(2.0), False)],
)
def test_kinks_depend_on_an_elus_alpha(layer: nn.Module, warns: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HFMAML(nn.Sequential(nn.Linear(2, 2), layer))
    assert bool(caught) is warns


class Pooled(nn.Module):
    """Has its kinks in functions."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features, self.head, self.activation = nn.Conv2d(1, 4, 3), nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.features(x)).mean((2, 3)))


SMOOTH = {
    "gelu": F.gelu,
    "softplus": F.softplus,
    "silu": F.silu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "average": lambda x: F.avg_pool2d(x, 2),
    "normalize": F.normalize,
    "lengths": lambda x: x * torch.tensor([2, 3]).max(),
}
KINKED = {
    "relu": F.relu,
    "hardtanh": F.relu6,
    "elu": F.selu,
    "leaky_relu": F.leaky_relu,
    "abs": torch.abs,
    "threshold": lambda x: F.threshold(x, 0, 0),
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, 2),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "max": lambda x: x.max(3, True)[0],
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
}


@pytest.mark.parametrize("name", KINKED)
def test_hf_maml_warns_once_about_kinks_of_functions_at_the_first_batch(name: str) -> None:
    model, episodes = HFMAML(Pooled(KINKED[name]).double(), 0.1), make_episodes(tasks=2)
    with pytest.warns(UserWarning, match=f"kinks in {name}:"):
        model.meta_loss(episodes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval().evaluate(episodes)


@pytest.mark.parametrize("algorithm", [FOMAML, HFMAML])
def test_networks_with_a_function_that_is_compiled_as_a_whole_are_trained(
    algorithm: type[MAML],
) -> None:
    activation = torch.compile(
        F.gelu if algorithm is FOMAML else F.relu, fullgraph=True, backend="eager"
    )
    model = algorithm(Pooled(activation).double(), 0.1, tasks="loop")
    with pytest.warns(UserWarning, match="kinks in relu") if algorithm is HFMAML else nullcontext():
        model.meta_loss(make_episodes(tasks=2))


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_are_no_kinks(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HFMAML(Pooled(SMOOTH[name]).double(), 0.1).meta_loss(make_episodes(tasks=2))


def test_a_network_that_returns_no_tensor_of_logits_is_refused(tmp_path: Path) -> None:
    class Two(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"return logits \[examples, ways\]"):
        trainer(tmp_path).fit(MAML(Two(64, 3)), loader())


@pytest.mark.usefixtures("two_threads")
def test_tensors_that_a_network_keeps_as_plain_attributes_do_not_stop_a_test(
    tmp_path: Path,
) -> None:
    class Grid(MLP):
        def forward(self, x: Tensor) -> Tensor:
            # made in inference mode by the first pass of a test
            self.grid = torch.linspace(0, 1, 3)
            return super().forward(x) * self.grid

    for tasks in ("loop", "threads", "vmap"):
        trainer(tmp_path).test(MAML(Grid(64, 3), tasks=tasks), loader(), verbose=False)


def test_an_interrupted_test_leaves_nothing_in_the_next(tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_test_batch_end(self, *_) -> None:
            raise RuntimeError("interrupted")

    module = MAML(build("mlp").float())
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, callbacks=[Interrupt()]).test(module, loader(), verbose=False)
    trainer(tmp_path).test(module, loader(), verbose=False)
    assert module.adaptation.tasks == 6


def test_the_curve_of_several_loaders_is_that_of_the_first(tmp_path: Path) -> None:
    """As the picture of an episode and the best checkpoint are."""
    module, first = MAML(build("mlp").float()), loader(count=2)
    (figures, _) = trainer(tmp_path).test(module, [first, loader(count=1)], verbose=False)
    assert module.adaptation.tasks == 2 * 3
    assert module.adaptation.mean[-1] == figures["test/accuracy/dataloader_idx_0"]


def test_logging_can_be_switched_off(tmp_path: Path) -> None:
    trainer(tmp_path, log_every_n_steps=0).fit(MAML(MLP(64, 3)), loader())


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_datamodules_follow_the_trainers_precision(tmp_path: Path, precision: str) -> None:
    data = GlyphsDataModule(ways=3, meta_batch_size=2, train_batches=1, val_tasks=2, test_tasks=2)
    module = MAML(Conv4(1, 3, 28, channels=2), inner_lr=0.1)
    run = trainer(tmp_path, precision=precision, callbacks=[EpisodePictures()])
    run.fit(module, data)
    run.test(module, data, verbose=False)
    assert module.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision]


def judged(folder: Path, **arguments) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    module = MAML(
        Conv4(1, 3, 28, channels=2, activation="gelu"), inner_lr=0.5, test_steps=2, tasks="threads"
    )
    run = trainer(folder, callbacks=[EpisodePictures()], logger=CSVLogger(folder), **arguments)
    run.test(module, GlyphsDataModule(ways=3, meta_batch_size=4, test_tasks=21), verbose=False)
    torch.save(
        {name: value.item() for name, value in run.callback_metrics.items()}, folder / "judged.pt"
    )


@pytest.mark.cpu_only
@pytest.mark.usefixtures("two_threads")
def test_two_processes_test_every_task_once(tmp_path: Path) -> None:
    of_one, of_two = (tmp_path / name for name in ("one", "two"))
    judged(of_one)
    another_process.in_two(judged, of_two)
    assert all(len(list(folder.rglob("*.png"))) == 2 for folder in (of_one, of_two))
    one, two = (torch.load(folder / "judged.pt") for folder in (of_one, of_two))
    assert two == pytest.approx(one, abs=1e-6)


def test_running_averages_follow_training_and_serve_evaluation(tmp_path: Path) -> None:
    network = conv_batch_norm()
    module = MAML(network, inner_lr=0.1, batch_norm="running")
    trainer(tmp_path).fit(module, loader(4))
    assert network[1].num_batches_tracked == 4
    before = network[1].running_mean.clone()
    module.eval()
    one = single(make_episodes(tasks=1))
    outputs = module.evaluate(one).aux
    alone = module.evaluate(
        one._replace(query_x=one.query_x[:, :1], query_y=one.query_y[:, :1])
    ).aux
    torch.testing.assert_close(outputs[:, :, :1], alone)
    assert torch.equal(network[1].running_mean, before)


@pytest.mark.parametrize(("policy", "transductive"), [("batch", True), ("support", False)])
def test_only_batch_statistics_look_at_the_other_queries(policy: str, transductive: bool) -> None:
    module = MAML(build("conv_batch_norm"), inner_lr=0.1, test_steps=2, batch_norm=policy).eval()
    one = make_episodes(tasks=1)
    outputs = module.evaluate(one).aux[:, :, :2]
    fewer = module.evaluate(
        one._replace(query_x=one.query_x[:, :2], query_y=one.query_y[:, :2])
    ).aux
    assert torch.allclose(outputs, fewer) is not transductive


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_parameters_stay_and_the_rest_learns(tmp_path: Path, algorithm: type[MAML]) -> None:
    network = conv_batch_norm()
    network[0].requires_grad_(False)
    before = parameters(network)
    trainer(tmp_path).fit(algorithm(network, inner_lr=0.1), loader())
    moved = {name for name, p in parameters(network).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("0.")}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unused_parameters_need_no_flag(tmp_path: Path, algorithm: type[MAML]) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = MLP(64, 3, activation="gelu"), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    network = Unused()
    before = network.unused.weight.detach().clone()
    trainer(tmp_path).fit(algorithm(network, inner_lr=0.1), loader())
    assert torch.equal(network.unused.weight, before)


def test_accumulation_averages_meta_batches(tmp_path: Path) -> None:
    networks = [build("mlp"), build("mlp")]
    batches = [make_episodes(seed=1), make_episodes(seed=2)]
    together = Episodes(*(torch.cat(pair) for pair in zip(*batches, strict=True)))
    arguments = {"precision": "64-true", "accumulate_grad_batches": 2}
    trainer(tmp_path, **arguments).fit(
        MAML(networks[0], optimizer=sgd()), DataLoader(batches, batch_size=None)
    )
    trainer(tmp_path, precision="64-true").fit(
        MAML(networks[1], optimizer=sgd()), DataLoader([together], batch_size=None)
    )
    assert relative_error(parameters(networks[0]), parameters(networks[1])) < 1e-14


def test_clipping_bounds_the_meta_gradient(tmp_path: Path) -> None:
    network = build("mlp")
    before = parameters(network)
    arguments = {"precision": "64-true", "gradient_clip_val": 1e-3}
    trainer(tmp_path, **arguments).fit(
        MAML(network, optimizer=sgd()), DataLoader([make_episodes()], batch_size=None)
    )
    assert float((flat(parameters(network)) - flat(before)).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_dropout_inside_other_modules_is_found_by_auto(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.head = nn.Linear(64, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1, 2)
            return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))

    trainer(tmp_path).fit(MAML(Attention()), loader(), loader())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mixed_precision_runs(tmp_path: Path, algorithm: type[MAML]) -> None:
    network = conv_batch_norm()
    trainer(tmp_path, precision="bf16-mixed").fit(
        algorithm(network, inner_lr=0.1), loader(), loader()
    )
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dropout_trains_and_evaluation_is_without_it(tmp_path: Path, algorithm: type[MAML]) -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, WAYS)
    )
    module = algorithm(network, inner_lr=0.1, train_steps=2)
    trainer(tmp_path).fit(module, loader())
    module.eval()
    episodes = single(make_episodes())
    torch.testing.assert_close(module.evaluate(episodes), module.evaluate(episodes), rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_checkpoint_holds_plain_arguments_and_loads_safely(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    extra = {"probe_radius": 1e-3} if algorithm is HFMAML else {}
    module = algorithm(
        MLP(64, 3, activation="gelu"), inner_lr=0.2, train_steps=2, test_steps=4, **extra
    )
    run = trainer(tmp_path)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {
        "inner_lr": 0.2,
        "train_steps": 2,
        "test_steps": 4,
        "batch_norm": "batch",
        "tasks": "auto",
        "chunk_size": None,
        "adapt": None,
        "head": None,
        "inner_rates": None,
        "compiled": False,
        "query_in_eval": False,
        "keep_graphs": "auto",
        "cuda_graphs": True,
        **extra,
    }
    loaded = algorithm.load_from_checkpoint(
        tmp_path / "model.ckpt", network=MLP(64, 3, activation="gelu"), weights_only=True
    )
    episodes = single(make_episodes())
    torch.testing.assert_close(loaded.evaluate(episodes), module.evaluate(episodes), rtol=0, atol=0)
    assert loaded.test_steps == 4


def test_optimizers_and_schedulers_are_configured_like_lightnings(tmp_path: Path) -> None:
    assert type(MAML(MLP(64, 3)).configure_optimizers()) is torch.optim.Adam
    assert MAML(MLP(64, 3)).configure_optimizers().defaults["lr"] == 1e-3
    plateau = partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=10.0
    )
    module = MAML(MLP(64, 3), optimizer=sgd(lr=1e-3), lr_scheduler=plateau)
    trainer(tmp_path, max_epochs=3).fit(module, loader(), loader())
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(1e-6)


def test_the_untouched_network_is_the_forward_pass() -> None:
    network = MLP(64, 3)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(MAML(network)(x), network(x))


class Own(nn.Module):
    """Has parameters of no layer, under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = (
            nn.Parameter(torch.randn(8, IMAGE * IMAGE) / IMAGE),
            nn.Linear(8, WAYS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            checkpoint(
                lambda x: torch.tanh(F.linear(x, self.weight)), x.flatten(1), use_reentrant=False
            )
        )


def test_checkpoints_of_a_modules_own_parameters_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="Expected a network whose adapting layers run once"):
        MAML(Own().double(), 0.1, 2, tasks="loop").meta_gradient(make_episodes())
    ANIL(Own().double(), 0.1, 2, tasks="loop").meta_gradient(make_episodes())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, inputs: int = IMAGE * IMAGE, outputs: int = WAYS) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8))
        self.middle, self.head = (
            nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh()),
            nn.Linear(8, outputs),
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(
            checkpoint(self.middle, x, use_reentrant=self.reentrant)
            if self.training
            else self.middle(x)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_which_run_with_other_parameters_are_refused(
    reentrant: bool,
) -> None:
    model, episodes = MAML(Checkpointed(reentrant).double(), 0.1, 2, tasks="loop"), make_episodes()
    for refused in (model.meta_loss, model.meta_gradient, model.evaluate):
        with pytest.raises(
            ValueError,
            match="Expected a network whose adapting layers run once but got one with checkpoints",
        ):
            refused(episodes)
    model.eval().evaluate(episodes)
    x = torch.linspace(-1, 1, 6).reshape(2, 3, 1)
    with pytest.raises(ValueError, match="Expected a network whose adapting layers run once"):
        MAML(Checkpointed(reentrant, 1, 1), 0.1, loss=nn.MSELoss()).meta_loss(Episodes(x, x, x, x))


def test_lazy_layers_are_refused_until_they_have_run() -> None:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(
        ValueError,
        match=r"whose parameters have shapes but \['1.weight', '1.bias'\] are lazy; run it once",
    ):
        MAML(network, 0.1)
    network(make_episodes().support_x[0].float())
    MAML(network.double(), 0.1).meta_loss(make_episodes())


@pytest.mark.cpu_only
@pytest.mark.parametrize("tasks", ["loop", "vmap"])
def test_a_training_step_is_few_calls_away_from_the_recursion(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recursion = functional_meta_gradient.task_meta_gradient
    paths: list[list[tuple[str, str]]] = []

    def noted(*arguments: Any) -> Any:
        frames = [(frame.filename, frame.name) for frame in traceback.extract_stack()]
        first = next(k for k, (_, name) in enumerate(frames) if name == "training_step")
        package = str(Path(core_meta_gradient.__file__).parents[1])
        paths.append([(file, name) for file, name in frames[first:] if file.startswith(package)])
        return recursion(*arguments)

    monkeypatch.setattr(functional_meta_gradient, "task_meta_gradient", noted)
    model = MAML(build("conv_batch_norm").float(), 0.1, 2, tasks=tasks)
    trainer(tmp_path, max_steps=1).fit(model, loader())
    assert paths
    for path in paths:
        files = {file for file, _ in path} | {core_meta_gradient.__file__}
        assert len(path) + 1 <= 8, path  # and the recursion itself
        assert len(files) <= 3, path
