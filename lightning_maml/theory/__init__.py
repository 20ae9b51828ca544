"""The papers' theory: constants, stepsizes and bounds as formulas, and their measurement.

Sources: "Fallah" is Fallah, Mokhtari, Ozdaglar, AISTATS 2020; "Ji" is Ji, Yang, Liang, JMLR 23,
2022. Fallah covers one inner step with fresh samples, Ji N steps: with fresh samples for every step
(resampling), and with one support set and one query set per task (finite-sum).

Arguments have the papers' letters and mean the same everywhere, in units of the loss per power of
the parameters' unit:

- ``L``: smoothness of the task losses, the largest spectral norm of a Hessian [loss / parameter^2];
- ``rho``: Lipschitz constant of their Hessians [loss / parameter^3];
- ``alpha``: the inner learning rate [parameter^2 / loss], so that ``alpha L`` has no unit;
- ``steps``: N, the number of inner steps;
- ``sigma``: standard deviation of the task gradients over tasks [loss / parameter];
- ``sample_sigma``: standard deviation of the gradients of single samples within a task (Fallah:
  sigma-tilde, Ji: sigma_g) [loss / parameter];
- ``hessian_sigma``: standard deviation of their Hessians (sigma_H) [loss / parameter^2];
- ``b``: mean over tasks of the distance between the gradients of support and query loss [loss /
  parameter].

Every formula takes numpy's numbers and tensors without dimensions too, and raises a ``ValueError``
if an argument is negative, not finite, or 0 where it must be positive, or if there is no result.

Some printed formulas cannot be right: their units do not fit, they contradict the paper's own
corollaries, or a step of the proof does not hold. There the function follows the proof, and its
docstring says so.
"""

from lightning_maml.theory.approximations import PathError as PathError
from lightning_maml.theory.approximations import adaptation_gap as adaptation_gap
from lightning_maml.theory.approximations import first_order_floor as first_order_floor
from lightning_maml.theory.approximations import hessian_free_error as hessian_free_error
from lightning_maml.theory.approximations import one_step_bias as one_step_bias
from lightning_maml.theory.approximations import one_step_noise as one_step_noise
from lightning_maml.theory.approximations import path_error as path_error
from lightning_maml.theory.approximations import printed_probe_radius as printed_probe_radius
from lightning_maml.theory.approximations import probe_radius as probe_radius
from lightning_maml.theory.arguments import Rule as Rule
from lightning_maml.theory.convergence import Convergence as Convergence
from lightning_maml.theory.convergence import FiniteSumMoments as FiniteSumMoments
from lightning_maml.theory.convergence import MomentConstants as MomentConstants
from lightning_maml.theory.convergence import finite_sum_bound as finite_sum_bound
from lightning_maml.theory.convergence import finite_sum_convergence as finite_sum_convergence
from lightning_maml.theory.convergence import finite_sum_moments as finite_sum_moments
from lightning_maml.theory.convergence import moment_constants as moment_constants
from lightning_maml.theory.convergence import resampling_bound as resampling_bound
from lightning_maml.theory.convergence import resampling_convergence as resampling_convergence
from lightning_maml.theory.coverage import Theorem as Theorem
from lightning_maml.theory.coverage import known_instead as known_instead
from lightning_maml.theory.coverage import theorems as theorems
from lightning_maml.theory.sizes import Sizes as Sizes
from lightning_maml.theory.sizes import finite_sum_sizes as finite_sum_sizes
from lightning_maml.theory.sizes import resampling_sizes as resampling_sizes
from lightning_maml.theory.stepsizes import ResamplingBatches as ResamplingBatches
from lightning_maml.theory.stepsizes import SmoothnessConstants as SmoothnessConstants
from lightning_maml.theory.stepsizes import StepsizeBatches as StepsizeBatches
from lightning_maml.theory.stepsizes import hessian_batch as hessian_batch
from lightning_maml.theory.stepsizes import largest_inner_lr as largest_inner_lr
from lightning_maml.theory.stepsizes import largest_one_step_inner_lr as largest_one_step_inner_lr
from lightning_maml.theory.stepsizes import meta_smoothness as meta_smoothness
from lightning_maml.theory.stepsizes import meta_stepsize as meta_stepsize
from lightning_maml.theory.stepsizes import paper_scale as paper_scale
from lightning_maml.theory.stepsizes import (
    printed_smoothness_constants as printed_smoothness_constants,
)
from lightning_maml.theory.stepsizes import recommended_inner_lr as recommended_inner_lr
from lightning_maml.theory.stepsizes import resampling_batches as resampling_batches
from lightning_maml.theory.stepsizes import smoothness_constants as smoothness_constants
from lightning_maml.theory.stepsizes import stepsize_batches as stepsize_batches
