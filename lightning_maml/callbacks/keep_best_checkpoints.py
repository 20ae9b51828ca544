"""Keep a run's best checkpoints when it resumes in another folder."""

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
    """Copies the best checkpoints so far to the new folder of a run that resumes elsewhere.

    In another folder Lightning's ``ModelCheckpoint`` forgets how good they were, and its best one
    would only be the best of the remaining epochs. This callback looks for them beside the
    checkpoint from which the run resumes. It copies none of them if one is missing or was replaced
    since, or if the new folder already has a file of that name; then Lightning does as it would
    without this callback. The command ``lightning-maml fit`` has this callback.

    Examples:
        >>> from lightning import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> from lightning_maml.callbacks import KeepBestCheckpoints
        >>> best = ModelCheckpoint(monitor="val/accuracy", mode="max", save_top_k=3)
        >>> trainer = Trainer(callbacks=[best, KeepBestCheckpoints()], logger=False)
        >>> any(isinstance(callback, KeepBestCheckpoints) for callback in trainer.callbacks)
        True
    """

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Copy the best checkpoints, and write their new paths into ``checkpoint``."""
        states = checkpoint["callbacks"]
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        keeps_best = trainer.state.fn == TrainerFn.FITTING and not is_trial
        beside = Path(str(trainer.ckpt_path)).parent
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            key, folder = callback.state_key, callback.dirpath
            if states.get(key, {}).get("dirpath", folder) == folder:
                continue
            if not keeps_best:
                # a test or trial run must not take over another run's best checkpoint
                del states[key]
                continue
            # process 0 alone copies, and all must agree on where the copies are
            moved = None
            if trainer.is_global_zero:
                moved = _moved(states[key], key, beside, str(folder))
            states[key] = trainer.strategy.broadcast(moved)


def _moved(state: dict[str, Any], key: str, beside: Path, folder: str) -> dict[str, Any]:
    """Copy a ``ModelCheckpoint``'s best checkpoints into its new folder.

    Args:
        state: What the ``ModelCheckpoint`` saved in the checkpoint.
        key: Its name among the callbacks' states.
        beside: The folder in which the best checkpoints should be now.
        folder: The new folder.

    Returns:
        The state for the new folder; ``state`` itself if nothing was copied.
    """
    scores = state["best_k_models"]
    names = {path: os.path.relpath(path, state["dirpath"]) for path in scores}
    # not Path: Lightning compares these strings with its own
    copies = {path: os.path.join(folder, name) for path, name in names.items()}
    if "://" in folder:
        return state
    for path, name in names.items():
        # a checkpoint from others must not make this write outside of the folder
        leaves_folder = ".." in Path(name).parts
        if leaves_folder or os.path.exists(copies[path]):
            return state
    if not all(_has_score(beside / name, key, scores[path]) for path, name in names.items()):
        return state
    for path, copy in copies.items():
        with whole_file(Path(copy)) as file:
            file.write((beside / names[path]).read_bytes())
    moved = {**state, "dirpath": folder}
    moved["best_k_models"] = {copies[path]: score for path, score in scores.items()}
    for name in ("best_model_path", "kth_best_model_path"):
        moved[name] = copies.get(state[name], state[name])
    return moved


def _has_score(file: Path, key: str, score: Any) -> bool:
    """Return whether ``file`` still is the checkpoint with this score, not one written since."""
    try:
        saved = read_checkpoint(file)["callbacks"][key]["current_score"]
        return float(saved) == float(score)
    except (OSError, ValueError, KeyError, TypeError):
        return False
