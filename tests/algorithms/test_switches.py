"""Lightning's switches, one by one, with each curvature under a real trainer.

Each does here what it does elsewhere.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from helpers.networks import flat, relative_error
from helpers.runs import Noise, network
from helpers.trainers import trainer_in_double as trainer
from lightning_maml import FOMAML, HFMAML, IMAML, MAML, ProtoNet
from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.datamodules.sampler import ClassImages

slow = pytest.mark.slow
ALGORITHMS = [MAML, pytest.param(FOMAML, marks=slow), HFMAML]
BATCHES = 4
SGD = partial(torch.optim.SGD, lr=0.1)


class Watch(Callback):
    """Keeps the batches trained on, the gradients before each step and the rates."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.rates: list[float] = []
        self.validations = 0

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch.support_x)

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = {
            name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
        }
        # there are none in SWA's last epoch, which only looks at batch norm
        self.gradients += [flat(gradients)] if gradients else []
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.validations += not trainer.sanity_checking


def fit(
    folder: Path,
    algorithm: type[MAML],
    *callbacks: Callback,
    model: dict[str, Any] | None = None,
    **switches: Any,
) -> Any:
    """Fit, test and predict; return the trainer, the model and what was seen."""
    torch.manual_seed(0)
    watch = Watch()
    run = trainer(
        folder,
        **({"precision": "32-true", "max_epochs": 2, "callbacks": [watch, *callbacks]} | switches),
    )
    module = algorithm(network(), 0.1, **({"optimizer": SGD} | (model or {})))
    data = Noise(train_batches=BATCHES, test_tasks=6)
    run.fit(module, data)
    steps = run.global_step
    run.test(module, data, verbose=False)
    predictions = run.predict(module, data)
    assert run.fast_dev_run or len(torch.cat(predictions)) in (2, 6)
    assert all(p.isfinite().all() for p in module.parameters())
    return steps, run, module, watch


every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@every_algorithm
def test_overfitting_sees_the_same_tasks_again_and_again(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    steps, _, _, watch = fit(tmp_path, algorithm, overfit_batches=2, max_epochs=3)
    assert steps == 6
    first, second = watch.batches[:2]
    assert all(torch.equal(a, b) for a, b in zip(watch.batches, [first, second] * 3, strict=True))
    assert not torch.equal(first, second)


@every_algorithm
@pytest.mark.parametrize(("fast_dev_run", "steps"), [(True, 1), (3, 3)])
def test_a_fast_development_run(
    tmp_path: Path, algorithm: type[MAML], fast_dev_run: int, steps: int
) -> None:
    assert fit(tmp_path, algorithm, fast_dev_run=fast_dev_run)[0] == steps


@every_algorithm
def test_fewer_batches(tmp_path: Path, algorithm: type[MAML]) -> None:
    limits = {f"limit_{stage}_batches": 1 for stage in ("train", "val", "test", "predict")}
    steps, _, module, watch = fit(tmp_path, algorithm, **limits)
    assert (steps, watch.validations, module.adaptation.tasks) == (2, 2, 2)


@every_algorithm
@pytest.mark.parametrize(
    ("interval", "validations"),
    [
        ({"val_check_interval": 1}, 8),
        ({"val_check_interval": 0.5}, 4),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 2),
        ({"check_val_every_n_epoch": 2}, 1),
        ({"limit_val_batches": 0}, 0),
    ],
)
def test_validation_intervals(
    tmp_path: Path, algorithm: type[MAML], interval: dict[str, Any], validations: int
) -> None:
    steps, _, _, watch = fit(tmp_path, algorithm, **interval)
    assert (steps, watch.validations) == (8, validations)


@every_algorithm
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping(tmp_path: Path, algorithm: type[MAML], kind: str) -> None:
    plain = fit(tmp_path, algorithm, max_epochs=1)[3].gradients[0]
    bound = float(plain.norm() if kind == "norm" else plain.abs().max()) / 3
    start = flat(dict(algorithm(_seeded_network(), 0.1).named_parameters()))
    expected = plain / 3 if kind == "norm" else plain.clamp(-bound, bound)
    one = fit(
        tmp_path, algorithm, max_steps=1, gradient_clip_val=bound, gradient_clip_algorithm=kind
    )[2]
    moved = (start - flat(dict(one.named_parameters()))) / 0.1
    torch.testing.assert_close(moved.detach(), expected, rtol=1e-3, atol=1e-6)


def _seeded_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return network()


@every_algorithm
def test_accumulation_steps_on_the_mean(tmp_path: Path, algorithm: type[MAML]) -> None:
    steps, _, _, watch = fit(tmp_path, algorithm, accumulate_grad_batches=2)
    assert steps == 4
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    alone = fit(tmp_path, algorithm, model=still, max_epochs=1)[3].gradients
    torch.testing.assert_close(watch.gradients[0], (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)
    changing = fit(tmp_path, algorithm, GradientAccumulationScheduler({0: 2, 1: 1}))[0]
    assert changing == 2 + 4


@every_algorithm
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_precisions(tmp_path: Path, algorithm: type[MAML], precision: str) -> None:
    exact = fit(tmp_path, algorithm, precision="64-true", max_epochs=1)[3].gradients[0]
    steps, _, _, watch = fit(tmp_path, algorithm, precision=precision, max_epochs=1)
    assert steps == BATCHES
    # on a CPU Lightning takes 16-mixed for bf16-mixed
    of_precision = {"32-true": 1e-4, "64-true": 1e-12}.get(precision, 0.5)
    assert relative_error({"g": watch.gradients[0].double()}, {"g": exact}) < of_precision


class Weights(Callback):
    """Keeps the weights at the start of each epoch and after each step."""

    def __init__(self) -> None:
        self.of_epochs: list[torch.Tensor] = []
        self.of_steps: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.of_epochs.append(flat(dict(module.named_parameters())).detach())

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.of_steps.append(flat(dict(module.named_parameters())).detach())


@every_algorithm
def test_exponential_averages_of_weights(tmp_path: Path, algorithm: type[MAML]) -> None:
    seen = Weights()
    module = fit(tmp_path, algorithm, seen, EMAWeightAveraging(decay=0.5))[2]
    average = seen.of_steps[0]
    for weights in seen.of_steps[1:]:
        average = (average + weights) / 2
    assert len(seen.of_steps) == 2 * BATCHES
    torch.testing.assert_close(flat(dict(module.named_parameters())).detach(), average)


@every_algorithm
def test_stochastic_weight_averages(tmp_path: Path, algorithm: type[MAML]) -> None:
    seen = Weights()
    module = fit(
        tmp_path, algorithm, seen, StochasticWeightAveraging(0.05, swa_epoch_start=1), max_epochs=3
    )[2]
    # Lightning takes them at the starts of epochs; the fourth looks at batch norm only
    average = torch.stack(seen.of_epochs[:3]).mean(0)
    torch.testing.assert_close(flat(dict(module.named_parameters())).detach(), average)


@every_algorithm
def test_stopping_early_and_by_time(tmp_path: Path, algorithm: type[MAML]) -> None:
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    steps, run, _, _ = fit(
        tmp_path, algorithm, EarlyStopping("val/loss", patience=1), model=still, max_epochs=9
    )
    assert (steps, run.current_epoch) == (2 * BATCHES, 2)
    assert fit(tmp_path, algorithm, Timer("00:00:00:00"), max_epochs=9)[0] <= 1


@every_algorithm
def test_schedules(tmp_path: Path, algorithm: type[MAML]) -> None:
    schedule = {"optimizer": SGD, "lr_scheduler": partial(StepLR, step_size=1, gamma=0.1)}
    rates = fit(tmp_path, algorithm, model=schedule)[3].rates
    assert rates == pytest.approx([0.1] * BATCHES + [0.01] * BATCHES)
    on_a_plateau = {
        "optimizer": SGD,
        "lr_scheduler": partial(
            ReduceLROnPlateau, mode="max", patience=0, factor=0.1, threshold=10.0
        ),
    }
    rates = fit(tmp_path, algorithm, model=on_a_plateau, max_epochs=3)[3].rates
    assert rates == pytest.approx([0.1] * BATCHES * 2 + [0.01] * BATCHES)


def _wandb(folder: Path) -> Any:
    return loggers.WandbLogger(save_dir=folder, offline=True)


def _mlflow(folder: Path) -> Any:
    return loggers.MLFlowLogger(tracking_uri=f"file:{folder / 'mlruns'}")


LOGGERS: dict[str, Callable[[Path], Any]] = {
    "csv": loggers.CSVLogger,
    "tensorboard": loggers.TensorBoardLogger,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


@every_algorithm
@pytest.mark.parametrize("kind", LOGGERS)
def test_loggers(
    tmp_path: Path, algorithm: type[MAML], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = fit(
        tmp_path,
        algorithm,
        LearningRateMonitor(),
        logger=LOGGERS[kind](tmp_path),
        log_every_n_steps=1,
    )[1]
    if kind == "wandb":  # whose files another process writes, some time after
        logged = str([dict(run.logger.experiment.summary), run.logger.experiment.config])
        run.logger.experiment.finish()
    else:
        logged = "".join(
            file.name + str(file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()
        )
    assert "accuracy" in logged
    assert "inner_lr" in logged


@every_algorithm
def test_several_loaders_are_judged_one_by_one(tmp_path: Path, algorithm: type[MAML]) -> None:
    class Halves(Noise):
        def class_images(self, split: str) -> ClassImages:
            whole = super().class_images(split)
            return whole if split == "test" else ClassImages(whole.images.flip(-1), whole.members)

    data, module = Halves(val_tasks=5, test_tasks=7), algorithm(network(), 0.1)
    data.setup()
    loaders = [data.test_dataloader(), data.val_dataloader()]
    alone = [
        trainer(tmp_path, precision="32-true").test(module, loader, verbose=False)[0]
        for loader in loaders
    ]
    together = trainer(tmp_path, precision="32-true").test(module, loaders, verbose=False)
    for number, one in enumerate(alone):
        assert {
            f"{name}/dataloader_idx_{number}": value for name, value in one.items()
        }.items() <= together[number].items()
    assert {
        "test/accuracy",
        "test/accuracy_ci95",
        "test/accuracy_step_01",
        "test/loss_before",
    } < alone[0].keys()
    validated = trainer(tmp_path, precision="32-true").validate(module, loaders, verbose=False)
    for number, one in enumerate(alone):
        assert {
            f"{name}/dataloader_idx_{number}".replace("test/", "val/"): v for name, v in one.items()
        }.items() <= validated[number].items()
    predicted = trainer(tmp_path, precision="32-true").predict(module, loaders)
    assert [len(torch.cat(outputs)) for outputs in predicted] == [7, 5]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, IMAML, ProtoNet])
@pytest.mark.parametrize(("tasks", "batch_norm"), [("loop", "batch"), ("vmap", "support")])
def test_a_network_given_compiled_runs_as_it_was(
    algorithm: type[EpisodicModule], tasks: Any, batch_norm: Any
) -> None:
    data = Noise()
    data.setup()
    episodes = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    plain, in_place, wrapped = (_seeded_network() for _ in range(3))
    in_place.compile(backend=_refuse)
    wrapped = torch.nn.Sequential(torch.compile(wrapped, backend=_refuse))
    expected, *others = [], [], []
    for given, found in ((plain, expected), (in_place, others[0]), (wrapped, others[1])):
        with (
            nullcontext()
            if given is plain
            else pytest.warns(
                UserWarning, match="given to torch.compile, but tasks run it as it was"
            )
        ):
            model = algorithm(given, tasks=tasks, batch_norm=batch_norm)
        model.meta_loss(episodes).backward()
        found += [p.grad for p in model.parameters()]
        found += [
            model.evaluate(episodes).aux,
            model.adapt(episodes.support_x, episodes.support_y)(episodes.query_x),
        ]
        found.append(model.adapt(episodes.support_x[0], episodes.support_y[0])(episodes.query_x[0]))
    for found in others:
        torch.testing.assert_close(found, expected)


def _refuse(program: Any, inputs: Any) -> None:
    raise AssertionError("This is not to be compiled.")


@pytest.mark.parametrize(
    "algorithm", [MAML, pytest.param(FOMAML, marks=slow), pytest.param(HFMAML, marks=slow)]
)
def test_a_compiled_model_trains_as_it_does_uncompiled(
    tmp_path: Path, algorithm: type[MAML]
) -> None:
    ends = []
    for wrapped in (False, True):
        module = algorithm(_seeded_network(), 0.1, optimizer=SGD)
        run, given = (
            trainer(tmp_path, precision="32-true"),
            torch.compile(module) if wrapped else module,
        )
        run.fit(given, Noise())
        ends.append(
            dict(module.named_parameters()) | {"predicted": torch.cat(run.predict(given, Noise()))}
        )
    assert relative_error(*ends) < 1e-3


@every_algorithm
def test_the_tuner_finds_a_rate_and_a_batch_size(tmp_path: Path, algorithm: type[MAML]) -> None:
    run = trainer(tmp_path, precision="32-true", enable_checkpointing=True)
    found = Tuner(run).lr_find(
        algorithm(network(), 0.1), Noise(train_batches=30), num_training=20, update_attr=False
    )
    assert 1e-8 < found.suggestion() < 1
    data = Noise()
    run = trainer(tmp_path, precision="32-true", enable_checkpointing=True)
    found = Tuner(run).scale_batch_size(
        algorithm(network(), 0.1),
        data,
        batch_arg_name="meta_batch_size",
        init_val=2,
        steps_per_trial=1,
        max_trials=2,
    )
    assert found > 2
    assert len(next(iter(data.train_dataloader())).support_x) == data.meta_batch_size > 2


@pytest.fixture(scope="module", params=ALGORITHMS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MAML:
    """Return a model of an algorithm, fitted without a switch."""
    model: MAML = fit(tmp_path_factory.mktemp("plain"), request.param)[2]
    return model


@pytest.mark.parametrize(
    "switches",
    [
        {"deterministic": True},
        {"detect_anomaly": True},
        {"inference_mode": False},
        {"benchmark": True},
        {"profiler": "simple"},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_time": "00:00:10:00"},
        {"use_distributed_sampler": False},
    ],
    ids=lambda switches: next(iter(switches)),
)
def test_switches_that_change_no_number(
    tmp_path: Path, plain: MAML, switches: dict[str, Any]
) -> None:
    try:
        switched = fit(tmp_path, type(plain), **switches)[2]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*(flat(dict(model.named_parameters())) for model in (plain, switched)))


def test_a_schedule_may_be_lightnings_dict(tmp_path: Path) -> None:
    def halved_every_other_step(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        schedule = StepLR(optimizer, step_size=1, gamma=0.5)
        return {"scheduler": schedule, "interval": "step", "frequency": 2, "name": "rate"}

    model = MAML(
        network(), optimizer=partial(torch.optim.SGD, lr=1.0), lr_scheduler=halved_every_other_step
    )
    run = trainer(tmp_path, precision="32-true")
    run.fit(model, Noise(train_batches=5))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.25
    assert run.lr_scheduler_configs[0].name == "rate"


def test_other_intervals_are_refused() -> None:
    with pytest.raises(ValueError, match="`lr_scheduler_interval` to be 'epoch' or 'step' but got"):
        MAML(network(), lr_scheduler_interval="batch")


def test_the_interval_holds_for_a_dict_that_names_none() -> None:
    def made(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"scheduler": StepLR(optimizer, step_size=1)}

    configured = MAML(
        network(), lr_scheduler=made, lr_scheduler_interval="step"
    ).configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"


def test_a_dict_without_a_scheduler_is_refused() -> None:
    def as_configure_optimizers_has_it(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"lr_scheduler": {"scheduler": StepLR(optimizer, step_size=1)}}

    model = MAML(network(), lr_scheduler=as_configure_optimizers_has_it)
    with pytest.raises(ValueError, match=r"a dict with one as 'scheduler', but got .*'lr_sched"):
        model.configure_optimizers()


@pytest.mark.parametrize("monitor", ["train/loss", "val/loss"])
def test_a_plateau_of_one_process_is_refused(monitor: str) -> None:
    def made(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"scheduler": ReduceLROnPlateau(optimizer), "monitor": monitor}

    model = MAML(network(), lr_scheduler=made)
    model.trainer = SimpleNamespace(world_size=2)
    is_own = monitor == "train/loss"
    refusal = pytest.raises(ValueError, match="their weights would drift apart; monitor val/loss")
    with refusal if is_own else nullcontext():
        model.configure_optimizers()


def test_logging_trains_nothing(tmp_path: Path) -> None:
    weights = []
    for every in (1, 50):
        torch.manual_seed(0)
        model = MAML(network(dropout=0.5), 0.1, 1)
        run = trainer(tmp_path, precision="32-true", log_every_n_steps=every)
        run.fit(model, Noise(train_batches=3))
        weights.append(flat(dict(model.named_parameters())))
    assert torch.equal(*weights)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_half_precision_that_scales_the_meta_gradient_alone_is_warned_of(stage: str) -> None:
    model = MAML(network())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.trainer = Trainer(plugins=[MixedPrecision("16-mixed", "cuda")], barebones=True)
        model.setup(stage)
    said = [str(each.message) for each in caught if "small ones 0" in str(each.message)]
    assert len(said) == (stage == "fit")
