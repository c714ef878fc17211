"""Limits of infinite width, at finite and infinite depth: outputs and kernels, in numpy.

The network is x^0 = U xi, x^l = x^{l-1} + a L^-alpha MS(phi(W^l x^{l-1})), f = V x^L, with U of
entries N(0, 1), W^l of N(0, 1/n) and n V of N(0, 1): a ResNet whose inputs are multiplied by
in_features^1/2.  Kernels are inner products over the width, <x, y> = x . y / n, and gradients are
dx = n dLoss/dx.  Training is SGD on the blocks, W^l <- W^l - lr L^(alpha - gamma) dLoss/dW^l, input and
output layers frozen, the loss of a step being the mean over its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from depthnet._checks import integer, number, one_of
from depthnet.scaling.classification import classify
from depthnet.theory.moments import Homogeneous, Moments, moments
from depthnet.theory.recursion import Scales, recursion

Array = np.ndarray

# Depths that a limit is extrapolated from.  Their error is a power series in 1/L.
LIMIT_DEPTHS = (64, 128, 256)
RUNGE_KUTTA_STEPS = 128


@dataclass(frozen=True)
class Trajectory:
    """A network's training: T steps of `batch` samples, N = T batch of them, one after another.

    outputs: f before each step's update, of the shape of the targets.
    fractions: (F,), depths l / L from 0 to 1.
    forward_kernel: (F, N, N), <x_i, x_j> at these depths, each sample with the weights of its own step.
    gradient_kernel: (F, N, N), <dx_i, dx_j>, dx = n dLoss_i/dx of each sample's own loss.
    error: estimates of the absolute errors, of the same shapes, where a limit was extrapolated.
    """

    outputs: Array
    fractions: Array
    forward_kernel: Array
    gradient_kernel: Array
    error: Trajectory | None = None


def initial_kernels(
    activation: str | tuple,
    inputs: Array,
    *,
    depth: int | None = None,
    a: float = 1.0,
    alpha: float = 0.5,
) -> Trajectory:
    """Kernels at initialization, gradients being those of f itself (dLoss/df = 1).

    C^l = C^{l-1} + (a L^-alpha)^2 Cov(phi, phi) and K^{l-1} = K^l + (a L^-alpha)^2 E[phi' phi'] K^l, the
    moments under N(0, C^{l-1}); as L grows, for alpha = 1/2, dC/ds = a^2 Cov(phi, phi) and
    dK/ds = -a^2 E[phi' phi'] K over s in [0, 1] (Definition E.1 at the first step), solved to about 1e-8.

    Args:
        activation: as for `moments`. inputs: (N, d), or (T, batch, d) with N = T batch.
        depth: L, or None for the limit of infinite depth.

    Raises:
        ValueError: the limit does not exist (alpha < 1/2), or an argument is not as described.
    """
    phi = moments(activation)
    gram, _, _ = _inputs(inputs)
    number("a", a)
    number("alpha", alpha)
    if depth is not None:
        steps = integer("depth", depth, 1)
        rate = (a * steps**-alpha) ** 2
    elif alpha < 0.5:
        raise ValueError(f"alpha={alpha:g}: kernels grow without end as depth does; give a depth")
    else:
        steps = RUNGE_KUTTA_STEPS
        rate = a**2 / steps if alpha == 0.5 else 0.0

    def growth(C):
        return rate * phi.covariance(*_pairs(C))

    C, slopes = [gram], []
    for _ in range(steps):
        if depth is not None:
            C.append(C[-1] + growth(C[-1]))
            slopes.append(rate * phi.slope(*_pairs(C[-2])))
        else:
            k1 = growth(C[-1])
            k2 = growth(C[-1] + k1 / 2)
            middle = C[-1] + k2 / 2
            k3 = growth(middle)
            k4 = growth(C[-1] + k3)
            C.append(C[-1] + (k1 + 2 * k2 + 2 * k3 + k4) / 6)
            # log K is an integral over s: Simpson's rule.
            ends = phi.slope(*_pairs(C[-2])) + phi.slope(*_pairs(C[-1]))
            slopes.append(np.expm1(rate * (ends + 4 * phi.slope(*_pairs(middle))) / 6))
    K = [np.ones_like(gram)]
    for slope in reversed(slopes):
        K.append(K[-1] * (1 + slope))
    return Trajectory(
        outputs=np.zeros(len(gram)),
        fractions=np.linspace(0, 1, steps + 1),
        forward_kernel=np.array(C),
        gradient_kernel=np.array(K[::-1]),
    )


def linear_trajectory(
    inputs: Array,
    targets: Array,
    *,
    depth: int | None = None,
    lr: float,
    a: float = 1.0,
    alpha: float = 0.5,
    gamma: float = 0.5,
    loss: str | Callable[[Array, Array], Array] = "squared",
) -> Trajectory:
    """SGD on a linear network, any (alpha, gamma): Lemma 4.3; in the limit, Proposition 4.4.

    Args:
        inputs: (T, d), one sample a step, or (T, batch, d).
        targets: (T,) or (T, e) for e outputs; (T, batch) or (T, batch, e).
        depth: L, or None for the limit, extrapolated from finite depths, with estimates of its error.
        lr: the learning rate. a: the branch multiplier is a L^-alpha.
        loss: `squared`, |f - y|^2 / 2; `cross_entropy`, the targets being probabilities of e classes;
            or a function of outputs and targets (batch, e) that returns dLoss/df.

    Raises:
        ValueError: there is no limit (alpha < 1/2 or alpha + gamma < 1), or an argument is wrong.
    """
    number("alpha", alpha)
    number("gamma", gamma)
    return _trajectory(
        Homogeneous(1.0, -1.0), inputs, targets, depth, lr, a, alpha, gamma, loss, corrected=True
    )


def trajectory(
    activation: str | tuple,
    inputs: Array,
    targets: Array,
    *,
    depth: int | None,
    lr: float,
    a: float = 1.0,
    corrected: bool = True,
    loss: str | Callable[[Array, Array], Array] = "squared",
) -> Trajectory:
    """SGD on a nonlinear network under Depth-muP (alpha = gamma = 1/2): Definition E.1, corrected.

    At depth L it is the limit's equation in L steps.  Networks of L layers are farther from the limit
    than that: their distance was measured to fall as L^-1/2 to L^-1.
    The definition as printed (corrected=False) lacks the terms in phi'' and phi''' of the backward pass,
    and disagrees with networks in gradients from the start, in features from the second step on;
    `depthnet reproduce trajectory` shows both.

    Args:
        activation: as for `moments`; smooth functions, or slopes (p, q), for which derivatives of phi'
            are taken in the sense of distributions.
        The others are those of `linear_trajectory`.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """
    return _trajectory(
        moments(activation), inputs, targets, depth, lr, a, 0.5, 0.5, loss, corrected
    )


def _trajectory(
    phi: Moments, inputs, targets, depth, lr, a, alpha, gamma, loss, corrected
) -> Trajectory:
    gram, steps, batch = _inputs(inputs)
    number("lr", lr)
    number("a", a)
    targets = _targets(targets, np.shape(inputs)[:-1])
    gradient = loss if callable(loss) else LOSSES[one_of("loss", loss, LOSSES)]
    if loss == "cross_entropy" and targets.shape == np.shape(inputs)[:-1]:
        raise ValueError(
            f"targets must be probabilities of the classes, of shape {(*np.shape(inputs)[:-1], 'e')}, "
            f"for loss='cross_entropy', got {targets.shape}"
        )
    columns = targets.reshape(steps * batch, -1)

    def solve(L: int, scales: Scales) -> Trajectory:
        f, forward, backward = recursion(
            phi, gram, columns, gradient, depth=L, batch=batch, scales=scales, corrected=corrected
        )
        fractions = np.linspace(0, 1, L + 1)
        return Trajectory(f.reshape(targets.shape), fractions, forward, backward)

    if depth is not None:
        L = integer("depth", depth, 1)
        return solve(L, Scales(a * L**-alpha, lr * a * L**-gamma / batch))
    found = classify(alpha, gamma)
    if not (found.stable_at_initialization and found.stable_in_training):
        raise ValueError(
            f"alpha={alpha:g}, gamma={gamma:g} have no limit, being {found.summary}; give a depth"
        )
    # Beyond alpha = 1/2 the initial weights have no part in the limit, and off the line nothing moves.
    noise = alpha == 0.5
    moves = lr * a**2 if found.nontrivial else 0.0
    by_depth = []
    for L in LIMIT_DEPTHS:
        branch = a * L**-0.5 if noise else 1.0 / L
        by_depth.append(solve(L, Scales(branch, moves / batch / (L * branch), noise)))
    return _extrapolated(by_depth)


def _extrapolated(by_depth: list[Trajectory]) -> Trajectory:
    """The limit of three results at depths L, 2 L, 4 L whose errors are c / L + d / L^2 + ..."""

    def limit(values: list[Array]) -> tuple[Array, Array]:
        coarse, middle, fine = values
        first, second = 2 * middle - coarse, 2 * fine - middle
        best = (4 * second - first) / 3
        return best, abs(best - second)

    shared = [slice(None, None, L // LIMIT_DEPTHS[0]) for L in LIMIT_DEPTHS]
    outputs = limit([one.outputs for one in by_depth])
    forward, backward = (
        limit([getattr(one, name)[step] for one, step in zip(by_depth, shared, strict=True)])
        for name in ("forward_kernel", "gradient_kernel")
    )
    fractions = by_depth[0].fractions
    errors = Trajectory(outputs[1], fractions, forward[1], backward[1])
    return Trajectory(outputs[0], fractions, forward[0], backward[0], errors)


def _softmax(f: Array) -> Array:
    e = np.exp(f - f.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "squared": lambda f, y: f - y,
    "cross_entropy": lambda f, y: _softmax(f) - y,
}


def _pairs(C: Array) -> tuple[Array, Array, Array]:
    variance = np.diagonal(C)
    return variance[:, None], C, variance[None, :]


def _inputs(inputs) -> tuple[Array, int, int]:
    """Gram matrix, number of steps, batch."""
    x = np.asarray(inputs, np.float64)
    if x.ndim not in (2, 3) or 0 in x.shape or not np.isfinite(x).all():
        raise ValueError(
            f"inputs must be finite, of shape (T, d) or (T, batch, d), got {np.shape(inputs)}"
        )
    rows = x.reshape(-1, x.shape[-1])
    return rows @ rows.T, len(x), 1 if x.ndim == 2 else x.shape[1]


def _targets(targets, samples: tuple[int, ...]) -> Array:
    y = np.asarray(targets, np.float64)
    if y.shape[: len(samples)] != samples or y.ndim > len(samples) + 1 or not np.isfinite(y).all():
        wanted = ", ".join(map(str, samples))
        raise ValueError(
            f"targets must be finite, of shape ({wanted}) or ({wanted}, e) as inputs are, got {y.shape}"
        )
    return y
