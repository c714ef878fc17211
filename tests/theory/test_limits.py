"""The limits: closed forms, known values, and networks of finite width."""

import numpy as np
import pytest

from depthnet.reproduce.networks import network, train
from depthnet.theory import initial_kernels, linear_trajectory, moments, trajectory

E = np.e


def given(chi):
    """A loss whose derivative by f is chi, whatever f is."""
    return lambda f, y: np.full_like(f, chi)


@pytest.mark.parametrize("activation", ["identity", "relu", "abs", (1.0, -0.3)])
@pytest.mark.parametrize("a", [1.0, 0.6])
def test_initial_kernels_in_closed_form(activation, a):
    phi, one = moments(activation), np.ones(())
    rate, slope = phi.covariance(one, one, one), phi.slope(one, one, one)
    limit = initial_kernels(activation, [[3.0]], a=a)
    p = limit.fractions
    np.testing.assert_allclose(
        limit.forward_kernel[:, 0, 0], 9 * np.exp(a**2 * rate * p), rtol=1e-9
    )
    np.testing.assert_allclose(
        limit.gradient_kernel[:, 0, 0], np.exp(a**2 * slope * (1 - p)), rtol=1e-9
    )
    finite = initial_kernels(activation, [[3.0]], depth=10, a=a)
    layer = np.arange(11)
    np.testing.assert_allclose(finite.forward_kernel[:, 0, 0], 9 * (1 + a**2 * rate / 10) ** layer)
    np.testing.assert_allclose(
        finite.gradient_kernel[:, 0, 0], (1 + a**2 * slope / 10) ** (10 - layer)
    )


def test_initial_kernels_of_several_inputs_converge_to_the_limit():
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    limit = initial_kernels("abs", x)
    assert limit.forward_kernel.shape == (len(limit.fractions), 6, 6)
    errors = []
    for depth in (256, 512):
        finite = initial_kernels("abs", x, depth=depth)
        step = depth // 128
        errors.append([
            abs(finite.forward_kernel[::step] - limit.forward_kernel).max(),
            abs(finite.gradient_kernel[::step] - limit.gradient_kernel).max(),
        ])  # fmt: skip
    # The error of a sum with steps 1/L halves when L doubles, to first order in 1/L = 1/256.
    np.testing.assert_allclose(np.divide(*errors), 2, rtol=4 / 256)


def test_other_exponents_at_initialization():
    finite = initial_kernels("identity", [[1.0]], depth=16, alpha=0.25)
    np.testing.assert_allclose(finite.forward_kernel[-1], (1 + 16**-0.5) ** 16)
    frozen = initial_kernels("abs", [[1.0]], alpha=0.75)
    assert (frozen.forward_kernel == 1).all()
    assert (frozen.gradient_kernel == 1).all()
    with pytest.raises(ValueError, match=r"alpha=0\.4: kernels grow without end"):
        initial_kernels("abs", [[1.0]], alpha=0.4)


def test_a_linear_network_over_five_steps():
    """Values of Lemma 4.3, found independently and agreed with by networks of width 1000."""
    x, y = np.array([1, -0.7, 1.2, 0.8, 1.0])[:, None], np.array([1, -0.5, 0.3, 0.9, 0.2])
    found = linear_trajectory(x, y, depth=32, lr=0.3)
    np.testing.assert_allclose(found.outputs, [0, -0.545, 0.899, 0.136, 0.536], atol=6e-4)
    sizes = np.diagonal(found.forward_kernel[-1])
    np.testing.assert_allclose(sizes, [2.677, 1.789, 5.112, 1.354, 2.629], atol=6e-4)


@pytest.mark.parametrize("depth", [1, 2, 7, 40])
def test_the_first_step_of_a_linear_network_is_exact_at_every_depth(depth):
    found = linear_trajectory(np.ones((2, 1)), np.zeros(2), depth=depth, lr=1.0, loss=given(0.7))
    assert found.outputs[1] == pytest.approx(-0.7 * (1 + 1 / depth) ** (depth - 1), rel=1e-12)


def test_the_linear_limit_after_one_step_in_closed_form():
    x0, x1, chi, lr, a = 1.2, -0.8, 0.7, 0.4, 0.9
    found = linear_trajectory([[x0], [x1]], np.zeros(2), lr=lr, a=a, loss=given(chi))
    want = -lr * a**2 * np.exp(a**2) * x0 * x1 * chi
    assert abs(found.outputs[1] - want) <= 3 * found.error.outputs[1]
    assert found.error.outputs[1] < 1e-4 * abs(want)

    found = linear_trajectory([[x0], [x1]], np.zeros(2), lr=1.0, loss=given(chi))
    p, k = found.fractions, x0 * x1
    want = np.exp(p) * (x1**2 + E * chi**2 * k**2 * (p**2 + 2 * p**3 / 3))
    assert (
        abs(found.forward_kernel[:, 1, 1] - want) <= 3 * found.error.forward_kernel[:, 1, 1] + 1e-9
    ).all()
    np.testing.assert_allclose(found.forward_kernel[:, 1, 1], want, rtol=1e-3)
    np.testing.assert_allclose(found.forward_kernel[:, 1, 0], k * np.exp(p), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.75, 1.0])
def test_beyond_one_half_the_linear_limit_is_an_ode_without_noise(alpha):
    x0, x1, chi = 1.2, -0.8, 0.7
    found = linear_trajectory(
        [[x0], [x1]], np.zeros(2), lr=1.0, alpha=alpha, gamma=1 - alpha, loss=given(chi)
    )
    k = x0 * x1
    assert found.outputs[1] == pytest.approx(-k * chi, rel=1e-9)
    np.testing.assert_allclose(
        found.forward_kernel[:, 1, 1], x1**2 + (chi * k * found.fractions) ** 2, rtol=1e-9
    )
    # Finite depths go there, as L^(1 - 2 alpha).
    off = [
        abs(linear_trajectory([[x0], [x1]], np.zeros(2), depth=L, lr=1.0, alpha=alpha, gamma=1 - alpha,
                              loss=given(chi)).outputs[1] - found.outputs[1])
        for L in (64, 256)
    ]  # fmt: skip
    assert np.log(off[0] / off[1]) / np.log(4) == pytest.approx(2 * alpha - 1, abs=0.1)


def test_no_limit_off_the_line():
    x, y = np.ones((2, 1)), np.ones(2)
    with pytest.raises(ValueError, match="unstable in training; give a depth"):
        linear_trajectory(x, y, lr=1.0, alpha=0.5, gamma=0.25)
    with pytest.raises(ValueError, match="unstable at initialization; give a depth"):
        linear_trajectory(x, y, lr=1.0, alpha=0.25, gamma=0.75)
    assert linear_trajectory(x, y, lr=1.0, alpha=0.5, gamma=0.75).outputs.tolist() == [0, 0]


def test_batches_outputs_and_losses():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 4)), rng.normal(size=(3, 2))
    one = linear_trajectory(x, y, depth=6, lr=0.2)
    twice = linear_trajectory(x[:, None].repeat(2, 1), y[:, None].repeat(2, 1), depth=6, lr=0.2)
    assert twice.outputs.shape == (3, 2, 2)
    np.testing.assert_allclose(twice.outputs, one.outputs[:, None].repeat(2, 1))
    np.testing.assert_allclose(twice.forward_kernel[:, ::2, ::2], one.forward_kernel)
    # With outputs that are all equal, cross-entropy's gradient at first is 1/e - y.
    target = np.eye(3)[[0, 1]]
    first = linear_trajectory(x[:2], target, depth=6, lr=0.2, loss="cross_entropy")
    again = linear_trajectory(x[:2], target, depth=6, lr=0.2, loss=lambda f, y: 1 / 3 - y)
    np.testing.assert_allclose(first.outputs, again.outputs)


def test_a_linear_trajectory_is_the_trajectory_of_the_identity():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2))
    linear = linear_trajectory(x, y, depth=5, lr=0.3, a=0.8)
    for activation in ("identity", (1.0, -1.0)):
        other = trajectory(activation, x, y, depth=5, lr=0.3, a=0.8)
        np.testing.assert_array_equal(other.outputs, linear.outputs)
    smooth = (lambda h: h, lambda h: 1 + 0 * h, lambda h: 0 * h, lambda h: 0 * h)
    other = trajectory(smooth, x, y, depth=5, lr=0.3, a=0.8)
    np.testing.assert_allclose(other.outputs, linear.outputs, rtol=1e-6)
    np.testing.assert_allclose(other.gradient_kernel, linear.gradient_kernel, rtol=1e-6)


def first_step_ode(activation, chi, lr, steps=2000):
    """The first step on one input by its own ODE: A = <x_0,x_0>, B = <x_1,x_0>, D = <x_1,x_1>, and g."""
    phi = moments(activation)
    one = np.ones(())
    V = phi.slope(one, one, one)

    def slopes(p, s):
        A, B, D, g = s
        dg = phi.slope(A, B, D) * (g - lr * B)
        dD = phi.covariance(D, D, D) + 2 * chi**2 * g * dg * np.exp(V * (1 - p))
        return np.array([phi.covariance(A, A, A), phi.covariance(A, B, D), dD, dg])

    s, h = np.array([1.0, 1.0, 1.0, 0.0]), 1 / steps
    for i in range(steps):
        k1 = slopes(i * h, s)
        k2 = slopes((i + 0.5) * h, s + h / 2 * k1)
        k3 = slopes((i + 0.5) * h, s + h / 2 * k2)
        k4 = slopes((i + 1) * h, s + h * k3)
        s = s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return s


@pytest.mark.parametrize("activation", ["identity", "relu", "abs", (1.0, -0.3)])
def test_the_first_nonlinear_step_follows_its_ode(activation):
    chi, lr = 0.7, 0.8
    A, B, D, g = first_step_ode(activation, chi, lr)
    found = trajectory(activation, np.ones((2, 1)), np.zeros(2), depth=None, lr=lr, loss=given(chi))
    # At a kink of phi the ODE starts with an infinite derivative: the series in 1/L has other powers.
    np.testing.assert_allclose(found.outputs[1], chi * g, rtol=2e-4)
    np.testing.assert_allclose(found.forward_kernel[-1], [[A, B], [B, D]], rtol=2e-3)


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_the_first_step_with_a_small_gradient_in_closed_form(activation):
    phi, one = moments(activation), np.ones(())
    c, V = phi.covariance(one, one, one), phi.slope(one, one, one)
    chi = 1e-5  # the answer is the limit chi -> 0, met to O(chi)
    found = trajectory(
        activation, np.ones((2, 1)), np.zeros(2), depth=None, lr=1.0, loss=given(chi)
    )
    assert found.outputs[1] / chi == pytest.approx(-V * (np.exp(c) - np.exp(V)) / (c - V), rel=1e-4)


def test_linear_networks_of_finite_width_agree():
    """Means over 24 networks within four standard errors, and 2 % for what is O(1/n) at n = 256."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2, 4)) / 2, rng.normal(size=(3, 2, 2))
    depth, lr = 12, 0.5
    theory = linear_trajectory(x, y, depth=depth, lr=lr)
    model = network("identity", 4, 2, 256, depth, 1.0, range(24))
    found = train(model, x, y, lr=lr, layers=[0, 6, 12], loss="squared")
    for name, want in (
        ("outputs", theory.outputs),
        ("forward_kernel", theory.forward_kernel[::6]),
        ("gradient_kernel", theory.gradient_kernel[::6]),
    ):
        samples = np.array([getattr(one, name) for one in found])
        error = samples.std(0, ddof=1) / len(samples) ** 0.5
        assert (abs(samples.mean(0) - want) <= 4 * error + 0.02 * abs(want).max()).all(), name


def test_nonlinear_networks_of_finite_depth_approach_the_corrected_definition():
    """Several steps of |x|: the distance to the corrected limit falls with depth, and is less than half
    of that to the definition as printed."""
    x, y = np.reshape([1.0, 1.3, -0.8], (3, 1, 1)), np.reshape([1.0, -1.0, 1.0], (3, 1, 1))

    def features(found):
        return np.array(
            [np.diagonal(found.gradient_kernel[0]), np.diagonal(found.forward_kernel[-1])]
        )

    corrected, printed = (
        features(
            trajectory("abs", x, y[..., 0], depth=None, lr=0.5, corrected=c, loss=lambda f, y: y)
        )
        for c in (True, False)
    )
    distance = []
    for depth in (8, 64):
        model = network("abs", 1, 1, 256, depth, 1.0, range(24))
        found = train(model, x, y, lr=0.5, layers=[0, depth], loss="product")
        mean = np.mean([features(one) for one in found], 0)
        distance.append([np.linalg.norm(mean / theory - 1) for theory in (corrected, printed)])
    assert distance[1][0] < distance[0][0]
    assert distance[1][0] < distance[1][1] / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.ones(3)}, r"inputs must be finite, of shape \(T, d\)"),
        ({"inputs": np.full((2, 1), np.nan)}, "inputs must be finite"),
        ({"targets": np.ones(5)}, r"targets must be finite, of shape \(2\) or \(2, e\)"),
        ({"loss": "squred"}, "did you mean 'squared'"),
        ({"loss": "cross_entropy"}, "targets must be probabilities"),
        ({"lr": np.inf}, "lr must be a finite number"),
        ({"a": "1"}, "a must be a finite number"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"gamma": np.nan}, "gamma must be a finite number"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"inputs": np.ones((2, 1)), "targets": np.ones(2), "depth": 4, "lr": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        linear_trajectory(arguments.pop("inputs"), arguments.pop("targets"), **arguments)
