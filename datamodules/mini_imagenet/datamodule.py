"""mini-ImageNet: 100 classes of ImageNet, 600 images each, 84 x 84 pixels.

The classes are those of Vinyals et al. 2016, in the split of Ravi & Larochelle 2017.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.class_splits import check_disjoint
from lightning_maml.datamodules.images.files import OnCorrupt, check_on_corrupt
from lightning_maml.datamodules.mini_imagenet.array_files import Split
from lightning_maml.datamodules.mini_imagenet.layouts import Layout, find_layout
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserValueError

CLASSES = {"train": 64, "val": 16, "test": 20}
"""Number of classes in each split."""


class MiniImageNetDataModule(EpisodicDataModule):
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

    image_size = 84

    def __init__(
        self,
        root: str = "data",
        *,
        queries: int = 15,
        meta_batch_size: int = 4,
        on_corrupt: OnCorrupt = "raise",
        **options: Any,
    ) -> None:
        super().__init__(queries=queries, meta_batch_size=meta_batch_size, **options)
        check_on_corrupt(on_corrupt)
        self.root = Path(root).expanduser()
        self.on_corrupt: OnCorrupt = on_corrupt
        self._layout: Layout | None = None

    def prepare_data(self) -> None:
        """Decode the image files, unless the data are arrays or a cache is there."""
        files = self._found().files
        if files is not None:
            files.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        layout = self._found()
        sizes = (
            f"{split} {len(part.sizes)} classes, {sum(part.sizes.values())} images"
            for split, part in layout.splits.items()
        )
        rank_zero_info(
            f"mini-ImageNet from the {layout.name} in {layout.folder}: {'; '.join(sizes)}"
        )
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        return self._found().splits[split].read()

    def _found(self) -> Layout:
        if self._layout is None:
            layout = find_layout(self.root, self.image_size, self.on_corrupt)
            _check_splits(layout.folder, layout.splits)
            self._layout = layout
        return self._layout


def _check_splits(folder: Path, splits: dict[str, Split]) -> None:
    check_disjoint({split: part.sizes for split, part in splits.items()}, str(folder))
    found = {split: len(part.sizes) for split, part in splits.items()}
    if found != CLASSES:
        expected, got = _in_words(CLASSES), _in_words(found)
        raise UserValueError(
            f"Expected {expected} classes in {folder}, as Ravi & Larochelle 2017 split "
            f"mini-ImageNet, but got {got} classes; for other data take ImageFolderDataModule."
        )


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())
