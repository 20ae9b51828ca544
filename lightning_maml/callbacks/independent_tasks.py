"""Training tasks for a callback's own use, independent of the batches that are trained on."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.batches.meta_batch import even_meta_batch
from lightning_maml.errors import UserTypeError, UserValueError


class IndependentTasks:
    """Draws meta-batches from a datamodule of this package, or from an iterable of the user's.

    Args:
        purpose: Seeds the datamodule's tasks, so that each callback has others.
        tasks: Tasks per meta-batch and process, where the datamodule draws them.
        episodes: Meta-batches like those trained on but independent of them, which are gone
            through again and again; None for the datamodule's.

    Raises:
        ValueError: If ``tasks`` is below 1.

    Examples:
        >>> from lightning_maml.callbacks.independent_tasks import IndependentTasks
        >>> tasks = IndependentTasks("my measurement", tasks=4, episodes=None)
        >>> tasks.are_given, tasks.drawn
        (False, 0)
    """

    def __init__(self, purpose: str, tasks: int, episodes: Iterable[AnyEpisodes] | None) -> None:
        if tasks < 1:
            raise UserValueError(f"Expected `tasks` to be at least 1 but got {tasks}.")
        self.drawn = 0
        """How many meta-batches were drawn."""
        self._purpose = purpose
        self._tasks = tasks
        self._episodes = episodes
        self._stream: Iterator[AnyEpisodes] | None = None

    @property
    def are_given(self) -> bool:
        """Whether the meta-batches are the user's."""
        return self._episodes is not None

    def start_at(self, drawn: int) -> None:
        """Go on as if ``drawn`` meta-batches had been drawn."""
        self.drawn, self._stream = drawn, None

    def check(self, trainer: Trainer) -> None:
        """Check that there is something to draw from.

        Raises:
            ValueError: If there is neither an iterable nor a datamodule that draws independent
                tasks.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self._episodes is None and not hasattr(data, "independent_episodes"):
            raise UserValueError(
                "Expected a datamodule of lightning_maml, which draws independent tasks, but got "
                f"{type(data).__name__ if data else 'none'}; give the callback `episodes`, an "
                "iterable of meta-batches like those trained on but drawn independently of them."
            )

    def draw(self, trainer: Trainer) -> AnyEpisodes:
        """Return the next meta-batch, moved to the device and converted as for the module."""
        if self._episodes is None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            episodes = data.independent_episodes(self._purpose, self.drawn, self._tasks)
        else:
            episodes = self._next_of(self._episodes)
        self.drawn += 1
        converted = trainer.precision_plugin.convert_input(episodes)
        ready = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=0)
        # arrays become tensors here, which are yet to be converted
        converted = trainer.precision_plugin.convert_input(even_meta_batch(ready))
        on_device: AnyEpisodes = trainer.strategy.batch_to_device(converted)
        return on_device

    def _next_of(self, given: Iterable[AnyEpisodes]) -> AnyEpisodes:
        """Return the next of the user's meta-batches."""
        if self._stream is None:
            # a datamodule's loader gives other tasks each time that it is gone through
            set_epoch = getattr(getattr(given, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(0)
            # a resumed run skips those that were drawn before
            self._stream = islice(_repeated(given), self.drawn, None)
        return next(self._stream)


def _repeated(episodes: Iterable[AnyEpisodes]) -> Iterator[AnyEpisodes]:
    # not itertools.cycle, which keeps all batches in memory and shuffles a loader only once
    while True:
        is_empty = True
        for batch in episodes:
            is_empty = False
            yield batch
        if is_empty:
            raise UserValueError(
                "Expected `episodes` to hold meta-batches each time it is gone through but it "
                "gave none; give a list or a loader that is not empty, not a generator, which is "
                "exhausted after the first time."
            )


def as_maml(callback: Callback, module: LightningModule) -> MAML:
    """Return ``module``, if it is a :class:`lightning_maml.MAML`.

    Args:
        callback: Who needs it, named in the error.
        module: The module being trained.

    Raises:
        TypeError: If it is not.

    Examples:
        >>> from lightning_maml import MAML, MLP
        >>> from lightning_maml.callbacks import MetaGradientMonitor
        >>> from lightning_maml.callbacks.independent_tasks import as_maml
        >>> model = MAML(MLP(4, 3))
        >>> as_maml(MetaGradientMonitor(), model) is model
        True
    """
    if not isinstance(module, MAML):
        raise UserTypeError(
            f"Expected MAML or one of its variants for {type(callback).__name__} but got "
            f"{type(module).__name__}."
        )
    return module
