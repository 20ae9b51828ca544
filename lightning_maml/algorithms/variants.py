"""The named variants of MAML, for which a config only has to change ``class_path``."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_maml.algorithms.adapting import InnerRate, Plan
from lightning_maml.algorithms.losses import ModelLosses
from lightning_maml.algorithms.maml import MAML
from lightning_maml.batches.episodes import AnyEpisodes
from lightning_maml.checks.inner_steps import moves_by_itself
from lightning_maml.core.hvp import CurvatureName, hessian_vector_product
from lightning_maml.errors import UserValueError
from lightning_maml.functional.implicit import implicit_gradient, proximal
from lightning_maml.functional.meta_gradient import MetaGradient
from lightning_maml.functional.reptile import reptile_gradient
from lightning_maml.io.plain import number, whole_number
from lightning_maml.networks.functional_network import FunctionalNetwork
from lightning_maml.networks.kinks import kinks


class FOMAML(MAML):
    """First-order MAML: the query gradient after adaptation (Fallah et al. 2020, Algorithm 2).

    Takes MAML's arguments. The cheapest variant, but the meta-objective's gradient need not fall
    below the order of alpha L sigma (Theorem 4.15).

    Examples:
        >>> from lightning_maml import FOMAML, MLP
        >>> FOMAML(MLP(4, 3), inner_lr=0.1, train_steps=5).curvature
        'none'
    """

    curvature = "none"


class HFMAML(MAML):
    """Hessian-free MAML: curvature by finite differences of gradients.

    Fallah et al. 2020, Algorithm 3, and its multi-step form: MAML's meta-gradient to three or four
    digits, from first derivatives only. The theory asks for a twice differentiable network. With
    ReLU or max-pooling HF-MAML does worse than :class:`FOMAML`, so it warns about them: about such
    layers when the model is made or, if there are none, about such functions at the first batch.
    Use GELU, softplus or SiLU with strides or average pooling.

    Args:
        network: The network to meta-train.
        inner_lr: alpha, the inner learning rate.
        train_steps: N, inner steps in training.
        probe_radius: h, how far from the inner point the two gradients are taken, in units of the
            parameters; by default the cube root of the machine epsilon (4.9e-3 in float32).
        **options: Further arguments of :class:`MAML`.

    Raises:
        ValueError: As in :class:`MAML`, and if ``probe_radius`` is not positive.

    Examples:
        >>> from lightning_maml import HFMAML, MLP
        >>> HFMAML(MLP(4, 3, activation="gelu"), train_steps=3, probe_radius=0.01).probe_radius
        0.01
    """

    curvature = "finite_difference"

    def __init__(
        self,
        network: nn.Module,
        inner_lr: InnerRate = 0.4,
        train_steps: int = 1,
        *,
        probe_radius: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, inner_lr, train_steps, **options)
        probe_radius = None if probe_radius is None else number(probe_radius, "probe_radius")
        # refuses a radius that is not positive
        hessian_vector_product(self.curvature, probe_radius)
        self.save_hyperparameters("probe_radius")
        self.probe_radius = probe_radius
        self._warned = False
        self._warn_of_kinks(kinks(network))

    @override
    def _inspect(self, episodes: AnyEpisodes) -> None:
        self._warn_of_kinks(self.kinks(episodes))

    def _warn_of_kinks(self, found: list[str]) -> None:
        if found and not self._warned:
            warnings.warn(
                "HFMAML needs a twice differentiable network and loss but got kinks in "
                f"{', '.join(found)}: its finite differences are then worse than no curvature at "
                "all. Use GELU, softplus or SiLU with strides or average pooling and a smooth "
                "loss, or train with MAML or FOMAML.",
                stacklevel=3,
            )
            self._warned = True


class ANIL(MAML):
    """Almost no inner loop: only the head adapts (Raghu et al. 2020). Arguments as :class:`MAML`.

    The body's meta-gradient has the mixed terms of the head's inner steps. For a first-order or
    Hessian-free version use the other classes with ``adapt="head"``.

    Examples:
        >>> from lightning_maml import ANIL, MLP
        >>> ANIL(MLP(4, 3), inner_lr=0.1).adapted_part
        'head'
    """

    default_adapt = "head"


class BOIL(MAML):
    """Body only in the inner loop (Oh et al. 2021). Takes MAML's arguments.

    The head does not adapt, but is meta-trained.

    Examples:
        >>> from lightning_maml import BOIL, MLP
        >>> BOIL(MLP(4, 3), inner_lr=0.1).adapted_part
        'body'
    """

    default_adapt = "body"


class LSLR(MAML):
    """MAML with inner rates learned for each layer and step. Takes MAML's arguments.

    Antoniou et al. 2019, section 4.

    Examples:
        >>> from lightning_maml import LSLR, MLP
        >>> model = LSLR(MLP(4, 3, hidden=[8]), inner_lr=0.1, train_steps=2)
        >>> [list(rates.shape) for rates in model.learned_rates.values][:2]  # a rate for each step
        [[2], [2]]
    """

    default_inner_rates = "per_layer_and_step"


class MetaSGD(MAML):
    """MAML with an inner rate learned for each number of the parameters (Li et al. 2017).

    Takes MAML's arguments.

    Examples:
        >>> from lightning_maml import MLP, MetaSGD
        >>> model = MetaSGD(MLP(4, 3, hidden=[8]), inner_lr=0.1)
        >>> [list(rates.shape) for rates in model.learned_rates.values][:2]
        [[8, 4], [8]]
    """

    default_inner_rates = "per_parameter"


class MAMLPlusPlus(LSLR):
    """MAML++ (Antoniou et al. 2019): learned rates, and an annealed start.

    For the first epochs the query losses after all steps are trained on, or no curvature is taken,
    or both.

    Args:
        network: The network to meta-train.
        inner_lr: alpha, the value at which the learned rates start.
        train_steps: N. In evaluation, steps beyond N use the rates of the last one.
        multi_step_epochs: Epochs over which the weights of the query losses change from equal for
            all steps to the last step only (section 4, "Multi-Step Loss Optimization").
        first_order_epochs: Epochs at the start that are trained without curvature (section 4,
            "Derivative-Order Annealing").
        **options: Further arguments of :class:`MAML`.

    Raises:
        ValueError: As in :class:`MAML`, and if a number of epochs is negative.

    Examples:
        >>> from lightning_maml import MLP, MAMLPlusPlus
        >>> MAMLPlusPlus(MLP(4, 3), train_steps=2, multi_step_epochs=10).step_weights(epoch=5)
        [0.25, 0.75]
    """

    compiles = False  # its weights of the query losses change with the epochs

    def __init__(
        self,
        network: nn.Module,
        inner_lr: InnerRate = 0.1,
        train_steps: int = 5,
        *,
        multi_step_epochs: int = 15,
        first_order_epochs: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(network, inner_lr, train_steps, **options)
        multi_step_epochs = whole_number(multi_step_epochs, "multi_step_epochs")
        first_order_epochs = whole_number(first_order_epochs, "first_order_epochs")
        for name, epochs in (
            ("multi_step_epochs", multi_step_epochs),
            ("first_order_epochs", first_order_epochs),
        ):
            if epochs < 0:
                raise UserValueError(f"Expected `{name}` to be at least 0 but got {epochs}.")
        self.save_hyperparameters("multi_step_epochs", "first_order_epochs")
        self.multi_step_epochs, self.first_order_epochs = multi_step_epochs, first_order_epochs

    def step_weights(self, epoch: int) -> list[float]:
        """Return the weights of the query losses after steps 1 .. N.

        Earlier ones shrink linearly from 1/N to 0, the last gets the rest.
        """
        steps = self.train_steps
        if steps == 0:
            return []
        earlier = 0.0
        if self.multi_step_epochs:
            earlier = max(0.0, 1 - epoch / self.multi_step_epochs) / steps
        return [earlier] * (steps - 1) + [1 - earlier * (steps - 1)]

    @override
    def _gradient_function(
        self, plan: Plan, episodes: AnyEpisodes, curvature: CurvatureName | None = None
    ) -> Callable[[], MetaGradient]:
        if curvature is not None:
            return super()._gradient_function(plan, episodes, curvature)
        if self._trainer is None and (self.multi_step_epochs or self.first_order_epochs):
            raise UserValueError(
                "Expected a trainer, over whose epochs MAMLPlusPlus anneals, but there is none; "
                "train with one, or set `multi_step_epochs` and `first_order_epochs` to 0."
            )
        epoch = self.current_epoch
        curvature = "none" if epoch < self.first_order_epochs else self.curvature
        return self._maml_gradient(plan, episodes, curvature, self.step_weights(epoch))


class Reptile(MAML):
    """Reptile (Nichol et al. 2018): the meta-gradient is ``w_0 - w_N``.

    Takes MAML's arguments. With SGD of rate epsilon a step is the paper's
    ``w <- w + epsilon (w_N - w)``. The query sets are evaluated, not trained on. With
    ``ResampledEpisodes`` each inner step has a mini-batch of its own, as in the paper. The inner
    rates cannot be learned, and parameters that do not adapt are not trained.

    Examples:
        >>> import torch
        >>> from lightning_maml import MLP, Episodes, Reptile
        >>> x, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2] * 2] * 2)  # two tasks
        >>> model = Reptile(MLP(4, 3), inner_lr=0.1, train_steps=5)
        >>> model.meta_loss(Episodes(x, y, x, y)).backward()
    """

    curvature = "none"
    learns_rates = False
    compiles = False

    @override
    def _optimised(self) -> Iterable[nn.Parameter]:
        # weight decay would move those that do not adapt; frozen ones may be thawed later
        adapts = {*self._adapting_parameters().values()}
        kept = {p for p in self.network.parameters() if p.requires_grad and p not in adapts}
        return (p for p in self.parameters() if p not in kept)

    @override
    def _gradient_function(
        self, plan: Plan, episodes: AnyEpisodes, curvature: CurvatureName | None = None
    ) -> Callable[[], MetaGradient]:
        if curvature is not None:
            return super()._gradient_function(plan, episodes, curvature)
        if trained := self._loss_of_outputs().trained:
            raise UserValueError(
                "Expected a loss without trainable parameters with Reptile, which trains only "
                f"what adapts, but got {trained}; freeze them by requires_grad_(False), or train "
                "with MAML or FOMAML."
            )
        return partial(reptile_gradient, **self._training_arguments(plan, episodes))


class IMAML(MAML):
    """iMAML: a proximal term keeps the adapted parameters close (Rajeswaran et al. 2019).

    The meta-gradient is that at the minimum. It does not need the inner path, so N may be as large
    as reaching the minimum takes, and only costs gradients. The paper's "Hessian-free" iMAML is
    this algorithm with another inner solver, and has nothing to do with :class:`HFMAML`. The inner
    rates cannot be learned, because the minimum does not depend on them.

    Args:
        network: The network to meta-train.
        inner_lr: alpha, the inner learning rate.
        train_steps: N, at least 1. In evaluation the steps have the proximal term, too.
        proximal_strength: lambda, in units of the loss per squared distance of the parameters.
        cg_steps: Hessian-vector products for each task's meta-gradient.
        **options: Further arguments of :class:`MAML`.

    Raises:
        ValueError: As in :class:`MAML`, if one of the last three numbers is out of range, or if
            parameters are complex.

    Examples:
        >>> from lightning_maml import IMAML, MLP
        >>> IMAML(MLP(4, 3), inner_lr=0.1, train_steps=16, proximal_strength=2.0).cg_steps
        5
    """

    learns_rates = False
    compiles = False

    def __init__(
        self,
        network: nn.Module,
        inner_lr: InnerRate = 0.1,
        train_steps: int = 16,
        *,
        proximal_strength: float = 2.0,
        cg_steps: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(network, inner_lr, train_steps, **options)
        if train_steps < 1:
            raise UserValueError(
                "Expected `train_steps` to be at least 1, because iMAML needs at least one inner "
                f"step, but got {train_steps}."
            )
        proximal_strength = number(proximal_strength, "proximal_strength")
        cg_steps = whole_number(cg_steps, "cg_steps")
        if not 0 < proximal_strength < float("inf"):
            raise UserValueError(
                "Expected `proximal_strength` to be a finite number above 0 but got "
                f"{proximal_strength}."
            )
        if cg_steps < 0:
            raise UserValueError(f"Expected `cg_steps` to be at least 0 but got {cg_steps}.")
        if any(p.is_complex() and p.requires_grad for p in network.parameters()):
            raise UserValueError(
                "Expected real parameters with IMAML but got complex ones; use MAML, or parameters "
                "that are real, of which the network makes complex numbers."
            )
        self.save_hyperparameters("proximal_strength", "cg_steps")
        self.proximal_strength, self.cg_steps = proximal_strength, cg_steps

    @override
    def _check_inner_steps(self) -> None:
        super()._check_inner_steps()
        if self.inner_optimizer is not None and moves_by_itself(self.inner_optimizer):
            raise UserValueError(
                "Expected an `inner_optimizer` without weight decay with IMAML, whose gradient is "
                "that at the minimum of support loss and proximal term, but "
                f"{self.inner_optimizer} moves parameters without gradient; the proximal term "
                "takes its place."
            )

    @override
    def _adaptation_settings(self) -> dict[str, Any]:
        return super()._adaptation_settings() | {"proximal_strength": self.proximal_strength}

    @override
    def _losses(
        self, functional: FunctionalNetwork, averages: Mapping[str, Tensor] | None = None
    ) -> ModelLosses:
        losses = super()._losses(functional, averages)
        anchor = {name: functional.params[name].detach() for name in self._adapting_parameters()}
        return losses._replace(support=proximal(losses.support, anchor, self.proximal_strength))

    @override
    def _gradient_function(
        self, plan: Plan, episodes: AnyEpisodes, curvature: CurvatureName | None = None
    ) -> Callable[[], MetaGradient]:
        return partial(
            implicit_gradient,
            **self._training_arguments(plan, episodes),
            strength=self.proximal_strength,
            cg_steps=self.cg_steps,
            curvature=curvature or self.curvature,
        )
