"""The claims of section 7 of Tensor Programs VI, region by region."""

import math

import pytest

from depthnet.scaling import PRESETS, classify


@pytest.mark.parametrize(("alpha", "gamma"), [(0, 0), (0, 1), (0.49, 0.51), (-1, 2)])
def test_claim_7_1_unstable_at_initialization(alpha, gamma):
    c = classify(alpha, gamma)
    assert not c.stable_at_initialization
    assert c.stable_in_training is c.nontrivial is c.faithful is c.diversity_exponent is None
    assert "unstable at initialization" in c.summary


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 0), (0.5, 0.49), (1, -0.5)])
def test_claim_7_2_unstable_in_training(alpha, gamma):
    c = classify(alpha, gamma)
    assert c.stable_at_initialization
    assert c.stable_in_training is False
    assert c.nontrivial is True
    assert c.faithful is c.feature_learning is c.layerwise_linearization is None
    assert c.summary == "unstable in training"


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 0.6), (1, 1), (2, 0)])
def test_claim_7_2_trivial(alpha, gamma):
    c = classify(alpha, gamma)
    assert c.stable_in_training is True
    assert c.nontrivial is False
    assert c.faithful is None
    assert c.summary == "trivial"


@pytest.mark.parametrize("alpha", [1.1, 1.5, 3])
def test_claim_7_3_unfaithful(alpha):
    c = classify(alpha, 1 - alpha)
    assert c.stable_in_training
    assert c.nontrivial
    assert c.faithful is False
    assert c.feature_learning is c.diversity_exponent is None
    assert c.layerwise_linearization is False


@pytest.mark.parametrize("alpha", [0.55, 0.6, 0.7, 0.75, 0.9, 1])
def test_claim_7_4_redundant(alpha):
    c = classify(alpha, 1 - alpha)
    assert c.faithful
    assert c.feature_learning
    assert c.redundant
    assert c.diversity_exponent == 0
    assert "redundant" in c.summary


def test_claim_7_5_depth_mup():
    c = classify(0.5, 0.5)
    assert c.stable_at_initialization
    assert c.stable_in_training
    assert c.nontrivial
    assert c.faithful
    assert c.feature_learning
    assert c.diversity_exponent == 0.5
    assert c.redundant is False
    assert "Depth-muP" in c.summary


@pytest.mark.parametrize(
    ("alpha", "linear"), [(0.5, True), (0.75, True), (0.999, True), (1, False)]
)
def test_claim_7_6_layerwise_linearization(alpha, linear):
    assert classify(alpha, 1 - alpha).layerwise_linearization is linear


def test_presets_classify_themselves():
    assert PRESETS["depth_mup"].classify() == classify(0.5, 0.5)
    assert not PRESETS["standard"].classify().stable_at_initialization
    assert PRESETS["half_zero"].classify().summary == "unstable in training"
    assert "ODE" in PRESETS["ode"].classify().summary


@pytest.mark.parametrize("bad", [math.nan, math.inf, "half", None])
def test_exponents_must_be_finite_numbers(bad):
    with pytest.raises(ValueError, match="gamma must be a finite number"):
        classify(0.5, bad)
