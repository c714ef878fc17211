import math

import numpy as np
import pytest

from depthnet.data import load
from depthnet.diagnostics.fits import Interval
from depthnet.diagnostics.phase_diagram import (
    QUANTITIES,
    REGIONS,
    UNDECIDED,
    PhaseSettings,
    decide,
    exponent,
    measure,
    phase_diagram,
    region,
)
from depthnet.reproduce.phase import Phase
from depthnet.scaling import classify

DEPTHS = np.array([16, 64, 256])
# Cells 1/2 apart, so that 0 is told from exponents of 1/2 at 1/4.  In networks this narrow, the factor by
# which changes grow from the lesser depth to the greater varies by 12 % from seed to seed, exponents by
# 0.12 / log(8) = 0.06, and the interval over 6 seeds is 2.57 / sqrt(6) times that, +-0.06.
SMALL = {
    "alphas": (0.0, 1.5),
    "gammas": (-0.5, 0.5),
    "spacing": 0.5,
    "depths": (16, 128),
    "width": 32,
    "seeds": 6,
    "steps": 3,
    "batch": 32,
}


def sizes(power, spread=0.0, seeds=8):
    """(seeds, depths), proportional to depth^power with normal noise of the logarithm."""
    noise = np.random.default_rng(0).normal(size=(seeds, len(DEPTHS)))
    return DEPTHS**power * np.exp(spread * noise)


def exponents(alpha, gamma, spread=0.0):
    return {
        name: exponent(DEPTHS, sizes(classify(alpha, gamma).exponents[name], spread))
        for name in QUANTITIES
    }


@pytest.mark.parametrize("spread", [0.0, 0.02])
@pytest.mark.parametrize(
    ("alpha", "gamma", "name"),
    [
        (0.5, 0.375, "unstable in training"),
        (1.25, -0.375, "unstable in training"),
        (0.5, 0.625, "trivial"),
        (1.125, 0.0, "trivial"),
        (1.125, -0.125, "unfaithful"),
        (1.0, 0.0, "redundant"),
        (0.625, 0.375, "redundant"),
        (0.5, 0.5, "diverse"),
    ],
)
def test_known_powers_are_put_where_the_claims_have_them(alpha, gamma, name, spread):
    assert decide(exponents(alpha, gamma, spread), spacing=0.125) == region(alpha, gamma) == name


def test_a_stream_that_grows_or_overflows_is_unstable_at_initialization():
    found = exponents(0.5, 0.5)
    for stream in (sizes(0.125), np.exp(0.2 * DEPTHS**0.25) + sizes(0) * 0):
        assert decide({**found, "stream": exponent(DEPTHS, stream)}, 0.125) == REGIONS[0]
    for bad in (math.inf, math.nan):
        stream = sizes(0)
        stream[3, -1] = bad  # one seed, the greatest depth
        assert exponent(DEPTHS, stream).low == math.inf
        assert decide({**found, "stream": exponent(DEPTHS, stream)}, 0.125) == REGIONS[0]
    assert region(0.375, 0.625) == REGIONS[0]


def test_a_change_that_overflows_is_unstable_in_training_and_one_of_zero_is_trivial():
    found = exponents(0.5, 0.5)
    diverged = exponent(DEPTHS, np.full((2, 3), math.nan))
    assert decide({**found, "stream_change": diverged}, 0.125) == "unstable in training"
    assert (
        decide({**found, "output_change": exponent(DEPTHS, np.zeros((2, 3)))}, 0.125) == "trivial"
    )


def test_an_interval_across_a_threshold_is_undecided_unless_an_earlier_size_decides():
    found = exponents(0.5, 0.5)
    for name, threshold in [
        ("stream", 1 / 16),
        ("stream_change", 1 / 16),
        ("output_change", -1 / 16),
        ("preactivation_change", 1 / 16),
        ("quadratic_variation", -1 / 8),
    ]:
        across = Interval(threshold, threshold - 0.01, threshold + 0.01)
        assert decide({**found, name: across}, 0.125) == UNDECIDED
        nothing = Interval(threshold, -math.inf, math.inf)  # of one seed
        assert decide({**found, name: nothing}, 0.125) == UNDECIDED
        earlier = {**exponents(0.5, 0.375), "stream": found["stream"]}
        if name not in ("stream", "stream_change"):
            assert decide({**earlier, name: across}, 0.125) == "unstable in training"


@pytest.fixture(scope="module")
def diagram():
    seen = []
    found = phase_diagram(
        PhaseSettings(**SMALL), progress=lambda depth, part: seen.append((depth, part))
    )
    assert seen == sorted(seen)
    assert {depth for depth, _ in seen} == {16, 128}
    return found


def test_real_networks_are_where_the_claims_have_them(diagram):
    assert {cell.theory for cell in diagram.cells} == set(REGIONS)
    assert diagram.disagreeing == []
    assert diagram.agreeing == len(diagram.cells) == 12
    for cell in diagram.cells:
        assert cell.theory == region(cell.alpha, cell.gamma)


def test_chunks_change_nothing(diagram):
    settings = diagram.settings
    members = settings.members
    assert np.array_equal(np.concatenate(settings.chunks(16)), members)
    stable = np.flatnonzero((members[:, 0] >= 0.5) & (members.sum(1) - members[:, 2] >= 1))
    rows = stable[[0, 5, 9]]
    apart = measure(settings, load("digits"), 16, members[rows])
    for name in QUANTITIES:
        together = diagram.sizes[name][..., 0].reshape(-1)[rows]
        # Members share nothing, so that only the order of sums can differ: rounding to 2^-24 in each of
        # 16 layers of a stream whose changes are 1e-3 of it or more.
        np.testing.assert_allclose(apart[name], together, rtol=16 * 2**-24 / 1e-3, err_msg=name)


def test_chunks_fit_in_memory():
    settings = PhaseSettings()
    for depth in settings.depths:
        chunks = settings.chunks(depth)
        assert sum(map(len, chunks)) == 81 * settings.seeds
        assert max(map(len, chunks)) * depth * settings.width**2 * 16 < 2**30


def findings(sizes):
    """Of the study whose two jobs, one a depth, found these sizes."""
    study = Phase(**SMALL)
    results = {
        job.name: {name: size[..., k].ravel() for name, size in sizes.items()}
        for k, job in enumerate(study.jobs())
    }
    return study.findings(results)


def test_the_study_reports_what_the_diagram_says(diagram):
    found = findings(diagram.sizes)
    for row, cell in zip(found.rows, diagram.cells, strict=True):
        assert (row["alpha"], row["gamma"]) == (cell.alpha, cell.gamma)
        assert (row["theory"], row["measured"]) == (cell.theory, cell.measured)
        for name, interval in cell.exponents.items():
            assert row[name] == interval.value
            assert (row[f"{name}_low"], row[f"{name}_high"]) == (interval.low, interval.high)
    assert found.verdicts[0].holds
    assert found.verdicts[0].words == "agreement 12 of 12"
    assert found.notes == []
    assert found.lines == [
        (name, n, n, n) for name, n in zip(REGIONS, (3, 3, 3, 1, 1, 1), strict=True)
    ]


def test_cells_that_disagree_are_listed(diagram):
    sizes = {**diagram.sizes, "stream": diagram.sizes["stream"].copy()}
    sizes["stream"][1, 2, 0, -1] = math.inf  # at (0.5, 0.5), of one seed
    found = findings(sizes)
    assert found.verdicts[0].holds is False
    assert found.verdicts[0].words == "agreement 11 of 12"
    assert len(found.notes) == 1
    assert found.notes[0].startswith("(0.5, 0.5): diverse in theory, unstable at initialization as")

    sizes = {**diagram.sizes, "output_change": diagram.sizes["output_change"].copy()}
    sizes["output_change"][1, 2, 0, -1] *= 100  # no longer one power of the depth in all seeds
    found = findings(sizes)
    assert found.verdicts[0].holds is None
    assert "undecided as measured" in found.notes[0]
    assert (UNDECIDED, 0, 1, 0) in found.lines
    assert found.figure is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alphas": (1.0, 0.5)}, "alphas must be two numbers, the lower first"),
        ({"gammas": (0.0, 0.3)}, "gammas must be .* whole steps of 0.125 apart"),
        ({"alphas": (0.0, math.nan)}, "alphas must be a finite number"),
        ({"spacing": 0.0}, "spacing must be positive"),
        ({"depths": (64,)}, "depths must be two at least"),
        ({"depths": (64, 16)}, "depths must be .* ascending"),
        ({"seeds": 1}, "seeds must be at least 2"),
        ({"optimizer": "adm"}, "optimizer='adm' is not one of"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        PhaseSettings(**wrong)
