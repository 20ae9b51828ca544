"""The papers' theory: constants, stepsizes and bounds as formulas, and their measurement."""

from lightning_maml.theory.coverage import Theorem as Theorem
from lightning_maml.theory.coverage import known_instead as known_instead
from lightning_maml.theory.coverage import theorems as theorems
from lightning_maml.theory.formulas import Convergence as Convergence
from lightning_maml.theory.formulas import FiniteSumMoments as FiniteSumMoments
from lightning_maml.theory.formulas import MomentConstants as MomentConstants
from lightning_maml.theory.formulas import PathError as PathError
from lightning_maml.theory.formulas import ResamplingBatches as ResamplingBatches
from lightning_maml.theory.formulas import Rule as Rule
from lightning_maml.theory.formulas import Sizes as Sizes
from lightning_maml.theory.formulas import SmoothnessConstants as SmoothnessConstants
from lightning_maml.theory.formulas import StepsizeBatches as StepsizeBatches
from lightning_maml.theory.formulas import adaptation_gap as adaptation_gap
from lightning_maml.theory.formulas import finite_sum_bound as finite_sum_bound
from lightning_maml.theory.formulas import finite_sum_convergence as finite_sum_convergence
from lightning_maml.theory.formulas import finite_sum_moments as finite_sum_moments
from lightning_maml.theory.formulas import finite_sum_sizes as finite_sum_sizes
from lightning_maml.theory.formulas import first_order_floor as first_order_floor
from lightning_maml.theory.formulas import hessian_batch as hessian_batch
from lightning_maml.theory.formulas import hessian_free_error as hessian_free_error
from lightning_maml.theory.formulas import largest_inner_lr as largest_inner_lr
from lightning_maml.theory.formulas import largest_one_step_inner_lr as largest_one_step_inner_lr
from lightning_maml.theory.formulas import meta_smoothness as meta_smoothness
from lightning_maml.theory.formulas import meta_stepsize as meta_stepsize
from lightning_maml.theory.formulas import moment_constants as moment_constants
from lightning_maml.theory.formulas import one_step_bias as one_step_bias
from lightning_maml.theory.formulas import one_step_noise as one_step_noise
from lightning_maml.theory.formulas import paper_scale as paper_scale
from lightning_maml.theory.formulas import path_error as path_error
from lightning_maml.theory.formulas import printed_probe_radius as printed_probe_radius
from lightning_maml.theory.formulas import (
    printed_smoothness_constants as printed_smoothness_constants,
)
from lightning_maml.theory.formulas import probe_radius as probe_radius
from lightning_maml.theory.formulas import recommended_inner_lr as recommended_inner_lr
from lightning_maml.theory.formulas import resampling_batches as resampling_batches
from lightning_maml.theory.formulas import resampling_bound as resampling_bound
from lightning_maml.theory.formulas import resampling_convergence as resampling_convergence
from lightning_maml.theory.formulas import resampling_sizes as resampling_sizes
from lightning_maml.theory.formulas import smoothness_constants as smoothness_constants
from lightning_maml.theory.formulas import stepsize_batches as stepsize_batches
