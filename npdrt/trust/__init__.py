"""Deep relative trust: the distances, bounds and lemmas of Bernstein et al. 2020 as functions;
and the layer Jacobians and bounds of MacDonald et al. 2023.

docs/theory.md says where each statement holds.
"""

from npdrt.trust.bounds import (
    Bound,
    all_bounds,
    jacobian_recursion,
    theorem_1_v1,
    theorem_1a,
    theorem_1b,
    theorem_2_v1,
    unconditional,
    without_perturbed,
)
from npdrt.trust.descent import (
    DescentBound,
    TrustModelGap,
    cosines,
    descent_bound,
    descent_threshold,
    gradient_breakdown,
    layerwise_direction,
    steepest_descent_distance,
    trust_model_gap,
    weaker_threshold,
)
from npdrt.trust.distances import (
    check_same_layers,
    check_same_shapes,
    deep_relative_trust,
    euclidean_trust,
    log_deep_relative_trust,
    log_squared_deep_relative_trust,
    log_surrogate_trust,
    relative_perturbations,
    squared_deep_relative_trust,
    surrogate_ratio,
    surrogate_trust,
    weights,
)
from npdrt.trust.dual import dual_direction, dual_norm, steepest_step
from npdrt.trust.jacobians import batch_jacobian, gram_spectrum, jacobian, skip_spectra
from npdrt.trust.layers import (
    Image,
    affine,
    affine_derivative,
    affine_jacobian,
    batch_norm_jacobian,
    block_diagonal,
    convolution_derivative,
    convolution_matrix,
    entry_norm_derivative,
    entry_norm_second,
    entry_norm_smallest,
    mean_removal,
    mean_removal_jacobian,
    nonlinearity_jacobian,
    pooled_shortcut,
    residual_jacobian,
    sphere,
    sphere_blocks,
    sphere_second,
    weight_norm_derivative,
    weight_norm_smallest,
)
from npdrt.trust.lemmas import (
    Inequality,
    lemma_1_v1,
    lemma_2_v1,
    lemma_3,
    lemma_3_v1,
    lemma_4_v1,
    lemma_5_v1,
    scalar_two_layers,
    scalar_two_layers_v1,
)
from npdrt.trust.lipschitz import (
    Bounds,
    lipschitz_estimate,
    loss_lipschitz,
    product_lipschitz,
    sphere_bounds,
)
from npdrt.trust.net import Net
from npdrt.trust.normalised_net import NormalisedResidualNet, escaping_radius, residual
from npdrt.trust.pair import Pair, is_tall, is_valley
from npdrt.trust.spectra import SpectralShift, condition_number, singular_values, spectral_shift
from npdrt.trust.system import (
    Blocks,
    Point,
    System,
    descent_factor,
    lemma_a_9,
    proposition_4_6,
    sigma,
    smallest_gram,
    theorem_2_4,
    theorem_4_7,
)
from npdrt.trust.update import (
    finite_depth_update,
    growth,
    log_growth,
    prefactor_drift,
    steps_to_overflow,
)
