import math

import numpy as np
import pytest

from depthnet.scaling import Parametrization
from depthnet.sweep import analysis
from depthnet.sweep.transfer import Job, JobResult, TransferSettings, jobs

GRID = np.arange(-13.0, -3.0)


def test_optimum_of_a_parabola_is_exact():
    for minimum in (-8.0, -7.7, -8.4):
        found = analysis.optimum(GRID, 2 + 0.1 * (GRID - minimum) ** 2)
        assert found.log2_lr == pytest.approx(minimum)
        assert not found.at_edge


def test_optimum_beside_a_cliff_uses_the_three_lowest_points():
    losses = 2 + 0.1 * (GRID + 7.2) ** 2
    losses[GRID > -7.5] = np.inf  # the lowest finite points are -8, -9, -10
    found = analysis.optimum(GRID, losses)
    assert found.log2_lr == -7.5  # kept within half a step of the lowest
    assert not found.at_edge


@pytest.mark.parametrize(
    ("losses", "position", "at_edge"),
    [
        (GRID, -13.0, True),
        (-GRID, -4.0, True),
        (np.where(GRID == -9, 1.0, np.inf), -9.0, False),
        (-((GRID + 8.0) ** 2), -13.0, True),
    ],
)
def test_optimum_without_a_parabola_is_the_lowest_point(losses, position, at_edge):
    assert analysis.optimum(GRID, losses) == analysis.Optimum(position, at_edge)


def test_optimum_when_everything_diverged():
    assert math.isnan(analysis.optimum(GRID, np.full(10, np.inf)).log2_lr)


def test_slices_and_divergence():
    first, second, last = analysis.slices(10)
    assert [(s.start, s.end) for s in (first, second, last)] == [(0, 5), (5, 10), (8, 10)]
    losses = np.ones((10, 4), np.float32)
    losses[6, 1] = np.nan
    losses[2, 2] = np.inf  # came back, but diverged on the way
    losses[:, 3] = np.arange(10)
    assert analysis.slice_losses(losses, first).tolist() == [1, 1, math.inf, 2]
    assert analysis.slice_losses(losses, last).tolist() == [1, math.inf, math.inf, 8.5]


def study(optimum_at, seeds=2, floor=2.0, noise=0.0, curvature=0.02):
    """Results whose curves have their minima at optimum_at[depth], the seeds `noise` apart."""
    settings = TransferSettings(
        depths=tuple(optimum_at), parametrizations=("ode",), seeds=seeds, steps=10
    )
    results = []
    for job in jobs(settings):
        best = optimum_at[job.depth] + noise * (job.seed - 0.5) * math.log2(job.depth)
        losses = floor + curvature * (job.log2_lr - best) ** 2
        results.append(JobResult(job, np.tile(losses, (10, 1)).astype(np.float32), {}))
    return results, settings


def judged(*arguments, **options):
    results, settings = study(*arguments, **options)
    return analysis.verdict(analysis.curves(results, settings, analysis.slices(10)[-1]), settings)


def test_verdicts():
    still = judged({8: -8.0, 16: -8.0, 32: -8.0})
    assert still.transfers is True
    assert (still.shift, still.drift) == pytest.approx((0, 0), abs=1e-4)
    moving = judged({8: -8.0, 16: -8.5, 32: -9.0}, curvature=0.001)
    assert moving.transfers is False
    assert moving.shift == pytest.approx(-1, abs=1e-3)
    assert moving.drift == pytest.approx(-0.5, abs=1e-3)
    assert moving.worst_regret < analysis.REGRET_LIMIT
    costly = judged({8: -7.55, 16: -7.5, 32: -7.45}, floor=0.01, curvature=1.0)  # two sides of -7.5
    assert abs(costly.drift) < analysis.DRIFT_LIMIT
    assert costly.transfers is False
    assert costly.worst_regret > analysis.REGRET_LIMIT
    noisy = judged({8: -8.0, 16: -8.2, 32: -8.4}, noise=0.4)
    assert noisy.transfers is None
    assert noisy.words.startswith("undecided")
    assert judged({8: -8.0}).transfers is None


def test_an_optimum_at_the_edge_of_the_grid_decides_nothing():
    at_edge = judged({8: -20.0, 16: -20.0})
    assert at_edge.transfers is None
    assert "at depth 8, 16 the lowest point is at the edge of the grid" in at_edge.words


def test_lost_depths_give_no_numbers():
    for lost_depth in (8, 16):
        results, settings = study({8: -8.0, 16: -8.0})
        for result in results:
            if result.job.depth == lost_depth:
                result.losses[:] = np.nan
        found = analysis.curves(results, settings, analysis.slices(10)[-1])
        verdict = analysis.verdict(found, settings)
        assert verdict.transfers is False
        assert verdict.worst_regret == math.inf
        assert "nan" not in verdict.words
        assert f"every learning rate diverges at depth {lost_depth}" in verdict.words


def test_the_shift_is_to_the_depth_farthest_from_the_base():
    results, settings = study({8: -8.0, 16: -8.0, 32: -9.0})
    settings = TransferSettings(
        depths=(8, 16, 32), base_depth=32, parametrizations=("ode",), seeds=2, steps=10
    )
    found = analysis.curves(results, settings, analysis.slices(10)[-1])
    assert analysis.verdict(found, settings).shift == pytest.approx(1.0, abs=1e-3)


def test_regret_of_a_diverging_learning_rate_is_infinite():
    results, settings = study({8: -5.0, 16: -8.0})
    deep = results[1]
    deep.losses[:, deep.job.log2_lr >= -6] = np.nan
    found = analysis.curves(results, settings, analysis.slices(10)[-1])
    assert found[1].regret == math.inf
    verdict = analysis.verdict(found, settings)
    assert verdict.transfers is False
    assert "diverges at depth 16" in verdict.words
    results[1].losses[:] = np.nan
    found = analysis.curves(results, settings, analysis.slices(10)[-1])
    assert found[1].best == math.inf
    assert "every learning rate diverges at depth 16" in analysis.verdict(found, settings).words


def test_rows_are_one_a_run_and_slice():
    results, settings = study({8: -8.0, 16: -8.0})
    rows = analysis.rows(results, settings)
    assert len(rows) == 2 * 20 * 3
    assert list(rows[0]) == [
        *("parametrization", "alpha", "gamma", "activation", "width", "depth", "log2_lr", "seed"),
        *("step_from", "step_to", "loss", "diverged"),
    ]
    results[0].losses[:, 0] = np.nan
    row = analysis.rows(results, settings)[0]
    assert (row["loss"], row["diverged"]) == (math.inf, 1)


def test_job_members_cross_learning_rates_and_seeds():
    settings = TransferSettings(
        depths=(8,), parametrizations=("0.75,0.25",), log2_lr=(-3, -2), per_octave=2
    )
    (job,) = jobs(settings)
    assert job.log2_lr.tolist() == [-3, -2.5, -2] * 2
    assert job.seed.tolist() == [0, 0, 0, 1, 1, 1]
    assert job.parametrization == Parametrization(0.75, 0.25, name="0.75,0.25")
    assert isinstance(job, Job)
