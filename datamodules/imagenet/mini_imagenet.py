"""mini-ImageNet: 100 classes of ImageNet, 600 images each, 84 x 84 pixels.

The classes are those of Vinyals et al. 2016, in the split of Ravi & Larochelle 2017.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

from lightning_maml.datamodules.imagenet.array_files import (
    open_cache_pickle,
    open_category_pickle,
    open_hdf5,
)
from lightning_maml.datamodules.imagenet.csv_lists import list_files
from lightning_maml.datamodules.imagenet.forms import (
    Form,
    Opened,
    Places,
    open_arrays,
    open_files,
    open_folders,
    split_names,
)
from lightning_maml.datamodules.imagenet.subset import ImageNetSubset
from lightning_maml.datamodules.images.files import OnCorrupt

NAME = "mini-ImageNet"


def _open_lists(places: Places, size: int, on_corrupt: OnCorrupt) -> Opened:
    classes = {split: list_files(place, split) for split, place in places.items()}
    return open_files(NAME, classes, places["train"].parent, size, on_corrupt)


class MiniImageNetDataModule(ImageNetSubset):
    """Few-shot episodes of mini-ImageNet, RGB, 84 x 84 pixels.

    There is no official download. The data are looked for in ``root`` and in the folders in it, and
    may have any of these forms: CSV lists of Ravi & Larochelle or of easyfsl beside the images;
    class folders in ``train``, ``val`` and ``test``; cache pickles of Ren et al.; category-split
    pickles of Gidaris & Komodakis; or torchmeta's HDF5 files. Image files are decoded once, into
    ``mini_imagenet_84.pt`` beside them; arrays in pickles are mapped into memory as they are.
    Pickles are read without running any code that they contain.

    Args:
        root: Folder of the data.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a
            warning.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.

    Raises:
        ValueError: If an argument is out of range, a split has too few classes or images for its
            episodes, or the files are not what they seem: a web page in place of a pickle, other
            classes or arrays than mini-ImageNet's, or the same classes in several splits.
        FileNotFoundError: If there is no mini-ImageNet in ``root``, or images of a list are
            missing.
        OSError: If an image cannot be read, or the cache cannot be written.
        ModuleNotFoundError: If the data are HDF5 files and h5py is not installed.

    Examples:
        >>> from lightning_maml.datamodules import MiniImageNetDataModule
        >>> data = MiniImageNetDataModule("data", ways=5, shots=5)  # reads when training starts
        >>> data.queries, data.meta_batch_size
        (15, 4)
    """

    dataset: ClassVar[str] = NAME
    classes: ClassVar[dict[str, int]] = {"train": 64, "val": 16, "test": 20}
    images: ClassVar[dict[str, int]] = {"train": 38_400, "val": 9_600, "test": 12_000}
    authors: ClassVar[str] = "Ravi & Larochelle 2017"
    forms: ClassVar[Mapping[str, Form]] = {
        "cache pickles": Form(
            split_names("mini-imagenet-cache-{}.pkl", "validation"),
            "of Ren et al. 2018, as torchmeta and learn2learn download them: "
            "zenodo.org/record/7978538, or Google Drive 16V_ZlkW4SsnNDtnGmaBRq2OoPmUOc5mY",
            partial(open_arrays, open_cache_pickle),
        ),
        "category-split pickles": Form(
            split_names("miniImageNet_category_split_{}.pickle")
            | {"train": ("miniImageNet_category_split_train_phase_train.pickle",)},
            "of Gidaris & Komodakis 2018 and MetaOptNet: github.com/kjunelee/MetaOptNet, or Google "
            "Drive 12V7qi-AjrYi6OoJdYcN_k502BM_jcP8D",
            partial(open_arrays, open_category_pickle),
        ),
        "HDF5 files": Form(
            split_names("{}_data.hdf5"),
            "as torchmeta writes them, in its folder miniimagenet",
            partial(open_arrays, open_hdf5),
        ),
        "CSV lists": Form(
            split_names("{}.csv"),
            "with filename,label (Ravi & Larochelle 2017: "
            "github.com/twitter-research/meta-learning-lstm) or class_name,image_name (easyfsl: "
            "github.com/sicara/easy-few-shot-learning), and the images, of ILSVRC 2012 or copies "
            "of 84 x 84 pixels, in images/",
            _open_lists,
        ),
        "class folders": Form(
            split_names("{}", "validation"),
            "holding a folder of images per class, as most code makes of the above",
            partial(open_folders, NAME),
            in_folders=True,
        ),
    }
