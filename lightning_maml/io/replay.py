"""A step that broke a run, saved with all that it depends on except the model's own code, so that it can be repeated."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.batches.trees import map_tensors
from lightning_maml.core.rng import set_random_state
from lightning_maml.io.checkpoints import WholeCheckpoints, read_checkpoint

_KINDS = {kind.__name__: kind for kind in (Episodes, ResampledEpisodes)}


def save_step(
    module: LightningModule, episodes: AnyEpisodes, random_state: dict[str, Any], folder: Path
) -> Path:
    """Save the step in which ``module`` broke, and return the path.

    Args:
        module: The model, at the parameters before the step.
        episodes: Its meta-batch.
        random_state: States of the random generators before it.
        folder: Where to save it.
    """
    trainer = module.trainer
    name = f"step_{module.global_step}{f'_rank_{trainer.global_rank}' if trainer.world_size > 1 else ''}.repro"
    path = folder / name
    step = {
        "kind": type(episodes).__name__,
        "episodes": [*map_tensors(lambda tensor: tensor.cpu(), tuple(episodes))],
        "state_dict": module.state_dict(),
        "random_state": random_state,
        "epoch": module.current_epoch,
    }
    WholeCheckpoints().save_checkpoint(step, path)
    return path


def load_step(module: LightningModule, path: str | Path) -> tuple[AnyEpisodes, int]:
    """Restore ``module`` and the random generators to before the step saved at ``path``; return its meta-batch and its epoch.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not whole, or is not a step of such a model.
    """
    step = read_checkpoint(path)
    if not {"kind", "episodes", "state_dict", "random_state", "epoch"} <= step.keys() or step[
        "kind"
    ] not in [*_KINDS]:
        raise ValueError(
            f"Expected {path} to be a step that a run saved when it broke but it holds "
            f"{', '.join(map(repr, step))}."
        )
    try:
        saved = step["state_dict"]
        dtypes = {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()}
        # also converts what is not saved
        module.to(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(saved[name].dtype) if name in saved else tensor.data
        module.load_state_dict(saved)
        set_random_state(step["random_state"], module.device)
        episodes: AnyEpisodes = _KINDS[step["kind"]](
            *map_tensors(lambda tensor: tensor.to(module.device), step["episodes"])
        )
    except Exception as error:
        raise ValueError(
            f"Expected {path} to be a step that the same model saved but got another: {error}"
        ) from error
    return episodes, step["epoch"]
