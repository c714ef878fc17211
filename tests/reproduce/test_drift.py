"""The study of drifts: what it trains, and what it says of drifts of known cause."""

import math

import numpy as np
import pytest

from depthnet.reproduce.drift import POWERS, Drift, _fit


def made_up(study, optimum):
    """Losses of every job whose bowls have their minima at optimum(case, depth); seeds differ a little."""
    rng, results = np.random.default_rng(0), {}
    for name, case in study.cases().items():
        (variant,) = case.variants()
        rates = np.array(variant.log2_lr)
        for depth in case.depths:
            at = optimum(case, depth) + rng.normal(0, 0.01, (1, case.seeds, 1, 1))
            u = rates - at
            losses = 2.3 * np.exp(0.115 * (np.exp(0.9 * u) - 1 - 0.9 * u))
            shape = (case.steps, case.seeds, 1, len(rates))
            results[f"{name}-depth_mup-L{depth}"] = {
                "losses": np.broadcast_to(losses, shape).astype(np.float32)
            }
    return results


def holds(optimum):
    study = Drift(steps=20, lengths=(10, 40, 80))
    return [verdict.holds for verdict in study.findings(made_up(study, optimum)).verdicts]


def test_a_drift_of_finite_depth_is_called_so_and_nothing_else_is():
    # Falling learning rates have the same drift, a whole octave higher.
    def optimum(case, depth):
        return -7 - 2 * depth**-0.5 + (case.schedule == "linear")

    assert holds(optimum)[:3] == [True, False, False]


def test_drifts_of_finite_width_and_of_length_are_called_so():
    def optimum(case, depth):
        per_doubling = 0.1 * (64 / case.width) ** 0.5 + 0.05 * math.log2(case.steps / 20)
        return -7.5 + per_doubling * math.log2(depth / 8)

    finite_depth, finite_width, length, *_ = holds(optimum)
    assert finite_depth is not True
    assert (finite_width, length) == (True, True)


def test_a_falling_rate_that_drifts_more_is_told_from_one_that_drifts_less():
    def optimum(case, depth):
        more = {20: 0.1, 80: -0.1}.get(case.steps, 0.0) * (case.schedule == "linear")
        return -7 + (0.05 + more) * math.log2(depth / 8)

    assert holds(optimum)[3:] == [True, False]


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_the_fit_recovers_a_power(power):
    depths = np.array([8, 16, 32, 64, 128, 256, 512])
    optima = -7.0 - np.array([[1.0, 3.0]]) * depths[:, None] ** -power
    found, limit = _fit(depths, optima)
    np.testing.assert_allclose(found, power, atol=(POWERS[1] - POWERS[0]) / 2)
    np.testing.assert_allclose(limit, -7.0, atol=0.15)


def test_every_case_differs_from_the_base_in_what_its_name_says():
    cases = Drift().cases()
    assert cases["width-32"].width == 32
    assert cases["steps-800"].steps == 800
    assert (cases["linear-800"].steps, cases["linear-800"].schedule) == (800, "linear")
    settings = cases["width-256"].settings_of(cases["width-256"].variants()[0])
    assert (settings.base_width, settings.sweep) == (64, ("all",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (8, 128)}, "depths must be at least three"),
        ({"widest_depth": 24}, "depths must have 24"),
        ({"shared_depth": 16}, "must be ascending"),
        ({"lengths": (2,)}, "lengths must be at least 5"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Drift(**changes)
