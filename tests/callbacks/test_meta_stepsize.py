"""The adaptive meta-stepsize under real trainers: its rules, and what it refuses."""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from helpers import another_process
from helpers.families import (
    QUARTIC_CENTRES,
    Quartic,
    quartic_curvature,
    quartic_inner_lr,
    quartic_meta_objective,
    quartic_minimum,
    quartic_outputs_loss,
    quartic_smoothness,
    quartic_tasks,
)
from helpers.folders import CONFIGS, SMALL_NETWORK
from helpers.networks import build, make_episodes
from helpers.trainers import on_device
from lightning_maml import (
    FOMAML,
    HFMAML,
    MAML,
    MLP,
    AdaptiveMetaStepsize,
    Episodes,
    theory,
)
from lightning_maml.cli import run
from lightning_maml.datamodules import GlyphsDataModule

SGD = partial(torch.optim.SGD, lr=123.0)


class Watch(Callback):
    """Collects the learning rate that every optimizer step used."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.rates):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(
        **(
            {
                "default_root_dir": folder,
                **on_device(),
                "max_epochs": 1,
                "callbacks": list(callbacks),
            }
            | quiet
            | arguments
        )
    )


def repeated(episodes: Episodes, count: int) -> DataLoader[Episodes]:
    return DataLoader([episodes] * count, batch_size=None)


def quartic_module(steps: int) -> MAML:
    return MAML(
        Quartic(),
        inner_lr=quartic_inner_lr(steps),
        train_steps=steps,
        loss=quartic_outputs_loss,
        optimizer=SGD,
    )


class StopAt(Callback):
    """Stops where the closed form of |grad F| is small."""

    def __init__(self, steps: int, epsilon: float) -> None:
        self.reached: int | None = None
        self.steps, self.epsilon = steps, epsilon

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        gradient = torch.func.grad(partial(quartic_meta_objective, steps=self.steps))(
            pl_module.network.w.detach()
        )
        if gradient.norm() < self.epsilon:
            self.reached, trainer.should_stop = trainer.global_step, True


@pytest.mark.parametrize(
    ("steps", "rule", "iterations"),
    [pytest.param(1, "one_step", 224, marks=pytest.mark.slow), (5, "finite_sum", 51)],
)
def test_adaptive_stepsize_converges_where_the_best_fixed_one_diverges(
    tmp_path: Path, steps: int, rule: theory.Rule, iterations: int
) -> None:
    stop = StopAt(steps, 1e-6)
    stepsize = AdaptiveMetaStepsize(rule, scale=1.0, every_n_steps=1, episodes=[quartic_tasks()])
    trainer(tmp_path, stepsize, stop, precision="64-true").fit(
        quartic_module(steps), repeated(quartic_tasks(), 400)
    )
    assert stop.reached == pytest.approx(iterations, rel=0.2)

    rate = 1 / quartic_smoothness(quartic_minimum(steps), steps)
    fixed = MAML(
        Quartic(),
        inner_lr=quartic_inner_lr(steps),
        train_steps=steps,
        loss=quartic_outputs_loss,
        optimizer=partial(torch.optim.SGD, lr=rate),
    )
    distances = []
    with pytest.raises(FloatingPointError, match="finite"):
        trainer(tmp_path, Record(distances), precision="64-true").fit(
            fixed, repeated(quartic_tasks(), 4)
        )
    assert len(distances) <= 3


class Record(Callback):
    def __init__(self, distances: list[float]) -> None:
        self.distances = distances

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.distances.append(float(pl_module.network.w.norm()))


@pytest.mark.parametrize("rule", ["one_step", "resampling", "finite_sum"])
@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
def test_beta_is_that_of_the_rule(tmp_path: Path, algorithm: type[MAML], rule: theory.Rule) -> None:
    """Against closed forms of L, rho and the gradients; support and query are equal, so b = 0."""
    module = algorithm(
        Quartic(), inner_lr=quartic_inner_lr(1), loss=quartic_outputs_loss, optimizer=SGD
    )
    w = module.network.w.detach().clone()
    watch = Watch()
    run = trainer(
        tmp_path, AdaptiveMetaStepsize(rule, episodes=[quartic_tasks()]), watch, precision="64-true"
    )
    run.fit(module, repeated(quartic_tasks(), 1))
    L, rho = quartic_curvature(w)
    distance = w - QUARTIC_CENTRES[:, 0]
    norms = (0.1 * w + distance.square().sum(-1, keepdim=True) * distance).norm(dim=-1)
    smoothness = theory.meta_smoothness(rule, L, rho, quartic_inner_lr(1), 1, float(norms.mean()))
    scale = {
        "one_step": {MAML: 1 / 12, FOMAML: 1 / 18, HFMAML: 1 / 25}[algorithm],
        "resampling": 1 / 100,
        "finite_sum": 1 / 80,
    }[rule]
    assert watch.rates == [pytest.approx(scale / smoothness, rel=1e-3)]
    logged = run.callback_metrics
    assert logged["train/meta_stepsize"] == pytest.approx(watch.rates[0])
    assert logged["train/meta_smoothness"] == pytest.approx(smoothness, rel=1e-3)
    assert logged["train/task_gradient_norm"] == pytest.approx(float(norms.mean()))
    assert logged["train/L"] == pytest.approx(L, rel=1e-3)
    assert logged["train/rho"] == pytest.approx(rho, rel=1e-3)
    # the other rules have none
    assert logged.get("train/b") == (0 if rule == "finite_sum" else None)


def test_given_constants_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_maml.theory.measure.Probe.curvature", None)
    monkeypatch.setattr("lightning_maml.theory.measure.Probe.spread", None)
    module, watch = MAML(build("mlp"), inner_lr=0.1, train_steps=2, optimizer=SGD), Watch()
    stepsize = AdaptiveMetaStepsize(
        "finite_sum", L=2.0, rho=3.0, b=5.0, scale=0.5, episodes=[make_episodes(seed=9)]
    )
    norms = module.probe(make_episodes(seed=9)).gradient_norms()
    trainer(tmp_path, stepsize, watch, precision="64-true").fit(
        module, repeated(make_episodes(), 1)
    )
    growth, c_l, c_b = theory.smoothness_constants(2.0, 3.0, 0.1, 2)
    assert watch.rates[0] == pytest.approx(
        0.5 / (growth * 2 + c_b * 5 + c_l * float(norms.mean())), rel=1e-9
    )


def test_what_it_logs_reaches_the_device_in_one_copy(tmp_path: Path) -> None:
    class Logged(MAML):
        def log_dict(self, dictionary: Any, **arguments: Any) -> None:
            places.append({value.untyped_storage().data_ptr() for value in dictionary.values()})
            super().log_dict(dictionary, **arguments)

    places: list[set[int]] = []
    adaptive = AdaptiveMetaStepsize(L=2.0, rho=0.0, b=0.0, episodes=[make_episodes()])
    model = Logged(build("mlp"), 0.1, optimizer=SGD)
    trainer(tmp_path, adaptive).fit(model, repeated(make_episodes(), 2))
    assert [len(of_step) for of_step in places] == [1, 1]


def test_constants_are_measured_again_every_n_steps(tmp_path: Path) -> None:
    measured: list[float] = []

    class Watched(AdaptiveMetaStepsize):
        def on_before_optimizer_step(self, trainer: Trainer, *arguments: Any) -> None:
            super().on_before_optimizer_step(trainer, *arguments)
            measured.append(self.state_dict()["measured"]["L"])

    module = MAML(build("mlp"), inner_lr=0.1, optimizer=SGD)
    stepsize = Watched(scale=1.0, every_n_steps=3, episodes=[make_episodes(seed=9)])
    trainer(tmp_path, stepsize, precision="64-true").fit(module, repeated(make_episodes(), 7))
    changes = [before != after for before, after in pairwise(measured)]
    assert changes == [False, False, True, False, False, True]


def test_the_rate_is_set_per_optimizer_step_not_per_batch(tmp_path: Path) -> None:
    drawn = []

    def episodes() -> Iterator[Episodes]:
        for seed in range(100):
            drawn.append(seed)
            yield make_episodes(seed=seed)

    module = MAML(build("mlp"), inner_lr=0.1, optimizer=SGD)
    run = trainer(
        tmp_path,
        AdaptiveMetaStepsize(L=1.0, rho=1.0, b=1.0, episodes=episodes()),
        precision="64-true",
        accumulate_grad_batches=3,
    )
    run.fit(module, repeated(make_episodes(), 6))
    assert run.global_step == len(drawn) == 2


def glyphs(**arguments: Any) -> GlyphsDataModule:
    return GlyphsDataModule(
        **(
            {"ways": 3, "queries": 2, "meta_batch_size": 4, "train_batches": 4, "val_tasks": 4}
            | arguments
        )
    )


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return MLP(784, 3, hidden=[8], activation="gelu")


def test_the_datamodules_tasks_are_independent_of_those_trained_on_and_of_each_other() -> None:
    data = glyphs()
    data.setup("fit")
    trained_on = [batch.query_x for batch in data.train_dataloader()]
    drawn = [data.independent_episodes("stepsize", draw, 4).query_x for draw in (0, 1)]
    other = data.independent_episodes("stationarity", 0, 4).query_x
    everything = [*trained_on, *drawn, other]
    assert all(not torch.equal(a, b) for i, a in enumerate(everything) for b in everything[:i])
    assert torch.equal(drawn[0], data.independent_episodes("stepsize", 0, 4).query_x)
    tasks = torch.cat(everything).flatten(1)
    assert len(tasks.unique(dim=0)) == len(tasks)
    with pytest.raises(ValueError, match=r"`purpose` to be one of 'stepsize'.* but got 'mine'"):
        data.independent_episodes("mine", 0, 4)  # type: ignore[arg-type]


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_run_equals_the_one_that_was_not_stopped(tmp_path: Path, own: bool) -> None:
    data, tasks = glyphs(), list(iter_tasks()) if own else None

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[torch.Tensor, list[float]]:
        module, watch = MAML(small_network(), inner_lr=0.1, optimizer=SGD), Watch()
        stepsize = AdaptiveMetaStepsize(scale=1.0, every_n_steps=3, tasks=2, episodes=tasks)
        run = trainer(
            tmp_path,
            stepsize,
            watch,
            max_epochs=epochs,
            enable_checkpointing=True,
            reload_dataloaders_every_n_epochs=1,
        )
        watch.rates = [0.0] * (0 if checkpoint is None else 4)
        run.fit(module, data, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return weights(module), watch.rates

    whole, rates = fit(2)
    fit(1)
    resumed, rates_after = fit(2, tmp_path / "1.ckpt")
    assert rates_after[4:] == rates[4:]
    assert torch.equal(whole, resumed)


def iter_tasks() -> Iterator[Episodes]:
    data = glyphs(seed=77)
    data.setup("fit")
    for _ in range(2):
        yield from data.train_dataloader()


class SaveRates(Watch):
    """Writes the rates of this process to a file when training ends."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(self.rates, self.folder / f"{trainer.global_rank}.pt")


def rated(folder: Path, tasks: int, **arguments: Any) -> None:
    stepsize = AdaptiveMetaStepsize(scale=1.0, every_n_steps=2, tasks=tasks)
    module = MAML(small_network().double(), inner_lr=0.1, optimizer=SGD)
    trainer(folder, stepsize, SaveRates(folder), precision="64-true", **arguments).fit(
        module, glyphs(meta_batch_size=tasks)
    )


@pytest.mark.cpu_only
def test_every_process_sets_the_same_rate(tmp_path: Path) -> None:
    of_one, of_two = (tmp_path / name for name in ("one", "two"))
    of_one.mkdir()
    of_two.mkdir()
    rated(of_one, 4)
    another_process.in_two(rated, of_two, 2)
    (one,), (first, second) = (
        [torch.load(file) for file in sorted(folder.glob("*.pt"))] for folder in (of_one, of_two)
    )
    assert first == second
    assert len(set(first)) > 1
    assert first == pytest.approx(one, rel=1e-6), "the same tasks, shared out"


@pytest.mark.parametrize(("algorithm", "regime"), [(MAML, "finite_sum"), (HFMAML, "resampling")])
def test_adaptive_stepsize_runs_from_a_config(
    tmp_path: Path, algorithm: type[MAML], regime: str
) -> None:
    config = CONFIGS / f"glyphs_{algorithm.__name__.lower()}.yaml"
    arguments = [
        "--trainer.callbacks=AdaptiveMetaStepsize",
        f"--trainer.callbacks.rule={regime}",
        "--trainer.callbacks.scale=10",
    ]
    sgd = [
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0",
        "--model.lr_scheduler=null",
    ]
    small = [
        "--data.train_batches=2",
        "--data.meta_batch_size=2",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=1",
    ]
    command = run(
        [
            "fit",
            f"--config={config}",
            *arguments,
            *sgd,
            *small,
            *SMALL_NETWORK,
            f"--data.regime={regime}",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert command.trainer.callback_metrics["train/meta_stepsize"] > 0
    assert command.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        float(command.trainer.callback_metrics["train/meta_stepsize"])
    )


class ByHand(MAML):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False


class TwoOptimizers(ByHand):
    def configure_optimizers(self) -> Any:
        return [SGD(self.network[1].parameters()), SGD(self.network[3].parameters())]


class NotMAML(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.parameters())


def scheduled() -> MAML:
    return MAML(
        build("mlp"),
        optimizer=SGD,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1),
    )


@pytest.mark.parametrize(
    ("module", "rule", "message"),
    [
        (
            lambda: ByHand(build("mlp")),
            "finite_sum",
            "Expected automatic optimization for AdaptiveMetaStepsize",
        ),
        (
            lambda: TwoOptimizers(build("mlp")),
            "finite_sum",
            "Expected one optimizer for AdaptiveMetaStepsize but got 2",
        ),
        (
            scheduled,
            "finite_sum",
            (
                "Expected no learning-rate scheduler beside AdaptiveMetaStepsize but got StepLR; "
                "set the model"
            ),
        ),
        (
            NotMAML,
            "finite_sum",
            "Expected MAML or one of its variants for AdaptiveMetaStepsize but got NotMAML",
        ),
        (
            lambda: MAML(build("mlp"), train_steps=3, optimizer=SGD),
            "one_step",
            "Expected train_steps=1 with rule 'one_step' but got 3",
        ),
    ],
)
def test_whatever_else_sets_the_learning_rate_is_refused(
    tmp_path: Path, module: Any, rule: theory.Rule, message: str
) -> None:
    run = trainer(
        tmp_path, AdaptiveMetaStepsize(rule, episodes=[make_episodes()]), precision="64-true"
    )
    with pytest.raises((ValueError, TypeError), match=message):
        run.fit(module(), repeated(make_episodes(), 1))


def test_missing_or_empty_episodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="draws independent tasks, but got none; give the callback `episodes`"
    ):
        trainer(tmp_path, AdaptiveMetaStepsize()).fit(
            MAML(build("mlp"), optimizer=SGD), repeated(make_episodes(), 1)
        )
    run = trainer(tmp_path, AdaptiveMetaStepsize(episodes=[]), precision="64-true")
    with pytest.raises(
        ValueError,
        match="`episodes` to hold meta-batches each time it is gone through but it gave none",
    ):
        run.fit(MAML(build("mlp"), optimizer=SGD), repeated(make_episodes(), 1))


@pytest.mark.parametrize(
    ("optimizer", "arguments", "message"),
    [
        (torch.optim.Adam, {}, "do not cover Adam as it is configured, whose rate beta becomes"),
        (partial(SGD, momentum=0.9, weight_decay=0.1), {}, "do not cover SGD as it is configured"),
        (SGD, {"gradient_clip_val": 1.0}, "do not cover gradient clipping"),
    ],
)
def test_a_warning_names_what_the_theorems_do_not_cover(
    tmp_path: Path, optimizer: Any, arguments: dict[str, Any], message: str
) -> None:
    stepsize = AdaptiveMetaStepsize(L=1.0, rho=1.0, b=0.0, episodes=[make_episodes()])
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, stepsize, precision="64-true", **arguments).fit(
            MAML(build("mlp"), optimizer=optimizer), repeated(make_episodes(), 1)
        )


def test_a_warning_names_kinks_if_rho_is_measured(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.warns(
        UserWarning, match=r"a network or loss with kinks in 2 \(ReLU\), whose rho does not exist"
    ):
        trainer(
            tmp_path, AdaptiveMetaStepsize(episodes=[make_episodes()]), precision="64-true"
        ).fit(MAML(network, optimizer=SGD), repeated(make_episodes(), 1))


class FunctionalReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x.flatten(1))))


def test_a_warning_names_kinks_that_are_functions(tmp_path: Path) -> None:
    stepsize = AdaptiveMetaStepsize(episodes=[make_episodes()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, stepsize, precision="64-true").fit(
            MAML(FunctionalReLU().double(), optimizer=SGD), repeated(make_episodes(), 3)
        )
    said = [str(w.message) for w in caught if "kinks in" in str(w.message)]
    assert len(said) == 1
    assert "the theorems do not cover a network or loss with kinks in relu, whose rho" in said[0]


@pytest.mark.parametrize(
    ("rule", "steps", "inner_lr", "warns"),
    [
        ("finite_sum", 5, 3.5, True),
        ("finite_sum", 5, 0.0719, True),
        ("finite_sum", 5, 0.0717, False),
        ("one_step", 1, 0.17, True),
        ("one_step", 1, 0.16, False),
    ],
)
def test_an_inner_rate_beyond_the_theorems_is_said_once(
    tmp_path: Path, rule: theory.Rule, steps: int, inner_lr: float, warns: bool
) -> None:
    stepsize = AdaptiveMetaStepsize(rule, L=1.0, rho=1.0, b=0.0, episodes=[make_episodes()])
    model = MAML(build("mlp"), inner_lr, train_steps=steps, optimizer=SGD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, stepsize, precision="64-true").fit(model, repeated(make_episodes(), 3))
    said = [str(w.message) for w in caught if "alpha L =" in str(w.message)]
    assert len(said) == warns
    for sentence in said:
        assert f"alpha L = {inner_lr:.3g} with N = {steps}, but the theorem needs less" in sentence


def cosine_module(w: float, bend: float = 1.0) -> MAML:
    """Tasks ``bend cos(w) + 0.1 w``, with ``L = bend |cos w|`` and ``rho = bend |sin w|`` at w."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (bend * torch.cos(self.w) + 0.1 * self.w).expand(len(x), 1)

    def mean(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (outputs + 0 * y).mean()

    return MAML(Point(), 0.01, loss=mean, optimizer=SGD)


POINTS = torch.zeros(1, 2, 1, dtype=torch.float64)
ONE_POINT = Episodes(POINTS, POINTS, POINTS, POINTS)


@pytest.mark.parametrize("keep_largest", [False, True])
def test_the_largest_constants_so_far_are_kept_if_asked(tmp_path: Path, keep_largest: bool) -> None:
    class Walk(Callback):
        """Moves w on, and notes L and rho."""

        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            logged = trainer.callback_metrics
            self.seen.append((float(logged["train/L"]), float(logged["train/rho"])))
            with torch.no_grad():
                pl_module.network.w += 0.5

    walk = Walk()
    stepsize = AdaptiveMetaStepsize(
        scale=1e-9, every_n_steps=1, episodes=[ONE_POINT], keep_largest=keep_largest
    )
    trainer(tmp_path, stepsize, walk, precision="64-true").fit(
        cosine_module(0.2), repeated(ONE_POINT, 4)
    )
    at = torch.tensor([0.2, 0.7, 1.2, 1.7], dtype=torch.float64)
    L, rho = at.cos().abs(), at.sin().abs()
    if keep_largest:
        L, rho = L.cummax(0).values, rho.cummax(0).values
    expected = torch.stack([L, rho], 1)
    assert torch.tensor(walk.seen, dtype=torch.float64) == pytest.approx(expected, rel=1e-3)


class Separate(nn.Module):
    """The steepest direction is quadratic, and the Hessian changes along the other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0] * self.a, torch.exp(self.b) * x[:, 1]], 1)


def test_rho_is_found_where_the_steepest_direction_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 2, dtype=torch.float64) * torch.tensor([10.0, 1.0])
    episodes = Episodes(x, x.flip(1), x, x.flip(1))
    model = MAML(Separate().double(), 1e-4, loss=nn.functional.mse_loss, optimizer=SGD)
    expected = model.probe(episodes).curvature(restarts=10).rho
    run = trainer(tmp_path, AdaptiveMetaStepsize(episodes=[episodes]), precision="64-true")
    run.fit(model, repeated(episodes, 1))
    assert expected > 1
    assert float(run.callback_metrics["train/rho"]) == pytest.approx(expected, rel=0.02)


def test_each_fit_measures_anew(tmp_path: Path) -> None:
    stepsize = AdaptiveMetaStepsize(
        scale=1e-9, every_n_steps=1000, episodes=[ONE_POINT], keep_largest=True
    )
    for at in (0.2, 1.2):  # cos falls
        run = trainer(tmp_path, stepsize, precision="64-true")
        run.fit(cosine_module(at), repeated(ONE_POINT, 1))
        assert float(run.callback_metrics["train/L"]) == pytest.approx(math.cos(at), rel=1e-3)


def test_a_test_between_fit_and_checkpoint_forgets_nothing(tmp_path: Path) -> None:
    stepsize = AdaptiveMetaStepsize(scale=1e-9, episodes=[ONE_POINT])
    run = trainer(tmp_path, stepsize, precision="64-true")
    run.fit(cosine_module(0.2), repeated(ONE_POINT, 3))
    before = stepsize.state_dict()
    assert before["drawn"] == 3
    run.validate(cosine_module(0.2), repeated(ONE_POINT, 1))
    assert stepsize.state_dict() == before


def test_each_fit_draws_its_tasks_from_the_start_or_from_its_checkpoint(tmp_path: Path) -> None:
    """Also if the callback was used before."""
    batches = [make_episodes(seed=seed) for seed in range(5)]
    model = partial(MAML, build("mlp"), 0.1, optimizer=partial(torch.optim.SGD, lr=0.0))

    def norms(run: Trainer, steps: int, checkpoint: Path | None = None) -> list[float]:
        watch = Logged("train/task_gradient_norm")
        run.callbacks.append(watch)
        run.fit(model(), repeated(make_episodes(), steps), ckpt_path=checkpoint)
        return watch.seen

    stepsize = AdaptiveMetaStepsize(L=0.1, rho=0.1, b=0.1, scale=1e-30, episodes=batches)
    start = partial(trainer, tmp_path, stepsize, precision="64-true")
    first = start()
    seen = norms(first, 4)
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert norms(start(), 2) == seen[:2]
    assert len(set(seen)) == 4
    resumed = norms(start(max_epochs=2), 4, tmp_path / "last.ckpt")
    expected = [float(model().probe(batch).gradient_norms().mean()) for batch in batches]
    assert resumed == pytest.approx([expected[index % 5] for index in range(4, 8)])


class Logged(Callback):
    """Collects a logged figure of every step."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics[self.name]))


def test_what_is_measured_is_said_to_be_a_lower_bound(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stepsize = AdaptiveMetaStepsize(every_n_steps=1, scale=1e-9, episodes=[ONE_POINT])
    with caplog.at_level("INFO"):
        trainer(tmp_path, stepsize, precision="64-true").fit(
            cosine_module(0.7), repeated(ONE_POINT, 3)
        )
    said = [record.message for record in caplog.records if "lower bounds" in record.message]
    assert len(said) == 1
    assert "L = 0.765 and rho = 0.644, measured where training is now" in said[0]


def test_without_curvature_beta_follows_from_rho_alone(tmp_path: Path) -> None:
    """With L = 0, L-hat is N alpha rho g."""
    watch = Watch()
    stepsize = AdaptiveMetaStepsize(L=0.0, rho=2.0, b=0.0, scale=1.0, episodes=[make_episodes(9)])
    model = MAML(build("mlp"), 0.1, train_steps=3, optimizer=SGD)
    norm = float(model.probe(make_episodes(9)).gradient_norms().mean())
    trainer(tmp_path, stepsize, watch, precision="64-true").fit(model, repeated(make_episodes(), 1))
    assert watch.rates == [pytest.approx(1 / (3 * 0.1 * 2 * norm), rel=1e-9)]


def test_linear_losses_have_no_such_stepsize(tmp_path: Path) -> None:
    stepsize = AdaptiveMetaStepsize(episodes=[ONE_POINT])
    with pytest.raises(
        FloatingPointError, match=r"L-hat to be a number above 0 but got .* / 0 at step 0"
    ):
        trainer(tmp_path, stepsize, precision="64-true").fit(
            cosine_module(0.2, bend=0.0), repeated(ONE_POINT, 1)
        )
    almost = AdaptiveMetaStepsize(L=0.0, rho=1e-320, b=0.0, scale=1.0, episodes=[make_episodes(9)])
    with pytest.raises(
        FloatingPointError, match=r"scale / L-hat to be a number above 0 but got 1 / "
    ):
        trainer(tmp_path, almost, precision="64-true").fit(
            MAML(build("mlp"), 0.1, optimizer=SGD), repeated(make_episodes(), 1)
        )


def test_a_constant_that_was_given_before_is_measured_after_a_resume(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None, **constants: float) -> dict[str, Any]:
        stepsize = AdaptiveMetaStepsize(
            scale=1.0, every_n_steps=1000, episodes=[make_episodes(seed=9)], **constants
        )
        run = trainer(
            tmp_path, stepsize, precision="64-true", max_epochs=epochs, enable_checkpointing=True
        )
        run.fit(
            MAML(build("mlp"), inner_lr=0.1, optimizer=SGD),
            repeated(make_episodes(), 2),
            ckpt_path=checkpoint,
        )
        run.save_checkpoint(tmp_path / "some.ckpt")
        return run.callback_metrics

    assert fit(1, None, L=5.0, rho=2.0)["train/rho"] == 2
    after = fit(2, tmp_path / "some.ckpt", L=5.0)
    assert after["train/L"] == 5
    assert after["train/rho"] > 0
    assert after["train/rho"] != 2


def test_curvature_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = quartic_module(1)
    with torch.no_grad():
        module.network.w *= 1e90
    stepsize = AdaptiveMetaStepsize("one_step", episodes=[quartic_tasks()])
    with pytest.raises(FloatingPointError, match="finite"):
        trainer(tmp_path, stepsize, precision="64-true").fit(module, repeated(quartic_tasks(), 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` to be at least 1 but got 0"),
        ({"scale": 0.0}, "`scale` to be positive but got 0.0"),
        ({"tasks": 0}, "`tasks` to be at least 1 but got 0"),
        ({"L": -1.0}, "`L` to be a finite number of at least 0 but got -1.0"),
        ({"rho": -1.0}, "`rho` to be a finite number of at least 0 but got -1.0"),
        ({"rule": "none"}, "`rule` to be .* but got 'none'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveMetaStepsize(**arguments)
