"""Training in the limit of infinite width, layer by layer: Tensor Programs VI, sections 4 and E.

In that limit every vector of the network is a sum of independent Gaussian vectors, one for each layer,
step and sample, with coefficients that are numbers.  What can be asked of training (outputs, inner
products of features) is a function of those coefficients.  This file computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from depthnet.theory.moments import Moments

Array = np.ndarray


@dataclass(frozen=True)
class Scales:
    """The network's and the optimizer's constants at depth L.

    branch: the branch multiplier m. update: W_t = W_0 - update sum_s dh_s (x) x_s / n, over all samples
    s of earlier steps. noise: whether the blocks' initial weights act at all; without, the recursion
    is that of the ODE that alpha > 1/2 has as its limit.
    """

    branch: float
    update: float
    noise: bool = True


def recursion(
    moments: Moments,
    gram: Array,
    targets: Array,
    loss_gradient: Callable[[Array, Array], Array],
    *,
    depth: int,
    batch: int,
    scales: Scales,
    corrected: bool = True,
) -> tuple[Array, Array, Array]:
    """Outputs and kernels of SGD on the blocks of x^l = x^{l-1} + m MS(phi(W^l x^{l-1})), f = V x^L.

    Input and output weights are frozen, V independent of everything else.  Samples i = 0 .. N-1 are
    ordered by steps, `batch` of them a step.  With dx = n dLoss/dx and dh = phi'(h) dx,

        x_i^l      = x_i^{l-1} + m [ phi^c(w_i^l) + sum_j E[phi'_i phi'_j] b_ij dx_j^l ]
        dx_i^{l-1} = dx_i^l    + m [ z_i^l + sum_j t_ij x_j^{l-1} + t_ii x_i^{l-1} ]

    over j of earlier steps.  w_i^l = W_0 x_i^{l-1} and z_i^l = W_0^T dh_i^l are the Gaussians: new and
    independent in every layer, with Cov(w_i, w_j) = <x_i, x_j> and Cov(z_i, z_j) = E[phi'_i phi'_j]
    <dx_i, dx_j>.  What the update of W and the reuse of W_0 add,

        b_ij = x_i^{l-1}[z_j^l] - update <x_i^{l-1}, x_j^{l-1}>
        t_ij = E[phi'_i phi'_j] (dx_i^l[w_j^l] - update <dx_i^l, dx_j^l>)
               + E[phi''_i phi''_j] b_ij <dx_i^l, dx_j^l>
        t_ii = sum_j { dx_i^l[w_j^l] E[phi''_i phi^c_j] + b_ij <dx_i^l, dx_j^l> E[phi'''_i phi'_j] }
               + dx_i^l[w_i^l] (E[phi''_i phi^c_i] + E[phi'_i^2]),

    where y[w] is the coefficient of phi^c(w) in y, and y[z] that of z.  For phi = identity this is Lemma
    4.3, exact at every depth.  Otherwise it is, in L steps, Definition E.1 with the terms in phi'' and
    phi''' that the definition as printed lacks; corrected=False is the definition as printed.

    Args:
        gram: (N, N), inner products of the inputs x_i^0.
        targets: (N, e). loss_gradient: dLoss/df (batch, e) of outputs and targets of the same shape.

    Returns:
        outputs (N, e); forward kernel <x_i^l, x_j^l> and gradient kernel <dx_i^l, dx_j^l>, (L+1, N, N).
    """
    n, m, L = len(gram), scales.branch, depth
    # Coefficients of x_i^l (forward) and dx_i^l (backward) in w_j^q, then in z_j^q; w^0 stands for the
    # inputs, z^{L+1} for V's part in the loss.  Layer, sample, kind, q, j.
    forward, backward = (np.zeros((L + 1, n, 2, L + 2, n)) for _ in range(2))
    base = np.zeros((2, L + 2, n, n))  # covariances of phi^c(w^q) and z^q
    kernels = np.zeros((2, L + 1, n, n))  # forward, gradient
    reuse = np.zeros((L + 1, n, n))  # b
    outputs, gradients = np.zeros_like(targets), np.zeros_like(targets)
    base[0, 0] = gram
    for start in range(0, n, batch):
        now, past, seen = (slice(start, start + batch), slice(0, start), slice(0, start + batch))
        own = np.arange(start, start + batch)

        def inner(which, layer, coefficients, now=now, seen=seen):
            """Fill in the kernels of this step's vectors at a layer with all seen so far."""
            mixed = np.matmul(
                coefficients[layer, now].transpose(1, 2, 0, 3)[..., seen], base[..., seen, seen]
            )
            other = coefficients[layer, seen].transpose(1, 2, 3, 0)[..., seen, :]
            products = np.matmul(mixed, other).sum((0, 1))
            kernels[which, layer, now, seen] = products
            kernels[which, layer, seen, now] = products.T

        forward[0, own, 0, 0, own] = 1.0
        inner(0, 0, forward)
        for layer in range(1, L + 1):
            C = kernels[0, layer - 1]
            variance = np.diagonal(C)
            pair = variance[now, None], C[now, seen], variance[None, seen]
            fresh = moments.covariance(*pair)
            base[0, layer, now, seen], base[0, layer, seen, now] = fresh, fresh.T
            b = forward[layer - 1, now, 1, layer, past] - scales.update * C[now, past]
            reuse[layer, now, past] = b
            slope = moments.slope(variance[now, None], C[now, past], variance[None, past])
            forward[layer, now] = forward[layer - 1, now]
            forward[layer, now] += m * np.tensordot(slope * b, backward[layer, past], 1)
            if scales.noise:
                forward[layer, own, 0, layer, own] += m
            inner(0, layer, forward)

        outputs[now] = forward[L, now, 1, L + 1, past] @ gradients[past]
        gradients[now] = loss_gradient(outputs[now], targets[now])
        base[1, L + 1, seen, seen] = gradients[seen] @ gradients[seen].T
        backward[L, own, 1, L + 1, own] = 1.0
        inner(1, L, backward)
        for layer in range(L, 0, -1):
            C, K = kernels[0, layer - 1], kernels[1, layer]
            variance = np.diagonal(C)
            pair = variance[now, None], C[now, seen], variance[None, seen]
            earlier = variance[now, None], C[now, past], variance[None, past]
            alone = variance[now], variance[now], variance[now]
            response, b = backward[layer, now, 0, layer, past], reuse[layer, now, past]
            slope = moments.slope(*earlier)
            if corrected:
                fresh = moments.slope(*pair) * K[now, seen]
                t = slope * (response - scales.update * K[now, past])
                t += moments.curvature(*earlier) * b * K[now, past]
                t_own = (response * moments.curvature_value(*earlier)).sum(1)
                t_own += (b * K[now, past] * moments.third_slope(*earlier)).sum(1)
                t_own += backward[layer, own, 0, layer, own] * (
                    moments.curvature_value(*alone) + moments.slope(*alone)
                )
            else:
                size = np.diagonal(K)
                fresh = moments.covariance(size[now, None], K[now, seen], size[None, seen])
                t = moments.slope_covariance(*earlier) * response
                t -= slope * scales.update * K[now, past]
                t_own = np.zeros(batch)
            base[1, layer, now, seen], base[1, layer, seen, now] = fresh, fresh.T
            backward[layer - 1, now] = backward[layer, now]
            backward[layer - 1, now] += m * np.tensordot(t, forward[layer - 1, past], 1)
            backward[layer - 1, now] += m * t_own[:, None, None, None] * forward[layer - 1, now]
            if scales.noise:
                backward[layer - 1, own, 1, layer, own] += m
            inner(1, layer - 1, backward)
    return outputs, kernels[0], kernels[1]
