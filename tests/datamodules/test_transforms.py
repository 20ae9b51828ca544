"""Transforms of whole episodes on the device."""

from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

from helpers.folders import CONFIGS
from helpers.random_numbers import drawn_on_cpu
from helpers.trainers import on_device
from lightning_maml import FOMAML, Conv4, Episodes, ResampledEpisodes
from lightning_maml.cli import main, run
from lightning_maml.datamodules import EpisodeTransforms, GlyphsDataModule
from lightning_maml.datamodules.transforms import STATISTICS


def places(*leading: int, size: int = 12) -> Tensor:
    """Images of three channels whose pixels say where they were."""
    grid = torch.arange(size * size).view(1, size, size).expand(3, size, size) / size**2
    return grid.expand(*leading, 3, size, size)


def episodes(tasks: int = 6) -> Episodes:
    labels = torch.zeros(tasks, 4, dtype=torch.long)
    return Episodes(places(tasks, 4), labels, places(tasks, 4), labels)


def corners(images: Tensor) -> list[float]:
    return images[..., 0, 0, 0].flatten().tolist()


def test_one_draw_per_task_moves_all_its_images_alike() -> None:
    torch.manual_seed(0)
    moved = EpisodeTransforms(train=[v2.RandomCrop(4)], vary="task")(episodes(), training=True)
    assert moved.support_x.shape == (6, 4, 3, 4, 4)
    by_task = [set(corners(moved.support_x[t])) | set(corners(moved.query_x[t])) for t in range(6)]
    assert all(len(places_) == 1 for places_ in by_task)
    assert len(set.union(*by_task)) > 3


def test_one_draw_per_image_moves_each_on_its_own() -> None:
    torch.manual_seed(0)
    moved = EpisodeTransforms(train=[v2.RandomCrop(4)], vary="image")(episodes(), training=True)
    assert all(len(set(corners(moved.support_x[t]))) > 1 for t in range(6))
    assert len(set(corners(moved.support_x)) | set(corners(moved.query_x))) > 20


def test_testing_has_its_own_transforms() -> None:
    transforms = EpisodeTransforms(train=[v2.RandomCrop(4)], test=[v2.CenterCrop(6)])
    tested = transforms(episodes(), training=False)
    assert torch.equal(tested.query_x, places(6, 4)[..., 3:9, 3:9])
    assert transforms(episodes(), training=True).query_x.shape == (6, 4, 3, 4, 4)
    untouched = episodes()
    assert EpisodeTransforms()(untouched, training=True) is untouched


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),  # as torchvision documents them
        # 120.396 / 255 and so on
        ("metaoptnet", [0.47214, 0.45331, 0.40996], [0.27719, 0.26775, 0.28449]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_named_statistics_normalise_images(
    name: str, mean: list[float], std: list[float], training: bool
) -> None:
    normalised = EpisodeTransforms(normalize=name)(episodes(), training)
    expected = (places(6, 4) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert (normalised.support_x - expected).abs().max() < 1e-4


def noise(tasks: int = 3, dtype: torch.dtype = torch.float32) -> ResampledEpisodes:
    """Images of noise, in two steps, with empty Hessian batches."""
    random = torch.Generator().manual_seed(0)
    labels = torch.zeros(tasks, 2, 4, dtype=torch.long)
    support = drawn_on_cpu(torch.rand, tasks, 2, 4, 3, 12, 10, generator=random).to(dtype)
    query = drawn_on_cpu(torch.rand, tasks, 5, 3, 12, 10, generator=random).to(dtype)
    return ResampledEpisodes(
        support, labels, support[:, :, :0], labels[:, :, :0], query, labels.flatten(1)[:, :5]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["imagenet", "metaoptnet"])
def test_normalising_is_torchvisions_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    batch = noise(dtype=dtype)
    normalised = EpisodeTransforms(normalize=name)(batch, training=True)
    for part, stored in zip(normalised[::2], batch[::2], strict=True):
        assert part.dtype == dtype
        assert torch.equal(part, v2.Normalize(*STATISTICS[name])(stored))


@pytest.mark.parametrize("size", [5, 12, 17])
def test_images_of_all_tasks_are_resized_as_each_of_them_alone(size: int) -> None:
    batch = noise()
    resized = EpisodeTransforms(resize=size)(batch, training=False)
    assert resized.hessian_x.shape == (3, 2, 0, 3, size, size)
    for part, stored in ((resized.support_x, batch.support_x), (resized.query_x, batch.query_x)):
        alone = [resize(image[None], [size, size]) for image in stored.flatten(0, -4)]
        assert torch.equal(part.flatten(0, -4), torch.cat(alone))


def test_statistics_of_a_test_can_be_trained_with() -> None:
    """Tensors that are made in a test cannot be saved for a derivative; these can."""
    batch = noise(dtype=torch.float64)
    batch = Episodes(batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    transforms = EpisodeTransforms(normalize="metaoptnet")
    with torch.inference_mode():
        transforms(batch, training=False)
    images = batch.query_x.requires_grad_()
    (gradient,) = torch.autograd.grad(transforms(batch, training=True).query_x.sum(), images)
    std = torch.tensor(STATISTICS["metaoptnet"][1], dtype=torch.float64)
    assert torch.allclose(gradient, (1 / std)[:, None, None].expand_as(gradient))


@pytest.mark.parametrize("vary", ["image", "task"])
def test_resampled_episodes_are_transformed(vary: str) -> None:
    labels = torch.zeros(2, 3, 4, dtype=torch.long)
    batch = ResampledEpisodes(
        places(2, 3, 4),
        labels,
        places(2, 3, 0),
        labels[:, :, :0],
        places(2, 5),
        torch.zeros(2, 5).long(),
    )
    moved = EpisodeTransforms(
        6, train=[v2.RandomHorizontalFlip(1.0)], vary=vary, normalize="imagenet"
    )(batch, training=True)
    assert [tuple(x.shape) for x in moved[::2]] == [
        (2, 3, 4, 3, 6, 6),
        (2, 3, 0, 3, 6, 6),
        (2, 5, 3, 6, 6),
    ]
    plain = EpisodeTransforms(6, normalize="imagenet")(batch, training=False)
    assert torch.allclose(moved.support_x.flip(-1), plain.support_x, atol=1e-5)


def test_colour_jitter_changes_colours_only_in_training() -> None:
    transforms = EpisodeTransforms(train=[v2.ColorJitter(brightness=(0.2, 0.4))])
    assert transforms(episodes(), training=True).query_x.max() < 0.5
    assert torch.equal(transforms(episodes(), training=False).query_x, episodes().query_x)


@pytest.mark.parametrize("training", [True, False])
def test_images_are_resized_in_training_and_testing(training: bool) -> None:
    resized = EpisodeTransforms(resize=6)(episodes(), training)
    assert resized.query_x.shape == (6, 4, 3, 6, 6)
    blocks = places(6, 4).unfold(-2, 2, 2).unfold(-2, 2, 2).mean((-2, -1))
    assert (resized.query_x - blocks)[..., 1:-1, 1:-1].abs().max() < 1e-6, "a ramp keeps its slope"
    with pytest.raises(ValueError, match="`resize` to be at least 1 but got 0"):
        EpisodeTransforms(resize=0)


@pytest.mark.cpu_only
def test_normalising_gray_images_is_refused() -> None:
    grey = Episodes(*(x[:, :, :1] if x.ndim == 5 else x for x in episodes()))
    with pytest.raises(
        ValueError,
        match=r"images of 3 channels for normalize='imagenet' but got 1; use v2.Normalize instead",
    ):
        EpisodeTransforms(normalize="imagenet")(grey, training=True)


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("argument", "message"),
    [("vary", "'image' or 'task'"), ("normalize", "'none', 'imagenet' or 'metaoptnet'")],
)
def test_unknown_words_are_refused(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` to be {message} but got 'both'"):
        EpisodeTransforms(**{argument: "both"})


@pytest.mark.cpu_only
def test_a_transform_that_is_not_in_a_list_is_refused() -> None:
    with pytest.raises(
        TypeError, match="`train` to be a list of transforms but got Compose; put it in a list"
    ):
        EpisodeTransforms(train=v2.Compose([v2.RandomHorizontalFlip()]))


class Means(Callback):
    """Keeps the means of the images that a module gets."""

    def __init__(self) -> None:
        self.means = {"train": [], "val": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.means["train"].append(float(batch.query_x.mean()))

    def on_validation_batch_start(
        self, trainer, pl_module, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self.means["val"].append(float(batch.query_x.mean()))


class Fill(nn.Module):
    """Images of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self._value)


def test_the_trainer_decides_which_transforms_are_used() -> None:
    data = GlyphsDataModule(
        train_batches=3,
        meta_batch_size=2,
        val_tasks=4,
        transforms=EpisodeTransforms(train=[Fill(0.25)], test=[Fill(0.75)]),
    )
    means = Means()
    trainer = Trainer(
        max_epochs=2,
        **on_device(),
        callbacks=[means],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(FOMAML(Conv4(1, 5, 28, channels=4)), data)
    assert means.means == {"train": [0.25] * 6, "val": [0.75] * 6}, "sanity checking is no training"


YAML = """
data:
  class_path: GlyphsDataModule
  init_args:
    transforms:
      train:
        - {class_path: torchvision.transforms.v2.RandomCrop, init_args: {size: 28, padding: 2}}
        - {class_path: torchvision.transforms.v2.RandomHorizontalFlip}
        - {class_path: torchvision.transforms.v2.ColorJitter, init_args: {brightness: 0.4}}
      test:
        - {class_path: torchvision.transforms.v2.Resize, init_args: {size: [28, 28]}}
      vary: image
"""


@pytest.mark.cpu_only
def test_transforms_can_be_given_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("transforms.yaml").write_text(YAML)
    config = CONFIGS / "glyphs_fomaml.yaml"
    arguments = [
        f"--config={config}",
        "--config=transforms.yaml",
        "--data.transforms.vary=task",
        "--trainer.fast_dev_run=1",
    ]
    cli = run(["fit", *arguments, "--trainer.enable_progress_bar=false"])
    transforms = cli.datamodule.transforms
    assert [type(transform) for transform in transforms.train] == [
        v2.RandomCrop,
        v2.RandomHorizontalFlip,
        v2.ColorJitter,
    ]
    assert (transforms.vary, type(transforms.test[0])) == ("task", v2.Resize)
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--data.transforms.normalise=imagenet"])
