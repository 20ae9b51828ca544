"""Episodes of any dataset with labels."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule, splits_of
from lightning_maml.datamodules.class_splits import (
    Shares,
    check_disjoint,
    check_shares,
    split_classes,
)
from lightning_maml.datamodules.images.files import UnsuitableImage, pixels
from lightning_maml.datamodules.messages import first_five
from lightning_maml.datamodules.origins import Label, Origin, Source, origins, source
from lightning_maml.datamodules.remembered import Remembered
from lightning_maml.datamodules.sampler import ClassImages, check_seed
from lightning_maml.errors import UserTypeError, UserValueError


class FewShotDataModule(EpisodicDataModule):
    """Few-shot episodes of datasets with labels, such as torchvision's or Hugging Face's.

    The datasets are map-style ones, and are read into memory once. Items are pairs (image, label),
    or dictionaries with both. PIL images become RGB of ``image_size``; transparent ones are put on
    white, and photographs are turned upright according to their EXIF data. Arrays ``[H, W, C]`` or
    ``[H, W]`` and tensors ``[C, H, W]`` or ``[H, W]`` of bytes are images in 0 .. 255. Arrays and
    tensors of floats, of any shape, become float32.

    The datasets of two splits must not share a class. Two classes are the same if they have the
    same name, or the same label in one dataset that both splits are subsets of (by
    ``torch.utils.data.Subset``, as ``random_split`` makes them). Labels 0, 1, ... of different
    datasets are different classes; if their names are such numbers too, a warning asks whether
    they are.

    Args:
        train: Dataset of the training classes; without ``val`` and ``test``, of all classes, which
            are then divided among the splits at random.
        val: Dataset of the validation classes.
        test: Dataset of the test classes.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        image_size: Height and width that PIL images are resized to, whatever their aspect ratio; by
            default they keep their size.
        image_key: Key of the image in items that are dictionaries.
        label_key: Key of the label in such items.
        shares: Fractions of the classes for training, validation and testing, if ``train`` is the
            only dataset.
        split_seed: Seed of that split.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, datasets share classes, images differ in size or
            have more than 8 bits, labels are -1 beside class names or of mixed kinds, or a split
            has too few classes or images for its episodes.
        TypeError: If a dataset cannot be indexed, or its items are not images with labels.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_maml.datamodules import FewShotDataModule
        >>> images, labels = torch.rand(200, 3, 8, 8), torch.arange(200) % 20
        >>> data = FewShotDataModule(TensorDataset(images, labels), ways=3, shots=1, queries=5)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.query_x.shape
        torch.Size([4, 15, 3, 8, 8])
    """

    def __init__(
        self,
        # not Dataset[Any], for which jsonargparse takes no init_args
        train: Dataset,  # type: ignore[type-arg]
        val: Dataset | None = None,  # type: ignore[type-arg]
        test: Dataset | None = None,  # type: ignore[type-arg]
        *,
        queries: int = 15,
        meta_batch_size: int = 4,
        image_size: int | None = None,
        image_key: str = "image",
        label_key: str = "label",
        shares: Shares = (0.64, 0.16, 0.2),
        split_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(queries=queries, meta_batch_size=meta_batch_size, **options)
        check_shares(shares)
        check_seed("split_seed", split_seed)
        if (val is None) != (test is None):
            raise UserValueError(
                "Expected both `val` and `test`, or neither for a split of the classes of "
                "`train`, but got one of them."
            )
        if image_size is not None and image_size < 1:
            raise UserValueError(f"Expected `image_size` to be at least 1 but got {image_size}.")
        self._datasets_of = {"train": train}
        if val is not None and test is not None:
            self._datasets_of |= {"val": val, "test": test}
        for name, dataset in self._datasets_of.items():
            if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
                raise UserTypeError(
                    f"Expected `{name}` to be a dataset with a length and items by number but got "
                    f"{type(dataset).__name__}."
                )
        self.image_size, self.image_key, self.label_key = image_size, image_key, label_key
        self.shares, self.split_seed = shares, split_seed
        self._read_splits: Remembered[dict[str, LabelledImages]] = Remembered()

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that a stage needs, and check them.

        They must not share a class, and have enough classes and images for their episodes.

        Args:
            stage: Stage of the trainer, such as ``"fit"``; None for all splits.
        """
        for split in splits_of(stage):
            self.class_images(split)
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        if len(self._datasets_of) > 1:
            return self._read(split)
        whole = self._read("train")
        chosen = split_classes(len(whole.members), self.shares, self.split_seed)[split]
        return ClassImages(
            whole.images,
            [whole.members[number] for number in chosen],
            [whole.names[number] for number in chosen],
        )

    def _read(self, name: str) -> ClassImages:
        """Return the images of a dataset, after a check that it shares no class with the others."""
        of_items = self.image_size, self.image_key, self.label_key
        splits = self._read_splits(of_items, dict)
        if name not in splits:
            read = read_dataset(self._datasets_of[name], name, *of_items)
            for other, read_before in splits.items():
                _check_no_shared_class({other: read_before, name: read})
            splits[name] = read
        return splits[name].images

    @override
    def read_by(self) -> tuple[Any, ...]:
        of_items = self.image_size, self.image_key, self.label_key
        return *of_items, *self.shares, self.split_seed


class LabelledImages(NamedTuple):
    """The images of a dataset.

    Attributes:
        images: Its images, and its classes.
        origins: The original datasets and labels of each class.
        has_names: Whether the dataset itself names its classes.
    """

    images: ClassImages
    origins: list[set[Origin]]
    has_names: bool


def _check_no_shared_class(splits: dict[str, LabelledImages]) -> None:
    """Check that two splits share no class of the same original dataset, or of the same name.

    Raises:
        ValueError: If they do.
    """
    cure = "; give the whole dataset as `train` alone, and its classes are shared out"
    one, other = (set[Origin]().union(*split.origins) for split in splits.values())
    first = next(iter(splits.values()))
    shared = [
        name
        for name, origin in zip(first.images.names, first.origins, strict=True)
        if origin & other
    ]
    check_disjoint(dict.fromkeys(splits, shared), "the datasets", cure)
    # Classes are compared by name only across datasets, as one dataset may have two classes of a
    # name; and only if they have names, as each dataset may count its classes from 0.
    one_dataset = {dataset for dataset, _ in one} & {dataset for dataset, _ in other}
    if one_dataset:
        return
    named = {
        name: [of_class for of_class in split.images.names if not of_class.isdigit()]
        for name, split in splits.items()
    }
    check_disjoint(named, "the datasets", cure)
    if all(split.has_names for split in splits.values()):
        _warn_of_shared_numbers({name: split.images.names for name, split in splits.items()})


def _warn_of_shared_numbers(names: dict[str, Sequence[str]]) -> None:
    first, second = names.values()
    shared = [name for name in first if name in second]
    if shared:
        rank_zero_warn(
            f"The datasets {' and '.join(names)} both have classes named {first_five(shared)}: if "
            "these are the same classes, the accuracy is not one on new classes; give the whole "
            "dataset as `train` alone, and its classes are shared out."
        )


def read_dataset(
    dataset: Any, name: str, image_size: int | None, image_key: str, label_key: str
) -> LabelledImages:
    """Read a whole dataset into memory.

    Args:
        dataset: Dataset of pairs (image, label), or of dictionaries.
        name: Name of the dataset, for messages.
        image_size: Height and width to resize PIL images to; None to leave them.
        image_key: Key of the image in dictionaries.
        label_key: Key of the label in dictionaries.

    Raises:
        TypeError: If an item is not an image with a label.
        ValueError: If images differ in shape or type or have more than 8 bits, there are none,
            labels are -1 beside class names or of mixed kinds, or a concatenation merges classes.
    """
    if len(dataset) == 0:
        raise UserValueError(f"Expected `{name}` to hold images but it is empty.")
    images, labels = _read_items(dataset, name, image_size, image_key, label_key)
    _warn_of_random_items(dataset, images, image_size, image_key, label_key)
    rows_of: dict[Label, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label, []).append(row)
    values = _in_order(rows_of, name)
    members = [np.array(rows_of[value]) for value in values]
    sources = [source(dataset, number) for number in range(len(dataset))]
    _check_different(sources, labels, name)

    def label_at(holder: Any, number: int) -> Label:
        which = f"item {number} of {type(holder).__name__}"
        return _label(_item(holder[number], which, image_key, label_key)[1], which)

    members_of_label = dict(zip(values, members, strict=True))
    names = _names(dataset, name, sources, members_of_label, label_key)
    holders = [dataset, *(item.dataset for item in sources if item.as_it_is)]
    return LabelledImages(
        ClassImages(images, members, names),
        origins(sources, labels, members, label_at),
        has_names=any(_class_names(holder, label_key) for holder in holders),
    )


def _in_order(labels: Iterable[Label], name: str) -> list[Label]:
    """Return labels in their order; numbers and strings have none among each other.

    Raises:
        ValueError: If there are both.
    """
    kinds = {isinstance(label, str): label for label in labels}
    if len(kinds) > 1:
        raise UserValueError(
            f"Expected the labels of `{name}` to be whole numbers, or else strings, but got both, "
            f"{kinds[False]!r} and {kinds[True]!r}; make them all the same."
        )
    return sorted(labels)


def _check_different(sources: Sequence[Source], labels: Sequence[Label], name: str) -> None:
    """Check that no item is in a class twice: it could be both support and query.

    It may be in several classes, if each turns it by another angle.
    """
    different = {
        (id(each.dataset), each.number, label) for each, label in zip(sources, labels, strict=True)
    }
    repeated = len(sources) - len(different)
    if repeated:
        raise UserValueError(
            f"Expected `{name}` to hold each item once, as one that is there twice could be both "
            f"support and query, but {repeated} are repeated; give the dataset without "
            "oversampling: every task has as many images of each class anyway."
        )


def _read_items(
    dataset: Any, name: str, image_size: int | None, image_key: str, label_key: str
) -> tuple[Tensor, list[Label]]:
    """Return the images of a dataset, ``[M, ...]``, and their labels."""
    images = torch.empty(0)
    labels: list[Label] = []
    for number in tqdm(range(len(dataset)), desc=f"Reading {name}", unit="image"):
        which = f"item {number} of `{name}`"
        image, label = _item(dataset[number], which, image_key, label_key)
        tensor = _tensor(image, image_size, which)
        if number == 0:
            images = torch.empty(len(dataset), *tensor.shape, dtype=tensor.dtype, device="cpu")
            _say_if_gray(image, name)
        if (tensor.shape, tensor.dtype) != (images.shape[1:], images.dtype):
            cure = "resize them by the dataset's own transform"
            if isinstance(image, Image.Image):
                cure = "give `image_size`"
            raise UserValueError(
                f"Expected all images of `{name}` to be like its first, {images.dtype} "
                f"{list(images.shape[1:])}, but {which} is {tensor.dtype} {list(tensor.shape)}; "
                f"{cure}."
            )
        images[number] = tensor
        labels.append(_label(label, which))
    if images.dtype == torch.uint8 and images.max() == 1:
        rank_zero_warn(
            f"The bytes of `{name}` are all 0 or 1, and become 0 or 1/255, because bytes are "
            "taken for 0 .. 255; give floats instead."
        )
    return images, labels


def _warn_of_random_items(
    dataset: Any, images: Tensor, image_size: int | None, image_key: str, label_key: str
) -> None:
    """Warn where items are other ones when they are read again, as they are read only once."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    count = len(dataset)
    for number in sorted({0, count // 2, count - 1}):
        image, _ = _item(dataset[number], f"item {number}", image_key, label_key)
        again = _tensor(image, image_size, f"item {number}")
        if not torch.equal(again.nan_to_num(), images[number].nan_to_num()):
            rank_zero_warn(
                f"Items of {type(dataset).__name__} change when they are read again, but they are "
                "read only once, in training, validation and test alike; leave random transforms "
                "out of the dataset, and give them to `EpisodeTransforms(train=[...])`."
            )
            break
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


def _names(
    dataset: Any,
    which: str,
    sources: list[Source],
    members: Mapping[Label, np.ndarray],
    label_key: str,
) -> list[str]:
    """Return the name of each class.

    It is the dataset's own; or else that of the original dataset, below subsets and concatenations;
    or else the label.

    Raises:
        ValueError: If a concatenation merges classes of different names, or images have no class.
    """
    own = _class_names(dataset, label_key)
    # what may give an item another label may also give its class another name
    of_original = {
        id(item.dataset): _class_names(item.dataset, label_key) for item in sources if item.as_it_is
    }
    names = []
    merged: list[Label] = []
    for label, rows in members.items():
        if own:
            found = [_name(label, own)]
        else:
            originals = {id(sources[row].dataset) for row in rows}
            found = sorted({_name(label, of_original.get(each, ())) for each in originals})
            if len(originals) > 1 and not any(of_original.get(each) for each in originals):
                merged.append(label)
        has_names = own or any(of_original.get(id(sources[row].dataset)) for row in rows)
        if has_names and isinstance(label, int) and label < 0:
            raise UserValueError(
                f"Expected a class for every image of `{which}` but {len(rows)} have the label "
                f"{label}, for which it has no class name; leave them out, by "
                "torch.utils.data.Subset for instance."
            )
        if len(found) > 1:
            raise UserValueError(
                f"Expected label {label} to be one class in all parts of `{which}` but it is "
                f"{' and '.join(found)}; give the classes of each part labels of their own."
            )
        names += found
    if any(isinstance(label, int) for label in merged):
        rank_zero_warn(
            f"`{which}` joins datasets whose classes have numbers and no names: label {merged[0]} "
            "of each is taken for one class, and so are others; if they are different classes, "
            "give those of each part labels of their own."
        )
    return names


def _name(label: Label, names: Sequence[Any]) -> str:
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names):
        return str(label)
    return str(names[label])


def _class_names(dataset: Any, label_key: str) -> Sequence[Any]:
    """Return the class names by number, as torchvision or Hugging Face keep them, or nothing."""
    features = getattr(dataset, "features", None)
    feature = features.get(label_key) if isinstance(features, Mapping) else None
    names = getattr(feature, "names", None) or getattr(dataset, "classes", None)
    return names if isinstance(names, (list, tuple)) else ()


def _item(item: Any, which: str, image_key: str, label_key: str) -> tuple[Any, Any]:
    if isinstance(item, dict):
        if image_key not in item or label_key not in item:
            raise UserTypeError(
                f"Expected {which} to hold {image_key!r} and {label_key!r} but it holds "
                f"{', '.join(map(repr, item))}; give image_key, label_key."
            )
        return item[image_key], item[label_key]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UserTypeError(
            f"Expected {which} to be a pair (image, label) or a dictionary but got "
            f"{type(item).__name__}."
        )
    return item[0], item[1]


def _say_if_gray(image: Any, name: str) -> None:
    if isinstance(image, Image.Image) and image.mode in ("1", "L"):
        rank_zero_warn(
            f"The images of `{name}` are gray and become RGB, with three channels; for one "
            "channel give the dataset transform=Compose([Grayscale(), PILToTensor()]), for three "
            "without this warning transform=Grayscale(3), all of torchvision.transforms."
        )


def _label(label: Any, which: str) -> Label:
    value = label
    if isinstance(label, (Tensor, np.ndarray, np.generic)) and label.ndim == 0:
        value = label.item()
    if not isinstance(value, (int, str)):
        raise UserTypeError(
            f"Expected the label of {which} to be one whole number or a string but got "
            f"{type(label).__name__}."
        )
    return value


def _tensor(image: Any, image_size: int | None, which: str) -> Tensor:
    if isinstance(image, Image.Image):
        try:
            image = pixels(image, "RGB", image_size)
        except UnsuitableImage as error:
            raise UserValueError(f"Expected {which} to be an image but {error}.") from error
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
        if image.dtype == torch.uint8 and image.ndim == 3:
            image = image.permute(2, 0, 1)  # arrays have their channels last
    if not isinstance(image, Tensor):
        raise _no_image(which, type(image).__name__)
    if image.is_floating_point():
        return image.float()
    if image.dtype != torch.uint8:
        raise _no_image(which, str(image.dtype))
    if image.ndim < 2:
        raise _no_image(
            which, f"{image.ndim}-dimensional bytes; what is no image is given as floats"
        )
    return image[None] if image.ndim == 2 else image  # gray: one channel


def _no_image(which: str, got: str) -> TypeError:
    return UserTypeError(
        f"Expected the image of {which} to be a PIL image, or an array or tensor of bytes or "
        f"floats, but got {got}."
    )
