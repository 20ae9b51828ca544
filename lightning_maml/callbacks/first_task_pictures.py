"""The base of callbacks that draw the first task of a test."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import Episodes
from lightning_maml.batches.meta_batch import parts_of
from lightning_maml.batches.trees import map_tensors


class FirstTaskPictures(Callback):
    """Base of the callbacks that draw the first test task at the end of a test.

    A subclass defines :meth:`draw`. The pictures go to the logger's folder, or to the trainer's
    ``default_root_dir`` without a logger. Nothing is drawn for modules other than
    :class:`lightning_maml.MAML`, or for tasks other than ``Episodes``.

    Examples:
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks.first_task_pictures import FirstTaskPictures
        >>> class QueryLabels(FirstTaskPictures):
        ...     def draw(self, module, task, folder):
        ...         print("query labels:", task.query_y.tolist())
        >>> x, y = torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2)
        >>> tasks = DataLoader([Episodes(x, y, x, y)], batch_size=None)
        >>> trainer = Trainer(callbacks=[QueryLabels()], logger=False, enable_progress_bar=False)
        >>> _ = trainer.test(MAML(MLP(4, 3)), tasks, verbose=False)
        query labels: [[0, 1, 2]]
    """

    def __init__(self) -> None:
        self._task: Episodes | None = None

    def draw(self, module: MAML, task: Episodes, folder: Path) -> None:
        """Draw a task into files in ``folder``.

        Args:
            module: The model, as the test left it.
            task: ``Episodes`` with one task.
            folder: Exists.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(module, task, folder).")

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first task."""
        if batch_idx > 0 or dataloader_idx > 0 or not isinstance(pl_module, MAML):
            return
        first = parts_of(pl_module.as_meta_batch(batch))[0]
        if isinstance(first, Episodes):
            self._task = map_tensors(lambda tensor: tensor[:1], first)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw it, in process 0."""
        if isinstance(pl_module, MAML) and self._task is not None and trainer.is_global_zero:
            folder = pl_module.run_folder
            folder.mkdir(parents=True, exist_ok=True)
            self.draw(pl_module, self._task, folder)
            self._task = None
