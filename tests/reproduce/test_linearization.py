"""The study of deeper blocks: what it measures, and how it is judged."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from depthnet.reproduce.linearization import (
    GROWS,
    QUANTITIES,
    STABILITY,
    LinearizationStudy,
)
from depthnet.reproduce.study import run
from depthnet.scaling import Parametrization, classify
from depthnet.scaling.classification import DIVERSITY, WITHIN_BLOCKS

STUDY = LinearizationStudy()


def follow(study, change=0.0, noise=0.01):
    """Results that follow the predicted exponents to within `noise`, changed by `change`."""
    rng, results = np.random.default_rng(0), {}
    for job in study.jobs():
        k, rest = job.name.split("-", 1)
        parametrization = next(name for name in study.parametrizations if rest.startswith(name))
        p, depth = Parametrization.of(parametrization), int(rest.rpartition("-L")[2])
        exponents = {
            "stream_change": 1 - p.alpha - p.gamma,
            "quadratic_variation": 1 - 2 * p.alpha,
            "remainder": -p.gamma / 2,
            "products": -p.gamma if k > "k1" else -np.inf,
        }
        shape = (len(study.steps), study.seeds)
        sizes = {
            name: depth ** (exponent + change) * (1 + noise * rng.normal(size=shape))
            for name, exponent in exponents.items()
        }
        epsilons = np.tile([1 / 32, 1 / 16], (len(study.steps), 1))
        curves = np.tile(epsilons[:, None] ** 0.5, (1, study.seeds, 1))
        losses = np.ones((20, study.seeds))
        results[job.name] = {**sizes, "epsilons": epsilons, "curves": curves, "losses": losses}
    return results


@pytest.fixture(scope="module")
def judged():
    study = replace(STUDY, depths=(32, 64, 128))
    return study, study.findings(follow(study))


def test_every_limit_of_deeper_blocks_loses_what_the_classification_says(judged):
    study, findings = judged
    assert all(verdict.holds for verdict in findings.verdicts)
    lost = {(line[0], line[1]): line[-2] for line in findings.lines}
    for name in study.parametrizations:
        p = Parametrization.of(name)
        for k in study.block_depths:
            said = classify(p.alpha, p.gamma, k).lost
            expected = (STABILITY,) if said is None else said
            assert lost[f"({p.alpha:g},{p.gamma:g})", k] == (", ".join(expected) or "nothing")
    assert "nothing" not in [words for (_, k), words in lost.items() if k > 1]
    assert {lost["(0.5,0.5)", 2], lost["(1,0)", 2]} == {WITHIN_BLOCKS, DIVERSITY}


def test_verdicts_follow_the_data():
    study = replace(STUDY, depths=(32, 64, 128), parametrizations=("depth_mup",))
    shifted = study.findings(follow(study, change=GROWS + 0.2))
    assert [verdict.holds for verdict in shifted.verdicts] == [False] * 5
    assert shifted.lines[1][-2] == STABILITY
    vague = study.findings(follow(study, noise=0.5))
    assert [verdict.holds for verdict in vague.verdicts] == [None] * 5
    assert vague.lines[0][-2] == "undecided"


def test_without_a_claim_there_is_no_verdict():
    study = replace(STUDY, depths=(32, 64), parametrizations=("mup", "1,1"))
    assert study.findings(follow(study)).verdicts == []


def test_networks_are_trained_and_measured(tmp_path):
    study = LinearizationStudy(
        parametrizations=("depth_mup", "half_zero"),
        width=8,
        depths=(32, 64),
        steps=(0, 2, 3),
        seeds=2,
        batch=4,
    )
    findings = run(study, tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(findings.rows) == 2 * 2 * 2
    assert (tmp_path / "linearization.png").stat().st_size > 10_000
    assert {row["step"] for row in rows} == {"3", "2"}
    for row in rows:
        sizes = {name: float(row[name]) for name in QUANTITIES}
        if row["block_depth"] == "1":
            assert sizes.pop("products") == 0
        assert all(0 < size < np.inf for size in sizes.values())


def test_bad_settings_are_named():
    for settings, message in (
        ({"block_depths": (0,)}, "block_depths must be at least 1"),
        ({"block_depths": (2, 2)}, "block_depths must be 1 or more different ones"),
        ({"depths": (64,)}, "depths must be 2 or more different ones"),
        ({"activations": ("abs", "relu")}, "activations must be one"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearizationStudy(**settings)
