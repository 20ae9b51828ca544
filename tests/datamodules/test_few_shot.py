"""Episodes of any dataset with labels."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from torchvision.datasets import FakeData
from torchvision.transforms.v2 import Compose, Grayscale, PILToTensor, ToDtype, ToImage

from helpers.trainers import on_device
from lightning_maml import MAML, MLP
from lightning_maml.datamodules import (
    ClassImages,
    EpisodeTransforms,
    EpisodicDataModule,
    FewShotDataModule,
)
from lightning_maml.datamodules.few_shot import read_dataset

pytestmark = pytest.mark.cpu_only  # datasets are read

SPLITS = ("train", "val", "test")


class Items(Dataset):
    """A list as a dataset."""

    def __init__(self, items: list) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int):
        return self._items[number]


def tensors(classes: range = range(4), count: int = 6) -> TensorDataset:
    """Images [3, 8, 8] of bytes; each says its class and number."""
    labels = torch.tensor(list(classes)).repeat(count)
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 1, 1, 1] = labels, torch.arange(len(labels))
    return TensorDataset(images, labels)


def datamodule(*datasets, **arguments) -> FewShotDataModule:
    return FewShotDataModule(
        *datasets, **({"ways": 2, "shots": 1, "queries": 2, "meta_batch_size": 3} | arguments)
    )


def test_three_datasets_are_the_three_splits() -> None:
    module = datamodule(tensors(range(4)), tensors(range(4, 6)), tensors(range(6, 9)))
    module.setup()
    seen = {split: set(module.class_images(split).images[:, 0, 0, 0].tolist()) for split in SPLITS}
    assert seen == {"train": {0, 1, 2, 3}, "val": {4, 5}, "test": {6, 7, 8}}
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        batch = next(iter(loader))
        assert batch.query_x.shape == (3, 4, 3, 8, 8)
        for t in range(3):
            for label in range(2):
                parts = (
                    batch.support_x[t][batch.support_y[t] == label],
                    batch.query_x[t][batch.query_y[t] == label],
                )
                assert len({int(image[0, 0, 0]) for part in parts for image in part}) == 1, (
                    "one class per label"
                )
                assert len({int(image[1, 1, 1]) for part in parts for image in part}) == 3, (
                    "different images"
                )


def test_one_dataset_is_split_by_class() -> None:
    module = datamodule(tensors(range(25)), ways=3)
    module.setup()
    seen = [
        {
            int(module.class_images(split).images[rows[0], 0, 0, 0])
            for rows in module.class_images(split).members
        }
        for split in SPLITS
    ]
    assert [len(classes) for classes in seen] == [16, 4, 5]
    assert len(set.union(*seen)) == 25


def test_torchvision_datasets_of_pil_images_are_resized() -> None:
    data, *others = (
        FakeData(size=60, image_size=(3, 20, 24), num_classes=5, random_offset=60 * split)
        for split in range(3)
    )
    module = datamodule(data, *others, image_size=16)
    module.setup("fit")
    assert next(iter(module.train_dataloader())).support_x.shape == (3, 2, 3, 16, 16)
    number = 7
    image, label = data[number]
    expected = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS))
    read = module.class_images("train")
    assert np.array_equal(read.images[number].permute(1, 2, 0), expected)
    assert number in read.members[int(label)]


def test_torchvision_datasets_of_floats_are_taken_as_they_are() -> None:
    floats = Compose([ToImage(), ToDtype(torch.float32, scale=True)])
    module = datamodule(
        *(
            FakeData(size=60, image_size=(3, 20, 24), num_classes=5, transform=floats)
            for _ in range(3)
        )
    )
    module.setup("fit")
    batch = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert batch.query_x.shape == (3, 4, 3, 20, 24)
    assert 0.9 < batch.query_x.max() <= 1, "floats are taken as they are"


def test_hugging_face_datasets_are_read_by_their_keys() -> None:
    """With the interface of ``datasets.Dataset``: items are dictionaries, features have names."""

    class Names:
        names = ("cat", "dog", "owl")

    class HuggingFace(Items):
        features = {"img": object(), "fine_label": Names()}  # noqa: RUF012

    items = [
        {"img": Image.new("L", (10, 12), 20 * number), "fine_label": number % 3}
        for number in range(12)
    ]
    module = datamodule(
        HuggingFace(items),
        image_key="img",
        label_key="fine_label",
        ways=2,
        queries=3,
        shares=(0.34, 0.33, 0.33),
    )
    images = {split: module.class_images(split) for split in SPLITS}
    assert sorted(name for read in images.values() for name in read.names) == ["cat", "dog", "owl"]
    read = images["train"]
    assert read.images.shape == (12, 3, 12, 10)
    assert int(read.images[4].unique()) == 80
    with pytest.raises(
        TypeError,
        match="item 0 of `train` to hold 'image' and 'label' but it holds 'img', 'fine_label'; "
        "give image_key",
    ):
        datamodule(HuggingFace(items)).class_images("train")


def test_labels_without_a_name_are_named_by_their_number() -> None:
    class Named(Items):
        classes = ("cat", "dog")

    data = Named([(np.full((8, 8), number, np.uint8), number % 3) for number in range(12)])
    assert datamodule(data, data, data, ways=2).class_images("train").names == ["cat", "dog", "2"]


@pytest.mark.parametrize(
    "label",
    ["owl", 3, np.int64(3), torch.tensor(3), True],
    ids=["str", "int", "numpy", "tensor", "bool"],
)
def test_labels_may_be_of_any_kind(label) -> None:
    other = {"owl": "cat", True: False}.get(label if isinstance(label, (str, bool)) else None, 0)
    data = Items([(np.full((8, 8), 100, np.uint8), label), (np.zeros((8, 8), np.uint8), other)] * 4)
    read = datamodule(data, data, data).class_images("train")
    assert [rows.tolist() for rows in read.members] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert read.images.shape == (8, 1, 8, 8), "grey arrays have one channel"


def test_arrays_of_colour_images_are_height_width_channels() -> None:
    array = np.random.RandomState(0).randint(0, 256, (9, 7, 3)).astype(np.uint8)
    read = datamodule(*[Items([(array, 0), (array, 1)] * 3)] * 3).class_images("train")
    assert np.array_equal(read.images[0].permute(1, 2, 0), array)


def test_floats_of_any_precision_become_single() -> None:
    for array in (np.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.5, dtype=torch.float16)):
        assert (
            datamodule(*[Items([(array, 0), (array, 1)] * 3)] * 3)
            .class_images("train")
            .images.dtype
            == torch.float32
        )


def vectors() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        centres = torch.randn(30, 16, generator=generator)
        labels = torch.arange(30).repeat(12)
        noise = torch.randn(len(labels), 16, generator=generator)
    return TensorDataset(centres[labels] + 0.3 * noise, labels)


@pytest.mark.fits
def test_feature_vectors_can_be_trained_on() -> None:
    data = vectors()
    module = datamodule(data, ways=5, queries=5, train_batches=100, val_tasks=4, test_tasks=40)
    model = MAML(MLP(16, 5, activation="gelu"), inner_lr=0.5, train_steps=2)
    trainer = Trainer(
        max_epochs=1,
        **on_device(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, module)
    trainer.test(model, module, verbose=False)
    assert trainer.callback_metrics["test/accuracy"] > 0.8


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "`train` to hold images but it is empty"),
        (
            [torch.zeros(3)],
            TypeError,
            r"item 0 of `train` to be a pair \(image, label\) or a dictionary but got Tensor",
        ),
        (
            [(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 8), 0)],
            ValueError,
            (
                r"like its first, torch.float32 \[3, 8, 8\], but item 1 of `train` is "
                r"torch.float32 \[3, 9, 8\]; resize them by"
            ),
        ),
        (
            [(torch.zeros(3, 8, 8), [0, 1])],
            TypeError,
            "the label of item 0 of `train` to be one whole number or a string but got list",
        ),
        (
            [(torch.zeros(3, 8, 8), 1), (torch.zeros(3, 8, 8), "1")],
            ValueError,
            "labels of `train` to be whole numbers, or else strings, but got both, 1 and '1'",
        ),
        (
            [(torch.zeros(3, 8, 8), torch.zeros(2))],
            TypeError,
            "one whole number or a string but got Tensor",
        ),
        (
            [(torch.zeros(3, 8, 8).long(), 0)],
            TypeError,
            "the image of item 0 of `train` to be a PIL image, .* but got torch.int64",
        ),
        (
            [("cat.jpg", 0)],
            TypeError,
            "the image of item 0 of `train` to be a PIL image, .* but got str",
        ),
        (
            [(Image.new("L", (3, 4)), 0), (Image.new("L", (4, 4)), 0)],
            ValueError,
            "give `image_size`",
        ),
        (
            [(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 8, 8).byte(), 0)],
            ValueError,
            r"but item 1 of `train` is torch.uint8 \[3, 8, 8\]",
        ),
    ],
)
def test_unsuitable_items_are_refused(items: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        datamodule(*[Items(items)] * 3).class_images("train")


def test_arguments_that_are_no_datasets_are_refused() -> None:
    with pytest.raises(
        TypeError,
        match="`train` to be a dataset with a length and items by number but got generator",
    ):
        datamodule(item for item in ())
    with pytest.raises(ValueError, match="Expected both `val` and `test`, or neither"):
        datamodule(tensors(), tensors())


def named(names: list[str], labels: range) -> Dataset:
    data = Items([(np.full((8, 8), label, np.uint8), label) for label in labels] * 6)
    data.classes = names
    return data


def test_datasets_that_share_named_classes_are_refused() -> None:
    names = ["cat", "dog", "owl", "elk", "bat", "ant"]
    module = datamodule(
        named(names, range(2)), named(names, range(2, 4)), named(names[::-1], range(2))
    )
    module.setup("test")
    datamodule(named(names, range(2)), named(names, range(2, 4)), named(names, range(4, 6))).setup()
    with pytest.raises(
        ValueError,
        match="the splits of the datasets to share no class but 1 are both in train and in test "
        r"\(dog\)",
    ):
        datamodule(
            named(names, range(2)), named(names, range(2, 4)), named(names, range(1, 5))
        ).setup()


class Renumbered(Subset):
    """Some classes of a dataset, numbered from 0, as few-shot code often has it."""

    def __init__(self, dataset: Dataset, classes: list[int]) -> None:
        super().__init__(
            dataset,
            [number for number in range(len(dataset)) if int(dataset[number][1]) in classes],
        )
        self._classes = classes

    def __getitem__(self, number: int):
        image, label = super().__getitem__(number)
        return image, self._classes.index(int(label))

    def __getitems__(self, numbers: list[int]) -> list:
        return [self[number] for number in numbers]


def of_classes(data: Dataset, *classes: int) -> Subset:
    return Subset(data, [number for number in range(len(data)) if int(data[number][1]) in classes])


def test_random_split_is_refused_as_all_splits_have_all_classes() -> None:
    names = ["cat", "dog", "owl", "elk"]
    cure = "give the whole dataset as `train` alone"
    for data, shared in ((named(names, range(4)), "cat, dog, elk, owl"), (tensors(), "0, 1, 2, 3")):
        parts = random_split(data, [8, 8, 8], torch.Generator().manual_seed(0))
        with pytest.raises(
            ValueError,
            match=rf"share no class but 4 are both in train and in val \({shared}\): .*; {cure}",
        ):
            datamodule(*parts, queries=15).setup("fit")


def test_one_class_in_two_subsets_of_a_dataset_is_named() -> None:
    data = named(["cat", "dog", "owl", "elk", "bat", "ant"], range(6))
    nested = Subset(of_classes(data, 3, 4, 5), range(18))
    datamodule(of_classes(data, 0, 1), of_classes(data, 2, 3), of_classes(data, 4, 5)).setup()
    with pytest.raises(
        ValueError, match=r"share no class but 1 are both in train and in test \(elk\)"
    ):
        datamodule(of_classes(data, 0, 3), of_classes(data, 1, 2), nested).setup()
    with pytest.raises(
        ValueError, match=r"both in train and in val \(ant, bat, cat, dog, elk, ...\)"
    ):
        datamodule(data, data, nested).setup()
    with pytest.raises(
        ValueError, match=r"share no class but 3 are both in train and in test \(ant, bat, elk\)"
    ):
        datamodule(
            ConcatDataset([of_classes(data, 0), nested]), of_classes(data, 1, 2), nested
        ).setup()


def test_subsets_that_number_their_classes_anew_are_told_apart_by_the_labels_below() -> None:
    data = tensors(range(6))
    datamodule(Renumbered(data, [0, 1]), Renumbered(data, [2, 3]), Renumbered(data, [4, 5])).setup()
    with pytest.raises(ValueError, match=r"share no class but 1 are both in val and in test \(1\)"):
        datamodule(
            Renumbered(data, [0, 1]), Renumbered(data, [2, 3]), Renumbered(data, [3, 5])
        ).setup()


def test_one_dataset_may_have_two_classes_of_a_name_in_two_splits() -> None:
    data = named(["crane", "dog", "owl", "elk", "crane", "ant"], range(6))
    module = datamodule(of_classes(data, 0, 1), of_classes(data, 2, 3), of_classes(data, 4, 5))
    module.setup()
    assert [list(module.class_images(split).names) for split in SPLITS] == [
        ["crane", "dog"],
        ["owl", "elk"],
        ["crane", "ant"],
    ]


def test_a_concatenation_that_merges_classes_is_refused() -> None:
    data = ConcatDataset([named(["cat", "dog"], range(2)), named(["owl", "dog"], range(2))])
    with pytest.raises(
        ValueError,
        match="label 0 to be one class in all parts of `train` but it is cat and owl; give the "
        "classes of each",
    ):
        datamodule(data).class_images("train")


def test_gray_pil_images_become_rgb_with_a_warning_and_as_tensors_keep_one_channel() -> None:
    transform = Compose([Grayscale(), PILToTensor()])
    for mode in ("L", "1"):
        images = [
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert(mode)
            for _ in range(12)
        ]
        with pytest.warns(
            UserWarning,
            match=r"of `train` are gray and become RGB.*transform=Compose\(\[Grayscale\(\), "
            r"PILToTensor\(\)\]",
        ):
            read = datamodule(
                Items([(image, number % 3) for number, image in enumerate(images)])
            ).class_images("train")
        assert read.images.shape == (12, 3, 8, 8)
        one = datamodule(
            Items([(transform(image), number % 3) for number, image in enumerate(images)])
        ).class_images("train")
        assert torch.equal(one.images, read.images[:, :1])


def test_pil_images_that_would_lose_what_they_show_are_named() -> None:
    data = Items([(Image.new("RGB", (8, 8)), 0), (Image.new("I;16", (8, 8)), 1)])
    with pytest.raises(
        ValueError,
        match="Expected item 1 of `train` to be an image but pixels of mode I;16 have more than 8 "
        "bits",
    ):
        datamodule(data).class_images("train")


@pytest.mark.parametrize("of_16_bits", [True, False])
def test_colours_of_16_bits_are_refused_before_pillow_cuts_them_off(
    tmp_path: Path, of_16_bits: bool
) -> None:
    bytes_of_a_colour = b"\x00\xc8" if of_16_bits else b"\xc8"
    largest = 65535 if of_16_bits else 255
    (tmp_path / "deep.ppm").write_bytes(b"P6 8 8 %d\n" % largest + bytes_of_a_colour * (8 * 8 * 3))

    class Photographs(Items):
        def __getitem__(self, number: int):
            return Image.open(tmp_path / "deep.ppm"), super().__getitem__(number)

    data = Photographs([0, 0, 1, 1])
    if not of_16_bits:
        assert read_dataset(data, "train", None, "image", "label").images.images.unique() == 200
        return
    with pytest.raises(ValueError, match="its colours have more than 8 bits; convert them to 8"):
        read_dataset(data, "train", None, "image", "label")


def test_images_without_a_class_are_refused() -> None:
    """As STL10's unlabelled images and unlabelled splits of Hugging Face have the label -1."""

    class Partly(Items):
        classes = ("cat", "dog")

    data = Partly([(torch.rand(3, 8, 8), number % 3 - 1) for number in range(12)])
    with pytest.raises(ValueError, match="every image of `train` but 4 have the label -1, for whi"):
        datamodule(data, data, data).class_images("train")
    with pytest.raises(ValueError, match="every image of `train` but 4 have the label -1, for whi"):
        datamodule(Subset(data, range(12)), data, data).class_images("train")


def test_large_numbers_are_different_labels() -> None:
    labels = [2**63 + number for number in range(4)] + [0]
    data = Items([(torch.rand(3, 8, 8), label) for label in labels * 3])
    read = datamodule(data, data, data).class_images("train")
    assert read.names == ["0", *map(str, labels[:4])]
    assert [rows.tolist() for rows in read.members][:2] == [[4, 9, 14], [0, 5, 10]]


def test_classes_of_the_same_name_are_different_classes() -> None:
    """ImageNet, too, has two classes named crane and two named maillot."""
    module = datamodule(named(["crane", "dog"] * 10, range(20)))
    seen = {
        split: [int(images.images[rows[0], 0, 0, 0]) for rows in images.members]
        for split in SPLITS
        if (images := module.class_images(split))
    }
    assert sorted(label for labels in seen.values() for label in labels) == list(range(20))


@pytest.mark.parametrize(
    "odd",
    [
        {"features": torch.zeros(3)},
        {"classes": np.zeros(3)},
        {"classes": [("cat", "tabby"), ("dog",)]},
    ],
)
def test_attributes_that_only_look_like_class_names_are_ignored(odd: dict) -> None:
    data = Items([(np.zeros((8, 8), np.uint8), number % 2) for number in range(12)])
    for name, value in odd.items():
        setattr(data, name, value)
    assert len(datamodule(data).class_images("train").members) > 0


def test_rotations_need_square_images() -> None:
    data = [
        Items([(torch.zeros(3, 8, 9).byte(), number % 4) for number in range(24)]) for _ in range(3)
    ]
    with pytest.raises(
        ValueError,
        match=r"square images \[M, C, H, W\] in split 'train' for rotations='classes' but got "
        r"shape \[24, 3, 8, 9\]",
    ):
        datamodule(*data, rotations="classes").setup("fit")


def test_an_item_that_is_there_twice_is_refused() -> None:
    """It could be both support and query."""
    repeated = Subset(tensors(), [*range(24), *range(12)])
    with pytest.raises(ValueError, match=r"`train` to hold each item once.* but 12 are repeated"):
        datamodule(repeated).setup("fit")


class Turned(Subset):
    """Each class twice: as it is, and turned by 180 degrees, which is a class of its own."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset, [*range(len(dataset))] * 2)

    def __getitem__(self, number: int):
        image, label = super().__getitem__(number)
        is_turned = number >= len(self.dataset)
        return (image.flip(1, 2), label + 4) if is_turned else (image, label)

    def __getitems__(self, numbers: list[int]) -> list:
        return [self[number] for number in numbers]


def test_an_item_may_be_of_two_classes_that_show_it_otherwise() -> None:
    data = datamodule(Turned(tensors()), shares=(0.5, 0.25, 0.25))
    data.setup()
    assert sum(len(data.class_images(split).members) for split in SPLITS) == 8


class Changing(Items):
    def __getitem__(self, number: int):
        image, label = super().__getitem__(number)
        return image + torch.rand(()), label


def test_items_that_change_when_they_are_read_again_are_pointed_out() -> None:
    items = [(torch.rand(3, 8, 8), number % 6) for number in range(36)]
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Items of Changing change when they are read again"):
        datamodule(Changing(items), shares=(0.4, 0.3, 0.3)).setup("fit")
    after = torch.rand(())
    torch.manual_seed(0)
    for _ in range(36):
        torch.rand(())
    assert torch.equal(after, torch.rand(())), "the look leaves the random numbers as they are"


def test_numbers_that_are_missing_are_no_change(recwarn: pytest.WarningsRecorder) -> None:
    items = [(torch.full((1, 4, 4), torch.nan), number % 6) for number in range(36)]
    datamodule(Items(items), shares=(0.4, 0.3, 0.3)).setup("fit")
    assert not [each for each in recwarn if "change when they are read" in str(each.message)]


def test_numbered_classes_of_a_concatenation_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="label 0 of each is taken for one class, and so are othe"):
        datamodule(ConcatDataset([tensors(), tensors(range(3))]), tensors(), tensors()).setup("fit")


class Named(Items):
    def __init__(self, names: list[str]) -> None:
        super().__init__([(torch.rand(3, 8, 8), number % len(names)) for number in range(90)])
        self.classes = names


@pytest.mark.parametrize("digits_first", [False, True])
def test_names_are_compared_beside_digits(digits_first: bool) -> None:
    names = ["0", "1", "A"] if digits_first else ["A", "0", "1"]
    with pytest.raises(ValueError, match=r"share no class but 1 are both in .*\(A\)"):
        datamodule(Named(names), Named(names), Named(["x", "y"])).setup("fit")


def test_attributes_that_are_set_between_runs_count() -> None:
    data = datamodule(tensors(), tensors(), tensors(count=9))
    data.setup()
    sizes = []
    for shots in (1, 3):
        data.test_shots = shots
        sizes.append(next(iter(data.test_dataloader())).support_x.shape[1])
    assert sizes == [2, 6]
    one = next(iter(data.train_dataloader()))
    data.seed = 1
    assert not torch.equal(next(iter(data.train_dataloader())).support_x, one.support_x)


def test_settings_of_images_and_splits_that_are_set_between_runs_count() -> None:
    data = datamodule(tensors(range(20)), shares=(0.5, 0.25, 0.25))
    data.setup()
    first = data.class_fingerprints("test")
    data.split_seed = 1
    data.setup()
    assert data.class_fingerprints("test").keys() != first.keys()
    data.split_seed = 0
    data.setup()
    assert data.class_fingerprints("test").keys() == first.keys()
    data.shares = (0.25, 0.25, 0.5)
    data.setup()
    assert len(data.class_fingerprints("test")) > len(first)

    photographs = Items([(Image.new("RGB", (12, 10)), number % 20) for number in range(80)])
    data = datamodule(photographs, image_size=8)
    for size in (8, 6):
        data.image_size = size
        data.setup()
        assert next(iter(data.test_dataloader())).query_x.shape[-2:] == (size, size)


def test_numbers_as_names_may_be_the_same_classes() -> None:
    numbers = Named(["0", "1", "2"])
    with pytest.warns(UserWarning, match="train and val both have classes named 0, 1, 2: if these"):
        datamodule(numbers, Named(["0", "1", "2"]), numbers).setup("fit")
    with warnings.catch_warnings():  # labels without names are counted in each dataset
        warnings.simplefilter("error")
        datamodule(tensors(), tensors(), tensors()).setup("fit")


def test_bits_are_pointed_out() -> None:
    bits = TensorDataset(torch.randint(2, (90, 1, 8, 8), dtype=torch.uint8), torch.arange(90) % 15)
    with pytest.warns(UserWarning, match="bytes of `train` are all 0 or 1, and become 0 or 1/255"):
        datamodule(bits, test_ways=2).setup("fit")


def test_vectors_of_bytes_are_refused() -> None:
    vectors = TensorDataset(torch.randint(2, (40, 9), dtype=torch.uint8), torch.arange(40) % 4)
    with pytest.raises(TypeError, match="1-dimensional bytes; what is no image is given as floats"):
        datamodule(vectors).setup("fit")


class Folds(EpisodicDataModule):
    """Images that tell the fold."""

    fold = 0

    def class_images(self, split: str) -> ClassImages:
        images = torch.full((40, 1, 2, 2), float(self.fold))
        return ClassImages(images, np.split(np.arange(40), 4))

    def read_by(self) -> tuple[Any, ...]:
        return *super().read_by(), self.fold


def test_images_are_read_again_where_what_decides_them_changed() -> None:
    data = Folds(ways=2, shots=1, queries=1)
    for data.fold in range(3):
        data.setup()
        assert next(iter(data.train_dataloader())).support_x.unique().tolist() == [data.fold]


def test_a_loop_of_ones_own_gets_what_a_trainer_gives() -> None:
    transforms = EpisodeTransforms(train=[lambda x: x + 1], test=[lambda x: x - 1])
    data = datamodule(tensors(), tensors(range(4, 8)), tensors(range(8, 12)), transforms=transforms)
    data.setup()
    stored = next(iter(data.train_dataloader()))
    for training, added in ((True, 1), (False, -1)):
        prepared = data.prepared(stored, training=training)
        assert torch.equal(prepared.query_x, stored.query_x.float() / 255 + added)
