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


@pytest.mark.parametrize(
    ("alpha", "lost"),
    [
        (0.5, ("nonlinear learning within blocks",)),
        (0.75, ("feature diversity", "nonlinear learning within blocks")),
        (1, ("feature diversity",)),
    ],
)
def test_section_9_deeper_blocks_lose_something_in_every_limit(alpha, lost):
    c = classify(alpha, 1 - alpha, block_depth=2)
    assert c.lost == lost
    assert all(word in c.summary for word in (["redundant"] if alpha > 0.5 else ["linearized"]))
    assert classify(alpha, 1 - alpha).lost == (() if alpha == 0.5 else ("feature diversity",))
    assert classify(alpha, 2, block_depth=2).lost is None


def test_exponents():
    e = classify(0.5, 0.5).exponents
    assert e["stream"] == e["stream_change"] == e["output_change"] == e["preactivation_change"] == 0
    assert e["branch"] == e["gradient"] == -0.5
    assert e["branch_change"] == -1
    assert e["quadratic_variation"] == 0
    assert e["remainder"] == -0.5
    assert classify(0.5, 0).exponents["output_change"] == 0.5
    assert classify(1.25, -0.25).exponents["preactivation_change"] == 0.25
    assert classify(1, 0).exponents["quadratic_variation"] == -1
    assert classify(1, 0).exponents["remainder"] == 0
    assert classify(0, 0).exponents is None


@pytest.mark.parametrize("bad", [0, -1])
def test_block_depth_must_be_positive(bad):
    with pytest.raises(ValueError, match="block_depth must be at least 1"):
        classify(0.5, 0.5, bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "half", None])
def test_exponents_must_be_finite_numbers(bad):
    with pytest.raises(ValueError, match="gamma must be a finite number"):
        classify(0.5, bad)
