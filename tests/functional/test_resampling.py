"""The resampling case: fresh support batches and independent Hessian batches.

Ji et al. 2022, Algorithm 1; from the function to the command.
"""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor
from torch.func import functional_call

from helpers.folders import CONFIGS
from helpers.networks import (
    IMAGE,
    WAYS,
    build,
    leaves,
    make_episodes,
    plain_loss,
    relative_error,
    unrolled,
)
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import on_device
from lightning_maml import (
    FOMAML,
    HFMAML,
    MAML,
    Episodes,
    ResampledEpisodes,
    adaptation_curve,
    meta_gradient,
)
from lightning_maml.cli import run
from lightning_maml.core.params import Params
from lightning_maml.datamodules import GlyphsDataModule
from lightning_maml.networks.functional_network import FunctionalNetwork

RATE = 0.3


def resampled(
    steps: int, support: int = 9, hessian: int = 4, query: int = 6, tasks: int = 3
) -> ResampledEpisodes:
    random = torch.Generator().manual_seed(3)

    def batch(*sizes: int) -> tuple[Tensor, Tensor]:
        x = drawn_on_cpu(
            torch.rand, tasks, *sizes, 1, IMAGE, IMAGE, dtype=torch.float64, generator=random
        )
        return x, drawn_on_cpu(torch.randint, WAYS, (tasks, *sizes), generator=random)

    return ResampledEpisodes(*batch(steps, support), *batch(steps, hessian), *batch(query))


def explicit_product(network: torch.nn.Module, episodes: ResampledEpisodes, rate: float) -> Params:
    """Algorithm 1 as printed: the matrices I - alpha H_j, multiplied out from left to right."""
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def unflatten(w: Tensor) -> Params:
        parts = w.split([shape.numel() for shape in shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, unflatten(w), (x,)), y)

    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    total = torch.zeros_like(start)
    for task in (ResampledEpisodes(*task) for task in zip(*episodes, strict=True)):
        w, product = start, torch.eye(len(start), dtype=start.dtype)
        for j in range(len(task.support_x)):
            hessian = torch.autograd.functional.hessian(
                lambda w, task=task, j=j: loss(w, task.hessian_x[j], task.hessian_y[j]), w
            )
            product = product @ (torch.eye(len(start), dtype=start.dtype) - rate * hessian)
            w = w - rate * torch.func.grad(loss)(w, task.support_x[j], task.support_y[j])
        total += product @ torch.func.grad(loss)(w, task.query_x, task.query_y)
    return unflatten(total / len(episodes.support_x))


@functools.cache
def expected_of(steps: int) -> Params:
    return explicit_product(build("mlp"), resampled(steps), RATE)


@pytest.mark.parametrize("tasks", ["loop", "threads", "vmap"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_independent_hessian_batches_give_the_explicit_product(steps: int, tasks: str) -> None:
    network, episodes = build("mlp"), resampled(steps)
    functional = FunctionalNetwork(network, vectorised=tasks == "vmap")
    for curvature, bound in (("exact", 1e-12), ("finite_difference", 1e-8)):
        actual = meta_gradient(
            lambda w, x, y: F.cross_entropy(functional(w, x), y),
            functional.params,
            episodes,
            inner_lr=RATE,
            steps=steps,
            curvature=curvature,
            tasks=tasks,
        )
        assert relative_error(actual.grad, expected_of(steps)) < bound


def unrolled_resampled(
    network: torch.nn.Module, episodes: ResampledEpisodes, rate: float
) -> Params:
    """Autograd through the inner loop, which differentiates the support batches."""
    loss, w = plain_loss(network), leaves(network)
    total = torch.zeros((), dtype=torch.float64)
    for task in (ResampledEpisodes(*task) for task in zip(*episodes, strict=True)):
        adapted = w
        for x, y in zip(task.support_x, task.support_y, strict=True):
            gradient = torch.autograd.grad(
                loss(adapted, x, y), list(adapted.values()), create_graph=True
            )
            adapted = {
                name: p - rate * g for (name, p), g in zip(adapted.items(), gradient, strict=True)
            }
        total = total + loss(adapted, task.query_x, task.query_y)
    return dict(
        zip(w, torch.autograd.grad(total / len(episodes.support_x), list(w.values())), strict=True)
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv_group_norm", "conv_batch_norm"])
def test_the_same_batch_for_both_gives_autograd_through_the_loop(name: str, steps: int) -> None:
    network, episodes = build(name), resampled(steps)
    same = episodes._replace(hessian_x=episodes.support_x, hessian_y=episodes.support_y)
    oracle = unrolled_resampled(network, episodes, RATE)
    arguments = {"inner_lr": RATE, "steps": steps}
    assert (
        relative_error(
            meta_gradient(plain_loss(network), leaves(network), same, **arguments).grad, oracle
        )
        < 1e-12
    )
    independent = meta_gradient(plain_loss(network), leaves(network), episodes, **arguments).grad
    assert relative_error(independent, oracle) > 1e-3, (
        "autograd through the loop is not Algorithm 1"
    )


def test_first_order_needs_no_hessian_batch() -> None:
    network, episodes = build("mlp"), resampled(2)
    without = resampled(2)._replace(
        hessian_x=episodes.hessian_x[:, :, :0], hessian_y=episodes.hessian_y[:, :, :0]
    )
    loss, arguments = plain_loss(network), {"inner_lr": RATE, "steps": 2}
    first_order = meta_gradient(loss, leaves(network), without, curvature="none", **arguments).grad
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for task in (ResampledEpisodes(*task) for task in zip(*without, strict=True)):
        w = leaves(network)
        for x, y in zip(task.support_x, task.support_y, strict=True):
            gradient = torch.autograd.grad(loss(w, x, y), list(w.values()))
            w = {
                name: (p - RATE * g).detach().requires_grad_()
                for (name, p), g in zip(w.items(), gradient, strict=True)
            }
        gradient = torch.autograd.grad(loss(w, task.query_x, task.query_y), list(w.values()))
        expected = {
            name: total + g / 3 for (name, total), g in zip(expected.items(), gradient, strict=True)
        }
    assert relative_error(first_order, expected) < 1e-15
    for steps in (2, 1):
        fewer = ResampledEpisodes(*(tensor[:, :steps] for tensor in without[:4]), *without[4:])
        with pytest.raises(
            ValueError,
            match=r"Expected Hessian batches of .* with `curvature='exact'` but got none; draw some "
            r".* needs none\.$",
        ):
            meta_gradient(loss, leaves(network), fewer, inner_lr=RATE, steps=steps)
    meta_gradient(
        loss,
        leaves(network),
        ResampledEpisodes(*(tensor[:, :0] for tensor in without[:4]), *without[4:]),
        inner_lr=RATE,
        steps=0,
    )


def test_the_support_set_in_every_place_is_the_finite_sum_case() -> None:
    network, fixed = build("conv_group_norm"), make_episodes()
    repeated = ResampledEpisodes(
        *(tensor[:, None].expand(-1, 3, *tensor.shape[1:]) for tensor in (*fixed[:2], *fixed[:2])),
        fixed.query_x,
        fixed.query_y,
    )
    arguments = {"inner_lr": RATE, "steps": 3}
    expected = meta_gradient(plain_loss(network), leaves(network), fixed, **arguments)
    actual = meta_gradient(plain_loss(network), leaves(network), repeated, **arguments)
    assert relative_error(actual.grad, expected.grad) < 1e-14
    curves = [
        adaptation_curve(plain_loss(network), leaves(network), episodes, **arguments).loss
        for episodes in (fixed, repeated)
    ]
    torch.testing.assert_close(*curves)
    torch.testing.assert_close(
        curves[0][:, -1].mean(),
        unrolled(plain_loss(network), leaves(network), fixed, RATE, 3).detach(),
        msg="the oracle's own path",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hessian_y": torch.zeros(3, 2, 5)},
            "`hessian_x` and `hessian_y` to hold the same number of examples but got 4 and 5",
        ),
        (
            {"hessian_x": torch.zeros(3, 1, 4, 1, 8, 8)},
            "the same number of inner steps but got .*'hessian_x': 1",
        ),
        (
            {"support_y": torch.zeros(3, 2)},
            r"`support_y` to have at least the dimensions \[tasks, inner steps, examples\]",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    network, episodes = build("mlp"), resampled(2)
    with pytest.raises(ValueError, match=message):
        meta_gradient(
            plain_loss(network),
            leaves(network),
            episodes._replace(**change),
            inner_lr=RATE,
            steps=2,
        )


def test_as_many_support_batches_as_steps_are_asked_for() -> None:
    network, episodes = build("mlp"), resampled(2)
    with pytest.raises(
        ValueError,
        match="Expected `episodes` to hold 3 support batches per task, one per inner step, but got "
        "2",
    ):
        meta_gradient(plain_loss(network), leaves(network), episodes, inner_lr=RATE, steps=3)
    with pytest.raises(
        ValueError,
        match="Expected `steps` to be at most 2, the support batches of a task, but got 3",
    ):
        adaptation_curve(plain_loss(network), leaves(network), episodes, inner_lr=RATE, steps=3)


def test_a_datamodule_draws_different_images_for_every_batch() -> None:
    data = GlyphsDataModule(
        ways=3,
        shots=2,
        queries=4,
        regime="resampling",
        train_steps=3,
        hessian_shots=1,
        meta_batch_size=5,
        test_shots=7,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ResampledEpisodes)
    assert [list(tensor.shape[:-3]) for tensor in batch[::2]] == [[5, 3, 6], [5, 3, 3], [5, 12]]
    assert batch.support_y[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 3
    assert batch.hessian_y[0].tolist() == [[0, 1, 2]] * 3
    for task in range(5):
        images = torch.cat([x[task].flatten(0, -4) for x in batch[::2]])
        assert len(images.flatten(1).unique(dim=0)) == 3 * (3 * (2 + 1) + 4), (
            "every image is used once"
        )
    evaluated = next(iter(data.val_dataloader()))
    assert isinstance(evaluated, Episodes)
    assert evaluated.support_x.shape[1] == 3 * 7
    floats = data.on_after_batch_transfer(batch, 0)
    assert all(x.is_floating_point() and x.max() <= 1 for x in floats[::2])


def test_a_split_too_small_for_fresh_batches_is_refused() -> None:
    data = GlyphsDataModule(shots=2, queries=1, regime="resampling", train_steps=5)
    with pytest.raises(
        ValueError,
        match=r"train_steps x \(shots \+ hessian_shots\) \+ queries of split 'train' \(5 x \(2 \+ "
        r"2\) \+ 1\) to be at most 20",
    ):
        data.setup("fit")
    with pytest.raises(
        ValueError, match="Expected `regime` to be 'finite_sum' or 'resampling' but got 'fresh'"
    ):
        GlyphsDataModule(regime="fresh")


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, HFMAML])
@pytest.mark.parametrize("batch_norm", ["batch", "support", "running"])
def test_one_sgd_step_under_a_trainer_is_the_meta_gradient(
    tmp_path: Path,
    algorithm: type[MAML],
    batch_norm: str,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    tasks = "loop"
    if device.type == "cpu":
        request.getfixturevalue("two_threads")
        tasks = "threads"
    network, episodes = build("conv_batch_norm"), resampled(2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    functional = FunctionalNetwork(
        build("conv_batch_norm"), "support" if batch_norm == "support" else "batch"
    )

    def query_loss(w: Params, task: ResampledEpisodes) -> Tensor:
        statistics_of = task.support_x[0] if batch_norm == "support" else None
        return F.cross_entropy(
            functional(w, task.query_x, statistics_of=statistics_of), task.query_y
        )

    expected = meta_gradient(
        lambda w, x, y: F.cross_entropy(functional(w, x), y),
        functional.params,
        episodes,
        inner_lr=RATE,
        steps=2,
        curvature=algorithm.curvature,
        query_loss=query_loss,
        # finite differences magnify the rounding of another number of threads in a convolution
        tasks=tasks,
    ).grad
    module = algorithm(
        network,
        inner_lr=RATE,
        train_steps=2,
        optimizer=lambda p: torch.optim.SGD(p, 1.0),
        batch_norm=batch_norm,
        tasks=tasks,
    )
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    trainer = Trainer(
        default_root_dir=tmp_path, **on_device(), max_epochs=1, precision="64-true", **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader([episodes], batch_size=None))
    moved = {name: before[name] - p.detach() for name, p in network.named_parameters()}
    assert relative_error(moved, expected) < 1e-12
    assert {"train/loss", "train/loss_before", "train/accuracy"} <= set(trainer.callback_metrics)


def test_training_resampled_from_a_config(tmp_path: Path) -> None:
    command = run(
        [
            "fit",
            f"--config={CONFIGS / 'glyphs_hfmaml.yaml'}",
            "--data.regime=resampling",
            "--data.train_steps=2",
            "--data.hessian_shots=1",
            "--data.shots=2",
            "--model.train_steps=2",
            "--trainer.fast_dev_run=true",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert command.trainer.global_step == 1
