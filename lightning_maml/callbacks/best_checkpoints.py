"""Keeps the best checkpoints of the whole of a run that goes on in another folder."""

import os
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_maml.io.checkpoints import read_checkpoint
from lightning_maml.io.safe_files import whole_file


class KeepBestCheckpoints(Callback):
    """Takes along the best checkpoints so far if a run goes on in another folder, so that new ones are compared with them.

    In another folder Lightning's ``ModelCheckpoint`` forgets how good they were, and its best one
    would only be the best of the remaining epochs. They are looked for beside the checkpoint that
    the run goes on from, and copied. If one of them is missing or has since been replaced, or if
    the new folder already has a file of its name, none is copied, and Lightning does as it would
    without this callback. The command ``lightning-maml fit`` has this callback.
    """

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Copy them, and make the checkpoint say where they are now."""
        states = checkpoint["callbacks"]
        for callback in trainer.checkpoint_callbacks:
            key = callback.state_key
            if (
                not isinstance(callback, ModelCheckpoint)
                or states.get(key, {}).get("dirpath", callback.dirpath) == callback.dirpath
            ):
                continue
            if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
                del states[key]  # no best checkpoints are kept here
                continue
            beside, folder = Path(str(trainer.ckpt_path)).parent, str(callback.dirpath)
            states[key] = trainer.strategy.broadcast(
                _moved(states[key], key, beside, folder) if trainer.is_global_zero else None
            )


def _moved(state: dict[str, Any], key: str, beside: Path, folder: str) -> dict[str, Any]:
    """Copy a ``ModelCheckpoint``'s best checkpoints into its new folder and return its state there, or the old state if it cannot."""
    names = {path: os.path.relpath(path, state["dirpath"]) for path in state["best_k_models"]}
    # spelled as Lightning does, which compares them
    copies = {path: os.path.join(folder, name) for path, name in names.items()}
    if "://" in folder or any(
        ".." in Path(name).parts or os.path.exists(copies[path]) for path, name in names.items()
    ):
        return state
    if not all(
        _has_score(beside / name, key, state["best_k_models"][path]) for path, name in names.items()
    ):
        return state
    for path, copy in copies.items():
        with whole_file(Path(copy)) as file:
            file.write((beside / names[path]).read_bytes())
    best = {copies[path]: score for path, score in state["best_k_models"].items()}
    paths = {
        name: copies.get(state[name], state[name])
        for name in ("best_model_path", "kth_best_model_path")
    }
    return state | paths | {"dirpath": folder, "best_k_models": best}


def _has_score(file: Path, key: str, score: Any) -> bool:
    """Return whether a checkpoint still is the one with this score, and not one that has since taken its place."""
    try:
        return float(read_checkpoint(file)["callbacks"][key]["current_score"]) == float(score)
    except (OSError, ValueError, KeyError, TypeError):
        return False
