"""tiered-ImageNet: 608 classes of ImageNet in 34 categories, 84 x 84 pixels (Ren et al. 2018)."""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from lightning_maml.datamodules.imagenet.forms import (
    Form,
    Opened,
    Places,
    open_folders,
    split_names,
)
from lightning_maml.datamodules.imagenet.packed_files import open_packed, unpack_npz, unpack_pngs
from lightning_maml.datamodules.imagenet.subset import ImageNetSubset
from lightning_maml.datamodules.images.files import OnCorrupt

NAME = "tiered-ImageNet"


def _open_folders(places: Places, size: int, on_corrupt: OnCorrupt) -> Opened:
    """Open class folders with a cache for each split, as all images together fill the memory."""
    opened = {
        split: open_folders(f"{NAME} {split}", {split: place}, size, on_corrupt)
        for split, place in places.items()
    }

    def prepare() -> None:
        for each in opened.values():
            each.prepare()

    return Opened({split: each.splits[split] for split, each in opened.items()}, prepare)


class TieredImageNetDataModule(ImageNetSubset):
    """Few-shot episodes of tiered-ImageNet, RGB, 84 x 84 pixels.

    608 classes of ImageNet in 34 categories, of which 20 are for training (351 classes, 448,695
    images), 6 for validation (97 classes, 124,261 images) and 8 for testing (160 classes, 206,209
    images), so that the classes of different splits are less alike than in mini-ImageNet.

    The data are looked for in ``root`` and in the folders in it, and may have any of these forms:
    pickles of PNGs (``train_images_png.pkl``) or npz archives (``train_images.npz``), each with
    ``train_labels.pkl``, of Ren et al.; or class folders in ``train``, ``val`` and ``test``. Images
    are decoded once, into ``tiered_imagenet_train_84.pt`` and so on beside them, 16.5 GB in all,
    which takes as much memory as the images of a split, 9.5 GB. Pickles are read without running
    any code that they contain. The npz archives hold blue, green, red; here, they give the colours
    of the pickles.

    Args:
        root: Folder of the data.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a
            warning. A damaged pickle or archive is always an error.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, a split has too few classes or images for its
            episodes, or the files are not what they seem.
        FileNotFoundError: If there is no tiered-ImageNet in ``root``, or there are no labels.
        OSError: If an image cannot be read, or the cache cannot be written.

    Examples:
        >>> from lightning_maml.datamodules import TieredImageNetDataModule
        >>> data = TieredImageNetDataModule("data", ways=5, shots=5)  # reads when training starts
        >>> data.classes
        {'train': 351, 'val': 97, 'test': 160}
    """

    dataset: ClassVar[str] = NAME
    classes: ClassVar[dict[str, int]] = {"train": 351, "val": 97, "test": 160}
    images: ClassVar[dict[str, int]] = {"train": 448_695, "val": 124_261, "test": 206_209}
    authors: ClassVar[str] = "Ren et al. 2018"
    forms: ClassVar[Mapping[str, Form]] = {
        "pickles of PNGs": Form(
            {
                split: (f"{split}_images_png.pkl", f"tiered-imagenet-{split}_images_png.pkl")
                for split in ("train", "val", "test")
            },
            "of Ren et al. 2018, with train_labels.pkl, ...: zenodo.org/record/7978538, "
            "github.com/renmengye/few-shot-ssl-public, or Google Drive "
            "1g1aIDy2Ar_MViF2gDXFYDBTR-HYecV07",
            partial(open_packed, unpack_pngs, NAME),
        ),
        "npz archives": Form(
            split_names("{}_images.npz"),
            "the same unpacked, with train_labels.pkl, ..., as MetaOptNet passes them on: "
            "github.com/kjunelee/MetaOptNet",
            partial(open_packed, unpack_npz, NAME),
        ),
        "class folders": Form(
            split_names("{}", "validation"),
            "holding a folder of images per class",
            _open_folders,
            in_folders=True,
        ),
    }
