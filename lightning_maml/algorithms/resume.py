"""What a run needs, besides weights and optimizers, to go on as if it had not been interrupted."""

from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_maml.core.params import Params
from lightning_maml.core.rng import random_state, set_random_state


class ResumeState:
    """The random numbers of training, and gradients that the optimizer has yet to step on.

    Validation draws random numbers too. A resumed run would not draw them, so training continues
    from the state that its generators had before each validation.
    """

    def __init__(self) -> None:
        self._random_state: dict[str, Any] | None = None
        self._gradients: Params = {}

    def forget(self) -> None:
        """Forget what an aborted run may have left."""
        self._random_state, self._gradients = None, {}

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state to a checkpoint."""
        trainer = module.trainer
        device = trainer.strategy.root_device  # after a fit the model is on the CPU
        now = random_state(device) if self._random_state is None else self._random_state
        checkpoint["random_state"] = now
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batches % trainer.accumulate_grad_batches:
            checkpoint["gradients"] = {  # on the device: NCCL reduces nothing on a CPU
                name: trainer.strategy.reduce(p.grad.to(device, copy=True), reduce_op="mean")
                for name, p in module.named_parameters()
                if p.grad is not None
            }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Read the state from a checkpoint."""
        self._random_state = checkpoint.get("random_state")
        self._gradients = checkpoint.get("gradients", {})

    def restore(self, module: LightningModule) -> None:
        """Continue random numbers and sums of gradients from where the checkpoint has them."""
        self.continue_random_numbers(module.device)
        for name, gradient in self._gradients.items():
            module.get_parameter(name).grad = gradient.to(module.device)
        self._gradients = {}

    def pause_random_numbers(self, device: torch.device) -> None:
        """Remember where the random numbers of training are."""
        self._random_state = random_state(device)

    def continue_random_numbers(self, device: torch.device) -> None:
        """Set the generators to where training has them, if they were paused or loaded."""
        if self._random_state is not None:
            set_random_state(self._random_state, device)
            self._random_state = None


def warn_of_other_settings(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Warn if a checkpoint's model adapted with other settings than the one that loads it.

    Args:
        theirs: What the checkpoint's model adapted with; empty in one of another library.
        ours: What this model adapts with.
    """
    differing = [name for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
    if not theirs or not differing:
        return
    trained, here = (
        ", ".join(f"{name} {of[name]}" if name in of else f"no {name}" for name in differing)
        for of in (theirs, ours)
    )
    rank_zero_warn(
        f"The checkpoint's model adapts with {trained} but this one with {here}; if unintended, "
        "use the checkpoint's settings."
    )


def described(loss: Any) -> str:
    """Return the name of a loss, with the settings of a module or a partial function."""
    if isinstance(loss, partial):
        return f"{described(loss.func)} with {dict(loss.keywords)}"
    if not isinstance(loss, nn.Module):
        return str(getattr(loss, "__qualname__", type(loss).__qualname__))
    settings = {
        name: value
        for name, value in vars(loss).items()
        if isinstance(value, str | int | float) and name[0] != "_" and name != "training"
    }
    return f"{type(loss).__qualname__} with {settings}" if settings else type(loss).__qualname__
