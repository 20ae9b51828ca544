"""Reinforcement learning with the same functions: a point learns to reach a goal.

It moves in the plane, and adapts after a few trial runs.

A task is a goal; a policy that does not see it must find it from the rewards of its own
trajectories (Ji et al. 2022, Appendix A.1; the environment is that of Finn et al. 2017, section
5.3, shorter and without bounds). Two things differ from classification:

- The data depend on the parameters. ``ResampledEpisodes`` holds noise, which ``sample`` turns into
  trajectories at the inner point where they are needed.
- The derivatives of the expected return must include that dependence. The loss weights every reward
  by the likelihood ratio of its actions between the policy that is differentiated and the one that
  acted. Where the two are the same the ratio is 1 and its derivatives are those of DiCE (Foerster
  et al. 2018); at the two points that HF-MAML probes it is the importance weight of the same
  trajectories.

    python examples/point_navigation.py

runs three algorithms and makes a table and a picture, in some minutes on 2 cores.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from lightning_maml import ResampledEpisodes, adaptation_curve, meta_gradient
from lightning_maml.algorithms.metrics import TaskMean
from lightning_maml.core.hvp import CurvatureName
from lightning_maml.core.params import Params

HORIZON = 20
GOALS = 0.5
"""Goals lie in the square of this half-width around the start."""

STEP, STEP_STD = 0.1, 0.05
"""Longest mean action and standard deviation of an action around it, per coordinate."""

INNER_LR = 0.02
ALGORITHMS: dict[str, CurvatureName] = {
    "MAML": "exact",
    "FO-MAML": "none",
    "HF-MAML": "finite_difference",
}


def build_policy() -> nn.Module:
    """Return a smooth network from positions to mean actions, both ``[..., 2]``.

    Actions are in units of ``STEP``.
    """
    return nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2), nn.Tanh()
    )


class Trajectories(NamedTuple):
    """What a policy did, without an autograd graph.

    Attributes:
        positions: Where each action was taken, ``[S, H, 2]``.
        actions: Displacements, ``[S, H, 2]``.
        log_probs: Log-probabilities of the actions under the policy that took them, ``[S, H]``.
        rewards: Minus the squared distance to the goal after each action, ``[S, H]``.
    """

    positions: Tensor
    actions: Tensor
    log_probs: Tensor
    rewards: Tensor


class Navigation:
    """The environment and the loss, for a policy network such as :func:`build_policy` returns."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    def sample(self, params: Params, noise: Tensor, goal: Tensor) -> tuple[Trajectories, Tensor]:
        """Act with the policy at ``params``.

        ``noise`` ``[S, H, 2]`` is standard normal, ``goal`` is ``[S, 2]``.
        """
        position, positions, actions = torch.zeros_like(goal), [], []
        for t in range(noise.shape[1]):
            action = self._mean(params, position) + STEP_STD * noise[:, t]
            positions.append(position)
            actions.append(action)
            position = position + action
        taken_at, taken = torch.stack(positions, 1), torch.stack(actions, 1)
        rewards = -(taken_at + taken - goal[:, None]).square().sum(-1)
        return Trajectories(
            taken_at, taken, self._log_probs(params, taken_at, taken), rewards
        ), goal

    def loss(self, params: Params, runs: Trajectories, goal: Tensor) -> Tensor:
        """Return minus the mean return, estimated from trajectories drawn at other parameters.

        The estimate is unbiased for any ``params``.

        ``sum_t rho_t r_t - (rho_t - rho_{t-1}) b_t`` with ``rho_t`` the likelihood ratio of the
        first t actions. The baseline ``b_t``, the mean reward to go of the other trajectories, only
        lowers the variance: ``rho_t - rho_{t-1}`` has mean 0.
        """
        log_ratios = self._log_probs(params, runs.positions, runs.actions) - runs.log_probs
        ratios = log_ratios.cumsum(1).exp()
        before = torch.cat([torch.ones_like(ratios[:, :1]), ratios[:, :-1]], 1)
        to_go = runs.rewards.flip(1).cumsum(1).flip(1)
        others = (to_go.sum(0) - to_go) / (len(to_go) - 1)
        return -(ratios * runs.rewards - (ratios - before) * others).sum(1).mean()

    def _mean(self, params: Params, positions: Tensor) -> Tensor:
        mean: Tensor = STEP * functional_call(self.policy, params, (positions,))
        return mean

    def _log_probs(self, params: Params, positions: Tensor, actions: Tensor) -> Tensor:
        deviation = (actions - self._mean(params, positions)) / STEP_STD
        return -deviation.square().sum(-1) / 2  # up to a constant, which cancels in ratios


def draw_tasks(
    tasks: int, steps: int, runs: int, hessian_runs: int, random: torch.Generator
) -> ResampledEpisodes:
    """Draw goals, and the noise of ``runs`` trajectories per batch."""
    goals = GOALS * (2 * torch.rand(tasks, 1, 2, generator=random) - 1)

    def batch(*sizes: int) -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, *sizes, HORIZON, 2, generator=random), goals.view(
            tasks, *[1] * len(sizes), 2
        ).expand(-1, *sizes, -1)

    return ResampledEpisodes(*batch(steps, runs), *batch(steps, hessian_runs), *batch(runs))


def meta_train(
    policy: nn.Module, curvature: CurvatureName, iterations: int, seed: int = 0
) -> list[float]:
    """Train ``policy`` in place, with N = 1.

    Return, for every iteration, the mean return after adaptation.
    """
    task, random = Navigation(policy), torch.Generator().manual_seed(seed)
    params = dict(policy.named_parameters())
    optimizer = torch.optim.Adam(params.values(), lr=3e-3)
    returns = []
    for _ in tqdm(range(iterations), desc=curvature, unit="iteration"):
        episodes = draw_tasks(tasks=20, steps=1, runs=20, hessian_runs=20, random=random)
        result = meta_gradient(
            task.loss,
            params,
            episodes,
            inner_lr=INNER_LR,
            steps=1,
            curvature=curvature,
            sample=task.sample,
            tasks="vmap",
        )
        for name, parameter in params.items():
            parameter.grad = result.grad[name]
        optimizer.step()
        returns.append(-float(result.query_loss.mean()))
    return returns


def returns_on_new_tasks(policy: nn.Module, steps: int = 3, tasks: int = 200) -> Tensor:
    """Return mean returns after 0 .. ``steps`` adaptation steps, ``[tasks, steps + 1]``.

    Each is the mean of 20 runs; each step sees 20 runs.
    """
    task, episodes = (
        Navigation(policy),
        draw_tasks(
            tasks, steps, runs=20, hessian_runs=0, random=torch.Generator().manual_seed(10_000)
        ),
    )
    params = dict(policy.named_parameters())
    return -adaptation_curve(
        task.loss,
        params,
        episodes,
        inner_lr=INNER_LR,
        steps=steps,
        sample=task.sample,
        tasks="vmap",
    ).loss


def runs_on_one_task(policy: nn.Module, goal: Tensor, steps: int) -> list[Tensor]:
    """Return the positions of 20 runs after 0 .. ``steps`` steps, each ``[20, H, 2]``.

    Each adaptation step sees 20 runs.
    """
    task, random = Navigation(policy), torch.Generator().manual_seed(20_000)
    params, goals, positions = dict(policy.named_parameters()), goal.expand(20, 2), []
    for _ in range(steps + 1):
        runs, _ = task.sample(params, torch.randn(20, HORIZON, 2, generator=random), goals)
        positions.append((runs.positions + runs.actions).detach())
        gradient = torch.func.grad(task.loss)(params, runs, goals)
        params = {name: p - INNER_LR * gradient[name] for name, p in params.items()}
    return positions


def draw_runs(policies: dict[str, nn.Module], steps: int = 3) -> Figure:
    """Draw, for each policy, runs to four goals before and after adaptation."""
    goals = 0.8 * GOALS * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    figure = Figure(figsize=(3.2 * len(policies), 6.2), layout="constrained")
    axes = figure.subplots(2, len(policies), sharex=True, sharey=True, squeeze=False)
    for column, (name, policy) in enumerate(policies.items()):
        for number, goal in enumerate(goals):
            positions = runs_on_one_task(policy, goal, steps)
            for row, when in enumerate((0, -1)):
                for run in positions[when]:
                    axes[row, column].plot(*run.T, color=f"C{number}", linewidth=0.5, alpha=0.6)
                axes[row, column].plot(
                    *goal, marker="*", markersize=14, color=f"C{number}", markeredgecolor="black"
                )
        axes[0, column].set_title(f"{name}, before adaptation", fontsize=10)
        axes[1, column].set_title(f"after {steps} steps of 20 runs each", fontsize=10)
        axes[0, column].set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
        axes[1, column].set_aspect("equal")
    return figure


def main() -> None:
    """Train the three algorithms, print a table and save a picture."""
    parser = argparse.ArgumentParser(
        description="Meta-train a point to reach a goal that it is not told."
    )
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/point_navigation.png"))
    arguments = parser.parse_args()
    policies, rows = {}, []
    for name, curvature in ALGORITHMS.items():
        torch.manual_seed(0)
        policies[name] = build_policy()
        meta_train(policies[name], curvature, arguments.iterations)
        estimate = TaskMean()
        estimate.update(returns_on_new_tasks(policies[name]))
        rows.append((name, estimate.compute()))
    print(
        f"\nReturn over {HORIZON} steps, 200 new tasks, 95 % intervals; after 0 .. 3 adaptation "
        "steps of 20 runs each\n"
    )
    for name, (mean, ci95, _) in rows:
        print(
            f"{name:8}"
            + "".join(
                f"{m:9.2f} ± {c:.2f}" for m, c in zip(mean.tolist(), ci95.tolist(), strict=True)
            )
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw_runs(policies).savefig(arguments.out)
    print(f"\nRuns before and after adaptation: {arguments.out}")


if __name__ == "__main__":
    main()
