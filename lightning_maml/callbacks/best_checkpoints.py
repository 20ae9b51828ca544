"""The best checkpoint of a run that goes on in another folder is the best of all of it."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_maml.archives import whole_file


class KeepBestCheckpoints(Callback):
    """Where a run goes on from a checkpoint in another folder, takes those that were kept so far along, to be compared with new ones.

    Lightning's ``ModelCheckpoint`` forgets there how good they were, and its best one would be that of the epochs which were left. They are
    looked for beside the checkpoint that the run goes on from, and copied; where one is missing, it is as Lightning has it. The command
    ``lightning-maml fit`` has this callback.
    """

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy them, and have the checkpoint say where they are now."""
        beside, states = Path(str(trainer.ckpt_path)).parent, checkpoint.get("callbacks", {})
        for callback in trainer.checkpoint_callbacks:
            state = states.get(callback.state_key)
            if not isinstance(callback, ModelCheckpoint) or state is None or state["dirpath"] == callback.dirpath:
                continue
            if trainer.state.fn != TrainerFn.FITTING:
                del states[callback.state_key]  # a test keeps none
                continue
            kept = [path for path in {*state["best_k_models"], state["best_model_path"]} if path]
            names = [os.path.relpath(path, state["dirpath"]) for path in kept]
            if names and all((beside / name).is_file() for name in names):
                for name in names if trainer.is_global_zero else ():
                    _copy(beside / name, Path(str(callback.dirpath), name))
                states[callback.state_key] = _moved(state, str(callback.dirpath))


def _copy(source: Path, target: Path) -> None:
    with whole_file(target) as file:
        file.write(source.read_bytes())
    shutil.copystat(source, target)  # its time, by which the newest is known


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the state of a ``ModelCheckpoint`` whose best checkpoints are in another folder, in its own spelling."""

    def moved(path: str) -> str:
        return os.path.join(folder, os.path.relpath(path, state["dirpath"])) if path else ""

    best = {moved(path): score for path, score in state["best_k_models"].items()}
    paths = {name: moved(state[name]) for name in ("best_model_path", "kth_best_model_path")}
    return state | paths | {"dirpath": folder, "best_k_models": best}
