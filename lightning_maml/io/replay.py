"""Save the step that broke a run, so that it can be repeated.

The file holds all that the step depends on, except the model's own code.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.batches.trees import map_tensors
from lightning_maml.core.rng import set_random_state
from lightning_maml.errors import UserError, UserValueError
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

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from lightning import Trainer
        >>> from lightning_maml import MAML, MLP, Episodes
        >>> from lightning_maml.core.rng import random_state
        >>> from lightning_maml.io.replay import load_step, save_step
        >>> x, y = torch.rand(2, 3, 4), torch.tensor([[0, 1, 2]] * 2)
        >>> model = MAML(MLP(4, 3))
        >>> model.trainer = Trainer(barebones=True)
        >>> before = random_state(model.device)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_step(model, Episodes(x, y, x, y), before, Path(folder))
        ...     episodes, epoch = load_step(MAML(MLP(4, 3)), path)
        >>> path.name, torch.equal(episodes.support_x, x), epoch
        ('step_0.repro', True, 0)
    """
    trainer = module.trainer
    rank = f"_rank_{trainer.global_rank}" if trainer.world_size > 1 else ""
    path = folder / f"step_{module.global_step}{rank}.repro"
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
    """Restore ``module`` and the random generators to before the step saved at ``path``.

    Args:
        module: A model made as the one that broke.
        path: The file.

    Returns:
        The meta-batch of the step, on the module's device, and its epoch.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not whole, or is not a step of such a model.
    """
    step = read_checkpoint(path)
    needed = {"kind", "episodes", "state_dict", "random_state", "epoch"}
    # a list of kinds, as what another file has under this name may not be hashable
    if not needed <= step.keys() or step["kind"] not in [*_KINDS]:
        raise UserValueError(
            f"Expected {path} to be a step that a run saved when it broke but it holds "
            f"{', '.join(map(repr, step))}."
        )
    try:
        _restore(module, step["state_dict"])
        set_random_state(step["random_state"], module.device)
        tensors = map_tensors(lambda tensor: tensor.to(module.device), step["episodes"])
        episodes: AnyEpisodes = _KINDS[step["kind"]](*tensors)
    # a damaged file or another model may fail in any of these lines
    except Exception as error:  # noqa: BLE001
        # the words of an error of ours are in this one
        cause = None if isinstance(error, UserError) else error
        raise UserValueError(
            f"Expected {path} to be a step that the same model saved but got another: {error}"
        ) from cause
    return episodes, step["epoch"]


def _restore(module: LightningModule, saved: dict[str, Tensor]) -> None:
    """Load ``saved`` into ``module`` in the precision in which it was saved."""
    dtypes = {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()}
    # buffers that are not saved had the run's precision too
    module.to(max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in saved:
            tensor.data = tensor.data.to(saved[name].dtype)
    module.load_state_dict(saved)
