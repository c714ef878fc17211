"""Gaussian moments of activations: closed forms and quadrature against independent integrals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthnet.theory import moments
from depthnet.theory.moments import Homogeneous, Smooth

TANH = (
    np.tanh,
    lambda h: 1 - np.tanh(h) ** 2,
    lambda h: -2 * np.tanh(h) * (1 - np.tanh(h) ** 2),
    lambda h: (1 - np.tanh(h) ** 2) * (6 * np.tanh(h) ** 2 - 2),
)
CUBE = (lambda h: h**3, lambda h: 3 * h**2, lambda h: 6 * h, lambda h: 6 + 0 * h)
LINE = (lambda h: h, lambda h: 1 + 0 * h, lambda h: 0 * h, lambda h: 0 * h)

pairs = st.tuples(st.floats(0.05, 5), st.floats(-0.99, 0.99), st.floats(0.05, 5))


def covariance_of(pair):
    A, correlation, D = pair
    return A, correlation * np.sqrt(A * D), D


def by_angle(p, q, A, B, D):
    """E phi phi and E phi' phi' of homogeneous functions: in polar coordinates only an angle is left."""
    theta = (np.arange(200_000) + 0.5) * 2 * np.pi / 200_000
    z = np.sqrt(A) * np.cos(theta)
    y = B / np.sqrt(A) * np.cos(theta) + np.sqrt(D - B * B / A) * np.sin(theta)

    def phi(h):
        return p * np.maximum(h, 0) + q * np.maximum(-h, 0)

    def slope(h):
        return np.where(h >= 0, p, -q)

    return 2 * (phi(z) * phi(y)).mean(), (slope(z) * slope(y)).mean()  # E r^2 = 2


@settings(max_examples=30, deadline=None)
@given(pairs, st.floats(-2, 2), st.floats(-2, 2))
def test_the_homogeneous_family_against_an_integral_over_the_angle(pair, p, q):
    A, B, D = covariance_of(pair)
    phi = moments((p, q))
    second, slope = by_angle(p, q, A, B, D)
    size = (abs(p) + abs(q)) ** 2
    # The rule's error at a kink is one step of the angle, 2 pi / 200000, at each of four.
    assert abs(phi.second(A, B, D) - second) <= 1e-8 * size * np.sqrt(A * D) + 1e-12
    assert abs(phi.slope(A, B, D) - slope) <= 4e-5 * size + 1e-12
    mean_z, mean_y = ((p + q) * np.sqrt(v / (2 * np.pi)) for v in (A, D))
    least = np.finfo(float).tiny  # of slopes whose squares are subnormal numbers
    np.testing.assert_allclose(
        phi.covariance(A, B, D),
        phi.second(A, B, D) - mean_z * mean_y,
        atol=1e-12 * size * 5 + least,
    )


@pytest.mark.parametrize(
    ("name", "rate", "slope"),
    [("identity", 1, 1), ("relu", 0.5 - 0.5 / np.pi, 0.5), ("abs", 1 - 2 / np.pi, 1)],
)
def test_constants_at_unit_variance(name, rate, slope):
    one = np.ones(())
    assert moments(name).covariance(one, one, one) == pytest.approx(rate, abs=1e-15)
    assert moments(name).slope(one, one, one) == pytest.approx(slope, abs=1e-15)


@pytest.mark.parametrize(
    "phi", [Homogeneous(1.0, 0.3), Homogeneous(1.0, 1.0), Smooth(*TANH), Smooth(*CUBE)]
)
@settings(max_examples=15, deadline=None)
@given(pairs)
def test_prices_theorem(phi, pair):
    A, B, D = covariance_of((pair[0], 0.9 * pair[1], pair[2]))
    step = 1e-4 * np.sqrt(A * D - B * B)

    def derivative(f, argument):
        """Central, of fourth order: error about step^4."""
        h = step * np.eye(3)[argument]
        at = [f(A + k * h[0], B + k * h[1], D + k * h[2]) for k in (-2, -1, 1, 2)]
        return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * step)

    scale = (
        1 + abs(phi.slope(A, A, A)) / A + abs(phi.slope(D, D, D)) / D + 1 / np.sqrt(A * D - B * B)
    )
    for got, want in (
        (phi.curvature(A, B, D), derivative(phi.slope, 1)),
        (phi.third_slope(A, B, D), 2 * derivative(phi.slope, 0)),
        (phi.curvature_value(A, B, D), 2 * derivative(phi.covariance, 0)),
        (phi.slope(A, B, D), derivative(phi.covariance, 1)),
    ):
        assert abs(got - want) <= 1e-6 * scale**2 * (1 + abs(want))


def test_quadrature_is_exact_where_the_answer_is_known():
    A, B, D = 1.3, 0.4, 0.7
    cube, line = Smooth(*CUBE), Smooth(*LINE)
    assert cube.second(A, B, D) == pytest.approx(9 * A * B * D + 6 * B**3, rel=1e-7)  # Isserlis
    assert cube.slope(A, B, D) == pytest.approx(9 * (A * D + 2 * B * B), rel=1e-7)
    for name in (
        "second",
        "covariance",
        "slope",
        "slope_covariance",
        "curvature",
        "curvature_value",
        "third_slope",
    ):
        linear = getattr(Homogeneous(1.0, -1.0), name)(A, B, D)
        assert getattr(line, name)(A, B, D) == pytest.approx(linear, abs=1e-8)


def test_broadcasting_and_degenerate_pairs():
    for phi in (Homogeneous(1.0, 1.0), Smooth(*TANH)):
        A = np.array([0.0, 1.0, 2.0])[:, None]
        D = np.array([1.0, 2.0])[None]
        B = np.zeros((3, 2))
        for name in (
            "second",
            "covariance",
            "slope",
            "curvature",
            "curvature_value",
            "third_slope",
        ):
            found = getattr(phi, name)(A, B, D)
            assert found.shape == (3, 2)
            assert np.isfinite(found).all(), name
        same = np.array([1.5])
        assert np.isfinite(phi.curvature(same, same, same)).all()


def test_bad_activations():
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        moments("reluu")
    with pytest.raises(ValueError, match="four functions"):
        moments((np.tanh, np.tanh))
    with pytest.raises(TypeError, match="activation must be a name"):
        moments(3)
