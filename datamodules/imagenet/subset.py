"""What the datamodules of mini-ImageNet and tiered-ImageNet share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from lightning_maml.datamodules.base import EpisodicDataModule
from lightning_maml.datamodules.class_splits import check_disjoint
from lightning_maml.datamodules.imagenet.forms import Form, Layout, find_layout
from lightning_maml.datamodules.images.files import OnCorrupt, check_on_corrupt
from lightning_maml.datamodules.messages import say_what_was_found
from lightning_maml.datamodules.remembered import Remembered
from lightning_maml.datamodules.sampler import ClassImages
from lightning_maml.errors import UserValueError


class ImageNetSubset(EpisodicDataModule):
    """Few-shot episodes of a part of ImageNet that is found in ``root`` in one of several forms.

    Args:
        root: Folder of the data.
        queries: Query images per class.
        meta_batch_size: Tasks per optimizer step and process.
        on_corrupt: ``"raise"`` on an image file that cannot be read, or ``"skip"`` it with a
            warning.
        **options: Arguments of :class:`EpisodicDataModule`, such as ``ways``, ``shots``,
            ``test_tasks``, ``regime``, ``transforms`` and ``seed``.
    """

    image_size = 84
    dataset: ClassVar[str]
    """Name of the dataset, for messages and caches."""
    classes: ClassVar[dict[str, int]]
    """Number of classes in each split."""
    images: ClassVar[dict[str, int]]
    """Number of images in each split."""
    authors: ClassVar[str]
    """Whose split it is."""
    forms: ClassVar[Mapping[str, Form]]
    """The forms that it may have, by name."""

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
        self._layout: Remembered[Layout] = Remembered()

    def prepare_data(self) -> None:
        """Decode the images, unless the data are plain arrays or a cache is there."""
        with self._layout.forgotten_on_error():
            self._found().opened.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Say what was found, and read the splits that ``stage`` needs."""
        layout = self._found()
        splits = layout.opened.splits
        sizes = {split: [*part.sizes.values()] for split, part in splits.items()}
        where = f"the {layout.name} in {layout.folder}"
        say_what_was_found(self.dataset, where, sizes, self.images)
        super().setup(stage)

    def class_images(self, split: str) -> ClassImages:
        """Return the images of a split."""
        return self._found().opened.splits[split].read()

    def _found(self) -> Layout:
        return self._layout(self.read_by(), self._find)

    @override
    def read_by(self) -> tuple[Any, ...]:
        return self.root, self.image_size, self.on_corrupt

    def _find(self) -> Layout:
        layout = find_layout(self.dataset, self.forms, self.root, self.image_size, self.on_corrupt)
        self._check_classes(layout)
        return layout

    def _check_classes(self, layout: Layout) -> None:
        splits = layout.opened.splits
        check_disjoint({split: part.sizes for split, part in splits.items()}, str(layout.folder))
        found = {split: len(part.sizes) for split, part in splits.items()}
        if found != self.classes:
            expected, got = _in_words(self.classes), _in_words(found)
            raise UserValueError(
                f"Expected {expected} classes in {layout.folder}, as {self.authors} split "
                f"{self.dataset}, but got {got} classes; for other data take ImageFolderDataModule."
            )


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())
