"""Keep the checkpoint of the best validation, whatever is validated."""

import copy
import weakref
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

_FIRST_LOADER = "/dataloader_idx_0"


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best validation accuracy, of a regression with the lowest loss.

    Unlike Lightning's ``ModelCheckpoint`` it needs not be told what to monitor: it takes
    ``val/accuracy`` or ``val/loss``, whichever the first validation logs (with several loaders, of
    the first). Without validation it saves nothing. A callback that is used for another model, or
    by another trainer that does not resume a run, begins anew. The command ``lightning-maml fit``
    has this callback unless the config has a checkpoint callback of its own.

    Args:
        filename: Name of the checkpoint, without ``.ckpt``.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.callbacks import BestCheckpoint
        >>> x, y = torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2)
        >>> loader = DataLoader([Episodes(x, y, x, y)], batch_size=None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         callbacks=[BestCheckpoint()],
        ...         default_root_dir=folder,
        ...         logger=False,
        ...         enable_progress_bar=False,
        ...         enable_model_summary=False,
        ...         max_epochs=1,
        ...     )
        ...     trainer.fit(MAML(MLP(4, 3)), loader, loader)
        ...     print(Path(trainer.checkpoint_callback.best_model_path).name)
        best.ckpt
    """

    def __init__(self, filename: str = "best") -> None:
        super().__init__(filename=filename, auto_insert_metric_name=False)
        self._fit_of: tuple[weakref.ref[Trainer], weakref.ref[LightningModule]] | None = None
        self._before_fits: dict[str, Any] = {}
        self._last_folder: Any = None
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be sent to other processes."""
        return vars(self) | {"_fit_of": None}

    @property
    @override
    def state_key(self) -> str:
        """Return the name in checkpoints; Lightning's has what is monitored in it."""
        return type(self).__qualname__

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew for another model or trainer; a checkpoint is read after this."""
        if stage != "fit":
            return  # nothing is saved, and the folder is to be that of the next fit
        fit_of = weakref.ref(trainer), weakref.ref(pl_module)
        if not self._before_fits:
            self._before_fits = self._state()
        elif self._fit_of != fit_of:
            last_folder = self.dirpath
            # also the folder: the checkpoint of the other fit is to be left alone
            vars(self).update(copy.deepcopy(self._before_fits))
            self._last_folder = last_folder
        self._fit_of = fit_of
        super().setup(trainer, pl_module, stage)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what to monitor at the first validation, and save."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor is None and not trainer.sanity_checking:
            self._choose(trainer.callback_metrics)
        if self.monitor is not None:
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if self.monitor is not None:
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Monitor what the saved run did, and continue from its best value."""
        if state_dict["dirpath"] == self._last_folder:
            self.dirpath = self._last_folder  # the last fit of this callback is resumed
        if state_dict.get("monitor") is not None:
            self._monitor(state_dict["monitor"])
        super().load_state_dict(state_dict)

    def _state(self) -> dict[str, Any]:
        """Return a copy of the attributes."""
        attributes = vars(self).copy()
        del attributes["_before_fits"]
        # functions are those of a model, which Lightning lends to its callbacks
        return {name: copy.copy(it) for name, it in attributes.items() if not callable(it)}

    def _choose(self, logged: dict[str, Any]) -> None:
        names = ("val/accuracy", "val/loss")
        found = [
            f"{name}{loader}"
            for name in names
            for loader in ("", _FIRST_LOADER)
            if f"{name}{loader}" in logged
        ]
        if found:
            self._monitor(found[0])
        elif not self._has_warned:
            rank_zero_warn(
                "BestCheckpoint saves nothing, as the validation logged neither val/accuracy nor "
                f"val/loss but {sorted(logged)}; use Lightning's ModelCheckpoint(monitor=...)."
            )
            self._has_warned = True

    def _monitor(self, name: str) -> None:
        self.monitor = name
        self.mode, worst = ("max", -float("inf")) if "accuracy" in name else ("min", float("inf"))
        self.kth_value = self.kth_value.new_tensor(worst)
