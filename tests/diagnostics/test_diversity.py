import math

import numpy as np
import pytest
import torch

from depthnet import ResNet
from depthnet.diagnostics import residual_stream
from depthnet.diagnostics.diversity import (
    dyadic,
    expected_gradient_correlation,
    feature_diversity,
    gradient_diversity,
    kappas,
    quadratic_variation,
    update_diversity,
)
from depthnet.kernels import slopes

DEPTH, MEMBERS, INPUTS, WIDTH = 512, 6, 4, 32


def brownian():
    noise = torch.randn(DEPTH + 1, MEMBERS, INPUTS, WIDTH, dtype=torch.float64)
    return noise.cumsum(0) / DEPTH**0.5


def smooth():
    t = torch.linspace(0, 1, DEPTH + 1, dtype=torch.float64)[:, None, None, None]
    velocity = torch.randn(1, MEMBERS, INPUTS, WIDTH, dtype=torch.float64)
    return t * velocity


def test_a_brownian_path_has_kappa_one_half():
    found = feature_diversity(brownian())
    # d^2 of a member averages over 128 coordinates and the 16 disjoint windows of the largest eps: it errs
    # by (2 / 2048)^1/2 = 3 %, its exponent over a factor 16 by less than 0.03 / 2 / log(16) * 2 = 0.011.
    assert found.kappas.shape == (MEMBERS,)
    assert np.abs(found.kappas - 0.5).max() < 4 * 0.011
    assert abs(found.kappa.value - 0.5) < 4 * 0.011 / MEMBERS**0.5
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.along_depth.value == pytest.approx(found.kappa.value, abs=0.02)


def test_a_smooth_path_has_kappa_zero():
    found = feature_diversity(smooth())
    np.testing.assert_allclose(found.kappas, 0, atol=1e-12)
    assert found.along_depth.value == pytest.approx(0, abs=1e-12)


def test_noise_on_a_smooth_path_shows_at_small_eps():
    drift = 16.0  # d^2 = eps + 256 eps^2: they are equal at eps = 1/256
    found = feature_diversity(brownian() + drift * smooth(), epsilons=2.0 ** -np.arange(1, 10))
    fine, coarse = (
        kappas(found.epsilons[part], found.curves[:, part]).mean()
        for part in (slice(None, 2), slice(-2, None))
    )
    exponents = [
        math.log2((e + (drift * e) ** 2) / (e / 2 + (drift * e / 2) ** 2)) / 2
        for e in (2 / 512, 1 / 2)
    ]
    # The mean square of 768 velocities errs by 5 %, and moves an exponent by a quarter of that at most;
    # noise of the members' mean as above: 0.03 is twice what they amount to together.
    np.testing.assert_allclose([fine, coarse], 1 - np.array(exponents), atol=0.03)
    assert fine > 0.2 > 0.05 > coarse


def test_the_scale_of_the_stream_does_not_matter():
    x = brownian()
    np.testing.assert_allclose(
        feature_diversity(x).kappas, feature_diversity(1e-6 * x).kappas, rtol=1e-9
    )


def test_distances_are_the_definition():
    x = brownian()
    found = feature_diversity(x, epsilons=[1 / 8, 1 / 64], fractions=[0.5, 0.25])
    assert found.distances.shape == (2, 2, MEMBERS)
    np.testing.assert_array_equal(found.epsilons, [1 / 64, 1 / 8])
    np.testing.assert_array_equal(found.fractions, [0.25, 0.5])
    step = x[256 + 8, 3] - x[256, 3]
    expected = (step.norm(dim=-1).square() / WIDTH).mean().sqrt()
    assert found.distances[0, 1, 3] == pytest.approx(float(expected), rel=1e-12)


def test_members_of_a_population_are_measured_as_if_alone():
    x = brownian()
    together = feature_diversity(x)
    alone = [feature_diversity(x[:, member]) for member in range(MEMBERS)]
    np.testing.assert_allclose(
        together.distances, np.concatenate([one.distances for one in alone], -1), rtol=1e-12
    )
    np.testing.assert_allclose(together.kappas, [one.kappa.value for one in alone], rtol=1e-12)
    assert alone[0].kappa.high == math.inf  # one network says nothing of others
    assert alone[0].along_depth.high < math.inf
    variations = [quadratic_variation(x[:, member]) for member in range(MEMBERS)]
    torch.testing.assert_close(quadratic_variation(x), torch.stack(variations))


def test_default_epsilons():
    assert dyadic(32).tolist() == [1 / 32, 1 / 16]
    assert dyadic(100).tolist() == [1 / 64, 1 / 32, 1 / 16]
    assert dyadic(10_000)[0] == 1 / 256


@pytest.mark.parametrize("parametrization", ["depth_mup", "ode"])
def test_branches_are_noise_at_initialization(parametrization):
    depth, seeds = 256, 4
    model = ResNet(
        16, 64, depth, 4, parametrization=parametrization, base_width=64, population=seeds
    )
    with torch.no_grad():
        stream = residual_stream(model, torch.randn(8, 16))
    found = feature_diversity(stream)
    # As above, with 64 coordinates of 8 inputs, which are correlated: at least 64 x 16 samples of d^2.
    assert abs(found.kappa.value - 0.5) < 4 * (2 / 1024) ** 0.5 / math.log(16) / seeds**0.5
    # Independent steps: ||x^L||^2 is on average ||x^0||^2 and the sum of their squares.
    growth = stream.x[-1].square().mean((-2, -1)) - stream.x[0].square().mean((-2, -1))
    torch.testing.assert_close(
        quadratic_variation(stream).mean(), growth.mean(), rtol=0.0, atol=4 / 64**0.5 * 0.5
    )


@pytest.mark.parametrize("activation", ["identity", "relu", "abs", (1.0, -0.3)])
def test_neighboring_gradients_correlate_as_the_activation_says(activation):
    depth, seeds = 24, 3
    model = ResNet(
        16,
        512,
        depth,
        8,
        activation=activation,
        parametrization=(1.0, 0.0),
        output_std=1.0,
        population=seeds,
    )
    probe = torch.randn(seeds, 4, 16), torch.randn(seeds, 4, 8)
    stream = residual_stream(model, probe[0], lambda outputs: (outputs * probe[1]).sum())
    found = gradient_diversity(stream)
    assert found.cosines.shape == (depth - 1, seeds)
    # Backwards |dx|^2 grows by 1 + m^2 E phi'^2 a block, which dims the correlation, and the rest is noise
    # of size n^-1/2 in each cosine; inputs of a member share weights and are not counted.
    p, q = slopes(activation)
    dimmed = (1 + model.blocks.scale**2 * (p**2 + q**2) / 2) ** 0.5
    expected = expected_gradient_correlation(activation) / dimmed
    assert found.mean.value == pytest.approx(expected, abs=4 / (512 * (depth - 1) * seeds) ** 0.5)


def test_expected_gradient_correlation():
    values = [expected_gradient_correlation(name) for name in ("identity", "relu", "abs")]
    assert values == [1.0, 0.5, 0.0]


def test_update_diversity_is_the_cosine_of_flattened_layers():
    one, other = torch.randn(2, 5, 5).unbind(0)
    updates = torch.stack([one, 2 * one, -one, other])
    cosine = float((one * other).sum() / one.norm() / other.norm())
    np.testing.assert_allclose(
        update_diversity(updates).cosines[:, 0], [1, -1, -cosine], rtol=1e-5, atol=1e-7
    )
    population = update_diversity(torch.stack([updates, updates.flip(0)]))
    np.testing.assert_allclose(population.cosines[:, 0], population.cosines[::-1, 1], atol=1e-12)
    assert population.members.shape == (2,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: feature_diversity([1.0]),
            TypeError,
            "stream must be a Stream or a tensor, got list",
        ),
        (lambda: feature_diversity(torch.zeros(5, 4)), ValueError, "stream must be (L + 1, B, n)"),
        (
            lambda: feature_diversity(torch.zeros(9, 1, 4)),
            ValueError,
            "fewer than 32 blocks, got 8",
        ),
        (
            lambda: feature_diversity(torch.zeros(9, 1, 4), epsilons=[0.01, 0.5]),
            ValueError,
            "epsilons must be from 0.125 to 1 at depth 8",
        ),
        (
            lambda: feature_diversity(torch.zeros(9, 1, 4), epsilons=[0.5, 0.51]),
            ValueError,
            "epsilons must be two different multiples of 1/8",
        ),
        (
            lambda: feature_diversity(torch.zeros(33, 1, 4), fractions=[0.99]),
            ValueError,
            "fractions must be from 0 to 0.9375",
        ),
        (lambda: update_diversity(torch.zeros(4, 4)), ValueError, "updates must be (L, n, n)"),
        (lambda: update_diversity(torch.zeros(1, 4, 4)), ValueError, "two blocks at least, got 1"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_a_stream_without_gradients_is_refused():
    with pytest.raises(ValueError, match="stream must hold dh"):
        gradient_diversity(residual_stream(ResNet(4, 8, 3, 2), torch.randn(2, 4)))
