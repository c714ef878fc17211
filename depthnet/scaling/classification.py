"""The classification of depthwise parametrizations of residual blocks.

Claims 7.1 to 7.6 of Tensor Programs VI (arXiv 2310.02244), in the limit of infinite width, then
infinite depth: x^l = x^{l-1} + a L^-alpha MS(phi(W^l x^{l-1})), learning rates of W^l ∝ L^-gamma
relative to gradients of size 1 (which is Adam's learning rate).  Section 9 for deeper blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from depthnet._checks import integer, number

DIVERSITY, WITHIN_BLOCKS = "feature diversity", "nonlinear learning within blocks"


@dataclass(frozen=True)
class Classification:
    """Properties of the limit; None where the claims say nothing because an earlier one fails.

    stable_at_initialization: activations and outputs stay O(1) (claim 7.1).
    stable_in_training: so do their changes, at every step (7.2).
    nontrivial: the outputs change at all (7.2).
    faithful: every pre-activation stays of size 1, at initialisation and in training (7.3).
    feature_learning: features change by Theta(1) at every depth.
    diversity_exponent: kappa, with ||x^((s+e)L) - x^(sL)|| of order e^(1-kappa) (7.4, 7.5).
    layerwise_linearization: each layer acts as its linearisation in its weights' update (7.6).
    lost: of feature diversity and nonlinear learning within blocks, what the limit does not have; None
        unless it is faithful.  Nothing is lost by Depth-muP with one layer a block, and by no
        parametrization with more (section 9).
    exponents: the powers of L that sizes follow; None without stability at initialisation, where
        they grow faster than any power.
    summary: one phrase; explanation: a sentence or two.
    """

    alpha: float
    gamma: float
    block_depth: int
    stable_at_initialization: bool
    stable_in_training: bool | None
    nontrivial: bool | None
    faithful: bool | None
    feature_learning: bool | None
    diversity_exponent: float | None
    layerwise_linearization: bool | None
    lost: tuple[str, ...] | None
    exponents: dict[str, float] | None
    summary: str
    explanation: str

    @property
    def redundant(self) -> bool | None:
        """Whether neighbouring layers do the same thing: kappa = 0 (claim 7.4)."""
        return None if self.diversity_exponent is None else self.diversity_exponent == 0


def classify(alpha: float, gamma: float, block_depth: int = 1) -> Classification:
    """Classify branch multiplier ∝ L^-alpha with (Adam) learning rate ∝ L^-gamma.

    Args:
        block_depth: layers W in a block, all with the same learning rate.

    `exponents` holds the power of L that each of these follows, their size being a root mean square
    over the width (L^0 where it is of size 1), after a few steps at a learning rate that is small:

    | key | quantity | exponent |
    |---|---|---|
    | stream | x^l | 0 |
    | stream_change, output_change | x_t^l - x_0^l, f_t - f_0, only blocks trained | 1 - alpha - gamma |
    | preactivation_change | h_t^l - h_0^l | max(-gamma, 1 - alpha - gamma) |
    | branch | x^l - x^{l-1} at initialisation: noise, independent in every block | -alpha |
    | branch_change | its change by W^l's update: drift, alike in neighbouring blocks | -alpha - gamma |
    | quadratic_variation | sum over l of ||x^l - x^{l-1}||^2 at initialisation | 1 - 2 alpha |
    | gradient | dLoss/dW^l | -alpha |
    | remainder | the sum over blocks of what is nonlinear in the weights' updates | 1 - alpha - 2 gamma |

    Layers stay diverse where the quadratic variation does not vanish: drift adds 1/L to it.  The
    remainder's exponent is that of smooth activations; at a kink it is 1 - alpha - 3/2 gamma.

    Raises:
        TypeError, ValueError: an exponent is not a finite number, or block_depth is not 1 or more.
    """
    for argument, value in (("alpha", alpha), ("gamma", gamma)):
        number(argument, value)
    integer("block_depth", block_depth, 1)
    tolerance = 1e-9  # exponents such as 0.7 + 0.3 are meant to lie on the line
    total = alpha + gamma
    stable_start = alpha >= 0.5 - tolerance
    stable = total >= 1 - tolerance if stable_start else None
    nontrivial = total <= 1 + tolerance if stable_start else None
    on_line = bool(stable and nontrivial)
    faithful = alpha <= 1 + tolerance if on_line else None
    half, one = abs(alpha - 0.5) <= tolerance, abs(alpha - 1) <= tolerance
    summary, explanation = _words(alpha, stable_start, stable, nontrivial, faithful, half, one)
    lost = None
    if faithful:
        lost = () if half else (DIVERSITY,)
        if block_depth > 1:
            summary, explanation = _words_of_deeper_blocks(half, one)
            lost += () if one else (WITHIN_BLOCKS,)
    return Classification(
        alpha=alpha,
        gamma=gamma,
        block_depth=block_depth,
        stable_at_initialization=stable_start,
        stable_in_training=stable,
        nontrivial=nontrivial,
        faithful=faithful,
        feature_learning=True if faithful else None,
        diversity_exponent=(0.5 if half else 0.0) if faithful else None,
        layerwise_linearization=(faithful and not one) if on_line else None,
        lost=lost,
        exponents=_exponents(alpha, gamma) if stable_start else None,
        summary=summary,
        explanation=explanation,
    )


def _exponents(alpha: float, gamma: float) -> dict[str, float]:
    change = 1 - alpha - gamma
    return {
        "stream": 0.0,
        "stream_change": change,
        "output_change": change,
        "preactivation_change": max(-gamma, change),
        "branch": -alpha,
        "branch_change": -alpha - gamma,
        "quadratic_variation": 1 - 2 * alpha,
        "gradient": -alpha,
        "remainder": change - gamma,
    }


def _words_of_deeper_blocks(half, one) -> tuple[str, str]:
    if half:
        return "feature learning with feature diversity, linearized within blocks", (
            "Updates of a block's layers are L^1/2 times smaller than their initial weights, so that "
            "each block acts as its linearisation in them: layers within a block do not learn features "
            "together, and the best hyperparameters move with depth (section 9)."
        )
    if one:
        return "feature learning within blocks, redundant in depth (ODE limit)", (
            "A block's layers learn together, nonlinearly, but neighbouring blocks do the same thing: "
            "what keeps one loses the other, in every limit of deeper blocks (section 9)."
        )
    return "feature learning, redundant in depth, linearized within blocks", (
        "Neighbouring blocks do the same thing (increments of order e), and each acts as its "
        "linearisation in its layers' updates (1/2 < alpha < 1): both are lost (section 9)."
    )


def _words(alpha, stable_start, stable, nontrivial, faithful, half, one) -> tuple[str, str]:
    if not stable_start:
        return "unstable at initialization", (
            "Branches are too strong: L independent branches of size L^-alpha add up to more than "
            "Theta(1), and activations explode with depth before any training (alpha < 1/2)."
        )
    if not stable:
        return "unstable in training", (
            "Learning rates are too large: L updates, each of size L^-(alpha+gamma), point the same "
            "way and explode with depth (alpha + gamma < 1)."
        )
    if not nontrivial:
        return "trivial", (
            "Learning rates are too small: the sum of L updates of size L^-(alpha+gamma) vanishes, "
            "and the output does not change (alpha + gamma > 1)."
        )
    if not faithful:
        return "unfaithful", (
            "gamma < 0: the weights' updates grow with depth and pre-activations blow up in training, "
            "although the branches are scaled down enough to hide it (alpha > 1)."
        )
    if half:
        return "feature learning with maximal feature diversity (Depth-muP)", (
            "The one parametrization that is stable, nontrivial and faithful, learns features, and "
            "keeps neighbouring layers as different as a Brownian path's increments: "
            "||x^((s+e)L) - x^(sL)|| is of order e^(1/2). Hyperparameters transfer across depth."
        )
    if one:
        return "feature learning, redundant in depth (ODE limit)", (
            "The network becomes an ordinary differential equation in depth: neighbouring layers do "
            "the same thing, and features forget the blocks' random initialisation. Each layer stays "
            "nonlinear in its weights' update."
        )
    return "feature learning, redundant in depth", (
        "Neighbouring layers do the same thing (increments of order e), and each layer acts as its "
        "linearisation in its weights' update (1/2 < alpha < 1)."
    )
