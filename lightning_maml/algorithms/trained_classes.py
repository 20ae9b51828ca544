"""Which classes a model was trained on, to warn where it is tested on one of them."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn


class TrainedClasses:
    """The classes that a model was trained on in all runs with datamodules of this package.

    A datamodule keeps its own splits apart; but another one may test the model, or the same one
    with another ``split_seed``.
    """

    def __init__(self) -> None:
        self._fingerprints: set[str] = set()

    def add(self, trainer: Trainer) -> None:
        """Remember the training classes of a run."""
        self._fingerprints.update(_classes(trainer, "train"))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add them to a checkpoint."""
        checkpoint["trained_classes"] = sorted(self._fingerprints)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Read those of the checkpoint's model, whose weights replace those trained so far."""
        self._fingerprints = set(checkpoint.get("trained_classes", ()))

    def warn_if_among(self, trainer: Trainer, split: str) -> None:
        """Warn if classes of the split ``"val"`` or ``"test"`` are among them."""
        tested = _classes(trainer, split)
        both = sorted(name for mark, name in tested.items() if mark in self._fingerprints)
        if both:
            rank_zero_warn(
                f"The model was trained on {len(both)} of the {len(tested)} {split} classes "
                f"({', '.join(both[:5])}{', ...' if len(both) > 5 else ''}), so this is not its "
                "accuracy on new classes; use the datamodule's settings and files of training."
            )


def _classes(trainer: Trainer, split: str) -> dict[str, str]:
    """Return the names of the classes of a split by their fingerprints, where they are known."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    fingerprints = getattr(data, "class_fingerprints", None)
    return fingerprints(split) if callable(fingerprints) else {}
