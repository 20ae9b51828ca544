"""Sinusoids: the regression tasks of the MAML paper (Finn et al. 2017, section 5.1)."""

import math

import numpy as np
import torch
from torch import Tensor

from lightning_maml.batches.episodes import AnyEpisodes, Episodes, ResampledEpisodes
from lightning_maml.datamodules.base import EpisodicDataModule, Regime
from lightning_maml.datamodules.drawing import TaskKey, task_words, uniform
from lightning_maml.datamodules.sampler import ClassImages, TaskDataset, TaskSizes
from lightning_maml.errors import UserTypeError

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
"""The least and the largest of each, which are drawn uniformly."""


class SinusoidDataModule(EpisodicDataModule):
    """Few-shot regression of sinusoids ``y = A sin(x - phi)`` (Finn et al. 2017, section 5.1).

    A task has an amplitude A from 0.1 to 5, a phase phi from 0 to pi, and points x from -5 to 5,
    all drawn uniformly. Inputs and targets are floats, ``[T, S, 1]``. Nothing is downloaded. Train
    with ``loss=torch.nn.functional.mse_loss``.

    Args:
        shots: Support points of a task.
        queries: Query points of a training task.
        test_shots: Support points in validation and test; by default as in training.
        test_queries: Query points in validation and test.
        meta_batch_size: Tasks per optimizer step and process.
        train_batches: Meta-batches per epoch and process.
        val_tasks: Validation tasks, over all processes together; the same ones each time.
        test_tasks: Test tasks, over all processes together; the same ones each time.
        regime: ``"finite_sum"``: a training task owns one support set and one query set;
            ``"resampling"``: it draws a fresh support batch and an independent Hessian batch for
            each inner step. See :class:`EpisodicDataModule`.
        train_steps: N, the number of inner steps that training draws batches for with
            ``regime="resampling"``.
        hessian_shots: Points of a Hessian batch with ``regime="resampling"``; by default as many as
            ``shots``.
        seed: Seed of the tasks.
        num_workers: Loader processes.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from lightning_maml.datamodules import SinusoidDataModule
        >>> data = SinusoidDataModule(shots=5, meta_batch_size=4)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.support_x.shape, batch.query_y.shape
        (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
    """

    def __init__(
        self,
        *,
        shots: int = 10,
        queries: int = 10,
        test_shots: int | None = None,
        test_queries: int = 100,
        meta_batch_size: int = 25,
        train_batches: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        regime: Regime = "finite_sum",
        train_steps: int = 1,
        hessian_shots: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            shots=shots,
            queries=queries,
            test_shots=test_shots,
            test_queries=test_queries,
            meta_batch_size=meta_batch_size,
            train_batches=train_batches,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            regime=regime,
            train_steps=train_steps,
            hessian_shots=hessian_shots,
            seed=seed,
            num_workers=num_workers,
        )

    def class_images(self, split: str) -> ClassImages:
        """Refuse: sinusoids are no images."""
        raise UserTypeError(
            f"Expected a datamodule of images but got {type(self).__name__}, which has none; take "
            "its loaders, or `independent_episodes`."
        )

    def _task_dataset(self, split: str, sizes: TaskSizes) -> "SinusoidTasks":
        return SinusoidTasks(sizes, self._task_seed(split))


class SinusoidTasks(TaskDataset):
    """Sinusoids as a function of their epoch and number.

    Args:
        sizes: How many points a task has.
        seed: One or two numbers below 2**64.

    Examples:
        >>> from lightning_maml.datamodules.sampler import TaskSizes
        >>> from lightning_maml.datamodules.sinusoid import SinusoidTasks
        >>> tasks = SinusoidTasks(TaskSizes(ways=1, shots=3, queries=2, resampling=None), (0,))
        >>> tasks[5, 2].support_x.shape  # task 2 of epoch 5
        torch.Size([3, 1])
    """

    def __init__(self, sizes: TaskSizes, seed: tuple[int, ...]) -> None:
        parts = [[sizes.shots], [sizes.queries]]
        if sizes.resampling is not None:
            steps, hessian_shots = sizes.resampling
            parts = [[steps, sizes.shots], [steps, hessian_shots], [sizes.queries]]
        self._parts, self._seed = parts, seed

    def __getitems__(self, keys: list[TaskKey]) -> AnyEpisodes:
        """Return the meta-batch of some tasks, ``[T, S, 1]``, or ``[T, N, S, 1]`` for each step."""
        points = sum(map(math.prod, self._parts))
        words = task_words(self._seed, keys, 2 + points)[..., None]  # [T, words, 1]
        amplitudes, phases = uniform(words[:, :1], *AMPLITUDES), uniform(words[:, 1:2], *PHASES)
        x = uniform(words[:, 2:], *INPUTS)
        y = amplitudes * np.sin(x - phases)
        inputs, targets = map(self._in_parts, (x, y))
        tensors = [tensor for pair in zip(inputs, targets, strict=True) for tensor in pair]
        return Episodes(*tensors) if len(tensors) == 4 else ResampledEpisodes(*tensors)

    def _in_parts(self, points: np.ndarray) -> list[Tensor]:
        """Divide the points ``[T, points, 1]`` of tasks among their sets."""
        sizes = [math.prod(shape) for shape in self._parts]
        parts = torch.split(torch.from_numpy(points).float(), sizes, dim=1)
        return [
            torch.unflatten(part, 1, shape) for part, shape in zip(parts, self._parts, strict=True)
        ]
