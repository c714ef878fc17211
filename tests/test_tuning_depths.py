"""The best learning rate of a deep network, extrapolated from shallow ones; when that cannot be done."""

import json
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest

import depthnet
from depthnet import tuning
from depthnet.data import load
from depthnet.sweep.optima import EXPONENT, EXPONENTS, bowl, drawn_curves, extrapolated
from depthnet.tuning import TuningWarning

pytestmark = pytest.mark.filterwarnings("ignore::depthnet.tuning.TuningWarning")

DIGITS = load("digits")
SHALLOW, TARGET = (4, 8, 16), 256
GRID = np.arange(-12.0, -3.0)
resnet = partial(depthnet.ResNet, 64, out_features=10, base_width=32, base_depth=4)
small = partial(
    depthnet.tune, width=16, depth=4, log2_lr=(-10, -4), steps=20, depths=SHALLOW, target_depth=64
)


def rise(u):
    """Of log loss, u octaves from the optimum, as networks of depth 8 on text have it."""
    return 0.142 * (np.exp(0.9 * u) - 1 - 0.9 * u) / 0.81


@pytest.fixture
def drifting(monkeypatch):
    """Sets what optimum the networks of each depth have, in place of training them."""

    def of(optimum):
        def train(model_fn, data, width, depth, members, steps, batch, tick):
            tick(steps * len(members))
            log2_lr, _, seeds = (np.array(each) for each in zip(*members, strict=True))
            last = 2.3 * np.exp(rise(log2_lr - optimum(depth)) + 0.002 * seeds)
            first = np.full((steps // 2, len(members)), 5.0)
            return np.concatenate([first, np.tile(last, (steps - len(first), 1))])

        monkeypatch.setattr(tuning, "_train_population", train)

    return of


@pytest.mark.parametrize("drift", [0.0, -1.5, 0.8])
@pytest.mark.parametrize("p", EXPONENTS)
def test_a_drift_of_known_form_is_extrapolated(p, drift):
    x = -7.2 + drift * np.array([*SHALLOW, TARGET], float) ** -p
    value, low, high = extrapolated(SHALLOW, np.tile(x[:3, None], 5), TARGET)
    assert low - 1e-9 <= x[3] <= high + 1e-9
    if p == EXPONENT or drift == 0:
        assert value == pytest.approx(x[3], abs=1e-9)
    if drift == 0:
        assert high - low < 1e-9


def test_an_optimum_that_is_not_known_leaves_nothing_to_extrapolate():
    optima = np.full((3, 5), -8.0)
    optima[1] = math.nan
    assert all(map(math.isnan, extrapolated(SHALLOW, optima, TARGET)))


@pytest.mark.parametrize("p", EXPONENTS)
def test_intervals_hold_the_truth_as_often_as_they_say(p):
    # The optimum of each seed and depth has noise of its own, and losses have some besides.
    rng, studies, held = np.random.default_rng(0), 100, 0
    for _ in range(studies):
        limit, drift = rng.uniform(-8, -7), rng.normal(0, 1)
        common, level = rng.normal(0, 0.1, (3, 1)), rng.normal(0, 0.02, (3, 1))
        optima = []
        for depth in SHALLOW:
            own = limit + drift * depth**-p + common + rng.normal(0, 0.05, (3, 1))
            losses = np.exp(rise(GRID - own) + level + rng.normal(0, 0.003, (3, len(GRID))))
            optima.append(bowl(GRID, drawn_curves(losses[..., None])).optimum)
        _, low, high = extrapolated(SHALLOW, np.stack(optima), TARGET)
        held += low <= limit + drift * TARGET**-p <= high
    assert held / studies > 0.95 - 2 * math.sqrt(0.95 * 0.05 / studies)


@pytest.mark.parametrize("drift", [-1.5, 0.0])
def test_tune_extrapolates_and_shows_plain_transfer_beside_it(drifting, drift):
    drifting(lambda depth: -7.2 + drift * depth**-0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = small(resnet, DIGITS, log2_lr=(-12, -4))
    assert found.warnings == []
    assert list(found.curves) == [4, 8, 16]  # depth 16 by `depths`, not as 4 * depth
    told = found.extrapolation
    assert (told.depths, told.target_depth) == (SHALLOW, 64)
    # Bowls on a grid of whole octaves are 0.02 wrong at the most, and an extrapolation some times that.
    assert found.extrapolated.value == pytest.approx(-7.2 + drift / 8, abs=0.05)
    assert found.extrapolated.low <= -7.2 + drift / 8 <= found.extrapolated.high
    assert (told.base, told.deepest) == (found.optimum, found.curves[16].optimum)
    assert found.settings["lr"] == 2**found.optimum.value
    *_, base, deepest, extrapolation = str(found).splitlines()
    assert re.fullmatch(rf"  as at depth 4 +{re.escape(str(told.base))}", base)
    assert re.fullmatch(rf"  as at depth 16 +{re.escape(str(told.deepest))}", deepest)
    ending = rf"\(4, 8, 16\) +{re.escape(str(found.extrapolated))}"
    assert re.fullmatch(rf"  extrapolated from {ending}", extrapolation)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))["extrapolation"]
    assert record["depths"] == [4, 8, 16]
    assert record["extrapolated"]["value"] == found.extrapolated.value


def test_the_fit_sees_the_shallow_depths_only(drifting):
    drifting(lambda depth: -6.0 if depth in (2, 64) else -8.0)
    found = small(resnet, DIGITS, depth=2, check_depths=(64, 8))
    assert list(found.curves) == [2, 64, 8, 4, 16]
    assert found.extrapolated.value == pytest.approx(-8.0, abs=0.05)


def test_networks_are_trained_for_it():
    found = small(resnet, DIGITS, depth=2, depths=(8, 2, 4), check_depths=())
    assert list(found.curves) == [2, 4, 8]
    assert found.extrapolation.depths == (2, 4, 8)
    assert found.extrapolated.low <= found.extrapolated.value <= found.extrapolated.high
    assert small(resnet, DIGITS, steps=5, depths=None, target_depth=None).extrapolated is None


def test_the_picture_shows_the_extrapolation(drifting):
    pytest.importorskip("matplotlib")
    drifting(lambda depth: -8.0)
    (axis,) = small(resnet, DIGITS).plot().axes
    _, labels = axis.get_legend_handles_labels()
    assert labels == ["4", "8", "16", "64, extrapolated"]


def test_it_says_so_where_the_grid_does_not_hold_an_optimum(drifting):
    drifting(lambda depth: -12.0 if depth == 8 else -8.0)
    with pytest.warns(TuningWarning, match=r"^nothing is extrapolated to depth 64: .* depth 8$"):
        found = small(resnet, DIGITS)
    assert math.isnan(found.extrapolated.value)
    assert found.extrapolation.deepest == found.curves[16].optimum
    json.dumps(found.to_dict(), allow_nan=False)
    pytest.importorskip("matplotlib")
    _, labels = found.plot().axes[0].get_legend_handles_labels()
    assert labels == ["4", "8", "16"]


def test_it_says_so_where_the_interval_is_wide(drifting):
    # p = 1/4 and p = 1 differ by more than the limit.
    drifting(lambda depth: {4: -11.0, 8: -8.0, 16: -5.0}[depth])
    with pytest.warns(
        TuningWarning, match=r"depth 64 is not known: .* octaves wide, 2 are the limit"
    ):
        small(resnet, DIGITS, log2_lr=(-14, -2))


def test_it_says_so_where_the_optimum_need_not_converge():
    with pytest.warns(TuningWarning, match="presumes .* which that of standard .* does not"):
        small(partial(resnet, parametrization="standard"), DIGITS, log2_lr=(-14, -4))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("depths", {"depths": (4, 8)}),
        ("depths", {"depths": (4, 8, 8)}),
        ("depths", {"depths": (0, 4, 8)}),
        ("depths", {"depths": (4, 8, 16.5)}),
        ("depths", {"depths": 16}),
        ("depths", {"depths": None}),
        ("target_depth", {"target_depth": None}),
        ("target_depth", {"target_depth": 16}),
        ("target_depth", {"target_depth": 64.5}),
    ],
)
def test_bad_arguments_are_named(argument, changes):
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b") as caught:
        small(resnet, DIGITS, **changes)
    assert "\n" not in str(caught.value)
