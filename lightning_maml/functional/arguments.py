"""Checks of the arguments that the functions of this folder share."""

from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes
from lightning_maml.errors import UserValueError


def check_step_count(steps: int, name: str = "steps") -> None:
    """Check the number of inner steps.

    Raises:
        ValueError: If it is negative.
    """
    if steps < 0:
        raise UserValueError(f"Expected `{name}` to be at least 0 but got {steps}.")


def check_support_batches(episodes: AnyEpisodes, steps: int) -> None:
    """Check that there is a support batch for every inner step, where each step has its own.

    Raises:
        ValueError: If there are more or fewer.
    """
    if not isinstance(episodes, ResampledEpisodes):
        return
    drawn = episodes.support_y.shape[1]
    if drawn != steps:
        raise UserValueError(
            f"Expected `episodes` to hold {steps} support batches per task, one per inner step, "
            f"but got {drawn}; give the datamodule the same `train_steps` as the model."
        )
