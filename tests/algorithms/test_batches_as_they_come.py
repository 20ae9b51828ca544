"""Batches as loaders give them: four tensors, lists of tasks, tasks that differ in size."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch.utils.data import DataLoader

from helpers.networks import RATE, build, make_episodes, relative_error
from helpers.networks import autograd_meta_gradient as by_autograd
from helpers.trainers import trainer_in_double
from lightning_maml import (
    FOMAML,
    HFMAML,
    IMAML,
    LSLR,
    MAML,
    Episodes,
    ProtoNet,
    Reptile,
    SkipNonFinite,
    check,
)
from lightning_maml.batches.meta_batch import as_meta_batch, parts_of
from lightning_maml.batches.trees import map_tensors
from lightning_maml.callbacks import (
    AdaptiveMetaStepsize,
    EpisodePictures,
    MetaGradientMonitor,
    StationarityMonitor,
)
from lightning_maml.datamodules import meta_batch
from lightning_maml.errors import UserValueError

SIZES = [(1, 2), (3, 1), (1, 2), (2, 2)]  # shots and queries of each task


def task(number: int) -> Episodes:
    shots, queries = SIZES[number]
    of_one = make_episodes(tasks=1, shots=shots, queries=queries, seed=number)
    return map_tensors(lambda tensor: tensor[0], of_one)


def four_tasks() -> list[Episodes]:
    return [task(number) for number in range(len(SIZES))]


def with_task_dimension(of_one: Episodes) -> Episodes:
    return map_tensors(lambda tensor: tensor[None], of_one)


def parameters(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def gradients(model: MAML) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def test_tasks_of_one_size_are_stacked_and_others_kept_apart() -> None:
    uneven = meta_batch(four_tasks())
    assert uneven.places == [[0, 2], [1], [3]]
    assert [len(part.support_y) for part in uneven.parts] == [2, 1, 1]
    assert torch.equal(uneven.parts[0].support_x[1], four_tasks()[2].support_x)
    assert uneven.in_order(["ac", "b", "d"]) == [*"abcd"]
    even = meta_batch([four_tasks()[0], four_tasks()[2]])
    assert isinstance(even, Episodes)
    assert torch.equal(even.query_x[1], four_tasks()[2].query_x)


@pytest.mark.parametrize("tasks", ["auto", "loop", "vmap"])
def test_the_meta_gradient_of_uneven_tasks_is_the_mean_of_theirs(tasks: str) -> None:
    network = build("conv_batch_norm")
    model = MAML(network, RATE, 2, tasks=tasks)
    model.meta_loss(meta_batch(four_tasks())).backward()
    alone = [
        by_autograd(network, with_task_dimension(one), 2, F.cross_entropy) for one in four_tasks()
    ]
    mean = {f"network.{name}": sum(each[name] for each in alone) / len(alone) for name in alone[0]}
    assert relative_error(gradients(model), mean) < 1e-12


@pytest.mark.parametrize(
    "algorithm",
    [FOMAML, HFMAML, LSLR, IMAML, Reptile, lambda network, *_: ProtoNet(network)],
)
def test_every_algorithm_takes_them(algorithm: Callable[..., MAML]) -> None:
    model = algorithm(build("mlp"), RATE, 2)
    alone = []
    for one in four_tasks():
        model.zero_grad()
        model.meta_loss(with_task_dimension(one)).backward()
        alone.append({name: g.clone() for name, g in gradients(model).items()})
    model.zero_grad()
    model.meta_loss(meta_batch(four_tasks())).backward()
    mean = {name: sum(each[name] for each in alone) / len(alone) for name in alone[0]}
    assert relative_error(gradients(model), mean) < 1e-9


@pytest.mark.parametrize(
    "collate",
    [list, meta_batch, lambda tasks: [tuple(task) for task in tasks]],
    ids=["list", "meta_batch", "tuples"],
)
def test_trainers_take_lists_of_uneven_tasks(collate: Callable, tmp_path: Path) -> None:
    network = build("mlp")
    before = parameters(network)
    alone = [
        by_autograd(network, with_task_dimension(one), 1, F.cross_entropy) for one in four_tasks()
    ]
    model = MAML(network, RATE, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    loader = DataLoader(four_tasks(), batch_size=4, collate_fn=collate)
    run = trainer_in_double(tmp_path, log_every_n_steps=1)
    run.fit(model, loader)
    moved = {name: before[name] - p for name, p in parameters(network).items()}
    mean = {name: sum(each[name] for each in alone) / len(alone) for name in alone[0]}
    assert relative_error(moved, mean) < 1e-12

    curves = [model.evaluate(with_task_dimension(one)) for one in four_tasks()]
    logged = run.validate(model, loader, verbose=False)[0]
    loss = torch.stack([curve.loss[0, -1] for curve in curves]).mean()
    torch.testing.assert_close(logged["val/loss"], loss.item(), rtol=1e-6, atol=0)
    shares = [
        (curve.aux[0, -1].argmax(-1) == one.query_y).double().mean()
        for curve, one in zip(curves, four_tasks(), strict=True)
    ]
    torch.testing.assert_close(logged["val/accuracy"], (sum(shares) / 4).item(), rtol=1e-6, atol=0)
    (predicted,) = run.predict(model, loader)
    for outputs, curve in zip(predicted, curves, strict=True):
        torch.testing.assert_close(outputs, curve.aux[0, -1], rtol=0, atol=1e-12)


def test_training_logs_means_over_all_tasks(tmp_path: Path) -> None:
    model = MAML(build("mlp"), RATE, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    run = trainer_in_double(tmp_path, log_every_n_steps=1)
    run.fit(model, DataLoader(four_tasks(), batch_size=4, collate_fn=list))
    losses = [model.evaluate(with_task_dimension(one)).loss[0] for one in four_tasks()]
    before, after = torch.stack(losses).mean(0).cpu()
    logged = run.callback_metrics
    torch.testing.assert_close(logged["train/loss"].double(), after, rtol=1e-6, atol=0)
    torch.testing.assert_close(logged["train/loss_before"].double(), before, rtol=1e-6, atol=0)


def test_one_part_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    broken = four_tasks()[1]._replace(query_x=four_tasks()[1].query_x * float("nan"))
    model = MAML(build("mlp"), RATE)
    before = parameters(model.network)
    tasks = [four_tasks()[0], broken]
    run = trainer_in_double(tmp_path, callbacks=[SkipNonFinite()])
    run.fit(model, DataLoader(tasks, batch_size=2, collate_fn=list))
    assert model.skipped == 1
    assert all(torch.equal(before[name], p) for name, p in parameters(model.network).items())


def test_four_tensors_are_episodes(tmp_path: Path) -> None:
    episodes = make_episodes()
    found = []
    for batch in (episodes, tuple(episodes), [*episodes]):
        model = MAML(build("mlp"), RATE)
        run = trainer_in_double(tmp_path)
        run.fit(model, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))
        found.append(parameters(model.network))
    assert all(torch.equal(found[0][name], each[name]) for each in found for name in found[0])


def test_what_a_default_loader_makes_of_tuples_are_episodes() -> None:
    of_one = four_tasks()[0]
    dataset = [(x.cpu().numpy(), y, query_x, query_y) for x, y, query_x, query_y in [of_one] * 4]
    (batch,) = DataLoader(dataset, batch_size=4)
    assert not isinstance(batch, Episodes)
    assert as_meta_batch(batch).support_x.shape == (4, *of_one.support_x.shape)


def test_arrays_become_tensors() -> None:
    arrays = tuple(tensor.cpu().numpy() for tensor in make_episodes())
    assert all(map(torch.equal, as_meta_batch(arrays), make_episodes()))
    (of_one,) = parts_of(as_meta_batch([tuple(tensor.cpu().numpy() for tensor in four_tasks()[0])]))
    assert torch.equal(of_one.support_x[0], four_tasks()[0].support_x)


def test_pictures_are_drawn_of_lists_of_tasks(tmp_path: Path) -> None:
    run = trainer_in_double(tmp_path, callbacks=[EpisodePictures()])
    run.test(MAML(build("mlp"), RATE), DataLoader(four_tasks(), batch_size=4, collate_fn=list))
    assert {path.name for path in tmp_path.rglob("*.png")} == {"adaptation.png", "episode.png"}


def test_inputs_of_four_tensors_are_no_tasks() -> None:
    x, y, query_x, query_y = make_episodes()
    of_four = as_meta_batch(((x,) * 4, y, (query_x,) * 4, query_y))
    assert isinstance(of_four, Episodes)
    assert len(of_four.support_x) == 4


@pytest.mark.parametrize("batch", [None, 3, [], {"support": 1}, [torch.rand(2, 3)] * 3])
def test_anything_else_is_refused_as_before(batch, tmp_path: Path) -> None:
    assert as_meta_batch(batch) is batch
    with pytest.raises(TypeError, match=r"Expected a batch of `lightning_maml.Episodes` but got"):
        MAML(build("mlp"), RATE).meta_loss(batch)


def test_arrays_in_lists_get_the_precision_of_the_trainer(tmp_path: Path) -> None:
    arrays = [tuple(tensor.cpu().float().numpy() for tensor in one[::2]) for one in four_tasks()]
    labels = [tuple(tensor.cpu().numpy() for tensor in one[1::2]) for one in four_tasks()]
    tasks = [(x, y, q, z) for (x, q), (y, z) in zip(arrays, labels, strict=True)]
    model = MAML(build("mlp"), RATE)
    run = trainer_in_double(tmp_path)
    run.fit(model, DataLoader(tasks, batch_size=4, collate_fn=list))
    run.validate(model, DataLoader(tasks, batch_size=4, collate_fn=list), verbose=False)
    assert 0 < run.callback_metrics["val/loss"] < 10


def test_a_part_that_is_not_finite_leaves_the_running_averages_alone() -> None:
    network = build("conv_batch_norm")
    broken = four_tasks()[1]._replace(query_x=four_tasks()[1].query_x * float("nan"))
    before = network[1].running_mean.clone()
    with pytest.raises(FloatingPointError):
        MAML(network, RATE, batch_norm="running").meta_loss([four_tasks()[0], broken])
    assert torch.equal(network[1].running_mean, before)


def test_a_list_of_meta_batches_is_refused() -> None:
    # five ways and one shot: labels [1, 5] would fit logits [1, 5, 5] of a linear network
    x, y = torch.rand(1, 5, 4), torch.arange(5)[None]
    batches = [Episodes(x, y, x, y)] * 3
    with pytest.raises(ValueError, match=r"tasks of a list without a leading .* but got \[1, 5\]"):
        MAML(torch.nn.Linear(4, 5)).meta_loss(batches)


# calls outside of a trainer, and callbacks, take what a training step takes


def forms() -> dict[str, Any]:
    episodes = make_episodes(tasks=2)
    return {
        "four": tuple(episodes),
        "list": [map_tensors(lambda tensor, i=i: tensor[i], episodes) for i in range(2)],
    }


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("call", ["meta_gradient", "evaluate"])
def test_calls_take_what_training_takes(call: str, form: str) -> None:
    model = MAML(build("mlp"), RATE, 2)
    name = next(iter(dict(model.network.named_parameters())))
    calls = {
        "meta_gradient": lambda batch: model.meta_gradient(batch)[name],
        "evaluate": lambda batch: model.evaluate(batch).loss,
    }
    assert calls[call](forms()[form]).equal(calls[call](make_episodes(tasks=2)))
    with pytest.raises(UserValueError, match="Expected tasks of one size but got 3 sizes"):
        calls[call](meta_batch(four_tasks()))


def test_the_check_takes_what_training_takes() -> None:
    assert check(MAML(build("mlp"), RATE), forms()["four"]).ok


MONITORS: dict[str, Callable[[Any], Callback]] = {
    "gradients": lambda episodes: MetaGradientMonitor(1, episodes=episodes),
    "stationarity": lambda episodes: StationarityMonitor(1, episodes=episodes, meta_batches=3),
    "stepsize": lambda episodes: AdaptiveMetaStepsize("finite_sum", episodes=episodes),
}


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("monitor", MONITORS)
def test_callbacks_take_what_training_takes(monitor: str, form: str, tmp_path: Path) -> None:
    batches = [forms()[form]]
    model = MAML(build("mlp"), 0.01, optimizer=partial(torch.optim.SGD, lr=0.01))
    callbacks = [MONITORS[monitor](batches)]
    trainer_in_double(tmp_path, callbacks=callbacks, max_steps=2).fit(
        model, DataLoader(batches, batch_size=None)
    )


def points(tasks: int = 3, examples: int = 4) -> Episodes:
    x = torch.rand(tasks, examples, 1, dtype=torch.float64)
    return Episodes(x, x.sin(), x, x.sin())


@pytest.mark.parametrize(
    ("data", "warns"),
    [
        (DataLoader([points()]), True),  # batch_size=None was forgotten
        ([DataLoader([points()], batch_size=None)], True),
        (DataLoader([points()], batch_size=None), False),
        (DataLoader([points(tasks=1)], batch_size=None), False),
    ],
    ids=["batch_size", "list", "as it should be", "one task"],
)
def test_meta_batches_in_one_more_dimension_are_pointed_out(
    data: Any, warns: bool, tmp_path: Path
) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_in_double(tmp_path).fit(MAML(network, 0.01, loss=F.mse_loss), data)
    said = [str(each.message) for each in caught if "has added a dimension" in str(each.message)]
    assert len(said) == warns


def test_adaptation_to_one_sequence_says_nothing_of_loaders() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x, y = torch.rand(5, 7, 2), torch.rand(5, 7, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(network, 0.1, loss=F.mse_loss).adapt(x, y, many=False)
