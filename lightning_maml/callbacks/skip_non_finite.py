"""Continue training past a meta-batch whose loss or meta-gradient is not finite."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_maml.algorithms.base import EpisodicModule
from lightning_maml.errors import UserFloatingPointError, UserTypeError, UserValueError


class SkipNonFinite(Callback):
    """Skips and counts the meta-batches whose loss or meta-gradient is not finite.

    Without it a run stops on them. Logged: ``train/skipped``, how many there were so far. The
    optimizer does not step on them; if it steps on several meta-batches
    (``accumulate_grad_batches``), the skipped ones count as 0 in the mean.

    Args:
        at_most: The run stops once more meta-batches than this were skipped.

    Raises:
        ValueError: If ``at_most`` is negative; when training starts, if there are several
            processes, which have to step together.
        TypeError: If the module is not one of this package.
        FloatingPointError: In training, after more than ``at_most`` skipped steps.

    Examples:
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, Episodes, SkipNonFinite
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)
        >>> batches = [Episodes(x, y, x, y), Episodes(x, y, x * float("inf"), y)]
        >>> model = MAML(MLP(4, 3))
        >>> trainer = Trainer(callbacks=[SkipNonFinite(at_most=5)], max_epochs=1, barebones=True)
        >>> trainer.fit(model, DataLoader(batches, batch_size=None))
        >>> model.skipped
        1
    """

    def __init__(self, at_most: int = 100) -> None:
        if at_most < 0:
            raise UserValueError(f"Expected `at_most` to be at least 0 but got {at_most}.")
        self.at_most = at_most

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module skip, and count from 0 or from the number in a checkpoint."""
        if stage != "fit":
            return
        if not isinstance(pl_module, EpisodicModule):
            raise UserTypeError(
                "Expected a module of lightning_maml for SkipNonFinite but got "
                f"{type(pl_module).__name__}."
            )
        if trainer.world_size > 1:
            raise UserValueError(
                f"Expected one process for SkipNonFinite but got {trainer.world_size}, which have "
                "to step together; remove it."
            )
        pl_module.non_finite.skips = True
        pl_module.non_finite.skipped = 0

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module stop on non-finite meta-batches again."""
        if isinstance(pl_module, EpisodicModule):
            pl_module.non_finite.skips = False

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Do the same after an exception, on which Lightning does not call :meth:`teardown`."""
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the run if too many were skipped."""
        if isinstance(pl_module, EpisodicModule) and pl_module.skipped > self.at_most:
            raise UserFloatingPointError(
                f"Expected at most {self.at_most} meta-batches without a finite loss and "
                f"meta-gradient but there were {pl_module.skipped} by step {trainer.global_step}; "
                "lower inner_lr or check the data."
            )
