"""Training tasks for a callback's own use, drawn independently of the batches that are trained on."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes


class IndependentTasks:
    """Draws meta-batches from a datamodule of this package, or from an iterable of the user's.

    Args:
        purpose: Name that sets this stream apart from those of other callbacks.
        tasks: Tasks per meta-batch and process, where the datamodule draws them.
        episodes: Meta-batches like those trained on but independent of them, gone through again and
            again; None for the datamodule's.
    """

    def __init__(self, purpose: str, tasks: int, episodes: Iterable[AnyEpisodes] | None) -> None:
        if tasks < 1:
            raise ValueError(f"Expected `tasks` to be at least 1 but got {tasks}.")
        self.drawn = 0
        """How many meta-batches were drawn; restore this number for the stream to go on where it
        was."""
        self._purpose, self._tasks, self._episodes = purpose, tasks, episodes
        self._stream: Iterator[AnyEpisodes] | None = None

    @property
    def are_given(self) -> bool:
        """Whether the meta-batches are the user's."""
        return self._episodes is not None

    def check(self, trainer: Trainer) -> None:
        """Check that there is something to draw from.

        Raises:
            ValueError: If there is neither an iterable nor a datamodule that draws independent
                tasks.
        """
        if self._episodes is None and not hasattr(trainer.datamodule, "independent_episodes"):  # type: ignore[attr-defined]
            data = trainer.datamodule  # type: ignore[attr-defined]
            raise ValueError(
                "Expected a datamodule of lightning_maml, which draws independent tasks, but got "
                f"{type(data).__name__ if data else 'none'}; give the callback `episodes`, an "
                "iterable of meta-batches like those trained on but drawn independently of them."
            )

    def draw(self, trainer: Trainer) -> AnyEpisodes:
        """Return the next meta-batch, on the device and as the module gets it."""
        if self._episodes is None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            episodes = data.independent_episodes(self._purpose, self.drawn, self._tasks)
        else:
            if self._stream is None:
                self._stream = islice(_again_and_again(self._episodes), self.drawn, None)
            episodes = next(self._stream)
        self.drawn += 1
        on_device: AnyEpisodes = trainer.strategy.batch_to_device(episodes)
        return on_device


def _again_and_again(episodes: Iterable[AnyEpisodes]) -> Iterator[AnyEpisodes]:
    while True:
        before = None
        for before in episodes:
            yield before
        if before is None:
            raise ValueError(
                "Expected `episodes` to hold meta-batches each time it is gone through but it "
                "gave none; give a list or a loader that is not empty, not a generator, which is "
                "exhausted after the first time."
            )


def as_maml(callback: Callback, module: LightningModule) -> MAML:
    """Return ``module``, which the callback needs to be a :class:`lightning_maml.MAML`.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(module, MAML):
        raise TypeError(
            f"Expected MAML or one of its variants for {type(callback).__name__} but got "
            f"{type(module).__name__}."
        )
    return module
