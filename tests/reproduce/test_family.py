"""The family of activations: its theory, its measurements, and how they are judged."""

import csv
import math
import re

import numpy as np
import pytest

from depthnet import cli
from depthnet.reproduce import family
from depthnet.reproduce.family import ABS, IDENTITY, RELU, Family, correlation, slopes

SMALL = Family(
    angles=(-45.0, 0.0, 45.0),
    width=16,
    depth=4,
    multipliers=(0.25, 1.0, 4.0),
    log2_lr=(-10.0, -6.0),
    seeds=2,
    steps=10,
    batch=8,
    gradient_width=128,
    gradient_depth=16,
    gradient_seeds=4,
)


def no_tick(part):
    pass


def test_slopes_are_the_named_activations_up_to_a_factor():
    named = {IDENTITY: (1, -1), RELU: (2**0.5, 0), ABS: (1, 1), -11.25: (1.387, -1.387 * 0.199)}
    for angle, expected in named.items():
        np.testing.assert_allclose(slopes(angle), expected, atol=5e-4)
    for angle in np.linspace(-45, 45, 7):
        assert math.isclose(sum(slope**2 for slope in slopes(angle)), 2)


@pytest.mark.parametrize("angle", [-45.0, -20.0, 0.0, 30.0, 45.0])
def test_theory_against_random_vectors(angle):
    """dh = phi'(h) dx with independent h, h', and dx' = dx + N(0, E phi'^2 / depth)."""
    rng, n, depth = np.random.default_rng(0), 400_000, 4
    p, q = slopes(angle)
    dx = rng.normal(size=n)
    deeper = dx + rng.normal(size=n) * ((p**2 + q**2) / 2 / depth) ** 0.5
    a, b = (np.where(rng.normal(size=n) > 0, p, -q) * gradient for gradient in (dx, deeper))
    # The standard error of a correlation is at most 3 / sqrt(n) here, by its products' fourth moments.
    assert abs(np.corrcoef(a, b)[0, 1] - correlation(angle, depth)) < 9 / n**0.5


def test_measured_correlations_follow_theory():
    """Within three standard errors and the 1/width that the theory of infinite width leaves out."""
    found = SMALL._correlate(no_tick)["correlations"]
    assert found.shape == (3, 4)
    judged = SMALL._judge_correlations(dict(zip(SMALL.angles, found, strict=True)))
    assert [verdict.holds for verdict in judged] == [True, True]
    found[1] += 0.1
    judged = SMALL._judge_correlations(dict(zip(SMALL.angles, found, strict=True)))
    assert judged[0].holds is False
    assert "at +0°" in judged[0].words


def test_a_factor_of_the_activation_is_one_of_the_multiplier(monkeypatch):
    grid = [(0.5, -8.0), (1.0, -7.0)]
    expected = SMALL._train(no_tick, ABS, 4, grid)["losses"]
    monkeypatch.setattr(family, "slopes", lambda angle: tuple(2 * s for s in slopes(angle)))
    halved = SMALL._train(no_tick, ABS, 4, [(m / 2, lr) for m, lr in grid])["losses"]
    np.testing.assert_allclose(halved, expected, rtol=1e-5)  # powers of 2: only GEMMs may round
    assert np.ptp(expected) > 1e-3


def test_without_blocks_nothing_depends_on_activation_depth_or_the_blocks_learning_rate():
    losses = SMALL._train(no_tick, ABS, 4, [(0.0, -9.0), (0.0, -6.0)])["losses"]
    blockless = SMALL._train(no_tick, RELU, 1, [(0.0, 0.0)])["losses"]
    np.testing.assert_allclose(losses, np.repeat(blockless, 2, axis=1), rtol=1e-5)


def results(identity, relu, absolute, best=7):
    """Made up: every angle has its least losses (seeds,) at one point of the grid; no blocks, 9."""
    found = {"gradients": {"correlations": np.array([[1.0, 1.0], [0.5, 0.5], [0.0, 0.01]])}}
    found["no-blocks"] = {"losses": np.full((2, 1), 9.0)}
    for angle, own in zip(SMALL.angles, (identity, relu, absolute), strict=True):
        losses = np.full((2, 15), 10.0)
        losses[:, best] = own
        found[f"train{angle:+g}"] = {"losses": losses}
    return found


@pytest.mark.parametrize(
    ("absolute", "best", "holds"),
    [
        ((1.0, 2.0), 7, True),  # each seed 1 below relu: what seeds share does not count
        ((3.0, 4.0), 7, False),
        ((1.0, 4.0), 7, None),  # one seed below, one above
        ((1.0, 2.0), 2, None),  # at the least multiplier
        ((1.0, 2.0), 5, None),  # at the least learning rate
        ((np.inf, 2.0), 7, False),  # one diverged: what is left is 9, without blocks
    ],
)
def test_abs_against_relu(absolute, best, holds):
    findings = SMALL.findings(results((7.0, 8.0), (2.0, 3.0), absolute, best))
    verdict = next(v for v in findings.verdicts if v.claim == "|h| trains better than relu")
    assert verdict.holds is holds


def test_a_network_without_blocks_is_the_end_of_the_grid():
    findings = SMALL.findings(results((9.5, 9.5), (2.0, 3.0), (1.0, 2.0)))
    line = dict(zip(findings.header, findings.lines[0], strict=True))
    assert (line["a"], line["log2 lr"]) == ("0", "-")
    assert line["loss"].startswith("9.000")
    assert findings.verdicts[-1].claim == "relu trains better than identity"
    assert findings.verdicts[-1].holds is True


def test_the_command(tmp_path, capsys):
    changes = ["--set", "angles", "-45", "0", "45", "--set", "steps", "10", "--set", "batch", "8"]
    for key in ("width", "gradient_width"):
        changes += ["--set", key, "16"]
    for key in ("depth", "gradient_depth"):
        changes += ["--set", key, "4"]
    assert cli.main(["reproduce", "family", *changes, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "|h| trains better than relu" in printed
    assert re.search(r"\n +\+0 +relu +0\.\d{4} ± 0\.\d{4} +0\.4472 ", printed)  # 1/2 (1 + 1/4)^-1/2
    assert (tmp_path / "family.png").stat().st_size > 10_000
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [row for row in rows if row["quantity"] == "loss"]
    assert len(losses) == 4 + 3 * 4 * 4 * 5  # seeds; angles, seeds, multipliers, learning rates
    assert len(rows) - len(losses) == 3 * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"angles": (0.0, 45.0)}, "angles must be ascending, -45, 0 and 45 among"),
        ({"angles": (-45.0, 0.0, 45.0, 50.0)}, "angles must be from -45 to 45 degrees, got 50"),
        ({"multipliers": (1.0, 0.5)}, "multipliers must be positive and ascending"),
        ({"multipliers": ()}, "multipliers must be positive and ascending"),
        ({"gradient_seeds": 1}, "gradient_seeds must be at least 2, got 1"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"log2_lr": (-7.0, -9.0)}, "log2_lr must have low at most high"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Family(**changes)
