"""Curves of loss against learning rate: slices of training, the noise of means, and bowls."""

import math

import numpy as np
import pytest

from depthnet.sweep import optima
from depthnet.sweep.optima import bowl, drawn_curves

GRID = np.arange(-13.0, -3)
OCTAVES = GRID - GRID[0]


def rise(u, skew):
    """What a bowl's log of the loss is above its least, u octaves away from there, with c2 = 1."""
    return (np.exp(skew * u) - 1 - skew * u) / skew**2 if skew else u * u / 2


def curve(minimum, skew=optima.SKEW, bend=0.1, grid=GRID):
    return 2 * np.exp(bend * rise(grid - minimum, skew))


def fitted(losses, grid=GRID):
    """Of one curve."""
    return bowl(np.asarray(grid, float), np.asarray(losses, float)[None])


# ---- slices ----


def test_slices_and_divergence():
    first, second, last = optima.slices(10)
    assert [(s.start, s.end) for s in (first, second, last)] == [(0, 5), (5, 10), (8, 10)]
    losses = np.ones((10, 4), np.float32)
    losses[6, 1] = np.nan
    losses[2, 2] = np.inf  # came back, but diverged on the way
    losses[:, 3] = np.arange(10)
    assert optima.slice_losses(losses, first).tolist() == [1, 1, math.inf, 2]
    assert optima.slice_losses(losses, last).tolist() == [1, math.inf, math.inf, 8.5]


# ---- bowls ----


@pytest.mark.parametrize("minimum", [-8.0, -7.6, -8.4])
@pytest.mark.parametrize("skew", optima.SKEWS)
def test_bowls_of_every_skew_are_found_exactly(skew, minimum):
    """A bowl in u has the same form from wherever u is counted; here c0 + c1 u + c2 (...) of the first."""
    bend = 0.02  # so flat that five points are within the band, and the skew is fitted, too
    found = fitted(curve(minimum, skew, bend))
    assert found.optimum == pytest.approx(minimum, abs=1e-6)
    assert found.best == pytest.approx(2, rel=1e-9)
    assert not found.at_edge
    for at in (-9.0, -8.2, -7.3):
        expected = 2 * math.exp(bend * rise(at - minimum, skew))
        assert found.loss(at) == pytest.approx(expected, rel=1e-9)


def test_a_bowl_of_few_points_has_the_usual_skew():
    """Three points hold a bowl of one skew only; of another the optimum is where that one has it."""
    assert fitted(curve(-8.2, bend=1.0)).optimum == pytest.approx(-8.2, abs=1e-9)
    other = fitted(curve(-8.2, 0.0, bend=1.0)).optimum
    assert other != pytest.approx(-8.2, abs=0.01)
    assert other == pytest.approx(-8.2, abs=0.2)


@pytest.mark.parametrize("minimum", [-8.8, -8.1, -7.8])
def test_bowls_on_uneven_grids_are_found_exactly(minimum):
    uneven = np.array([-13.0, -11.0, -9.0, -8.0, -7.5, -7.0])
    found = fitted(curve(minimum, bend=0.15, grid=uneven), uneven)
    assert found.optimum == pytest.approx(minimum, abs=1e-9)
    assert found.best == pytest.approx(2, rel=1e-9)


@pytest.mark.parametrize("cliff", [-7.5, -6.5])
def test_beside_a_cliff_the_optimum_is_within_what_did_not_diverge(cliff):
    """The bowl has its minimum at -7.2: beyond the cliff at -7.5, before that at -6.5."""
    losses = np.where(cliff < GRID, np.inf, curve(-7.2))
    found = fitted(losses)
    assert found.optimum == pytest.approx(min(-7.2, math.floor(cliff)), abs=1e-9)
    assert found.best == pytest.approx(2 * np.exp(0.1 * rise(found.optimum + 7.2, optima.SKEW)))
    assert not found.at_edge


@pytest.mark.parametrize(
    ("losses", "optimum", "best", "at_edge"),
    [
        (np.exp(OCTAVES), -13.0, 1.0, True),
        (np.exp(-OCTAVES), -4.0, math.exp(-9), True),
        (np.where(GRID == -9, 1.0, np.inf), -9.0, 1.0, False),
        (np.where(GRID == -9, 1.0, np.nan), -9.0, 1.0, True),  # one point
        (np.select([GRID == -9, GRID == -8], [1.0, 2.0], np.nan), -9.0, 1.0, True),  # two points
        (np.select([GRID == -9, GRID == -8], [2.0, 1.0], np.inf), -8.0, 1.0, False),
        (np.where(GRID < -9, np.nan, curve(-12.0)), -9.0, None, True),  # what is lower is unknown
    ],
)
def test_what_does_not_bend_upwards_is_least_at_its_lowest_point(losses, optimum, best, at_edge):
    found = fitted(losses)
    assert found.optimum == pytest.approx(optimum, abs=1e-9)
    assert found.best == pytest.approx(np.nanmin(losses) if best is None else best)
    assert found.at_edge is at_edge


def test_three_points_make_a_bowl_wherever_they_are():
    losses = np.where((GRID >= -9) & (GRID <= -7), curve(-8.3, bend=1.0), np.nan)
    found = fitted(losses)
    assert found.optimum == pytest.approx(-8.3, abs=1e-9)
    assert not found.at_edge


def test_unknown_points_are_as_if_the_grid_had_none_there():
    losses = np.where(np.isin(GRID, (-10, -8)), np.nan, curve(-8.3, bend=0.03))
    found, without = fitted(losses), fitted(losses[~np.isnan(losses)], GRID[~np.isnan(losses)])
    assert found.optimum == without.optimum == pytest.approx(-8.3, abs=1e-6)
    np.testing.assert_array_equal(found.loss(-11.5), without.loss(-11.5))


def test_where_all_diverged_there_is_no_optimum():
    found = bowl(GRID, np.full((3, 10), np.inf))
    assert np.isnan(found.optimum).all()
    assert np.isinf(found.best).all()
    assert not found.at_edge
    assert np.isinf(found.loss(-8.3)).all()
    assert np.isnan(found.loss(found.optimum)).all()


def test_a_bowl_is_fitted_to_the_band_around_the_lowest_point_and_to_a_neighbor_on_either_side():
    """What is farther may be anything, as long as it is above."""
    losses = curve(-8.3, bend=0.1)
    in_band = losses <= losses.min() * (1 + optima.BAND)
    assert 2 <= in_band.sum() < 8
    far = ~in_band
    far[np.flatnonzero(in_band)[[0, -1]] + [-1, 1]] = in_band.sum() < 3
    disturbed = np.where(far, losses * 7, losses)
    assert fitted(disturbed).optimum == pytest.approx(-8.3, abs=1e-6)


def test_the_loss_is_the_bowls_within_and_a_line_from_point_to_point_elsewhere():
    losses = np.where(GRID > -6, np.inf, curve(-9.2, bend=0.3))
    found = fitted(losses)
    assert found.loss(-9.5) == pytest.approx(2 * math.exp(0.3 * rise(-0.3, optima.SKEW)))
    for at in (-13.0, -7.0, -6.0):  # points of the grid
        assert found.loss(at) == pytest.approx(losses[at == GRID])
    left, right = losses[:2]
    assert found.loss(-12.25) == pytest.approx(left**0.25 * right**0.75)
    assert found.loss(-5.75) == np.inf  # beside what diverged
    assert found.loss(-5.0) == found.loss(-4.5) == found.loss(-4.0) == np.inf
    assert np.isnan(found.loss(-13.01))
    assert np.isnan(found.loss(-3.99))
    assert np.isnan(found.loss(np.nan))


def test_each_curve_has_its_own_optimum_and_its_loss_at_a_place_of_its_own():
    minima = np.array([-8.3, -8.1, -8.6])
    found = bowl(GRID, np.stack([curve(minimum, bend=0.05) for minimum in minima]))
    np.testing.assert_allclose(found.optimum, minima, atol=1e-6)
    np.testing.assert_allclose(found.loss(minima), 2)
    expected = 2 * np.exp(0.05 * rise(-8.0 - minima, optima.SKEW))
    np.testing.assert_allclose(found.loss(-8.0), expected)


# ---- curves drawn ----


def noisy(seeds, steps=30, generator=0, networks=()):
    """Losses (*networks, seeds, 4 learning rates, steps): all have what a seed has in common."""
    rng = np.random.default_rng(generator)
    levels = np.exp(rng.normal(0, 0.02, (seeds, 1, 1)))
    return levels * np.exp(rng.normal(0, 0.01, (*networks, seeds, 4, steps)))


@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 7, 12, 30])
def test_the_first_curve_is_the_mean(seeds, steps):
    losses = noisy(seeds, steps)
    found = drawn_curves(losses, samples=20)
    assert found.shape == (21, 4)
    np.testing.assert_allclose(found[0], losses.mean((0, 2)), rtol=1e-12)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_networks_have_in_common_cancels_in_their_ratios(seeds):
    common = noisy(seeds)[:, :1]
    factors = np.exp(np.arange(8.0)).reshape(2, 1, 4, 1)
    found = drawn_curves(common * factors, samples=50)
    assert found.shape == (51, 2, 4)
    assert np.ptp(found[:, 0, 0]) > 0
    ratios = found / found[:, :1, :1]
    np.testing.assert_allclose(ratios, np.tile(factors.reshape(2, 4), (51, 1, 1)), rtol=1e-9)
    # Also of networks that are not looked at together.
    np.testing.assert_array_equal(drawn_curves((common * factors)[1], 50), found[:, 1])


@pytest.mark.parametrize("seeds", [4, 8])
def test_the_spread_is_students_t_of_the_standard_error(seeds):
    """Quantiles of |t| with seeds - 1 degrees of freedom, from tables."""
    losses, samples = noisy(seeds), 20000
    each = losses.mean(-1)
    error = each.std(0, ddof=1) / math.sqrt(seeds) / each.mean(0)
    found = drawn_curves(losses, samples, seed=1)
    t = np.log(found[1:] / found[0]) / error
    for part, quantile in {4: ((0.5, 0.765), (0.95, 3.182)), 8: ((0.5, 0.711), (0.95, 2.365))}[
        seeds
    ]:
        three_errors = 3 * math.sqrt(part * (1 - part) / samples)
        np.testing.assert_allclose((np.abs(t) < quantile).mean(0), part, atol=three_errors)
    # Without a side: the median is 0.
    np.testing.assert_allclose((t < 0).mean(0), 0.5, atol=3 * 0.5 / math.sqrt(samples))


def test_of_one_seed_blocks_of_steps_take_the_seeds_place():
    """Neighboring steps are alike: within a block they count as one."""
    rng = np.random.default_rng(0)
    blocks = 1 + 0.01 * rng.normal(size=(1, 3, optima.BLOCKS))
    found = drawn_curves(np.repeat(blocks, 6, -1), samples=50)
    as_seeds = drawn_curves(blocks[0].T[:, :, None], samples=50)
    np.testing.assert_allclose(found, as_seeds, rtol=1e-12)


def test_one_step_of_one_seed_has_no_spread():
    np.testing.assert_array_equal(drawn_curves(np.full((1, 2, 1), 3.0), 5), np.full((6, 2), 3.0))


def test_what_diverged_is_infinite_in_every_draw_and_what_is_unknown_is_not_a_number():
    losses = noisy(3)
    clean = drawn_curves(losses[[0, 2], 1:2], samples=20)
    losses[1, 0, 7] = np.inf
    losses[1, 1] = np.nan
    losses[:, 2] = np.nan
    found = drawn_curves(losses, samples=20)
    assert np.isinf(found[:, 0]).all()
    np.testing.assert_allclose(found[0, 1], clean[0])
    assert np.isfinite(found[:, 1]).all()
    assert np.isnan(found[:, 2]).all()
    assert np.isfinite(found[:, 3]).all()


@pytest.mark.parametrize("points", [4, 2])
def test_a_seed_that_is_not_trained_yet_plays_no_part_but_for_what_diverged(points):
    """Else one seed that is known would have no spread, and a curve steps where the second one ends."""
    losses = noisy(2)
    losses[1, :points] = np.nan
    losses[1, 3, 5:] = np.inf
    found, first = drawn_curves(losses, 20), drawn_curves(losses[:1], 20)
    np.testing.assert_array_equal(found[:, :3], first[:, :3])
    assert np.ptp(first, axis=0).min() > 0
    assert np.isinf(found[:, 3]).all()


def test_nothing_known_is_nothing_drawn():
    assert np.isnan(drawn_curves(np.full((2, 3, 4), np.nan), 5)).all()


def test_draws_of_two_seeds_that_differ_much_stay_finite_and_positive():
    losses = np.stack([np.full((2, 4), 0.1), np.full((2, 4), 10.0)])
    found = drawn_curves(losses)
    assert (found > 0).all()
    assert np.isfinite(found).all()
