"""Pictures show what the model predicted, and are left out where there is nothing to show."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from helpers.networks import build, make_episodes
from helpers.trainers import on_device, trainer_in_double
from lightning_maml import MAML, MLP, Episodes, ResampledEpisodes
from lightning_maml.algorithms.metrics import Estimate
from lightning_maml.callbacks import (
    EpisodePictures,
    LossMapPicture,
    draw_adaptation,
    draw_curve,
    draw_episode,
    draw_loss_map,
    loss_map,
)


def test_an_episode_shows_every_class_with_its_predictions_before_and_after() -> None:
    task = Episodes(*(tensor[0] for tensor in make_episodes(tasks=1, shots=2, queries=3)))
    before, after = torch.zeros(9, dtype=torch.long), task.query_y.clone()
    after[-1] = 0
    figure = draw_episode(task, torch.stack([before, after]), max_classes=5, max_images=5)
    titles = [(axes.get_title(), axes.title.get_color()) for axes in figure.axes]
    assert len(figure.axes) == 3 * (2 + 3)
    assert titles[:5] == [("class 0", "black")] * 2 + [("0 → 0", "tab:green")] * 3
    assert titles[-1] == ("0 → 0", "tab:red")
    small = draw_episode(task, torch.stack([before, after]), max_classes=2, max_images=1)
    assert len(small.axes) == 2 * (1 + 1)


def test_normalised_images_are_shown_within_their_range() -> None:
    task = Episodes(*(tensor[0] for tensor in make_episodes(tasks=1, shots=1, queries=1)))
    colours = (task.support_x.expand(-1, 3, -1, -1) - 0.45) / 0.25
    figure = draw_episode(
        task._replace(support_x=colours), torch.zeros(1, 3).long(), max_classes=1, max_images=1
    )
    shown = torch.tensor(figure.axes[0].images[0].get_array())
    assert 0 <= shown.min() < shown.max() <= 1
    stretched = (colours[0] - colours[0].min()) / (colours[0].max() - colours[0].min())
    torch.testing.assert_close(shown, stretched.permute(1, 2, 0).float(), atol=1e-6, rtol=0)


def test_the_adaptation_curve_shows_means_and_intervals() -> None:
    figure = draw_adaptation(
        Estimate(torch.tensor([0.2, 0.8, 0.9]), torch.tensor([0.02, 0.01, 0.01]), 600), "accuracy"
    )
    axes = figure.axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([0.2, 0.8, 0.9])
    assert axes.get_title() == "600 test tasks"


def test_a_curve_shows_targets_and_predictions_of_the_query_points_in_order() -> None:
    x = torch.tensor([[2.0], [0.0], [1.0]])
    task = Episodes(x[:2], 10 * x[:2], x, 10 * x)
    axes = draw_curve(task, torch.arange(12.0).view(4, 3)).axes[0]
    target, *predicted = axes.lines
    assert target.get_xdata().tolist() == [0, 1, 2]
    assert target.get_ydata().tolist() == [0, 10, 20]
    assert [line.get_ydata().tolist() for line in predicted] == [[1, 2, 0], [4, 5, 3], [10, 11, 9]]
    assert [line.get_label() for line in predicted] == ["before", "after 1 step", "after 3 steps"]
    assert axes.collections[0].get_offsets().tolist() == [[2, 20], [0, 0]]


def test_a_curve_without_adaptation() -> None:
    x = torch.rand(3, 1)
    axes = draw_curve(Episodes(x, x, x, x), torch.zeros(1, 3)).axes[0]
    assert [line.get_label() for line in axes.lines] == ["target", "before"]


def run_test(module: MAML, episodes: Episodes, folder: Path) -> list[str]:
    episodes = episodes._replace(
        support_x=episodes.support_x.float(), query_x=episodes.query_x.float()
    )
    quiet = {"enable_progress_bar": False, "logger": False, **on_device()}
    Trainer(default_root_dir=folder, callbacks=[EpisodePictures()], **quiet).test(
        module, DataLoader([episodes], batch_size=None), verbose=False
    )
    return sorted(file.name for file in folder.glob("*.png"))


def test_pictures_are_written_where_there_is_something_to_show(tmp_path: Path) -> None:
    assert run_test(
        MAML(build("mlp").float(), test_steps=2), make_episodes(), tmp_path / "images"
    ) == ["adaptation.png", "episode.png"]
    vectors = make_episodes()
    vectors = vectors._replace(
        support_x=vectors.support_x.flatten(2), query_x=vectors.query_x.flatten(2)
    )
    assert run_test(MAML(MLP(64, 3), test_steps=2), vectors, tmp_path / "vectors") == [
        "adaptation.png"
    ]
    targets = Episodes(
        vectors.support_x, vectors.support_x[:, :, :1], vectors.query_x, vectors.query_x[:, :, :1]
    )
    targets = Episodes(*(tensor.float() for tensor in targets))
    assert run_test(
        MAML(MLP(64, 1), loss=torch.nn.MSELoss(), test_steps=2), targets, tmp_path / "targets"
    ) == ["adaptation.png"]


def test_regression_with_one_number_in_and_one_out_is_drawn_as_a_curve(tmp_path: Path) -> None:
    x = torch.rand(2, 4, 1)
    for name, y in (("column", x.sin()), ("row", x.sin()[..., 0])):
        model = MAML(
            MLP(1, 1), loss=lambda outputs, y: (outputs.flatten() - y.flatten()).square().mean()
        )
        assert run_test(model, Episodes(x, y, x, y), tmp_path / name) == [
            "adaptation.png",
            "episode.png",
        ]
    gaussian = MAML(
        MLP(1, 2),
        loss=lambda outputs, y: F.gaussian_nll_loss(outputs[:, :1], y, outputs[:, 1:].exp()),
    )
    assert run_test(gaussian, Episodes(x, x, x, x), tmp_path / "two") == ["adaptation.png"]


class MeanAndVariance(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, log_variance = self.linear(x).split(1, -1)
        return {"mean": mean, "variance": log_variance.exp()}


def test_several_outputs_are_not_drawn_as_a_curve(tmp_path: Path) -> None:
    def loss(outputs: dict[str, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        return F.gaussian_nll_loss(outputs["mean"], y, outputs["variance"])

    x = torch.rand(2, 4, 1)
    model = MAML(MeanAndVariance(), loss=loss)
    assert run_test(model, Episodes(x, x.sin(), x, x.sin()), tmp_path) == ["adaptation.png"]


def test_a_curve_in_bf16(tmp_path: Path) -> None:
    x = torch.rand(2, 4, 1)
    run = Trainer(
        default_root_dir=tmp_path,
        callbacks=[EpisodePictures()],
        precision="bf16-true",
        enable_progress_bar=False,
        logger=False,
        **on_device(),
    )
    tasks = DataLoader([Episodes(x, x.sin(), x, x.sin())], batch_size=None)
    run.test(MAML(MLP(1, 1), loss=F.mse_loss), tasks, verbose=False)
    assert (tmp_path / "episode.png").exists()


def test_no_picture_is_drawn_of_resampled_tasks(tmp_path: Path) -> None:
    several = ResampledEpisodes(
        *(torch.stack([tensor] * 2, 1) for tensor in make_episodes()[:2] * 2), *make_episodes()[2:]
    )
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        **on_device(),
        "default_root_dir": tmp_path,
        "precision": "64-true",
    }
    run = Trainer(callbacks=[EpisodePictures()], **quiet)
    assert run.test(MAML(build("mlp"), train_steps=2), DataLoader([several], batch_size=None))
    assert list(tmp_path.glob("*.png")) == []


def test_max_classes_below_one_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`max_classes` and `max_images` to be at least 1 but got 0 and 5"
    ):
        EpisodePictures(max_classes=0)


def test_the_loss_map_has_the_losses_of_the_path_at_its_ends(tmp_path: Path) -> None:
    task, module = (
        make_episodes(tasks=1),
        MAML(build("conv_batch_norm"), inner_lr=0.5, test_steps=3, batch_norm="support"),
    )
    found = loss_map(module, task, resolution=5)
    assert found.along.tolist() == pytest.approx([-0.5, 0, 0.5, 1, 1.5])
    assert found.across.tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    query = module.evaluate(task).loss[0].tolist()
    assert found.query[2, [1, 3]].tolist() == pytest.approx([query[0], query[-1]])
    same = Episodes(task.support_x, task.support_y, task.support_x, task.support_y)
    support = module.evaluate(same).loss[0].tolist()
    assert found.support[2, [1, 3]].tolist() == pytest.approx([support[0], support[-1]])
    assert found.path[0].tolist() == [0, 0]
    assert found.path[-1].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert 0.3 < found.in_plane <= 1
    assert loss_map(MAML(build("mlp"), inner_lr=0.5), task, 2).in_plane == pytest.approx(1), (
        "one step is straight"
    )


def test_the_second_axis_of_the_loss_map_is_the_rest_of_the_query_gradient() -> None:
    task, module = make_episodes(tasks=1), MAML(build("mlp"), inner_lr=1e-3)
    # of points 2e-2 of the distance moved from one another
    found = loss_map(module, task, resolution=101)
    support_slope, query_slope = (
        float(values[51, 25] - values[49, 25]) for values in (found.support, found.query)
    )
    assert abs(support_slope) < 1e-3 * query_slope, (
        "the first axis is the support gradient, to which this one is orthogonal"
    )
    assert query_slope > 0


def test_loss_map_has_only_trained_parameters_and_needs_no_vmap() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("mlp")
            self.inner[1].requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert float(x.sum()) != 0  # what vmap refuses
            return self.inner(x)

    module, task = MAML(Peeks(), inner_lr=0.5), make_episodes(tasks=1)
    points = module.inner_path(task).points
    assert [sorted(point) for point in points] == [["inner.3.bias", "inner.3.weight"]] * 2
    assert 0 < loss_map(module, task, 3).in_plane <= 1


def test_a_map_that_cannot_be_drawn_does_not_end_the_test(tmp_path: Path) -> None:
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        **on_device(),
        "default_root_dir": tmp_path,
        "precision": "64-true",
    }
    data = DataLoader([make_episodes()], batch_size=None)
    for module in (
        MAML(build("mlp"), test_steps=0),
        MAML(build("conv_batch_norm"), batch_norm="per_step"),
    ):
        with pytest.warns(UserWarning, match="LossMapPicture draws nothing: Expected"):
            assert Trainer(callbacks=[LossMapPicture(5)], **quiet).test(module, data, verbose=False)
    assert list(tmp_path.glob("*.png")) == []


def test_the_loss_map_of_a_test_is_drawn(tmp_path: Path) -> None:
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        **on_device(),
        "default_root_dir": tmp_path,
        "precision": "64-true",
    }
    data = DataLoader([make_episodes()], batch_size=None)
    Trainer(callbacks=[LossMapPicture(resolution=5)], **quiet).test(
        MAML(build("mlp")), data, verbose=False
    )
    assert [file.name for file in tmp_path.glob("*.png")] == ["loss_map.png"]
    rounded = MAML(build("mlp").bfloat16(), inner_lr=0.5)
    draw_loss_map(
        loss_map(
            rounded,
            Episodes(
                *(t.bfloat16() if t.is_floating_point() else t for t in make_episodes(tasks=1))
            ),
            5,
        )
    )


def test_loss_map_refuses_adaptation_that_does_not_move() -> None:
    with pytest.raises(
        ValueError,
        match="Expected adaptation to move the parameters but it does not; use `test_steps`",
    ):
        loss_map(MAML(build("mlp"), test_steps=0), make_episodes(tasks=1), 5)
    with pytest.raises(ValueError, match="Expected `resolution` to be at least 2 but got 1"):
        LossMapPicture(resolution=1)


class Doubled(torch.autograd.Function):
    """Written in the older way, which ``torch.func`` does not take."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = build("mlp")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(Doubled.apply(x))


@pytest.mark.parametrize(("network", "rate"), [(Doubling, 0.1), (lambda: build("mlp"), 1e200)])
def test_a_map_that_fails_does_not_end_the_test(network: Any, rate: float, tmp_path: Path) -> None:
    loader = DataLoader([make_episodes(tasks=2)], batch_size=None)
    run = trainer_in_double(tmp_path, callbacks=[LossMapPicture(resolution=3)])
    with pytest.warns(UserWarning, match="LossMapPicture draws nothing"):
        run.test(MAML(network(), rate, test_steps=3), loader, verbose=False)
    assert not [*tmp_path.rglob("loss_map.png")]


def test_pictures_of_tasks_given_as_arrays(tmp_path: Path) -> None:
    # of float32, for a trainer in float64
    arrays = [tensor[0].numpy(force=True) for tensor in make_episodes(tasks=1)]
    task = tuple(x.astype("float32") if x.dtype == "float64" else x for x in arrays)
    run = trainer_in_double(tmp_path, callbacks=[EpisodePictures()])
    run.test(MAML(build("mlp")), DataLoader([task, task], collate_fn=list), verbose=False)
    assert (tmp_path / "episode.png").is_file()
