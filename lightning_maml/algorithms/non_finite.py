"""What becomes of a training step whose loss or meta-gradient is not finite."""

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.core.params import Params
from lightning_maml.errors import UserFloatingPointError
from lightning_maml.io.replay import save_step


class NonFinitePolicy:
    """Stops the run, and saves the step so that it can be taken again; or skips the step.

    Attributes:
        skips: Whether such steps are skipped; :class:`lightning_maml.SkipNonFinite` sets it.
        skipped: How many steps were skipped.
    """

    def __init__(self) -> None:
        self.skips = False
        self.skipped = 0

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the count to a checkpoint."""
        if self.skipped:
            checkpoint["skipped"] = self.skipped

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue the count of a checkpoint."""
        self.skipped = checkpoint.get("skipped", 0)

    def skip_or_stop(
        self,
        module: LightningModule,
        episodes: AnyEpisodes,
        before_it: dict[str, Any],
        error: FloatingPointError,
        folder: Path,
    ) -> None:
        """Count the step as skipped, or save it and stop.

        Args:
            module: The model.
            episodes: The meta-batch.
            before_it: The state of the random generators before the step.
            error: What was not finite.
            folder: Where the run keeps its logs.

        Raises:
            FloatingPointError: If such steps are not skipped. It says how to take the step again:
                by a command where the run has a config, else in Python.
        """
        if self.skips:
            self.skipped += 1
            module.log("train/skipped", float(self.skipped), prog_bar=True, batch_size=1)
            return
        path = save_step(module, episodes, before_it, folder)
        config = folder / "config.yaml"
        if config.is_file():
            way = f"run `lightning-maml replay --config={config} --ckpt_path={path}`"
        else:
            way = (
                "make the model anew and run `from lightning_maml.io.replay import load_step; "
                f"episodes, _ = load_step(model, '{path}'); model.meta_loss(episodes)`"
            )
        raise UserFloatingPointError(f"{error} To repeat the step, {way}.") from None


def check_is_finite(query_loss: Tensor, gradients: Params, where: str) -> None:
    """Check query losses and gradients, at the cost of waiting for a GPU once.

    Args:
        query_loss: Query losses ``[T]``.
        gradients: Gradients by name.
        where: Ends the sentence.

    Raises:
        FloatingPointError: If something is not finite.
    """
    sized = [query_loss, *(gradient for gradient in gradients.values() if gradient.numel())]
    largest = torch._foreach_norm([tensor.detach() for tensor in sized], float("inf"))
    dtype = reduce(torch.promote_types, [size.dtype for size in largest])
    if not torch.stack([size.to(dtype) for size in largest]).isfinite().all():
        check_losses_are_finite(query_loss, where)
        check_gradients_are_finite(gradients, where)


def check_losses_are_finite(query_loss: Tensor, where: str) -> None:
    """Check query losses ``[T]``.

    Raises:
        FloatingPointError: If one is not finite.
    """
    finite = query_loss.isfinite()
    if not finite.all():
        tasks = (~finite).nonzero().flatten().tolist()
        more = ", ..." if len(tasks) > 5 else ""
        values, named = (", ".join(map(str, of[:5])) for of in (query_loss[tasks].tolist(), tasks))
        raise UserFloatingPointError(
            f"Expected a finite query loss but got [{values}{more}] in tasks [{named}{more}] "
            f"{where}"
        )


def check_gradients_are_finite(gradients: Params, where: str) -> None:
    """Check gradients by name.

    Raises:
        FloatingPointError: If one is not finite.
    """
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if broken:
        raise UserFloatingPointError(
            f"Expected a finite meta-gradient but it is not finite in {broken} {where}"
        )
