"""Reinforcement learning as a network, a loss and data: a point learns to reach a goal.

The task is that of Ji et al. 2022, Appendix A.1: minus the expected discounted return of a policy,
estimated from trajectories that the policy itself draws. A point moves in the plane towards a goal
that its policy does not see (as in Finn et al. 2017, section 5.3); it adapts to the goal from the
rewards of a few runs.

What makes this fit a few-shot pipeline is where the parts are cut: the inputs of a task are noise,
the network turns noise into runs, the labels are goals, and the loss turns runs and goals into
minus the return. Each inner step then draws its runs with the parameters of that step.
"""

import zlib

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_maml import ResampledEpisodes

STEP, DEVIATION = 0.1, 0.05
"""Longest mean action, and standard deviation of an action around its mean, per coordinate."""


class Runs(nn.Module):
    """A policy that acts: it maps standard normal noise to what it did with it.

    Args:
        hidden: Units of each of its two layers.
    """

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.policy = nn.Sequential(
            nn.Linear(2, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 2),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return the runs of noise ``[S, H, 2]``: log-probabilities and positions, ``[S, H, 3]``.

        Log-probabilities are up to a constant. Only they have derivatives: where the point went
        depends on the parameters too, but the expectation is differentiated through the
        probabilities (:class:`MinusReturn`).
        """
        position, before, actions = torch.zeros_like(noise[:, 0]), [], []
        with torch.no_grad():
            for deviation in noise.unbind(1):
                action = self._mean(position) + DEVIATION * deviation
                before.append(position)
                actions.append(action)
                position = position + action
        taken_at, taken = torch.stack(before, 1), torch.stack(actions, 1)
        deviations = (taken - self._mean(taken_at)) / DEVIATION
        log_probs = -deviations.square().sum(-1, keepdim=True) / 2
        return torch.cat([log_probs, taken_at + taken], -1)

    def _mean(self, position: Tensor) -> Tensor:
        mean: Tensor = STEP * self.policy(position)
        return mean


class MinusReturn(nn.Module):
    """Minus the mean discounted return of runs.

    Its derivatives estimate those of the expectation of that return.

    The reward of a step is minus the squared distance to the goal after it. Each reward is
    multiplied by the likelihood ratio of the actions up to it between the policy that is
    differentiated and the one that acted; both are the same, so the ratio is 1, and its first and
    second derivatives are those of the expectation (DiCE, Foerster et al. 2018). A baseline, the
    mean reward to go of the other runs, lowers the variance and leaves the expectation alone.

    At the points that HF-MAML probes, runs are drawn anew from the same noise: each gradient is
    unbiased there, and as it changes smoothly with the parameters, so is their difference, with a
    variance that stays bounded as the points approach each other. It is another estimate of the
    same Hessian than MAML's.

    Args:
        discount: gamma, the weight of a reward relative to the one a step before.
    """

    def __init__(self, discount: float = 0.98) -> None:
        super().__init__()
        self.discount = discount

    def forward(self, runs: Tensor, goals: Tensor) -> Tensor:
        """Return a scalar for runs ``[S, H, 3]`` (at least two) to goals ``[S, 2]``."""
        log_probs, positions = runs[..., 0], runs[..., 1:]
        weights = self.discount ** torch.arange(runs.shape[1], device=runs.device)
        rewards = -weights * (positions - goals[:, None]).square().sum(-1)
        ratios = (log_probs - log_probs.detach()).cumsum(1).exp()
        before = torch.cat([torch.ones_like(ratios[:, :1]), ratios[:, :-1]], 1)
        to_go = rewards.flip(1).cumsum(1).flip(1)
        of_others = (to_go.sum(0) - to_go) / (len(to_go) - 1)
        return -(ratios * rewards - (ratios - before) * of_others).sum(1).mean()


class Goals(Dataset[ResampledEpisodes]):
    """Meta-batches of goals in the square of half-width 0.5 around the start.

    Args:
        first: Number of the first meta-batch, which seeds it.
        batches: How many there are.
        tasks: Goals in each.
        steps: N, inner steps that there is noise for.
        runs: Runs in each support, Hessian and query batch.
        horizon: H, actions in a run.
    """

    def __init__(
        self, first: int, batches: int, tasks: int, steps: int, runs: int, horizon: int
    ) -> None:
        self.first, self.batches, self.tasks = first, batches, tasks
        self.steps, self.runs, self.horizon = steps, runs, horizon

    def __len__(self) -> int:
        """Return the number of meta-batches."""
        return self.batches

    def __getitem__(self, number: int) -> ResampledEpisodes:
        """Return a meta-batch: noise as inputs ``[T, (N,) S, H, 2]``, goals ``[T, (N,) S, 2]``."""
        random = torch.Generator().manual_seed(self.first + number)
        goals = torch.rand(self.tasks, 2, generator=random) - 0.5

        def batch(*shape: int) -> tuple[Tensor, Tensor]:
            noise = torch.randn(self.tasks, *shape, self.horizon, 2, generator=random)
            return noise, goals.view(self.tasks, *[1] * len(shape), 2).expand(-1, *shape, -1)

        of_steps = (self.steps, self.runs)
        return ResampledEpisodes(*batch(*of_steps), *batch(*of_steps), *batch(self.runs))


class GoalData(LightningDataModule):
    """Fresh goals and fresh runs in every meta-batch; the same ones in each validation and test.

    Args:
        train_steps: N, as the model's.
        test_steps: K, as the model's.
        meta_batch_size: Goals per meta-batch.
        train_batches: Meta-batches in training, in one epoch.
        runs: Runs in each batch of a task.
        horizon: Actions in a run.
    """

    def __init__(
        self,
        train_steps: int = 1,
        test_steps: int = 3,
        meta_batch_size: int = 20,
        train_batches: int = 300,
        runs: int = 20,
        horizon: int = 20,
    ) -> None:
        super().__init__()
        self.train_steps, self.test_steps = train_steps, test_steps
        self.meta_batch_size, self.train_batches = meta_batch_size, train_batches
        self.runs, self.horizon = runs, horizon

    def independent_episodes(self, purpose: str, draw: int, tasks: int) -> ResampledEpisodes:
        """Return tasks of their own for callbacks such as ``StationarityMonitor``."""
        first = 10**7 + zlib.crc32(purpose.encode())
        return Goals(first, draw + 1, tasks, self.train_steps, self.runs, self.horizon)[draw]

    def train_dataloader(self) -> DataLoader[ResampledEpisodes]:
        """Return meta-batches of :class:`lightning_maml.ResampledEpisodes`."""
        return self._loader(0, self.train_batches, self.meta_batch_size, self.train_steps)

    def val_dataloader(self) -> DataLoader[ResampledEpisodes]:
        """Return 100 other goals."""
        return self._loader(10**6, 5, 20, self.test_steps)

    def test_dataloader(self) -> DataLoader[ResampledEpisodes]:
        """Return 400 more."""
        return self._loader(2 * 10**6, 20, 20, self.test_steps)

    def _loader(
        self, first: int, batches: int, tasks: int, steps: int
    ) -> DataLoader[ResampledEpisodes]:
        goals = Goals(first, batches, tasks, steps, self.runs, self.horizon)
        return DataLoader(goals, batch_size=None)
