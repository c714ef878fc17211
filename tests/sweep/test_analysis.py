import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from trials import GRID, bowls, grid, rise, trial

from depthnet.sweep import analysis, optima
from depthnet.sweep.study import Member, Network, Range, SweepSettings

ARRAY = np.array(GRID)
BENCH = Path(__file__).parents[2] / "bench"


LAST = optima.slices(20)[-1]


def settings(**given) -> SweepSettings:
    return SweepSettings(
        **{"depth": (8, 16, 32), "steps": 20, "parametrization": ("ode",), **given}
    )


def curves(trials, study, part=LAST):
    (panel,) = analysis.panels(study)
    return analysis.curves(trials, study, panel, part)


def judged(trials, study):
    (panel,) = analysis.panels(study)
    return analysis.verdict(curves(trials, study), study, panel)


def drifting(per_doubling, at=-8.0):
    return lambda network: at + per_doubling * math.log2(network.depth / 8)


def test_curves_are_means_over_seeds_at_the_best_multiplier_and_decay():
    study = settings(depth=(8,), log2_block_multiplier=(-2.0, -1.0), weight_decay=(0.0, 0.1))
    network = study.networks[0]
    trials = [
        trial(
            network,
            Member(*candidate, seed),
            np.full(20, 1 + abs(candidate[1] + candidate[0] / 8) + candidate[2] + 0.2 * seed),
        )
        for candidate in grid(study)
        for seed in range(2)
    ]
    (curve,) = curves(trials, study)
    expected = [1.1 + min(abs(-2 + lr / 8), abs(-1 + lr / 8)) for lr in GRID]
    np.testing.assert_allclose(curve.mean, expected, rtol=1e-6)
    assert (curve.band[0] <= curve.mean).all()
    assert (curve.mean <= curve.band[1]).all()


def test_the_scale_is_the_width_where_only_that_varies():
    study = settings(width=(32, 64, 128), depth=(8,))
    (panel,) = analysis.panels(study)
    trials = bowls(study, lambda network: -8.0 - math.log2(network.width / 32))
    assert [curve.scale for curve in curves(trials, study)] == [32, 64, 128]
    found = judged(trials, study)
    assert found.shift.value == pytest.approx(-2, abs=1e-4)
    assert "from width 32 to 128" in found.words
    assert panel.name == "ode"


def test_a_panel_for_each_parametrization_activation_and_width():
    study = settings(
        parametrization=("standard", "0.75,0.25"), activation=("abs", "1,-0.2"), width=(64, 32)
    )
    names = [panel.name for panel in analysis.panels(study)]
    assert names[:3] == [
        "standard, φ = abs, width 64",
        "standard, φ = abs, width 32",
        "standard, φ = 1,-0.2, width 64",
    ]
    assert len(names) == 8
    assert {len(panel.networks) for panel in analysis.panels(study)} == {3}


def test_verdicts():
    still = judged(bowls(settings(), drifting(0)), settings())
    assert (still.transfers, still.answer) == (True, "transfers")
    assert (still.shift.value, still.drift.value, still.cost.value) == pytest.approx(
        (0,) * 3, abs=1e-5
    )
    moving = judged(bowls(settings(), drifting(-0.5), bend=0.015), settings())
    assert (moving.transfers, moving.answer) == (False, "does not transfer")
    assert moving.shift.value == pytest.approx(-1, abs=1e-4)
    assert moving.drift.value == pytest.approx(-0.5, abs=1e-4)
    assert moving.drift.exceeds(analysis.DRIFT_LIMIT)
    costly = judged(bowls(settings(), drifting(0.2), bend=1.0), settings())
    assert not costly.drift.exceeds(analysis.DRIFT_LIMIT)
    assert costly.transfers is False
    assert costly.cost.value == pytest.approx(math.expm1(rise(-0.4)), abs=1e-4)
    alone = settings(depth=(8,))
    verdict = judged(bowls(alone, drifting(0)), alone)
    assert (verdict.transfers, verdict.answer) == (None, "undecided")
    assert "one depth says nothing of transfer" in verdict.words


def test_the_cost_is_read_from_bowls_not_from_points_of_the_grid():
    """Optima 0.04 octaves apart, on two sides of where the grid's best point changes from -8 to -7."""
    study = settings(depth=(8, 16))
    trials = bowls(study, lambda network: -7.483 if network.depth == 8 else -7.443, bend=1.0)
    shallow, deep = curves(trials, study)
    at = shallow.mean.argmin()
    assert deep.mean[at] / deep.mean.min() - 1 > 1.5 * analysis.COST_LIMIT
    verdict = judged(trials, study)
    assert verdict.cost.value == pytest.approx(math.expm1(rise(-0.04)), abs=1e-5)
    assert verdict.transfers is True


@pytest.mark.parametrize("growth", [0.97, 1.03])
def test_that_depth_helps_is_judged_apart_from_transfer(growth):
    """Losses of twice the depth are 3 % lower or higher; the optimum stays."""
    trials = bowls(settings(), drifting(0), least=lambda n: growth ** math.log2(n.depth))
    verdict = judged(trials, settings())
    assert verdict.transfers is True
    assert verdict.drift.exceeds(analysis.DRIFT_LIMIT) is False
    assert verdict.cost.exceeds(analysis.COST_LIMIT) is False
    assert verdict.gain.value == pytest.approx(growth**2 - 1, abs=1e-5)
    assert verdict.helps is (growth < 1)
    better = "better" if growth < 1 else "worse"
    assert f"at that rate depth 32 is {better} than depth 8" in verdict.words


def test_whether_depth_helps_is_unknown_within_the_noise():
    study = settings(seeds=3)
    trials = bowls(study, drifting(0), noise=0.05, least=lambda n: 1 - 1e-5 * n.depth)
    verdict = judged(trials, study)
    assert verdict.gain.low < 0 < verdict.gain.high
    assert verdict.helps is None
    assert "neither better nor worse" in verdict.words


@pytest.mark.parametrize("drift", [0.0, -1.0])
@pytest.mark.parametrize("swept", ["all", "hidden"])
def test_where_every_learning_rate_is_a_good_one_there_is_no_verdict(drift, swept):
    """The least learning rate, at -10, is 4.9 % or 5.1 % worse than the best, at -8."""
    study = settings(log2_lr=GRID[3:], sweep=swept)
    for contrast in (0.049, 0.051):
        trials = bowls(study, drifting(drift), bend=math.log1p(contrast) / rise(-2.0))
        verdict = judged(trials, study)
        assert verdict.contrast == pytest.approx(contrast, abs=1e-5)
        assert (verdict.answer == "no verdict") is (contrast < analysis.CONTRAST_LIMIT)
    trials = bowls(study, drifting(drift), bend=math.log1p(0.02) / rise(-2.0))
    verdict = judged(trials, study)
    assert verdict.transfers is None
    subject = {"all": "the learning rate hardly matters", "hidden": "blocks hardly matter"}[swept]
    assert verdict.words.startswith(
        f"no verdict: {subject} here: the least learning rate of the grid is only 2.0 % worse than the "
        "best at depth 8, where 5 % are needed"
    )


def test_a_flat_curve_of_a_deeper_network_does_not_hide_what_the_base_shows():
    """The contrast is the base's: there it is known before anything deeper is trained."""
    trials = bowls(settings(), drifting(0), diverges=lambda n, m: n.depth > 8 and m.log2_lr < -8)
    assert judged(trials, settings()).contrast > analysis.CONTRAST_LIMIT
    lowest = bowls(settings(), drifting(0), diverges=lambda n, m: m.log2_lr == -13)
    assert judged(lowest, settings()).contrast == math.inf


def test_a_drift_whose_interval_contains_the_limit_is_undecided():
    study = settings(seeds=4)
    trials = bowls(study, drifting(-0.25), apart=0.3, bend=0.015, generator=1)
    noisy = judged(trials, study)
    assert noisy.drift.low < -analysis.DRIFT_LIMIT < noisy.drift.high
    assert noisy.transfers is None
    assert noisy.words.startswith("undecided")
    assert "per doubling of depth, limit 0.25" in noisy.words


@pytest.mark.parametrize(
    ("estimate", "exceeds"),
    [
        ((0.1, -0.2, 0.2), False),
        ((0.3, 0.26, 0.4), True),
        ((-0.3, -0.4, -0.26), True),
        ((0.1, -0.3, 0.2), None),
        ((0.3, 0.2, 0.4), None),
        ((0.25, 0.25, 0.25), None),
        ((math.inf, math.inf, math.inf), True),
        ((math.inf, 0.1, math.inf), None),
        ((math.nan,) * 3, None),
        ((0.3, math.nan, math.nan), None),
    ],
)
def test_an_estimate_exceeds_a_limit_with_all_of_its_interval(estimate, exceeds):
    assert analysis.Estimate(*estimate).exceeds(0.25) is exceeds


def test_an_interval_holds_its_estimate():
    found = analysis.Estimate.of(1.0, np.array([1.5, 2.0, np.nan, 3.0]))
    assert found == (1.0, 1.0, 3.0)
    assert analysis.Estimate.of(4.0, np.array([1.5, 2.0])) == (4.0, 1.5, 4.0)


def test_an_optimum_at_the_edge_of_the_grid_decides_nothing():
    at_edge = judged(bowls(settings(), drifting(0, at=-20.0), skew=0.0), settings())
    assert at_edge.transfers is None
    assert "at depth 8, 16, 32 the lowest point is at the edge of the grid" in at_edge.words


@pytest.mark.parametrize("lost_depth", [8, 16])
def test_lost_depths_give_no_numbers(lost_depth):
    trials = bowls(settings(), drifting(0), diverges=lambda n, m: n.depth == lost_depth)
    verdict = judged(trials, settings())
    assert verdict.transfers is False
    assert verdict.cost.value == math.inf
    assert "nan" not in verdict.words
    assert f"every learning rate diverges at depth {lost_depth}" in verdict.words


def test_when_everything_diverged_there_is_a_summary_without_optima():
    trials = bowls(settings(), drifting(0), diverges=lambda n, m: True)
    summary = analysis.summarize(trials, settings())
    (panel,) = summary["panels"]
    last = panel["slices"]["last fifth"]
    assert last["transfers"] is False
    assert last["verdict"] == "does not transfer: every learning rate diverges at depth 8, 16, 32"
    assert all(math.isnan(cell["optimum_log2_lr"]) for cell in last["scales"].values())
    assert summary["trials"]["diverged"] == summary["trials"]["finished"] == 60


def test_the_shift_is_to_the_depth_farthest_from_the_base():
    study = settings(base_depth=32)
    shift = judged(bowls(study, drifting(-0.5)), study).shift
    assert shift.value == pytest.approx(1.0, abs=1e-4)


def test_the_cost_of_a_diverging_learning_rate_is_infinite():
    study = settings(depth=(8, 16))
    trials = bowls(
        study,
        lambda network: -5.0 if network.depth == 8 else -8.0,
        diverges=lambda network, member: network.depth == 16 and member.log2_lr >= -6,
    )
    assert curves(trials, study)[1].cost == math.inf
    verdict = judged(trials, study)
    assert verdict.transfers is False
    assert "the learning rate tuned at depth 8 diverges at depth 16" in verdict.words


def test_one_diverged_seed_is_a_diverged_learning_rate():
    trials = bowls(settings(), drifting(0), diverges=lambda n, m: m.log2_lr > -6 and m.seed == 1)
    for curve in curves(trials, settings()):
        np.testing.assert_array_equal(np.isinf(curve.mean), ARRAY > -6)
        np.testing.assert_array_equal(np.isinf(curve.band), [ARRAY > -6] * 2)


def test_missing_trials_are_left_out():
    def finished(network, member):
        return network.depth == 8 or (
            network.depth == 16 and member.log2_lr > -11 and member.seed < 1
        )

    trials = bowls(settings(), drifting(-0.1), noise=0.01, finished=finished)
    shallow, deep = curves(trials, settings())
    np.testing.assert_array_equal(np.isnan(deep.mean), ARRAY <= -11)
    assert not np.isnan(shallow.mean).any()
    assert deep.optimum.log2_lr == pytest.approx(-8.1, abs=0.1)
    verdict = judged(trials, settings())
    assert verdict.transfers is None
    assert "no trial is finished at depth 32" in verdict.words
    summary = analysis.summarize(trials, settings())
    assert summary["trials"]["planned"] == 60
    assert summary["trials"]["finished"] == len(trials) == 27
    assert summary["networks"]["ode-abs-n64-L32-all"]["finished"] == 0


def test_an_unknown_cost_decides_nothing():
    """Of depth 16 only learning rates above the optimum of depth 8 are known."""
    study = settings(depth=(8, 16))
    trials = bowls(
        study,
        lambda network: -8.1 if network.depth == 8 else -7.9,
        finished=lambda n, m: n.depth == 8 or m.log2_lr >= -8,
    )
    verdict = judged(trials, study)
    assert verdict.transfers is None
    assert "what it costs at depth 16 is not known" in verdict.words


def test_a_base_where_all_diverge_tells_no_costs():
    """Also not at depths that diverge at the greatest learning rate, beside which it would lie."""
    trials = bowls(settings(), drifting(0), diverges=lambda n, m: n.depth == 8 or m.log2_lr == -4)
    assert all(math.isnan(curve.cost) for curve in curves(trials, settings()))
    verdict = judged(trials, settings())
    assert verdict.transfers is False
    assert "what it costs" not in verdict.words


@pytest.mark.parametrize("depth", [8, 32])
def test_one_trial_only(depth):
    trials = bowls(settings(), drifting(0))
    (only,) = (
        t for t in trials if t.network.depth == depth and t.member == Member(-8.0, -1.5, 0.0, 1)
    )
    verdict = judged([only], settings())
    assert verdict.transfers is None
    assert "nan" not in verdict.words
    (curve,) = curves([only], settings())
    assert curve.best == pytest.approx(2.0)
    assert curve.optimum == optima.Optimum(-8.0, True)


def test_no_trials_give_empty_panels():
    verdict = judged([], settings())
    assert verdict.transfers is None
    assert verdict.words == "undecided: no trial is finished at depth 8, 16, 32"


sys.path.append(str(BENCH))  # which has a coverage.py, as site-packages may: loaded from its path
COVERAGE = importlib.util.spec_from_file_location("bench_coverage", BENCH / "coverage.py")


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_hold_the_truth_in_nine_of_ten_studies(seeds):
    """Of the optimum, the drift and the cost of made-up studies like those seen; see the benchmark."""
    coverage = importlib.util.module_from_spec(COVERAGE)
    COVERAGE.loader.exec_module(coverage)
    studies = 60
    three_errors = 3 * math.sqrt(0.9 * 0.1 / studies)
    for case in [case for case in coverage.CASES if case[0] == seeds][::2]:
        assert (coverage.covered(*case, studies) >= 0.9 - three_errors).all(), case


def search(study):
    ends = study.log2_lr
    return [
        (float(x), -1.5, 0.0) for x in np.random.default_rng(0).uniform(ends.low, ends.high, 40)
    ]


def test_the_optimum_of_a_search_is_its_best_candidate():
    study = settings(log2_lr=Range(-13, -4), sampler="tpe")
    trials = bowls(study, drifting(-0.5), candidates=search)
    tried = np.sort([candidate[0] for candidate in search(study)])
    for curve in curves(trials, study):
        optimum = drifting(-0.5)(curve.network)
        np.testing.assert_array_equal(curve.log2_lr, tried)
        assert curve.optimum.log2_lr == tried[np.abs(tried - optimum).argmin()]
        assert curve.interval[0] <= curve.optimum.log2_lr <= curve.interval[1]
        assert math.isnan(curve.cost)
    verdict = judged(trials, study)
    assert verdict.transfers is False
    assert "a search does not measure" in verdict.words


@pytest.mark.parametrize(("at", "at_edge"), [(-12.9, True), (-11.9, False), (-4.1, True)])
def test_a_search_is_at_the_edge_in_the_outer_twentieth_of_its_range(at, at_edge):
    study = settings(log2_lr=Range(-13, -4), sampler="tpe")
    trials = bowls(
        study, drifting(0, at=at), candidates=lambda s: [(x, -1.5, 0.0) for x in (-8.0, at, -9.0)]
    )
    assert [curve.optimum.at_edge for curve in curves(trials, study)] == [at_edge] * 3
    assert ("edge of the range" in judged(trials, study).words) == at_edge


def test_a_search_over_other_hyperparameters_keeps_the_grid_of_learning_rates():
    study = settings(weight_decay=Range(0.0, 1.0), sampler="tpe")
    trials = bowls(
        study, drifting(0), candidates=lambda s: [(lr, -1.5, 0.3 + lr / 100) for lr in GRID]
    )
    assert judged(trials, study).transfers is True
    assert judged(trials, study).cost.value == pytest.approx(0, abs=1e-6)


def test_rows_are_one_a_trial_and_slice():
    trials = bowls(settings(), drifting(0), diverges=lambda n, m: n.depth == 8 and m.log2_lr == -13)
    rows = analysis.rows(trials, settings())
    assert len(rows) == 60 * 3
    assert list(rows[0]) == [
        *("parametrization", "alpha", "gamma", "activation", "width", "depth", "sweep"),
        *("log2_lr", "log2_block_multiplier", "weight_decay", "seed"),
        *("step_from", "step_to", "loss", "diverged"),
    ]
    assert (rows[0]["loss"], rows[0]["diverged"]) == (math.inf, 1)
    assert (rows[0]["alpha"], rows[0]["gamma"]) == (1.0, 0.0)
    assert rows[-1]["loss"] == pytest.approx(2 * math.exp(0.14 * rise(4.0)))


def test_the_summary_counts_cost_and_is_json():
    trials = bowls(settings(), drifting(0))
    summary = analysis.summarize(trials, settings())
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["trials"]["flops"] == 20e9 * (8 + 16 + 32)
    assert summary["networks"]["ode-abs-n64-L16-all"]["seconds"] == 20 * 0.5 * 16
    (panel,) = summary["panels"]
    assert (panel["alpha"], panel["gamma"]) == (1.0, 0.0)
    cell = panel["slices"]["second half"]["scales"]["32"]
    assert cell["optimum_log2_lr"] == pytest.approx(-8.0, abs=1e-4)
    assert cell["cost"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert cell["tuned_loss"] == pytest.approx(2)


def test_a_network_that_is_not_of_the_study_is_ignored():
    trials = bowls(settings(), drifting(0))
    stranger = trial(Network("ode", "abs", 64, 4), trials[0].member, np.ones(20))
    assert [curve.scale for curve in curves([*trials, stranger], settings())] == [8, 16, 32]
