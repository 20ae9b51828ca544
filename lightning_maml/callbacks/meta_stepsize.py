"""The adaptive meta-stepsize of both papers as a callback."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes, ResampledEpisodes
from lightning_maml.callbacks.independent_tasks import IndependentTasks, as_maml
from lightning_maml.errors import UserFloatingPointError, UserValueError, check_truth
from lightning_maml.io.plain import number, whole_number
from lightning_maml.theory import (
    Rule,
    largest_inner_lr,
    largest_one_step_inner_lr,
    meta_smoothness,
    meta_stepsize,
    paper_scale,
    recommended_inner_lr,
)
from lightning_maml.theory.coverage import Data, described, known_instead, theorems
from lightning_maml.theory.measure import Probe


class AdaptiveMetaStepsize(Callback):
    """Sets the meta-optimizer's learning rate at every step to ``beta_k = scale / L-hat(w_k)``.

    The meta-objective has no bounded smoothness: ``L-hat(w)`` grows with the task gradients, whose
    mean norm is estimated at the current parameters on tasks of their own, independent of the
    training batch. Where the gradients are large the steps are short, and they lengthen as training
    goes on. Logged: ``train/meta_stepsize``, ``train/meta_smoothness`` (L-hat),
    ``train/task_gradient_norm``, ``train/L``, ``train/rho`` and with ``"finite_sum"`` ``train/b``.

    The rate is set once per optimizer step, also with gradient accumulation, for all parameter
    groups alike, and is the same in every process. The theory is that of plain SGD; with another
    optimizer, and with gradient clipping, beta becomes the rate of that optimizer and a warning
    says so. Others say where no theorem covers the algorithm, its number of steps and its kind of
    tasks with this rule (:func:`lightning_maml.theory.theorems`), where the network has kinks, and
    where alpha L is too large for the theorem.

    The L and rho of the papers' equations hold for all parameters. What is measured at the current
    ones is at most that, so beta may be larger than the papers', and its step go past a near
    minimum: give ``L`` and ``rho`` where they are known, or set ``keep_largest``.

    Args:
        rule: ``"one_step"`` (Fallah et al. 2020, eq. 17, for N = 1), ``"resampling"`` (Ji et al.
            2022, eq. 14) or ``"finite_sum"`` (eq. 22).
        L: Smoothness of the task losses; measured if None.
        rho: Lipschitz constant of their Hessians; measured if None. A network with kinks has none.
        b: Mean distance between the gradients of support and query loss, for ``"finite_sum"``;
            measured if None.
        scale: Numerator of beta, a safety factor; by default the papers' constant, see
            :func:`lightning_maml.theory.paper_scale`. That constant is for the worst case: with
            measured constants ``scale=1`` converges ten or more times faster, if alpha is at most 1
            / (8 N L). With far larger inner learning rates L-hat means little, and scale is a
            number to tune.
        tasks: B', tasks drawn per step and process; of ``episodes`` those of a batch.
        every_n_steps: How often L, rho and b are measured, at the parameters of that step, on B'
            tasks.
        keep_largest: Use the largest L and rho measured so far, not the last.
        episodes: Meta-batches like those trained on, drawn independently of them; by default the
            datamodule's, if it is one of this package.

    Raises:
        ValueError: If an argument is out of range; when training starts, with manual optimization,
            several optimizers, a learning-rate scheduler, ``"one_step"`` with several inner steps,
            or nothing to draw tasks from.
        TypeError: If the module is not a :class:`lightning_maml.MAML`.
        FloatingPointError: If a measured constant or the gradient norm is not finite, or L-hat is
            0 or so small that beta overflows.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from lightning import Trainer
        >>> from torch.utils.data import DataLoader
        >>> from lightning_maml import MAML, MLP, AdaptiveMetaStepsize, Episodes
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)
        >>> batches = [Episodes(x, y, x, y)]
        >>> model = MAML(
        ...     MLP(4, 3, activation="gelu"),
        ...     inner_lr=0.01,
        ...     optimizer=partial(torch.optim.SGD, lr=0.1),
        ... )
        >>> adaptive = AdaptiveMetaStepsize("finite_sum", L=10.0, rho=0.0, b=0.0, episodes=batches)
        >>> trainer = Trainer(callbacks=[adaptive], max_epochs=1, barebones=True)
        >>> trainer.fit(model, DataLoader(batches, batch_size=None))
        >>> round(trainer.optimizers[0].param_groups[0]["lr"], 5)  # 1 / (80 * 1.1**2 * 10)
        0.00103
    """

    def __init__(
        self,
        rule: Rule = "finite_sum",
        L: float | None = None,
        rho: float | None = None,
        b: float | None = None,
        scale: float | None = None,
        tasks: int = 4,
        every_n_steps: int = 100,
        episodes: Iterable[AnyEpisodes] | None = None,
        keep_largest: bool = False,
    ) -> None:
        tasks = whole_number(tasks, "tasks")
        every_n_steps = whole_number(every_n_steps, "every_n_steps")
        scale = _number_or_none(scale, "scale")
        L = _number_or_none(L, "L")
        rho = _number_or_none(rho, "rho")
        b = _number_or_none(b, "b")
        check_truth(keep_largest=keep_largest)
        if every_n_steps < 1:
            raise UserValueError(
                f"Expected `every_n_steps` to be at least 1 but got {every_n_steps}."
            )
        if scale is not None and not scale > 0:
            raise UserValueError(f"Expected `scale` to be positive but got {scale}.")
        # called for its checks of the rule and the constants
        meta_smoothness(rule, 1.0 if L is None else L, rho or 0.0, 0.0, 1, 0.0, b or 0.0)
        self.rule: Rule = rule
        self.scale = scale
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.keep_largest = keep_largest
        self._given = {"L": L, "rho": rho}
        if rule == "finite_sum":  # the other rules have no b
            self._given["b"] = b
        self._measured: dict[str, float] = {}
        self._tasks = IndependentTasks("stepsize", tasks, episodes)
        self._said: set[str] = set()
        self._is_first_step = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a fit anew; a checkpoint, if there is one, is read after this."""
        if stage == "fit":
            self._measured = {}
            self._tasks.start_at(0)
            self._said.clear()
            self._is_first_step = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what else would set the learning rate; warn where the theorems do not hold."""
        _check_nothing_else_sets_the_rate(trainer, pl_module)
        module = as_maml(self, pl_module)
        module.check_for_theory()
        if self.rule == "one_step" and module.train_steps != 1:
            raise UserValueError(
                f"Expected train_steps=1 with rule 'one_step' but got {module.train_steps}; use "
                "'resampling' or 'finite_sum'."
            )
        self._tasks.check(trainer)
        outside = _outside_the_theory(trainer, module)
        if outside:
            warnings.warn(
                f"AdaptiveMetaStepsize: the theorems do not cover {'; nor '.join(outside)}.",
                stacklevel=2,
            )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the learning rate."""
        module = as_maml(self, pl_module)
        episodes = self._tasks.draw(trainer)
        if self._is_first_step:
            self._is_first_step = False
            for sentence in (_not_covered(self.rule, module, episodes), _kinked(module, episodes)):
                if sentence:
                    rank_zero_warn(f"AdaptiveMetaStepsize: {sentence}.")
        probe = module.probe(episodes)
        constants = self._constants(probe, trainer)
        self._once("alpha", rank_zero_warn, _too_large_alpha(self.rule, module, constants["L"]))
        gradient_norm = _over_processes(trainer, float(probe.gradient_norms().mean()), "mean")
        smoothness = meta_smoothness(
            self.rule,
            **constants,
            alpha=module.check_for_theory(),
            steps=module.train_steps,
            gradient_norm=gradient_norm,
        )
        scale = paper_scale(self.rule, module.curvature) if self.scale is None else self.scale
        try:
            beta = meta_stepsize(smoothness, scale)
        except UserValueError as error:
            raise UserFloatingPointError(
                f"Expected scale / L-hat to be a number above 0 but got {scale:.3g} / "
                f"{smoothness:.3g} at step {trainer.global_step}; where the losses are linear or "
                "their gradients 0, remove AdaptiveMetaStepsize and set the rate."
            ) from error
        for group in optimizer.param_groups:
            group["lr"] = beta
        figures = {
            "meta_stepsize": beta,
            "meta_smoothness": smoothness,
            "task_gradient_norm": gradient_norm,
            **constants,
        }
        # one copy to the device, for which torch does not wait on CUDA (on MPS it would have to);
        # of numbers Lightning would make one each
        may_go_on = module.device.type == "cuda"
        on_device = torch.tensor([*figures.values()]).to(module.device, non_blocking=may_go_on)
        module.log_dict(
            {f"train/{name}": value for name, value in zip(figures, on_device, strict=True)}
        )

    def _once(self, what: str, say: Callable[[str], object], sentence: str) -> None:
        """Say a sentence, if there is one, once in a fit."""
        if sentence and what not in self._said:
            self._said.add(what)
            say(f"AdaptiveMetaStepsize: {sentence}.")

    def _constants(self, probe: Probe, trainer: Trainer) -> dict[str, float]:
        """Return L, rho and b, as given or as last measured, and measure them if it is time."""
        missing = {name for name, value in self._given.items() if value is None}
        # a resumed run may lack constants that were given before
        never_measured = missing - self._measured.keys()
        if never_measured or (missing and trainer.global_step % self.every_n_steps == 0):
            self._measure_again(probe, trainer, missing)
        return {
            name: self._measured[name] if value is None else value
            for name, value in self._given.items()
        }

    def _measure_again(self, probe: Probe, trainer: Trainer, missing: set[str]) -> None:
        before, self._measured = self._measured, _measure(probe, trainer, missing)
        if self.keep_largest:
            for name in {"L", "rho"} & self._measured.keys() & before.keys():
                self._measured[name] = max(self._measured[name], before[name])
        found = [f"{name} = {self._measured[name]:.3g}" for name in ("L", "rho") if name in missing]
        if found:
            sentence = (
                f"{' and '.join(found)}, measured where training is now on some tasks: lower "
                "bounds on the suprema that the theorems take"
            )
            self._once("measured", rank_zero_info, sentence)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the constants as last measured, and how many meta-batches were drawn."""
        return {"measured": self._measured, "drawn": self._tasks.drawn}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved run stopped."""
        self._measured = state_dict["measured"]
        self._tasks.start_at(state_dict["drawn"])


def _number_or_none(value: float | None, name: str) -> float | None:
    return None if value is None else number(value, name)


def _check_nothing_else_sets_the_rate(trainer: Trainer, pl_module: LightningModule) -> None:
    if len(trainer.optimizers) != 1:
        raise UserValueError(
            "Expected one optimizer for AdaptiveMetaStepsize but got "
            f"{len(trainer.optimizers)}; give all parameters to one of them."
        )
    if not pl_module.automatic_optimization:
        raise UserValueError(
            "Expected automatic optimization for AdaptiveMetaStepsize but the module "
            "optimizes by hand; set automatic_optimization = True, or set the rate there by "
            "lightning_maml.theory.meta_stepsize."
        )
    if trainer.lr_scheduler_configs:
        scheduler = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        raise UserValueError(
            "Expected no learning-rate scheduler beside AdaptiveMetaStepsize but got "
            f"{scheduler}; set the model's `lr_scheduler` to null, or remove the callback."
        )


def _measure(probe: Probe, trainer: Trainer, missing: set[str]) -> dict[str, float]:
    """Measure the missing ones of L, rho and b at the current parameters.

    L and rho are the largest of all processes, b is their mean.
    """
    measured: dict[str, float] = {}
    if missing & {"L", "rho"}:
        # one direction may have no third derivative at all
        curvature = probe.curvature(restarts=2 if "rho" in missing else 0, tolerance=1e-2)
        if "L" in missing:
            measured["L"] = _over_processes(trainer, curvature.L, "max")
        if "rho" in missing:
            measured["rho"] = _over_processes(trainer, curvature.rho, "max")
    if "b" in missing:
        measured["b"] = _over_processes(trainer, probe.spread().b, "mean")
    return measured


def _over_processes(trainer: Trainer, number: float, operation: str) -> float:
    """Return the mean or maximum over all processes, so that each sets the same stepsize."""
    if trainer.world_size > 1:
        # a maximum over processes may lose a nan, but not an infinity
        number = number if math.isfinite(number) else math.inf
        on_device = torch.tensor(number, dtype=torch.float64, device=trainer.strategy.root_device)
        number = float(trainer.strategy.reduce(on_device, reduce_op=operation))
    if not math.isfinite(number):
        raise UserFloatingPointError(
            f"Expected finite curvature and gradients for the meta-stepsize but got {number} at "
            f"step {trainer.global_step}; lower the rates or check the data."
        )
    return number


def _not_covered(rule: Rule, module: MAML, episodes: AnyEpisodes) -> str:
    """Return that no theorem with this rule covers the algorithm and tasks; empty if one does."""
    data: Data = "resampling" if isinstance(episodes, ResampledEpisodes) else "finite_sum"
    case = (module.curvature, module.train_steps, data)
    found = theorems(*case)
    if rule in [theorem.rule for theorem in found]:
        return ""
    why = known_instead(*case)
    if found:
        why = f"{found[-1].name}, which covers it, is about rule {found[-1].rule!r}"
    return f"no theorem covers {described(*case)} with rule {rule!r}: {why}"


def _kinked(module: MAML, episodes: AnyEpisodes) -> str:
    """Return that no theorem covers a network with kinks; empty if it has none."""
    found = module.kinks(episodes)
    if not found:
        return ""
    return (
        f"the theorems do not cover a network or loss with kinks in {', '.join(found)}, whose rho "
        "does not exist"
    )


def _too_large_alpha(rule: Rule, module: MAML, L: float) -> str:
    """Return that alpha L is too large for the theorems with this rule; empty if it is not."""
    alpha, steps = module.check_for_theory(), module.train_steps
    largest = largest_inner_lr(L, steps)
    if rule == "one_step":
        largest = largest_one_step_inner_lr(L, module.curvature)
    if alpha < largest or (rule == "one_step" and alpha == largest):
        return ""
    return (
        f"alpha L = {alpha * L:.3g} with N = {steps}, but the theorem needs less than "
        f"{largest * L:.3g}, and beyond it beta means little; lower inner_lr, to 1 / (8 N L) = "
        f"{recommended_inner_lr(L, steps):.2g} or less, or tune `scale`"
    )


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's step is its learning rate times the gradient, nothing else.

    Args:
        optimizer: Any optimizer of torch.

    Examples:
        >>> import torch
        >>> from lightning_maml.callbacks.meta_stepsize import is_plain_sgd
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> is_plain_sgd(torch.optim.SGD(weights, lr=0.1))
        True
        >>> is_plain_sgd(torch.optim.SGD(weights, lr=0.1, momentum=0.9))
        False
    """
    if not isinstance(optimizer, SGD):
        return False
    extras = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return not any(group[name] for group in optimizer.param_groups for name in extras)


def _outside_the_theory(trainer: Trainer, module: MAML) -> list[str]:
    """Return in words what of this run the theorems do not cover."""
    outside = []
    optimizer = trainer.optimizers[0]
    if not is_plain_sgd(optimizer):
        outside.append(
            f"{type(optimizer).__name__} as it is configured, whose rate beta becomes (they are "
            "about plain SGD, optimizer=partial(torch.optim.SGD, lr=1.0))"
        )
    if trainer.gradient_clip_val:
        outside.append("gradient clipping")
    return outside
