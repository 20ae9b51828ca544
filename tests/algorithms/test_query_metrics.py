"""Metrics of torchmetrics in validation and test, against torchmetrics itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from helpers import another_process
from helpers.networks import RATE, WAYS, build, make_episodes
from helpers.trainers import trainer_in_double
from lightning_maml import ANIL, MAML, MLP, Episodes, ProtoNet
from lightning_maml.batches.meta_batch import parts_of

STEPS = 2
F1 = MulticlassF1Score(WAYS, average="macro")


def loader(batches: int = 3, **sizes: int) -> DataLoader:
    return DataLoader(
        [make_episodes(seed=seed, **sizes) for seed in range(batches)], batch_size=None
    )


def logged(model: Any, tasks: Any, folder: Path, **options: Any) -> dict[str, float]:
    run = trainer_in_double(folder, **options)
    run.validate(model, tasks, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def of_each_task(model: Any, tasks: Any, step: int) -> list[tuple[Tensor, Tensor]]:
    """Outputs and labels of every task's queries after some steps."""
    model.eval()
    found = []
    for batch in tasks:
        for part in parts_of(batch):
            outputs = model.evaluate(part).aux[:, step]
            found += zip(outputs, part.query_y, strict=True)
    return found


def fresh(metric: Metric, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    metric = metric.clone().to(torch.get_default_device())
    for outputs, labels in pairs:
        metric.update(outputs, labels)
    return metric.compute()


@pytest.mark.parametrize("algorithm", [MAML, ANIL, ProtoNet])
def test_a_metric_of_each_task_is_averaged(algorithm: type, tmp_path: Path) -> None:
    tasks = loader()
    inner = {} if algorithm is ProtoNet else {"inner_lr": RATE, "test_steps": STEPS}
    model = algorithm(build("mlp"), metrics=F1, **inner)
    found = logged(model, tasks, tmp_path)
    for step, name in ((0, "_before"), (-1, "")):
        each = torch.stack([fresh(F1, [pair]) for pair in of_each_task(model, tasks, step)])
        assert found[f"val/MulticlassF1Score{name}"] == pytest.approx(float(each.mean()), rel=1e-6)
    ci95 = 1.96 * each.std(correction=1) / len(each) ** 0.5
    assert found["val/MulticlassF1Score_ci95"] == pytest.approx(float(ci95), rel=1e-5)
    assert not F1.update_called, "the metric itself is left alone"


def test_a_metric_of_all_queries_is_computed_once(tmp_path: Path) -> None:
    tasks = loader()
    metrics = MetricCollection({"f1": F1, "auroc": MulticlassAUROC(WAYS)}, prefix="query_")
    model = MAML(build("mlp"), RATE, STEPS, metrics=metrics, metrics_over="queries")
    found = logged(model, tasks, tmp_path)
    for step, name in ((0, "_before"), (-1, "")):
        pairs = of_each_task(model, tasks, step)
        for key, metric in (("query_f1", F1), ("query_auroc", MulticlassAUROC(WAYS))):
            right = float(fresh(metric, pairs))
            assert found[f"val/{key}{name}"] == pytest.approx(right, rel=1e-5)
    assert "val/query_f1_ci95" not in found


def test_metrics_of_regressions_of_positions_and_of_uneven_tasks(tmp_path: Path) -> None:
    x = torch.rand(3, 5, 2, dtype=torch.float64)
    y = x.sum(-1, keepdim=True)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    metrics = {"mae": MeanAbsoluteError()}
    regression = MAML(network, RATE, loss=F.mse_loss, metrics=metrics)
    tasks = [Episodes(x, y, x, y)]
    found = logged(regression, DataLoader(tasks, batch_size=None), tmp_path)
    each = [(outputs - right).abs().mean() for outputs, right in of_each_task(regression, tasks, 1)]
    assert found["val/mae"] == pytest.approx(float(sum(each)) / 3, rel=1e-6)

    images = torch.rand(2, 3, 1, 4, 5, dtype=torch.float64)
    masks = (images[:, :, 0] * WAYS).long()
    convolution = nn.Conv2d(1, WAYS, 3, padding=1).double()
    dense = MAML(convolution, RATE, metrics={"f1": F1})
    tasks = [Episodes(images, masks, images, masks)]
    found = logged(dense, DataLoader(tasks, batch_size=None), tmp_path)
    each = [fresh(F1, [pair]) for pair in of_each_task(dense, tasks, 1)]
    assert found["val/f1"] == pytest.approx(float(sum(each)) / 2, rel=1e-6)

    uneven = [[*_tasks(shots=1)], [*_tasks(shots=1), *_tasks(shots=2)]]
    model = MAML(build("mlp"), RATE, metrics={"f1": F1}, metrics_over="queries")
    found = logged(model, DataLoader(uneven, batch_size=None), tmp_path)
    assert found["val/f1"] == pytest.approx(float(fresh(F1, of_each_task(model, uneven, 1))))


def _tasks(shots: int) -> Any:
    return (Episodes(*parts) for parts in zip(*make_episodes(shots=shots), strict=True))


def test_several_loaders_have_metrics_of_their_own(tmp_path: Path) -> None:
    first, second = loader(1), loader(2, queries=2)
    model = MAML(build("mlp"), RATE, metrics={"f1": F1}, metrics_over="queries")
    found = logged(model, [first, second], tmp_path)
    for number, tasks in enumerate((first, second)):
        right = float(fresh(F1, of_each_task(model, tasks, 1)))
        assert found[f"val/f1/dataloader_idx_{number}"] == pytest.approx(right, rel=1e-6)


def test_every_validation_starts_anew(tmp_path: Path) -> None:
    model = MAML(build("mlp"), RATE, metrics={"f1": F1}, metrics_over="queries")
    first, second = (logged(model, loader(), tmp_path) for _ in range(2))
    assert first == second


def test_metrics_are_not_trained_or_saved() -> None:
    plain, measured = MAML(build("mlp"), RATE), MAML(build("mlp"), RATE, metrics=F1)
    assert measured.state_dict().keys() == plain.state_dict().keys()
    assert [*measured.hparams] == [*plain.hparams]


@pytest.mark.parametrize("algorithm", [MAML, ProtoNet])
@pytest.mark.parametrize("metrics", [F1, MetricCollection([F1]), {"f1": F1}, None])
def test_checkpoints_of_models_with_metrics_are_loaded(
    algorithm: type, metrics: Any, tmp_path: Path
) -> None:
    model = algorithm(build("mlp"), metrics=metrics)
    run = trainer_in_double(tmp_path)
    run.fit(model, loader(1))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = algorithm.load_from_checkpoint(
        tmp_path / "model.ckpt", network=build("mlp"), metrics=metrics
    )
    assert loaded.hparams == model.hparams


class Outputs(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_validation_batch_end(self, *arguments: Any) -> None:
        self.seen.append(arguments[2])

    on_test_batch_end = on_validation_batch_end


def test_callbacks_get_the_losses_and_outputs_of_each_task(tmp_path: Path) -> None:
    callback, model, tasks = Outputs(), MAML(build("mlp"), RATE, STEPS), loader(2)
    run = trainer_in_double(tmp_path, callbacks=[callback])
    run.validate(model, tasks, verbose=False)
    run.test(model, tasks, verbose=False)
    for seen, batch in zip(callback.seen, [*tasks] * 2, strict=True):
        curve = model.eval().evaluate(batch)
        torch.testing.assert_close(seen["loss"], curve.loss[:, -1])
        torch.testing.assert_close(seen["outputs"], curve.aux[:, -1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metrics": F.mse_loss}, TypeError, "`metrics` to be metrics of torchmetrics"),
        ({"metrics": {"mse": F.mse_loss}}, TypeError, "`metrics` to be metrics of torchmetrics"),
        ({"metrics": {"accuracy": F1}}, ValueError, r"logged anyway but got \['accuracy'\]"),
        ({"metrics": {"loss_ci95": F1}}, ValueError, r"logged anyway but got \['loss_ci95'\]"),
        ({"metrics": {"f1": F1, "f1_before": F1}}, ValueError, r"but got \['f1_before'\]"),
        ({"metrics": {"loss_step_01": F1}}, ValueError, r"but got \['loss_step_01'\]"),
        (
            {"metrics": F1, "metrics_over": "classes"},
            ValueError,
            "`metrics_over` to be 'tasks' or 'queries' but got 'classes'",
        ),
    ],
)
def test_other_metrics_are_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"Expected .*{message}"):
        MAML(MLP(4, WAYS), **options)


@pytest.mark.parametrize("over", ["tasks", "queries"])
def test_a_metric_of_more_than_one_number_is_refused(over: str, tmp_path: Path) -> None:
    metrics = {"confusion": MulticlassConfusionMatrix(WAYS)}
    model = MAML(build("mlp"), RATE, metrics=metrics, metrics_over=over)
    with pytest.raises(ValueError, match=r"'confusion' to be one number but got \[3, 3\]"):
        logged(model, loader(), tmp_path)


def of_processes(folder: Path, devices: int = 1, **_: Any) -> None:
    folder.mkdir(exist_ok=True)
    found = {}
    options = {"devices": 2, "strategy": "ddp_fork"} if devices > 1 else {}
    for over in ("tasks", "queries"):
        model = MAML(build("mlp"), RATE, metrics={"f1": F1}, metrics_over=over)
        run = trainer_in_double(folder, **options)
        run.validate(model, loader(4), verbose=False)  # Lightning gives each process its share
        found[over] = float(run.callback_metrics["val/f1"])
    if run.is_global_zero:
        torch.save(found, folder / "found.pt")


@pytest.mark.cpu_only
def test_two_processes_compute_metrics_of_all_tasks(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    of_processes(folders[0])
    another_process.in_two(of_processes, folders[1])
    one, two = (torch.load(folder / "found.pt") for folder in folders)
    assert two == pytest.approx(one, abs=1e-6)
