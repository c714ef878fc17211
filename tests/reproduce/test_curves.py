"""Studies of curves: what is trained, how it is judged, and what the command makes of it."""

import csv
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from trials import rise

import depthnet
from depthnet import cli, data
from depthnet.reproduce import blocks
from depthnet.reproduce.blocks import Fig4, Fig6, Fig7, Fig21, tilt
from depthnet.reproduce.curves import Curves, Variant, less, moves, stays
from depthnet.reproduce.learning_rates import Fig10, Fig11, Fig13
from depthnet.reproduce.registry import STUDIES
from depthnet.reproduce.study import run, state
from depthnet.sweep.analysis import CONTRAST_LIMIT
from depthnet.training.schedules import schedule

NAMES = (
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "fig10",
    "fig11",
    "fig12",
    "fig13",
    "fig21",
)
NAMES += ("fig10-hidden", "fig10-frozen", "line")
TINY = {"width": 8, "depths": (2, 4), "steps": 10, "batch": 4, "seeds": 2}


def no_tick(part):
    pass


def test_a_member_is_a_network_trained_alone():
    """With blocks of two layers, a norm, a multiplier and learning rates: as depthnet.ResNet has them."""
    rates = {"sweep": "hidden", "outer_log2_lr": -7.0, "schedule": "linear", "warmup": 3}
    study = blocks.Line(**{**TINY, "depths": (4, 8)}, base_depth=2, log2_a=(-1.0, 0.5), **rates)
    variant = study.variants()[1]  # (3/4, 1/4)
    found = study._train(variant, 8, no_tick)["losses"]
    assert found.shape == (10, 2, 2, len(variant.log2_lr))
    source = data.load("text")
    model = depthnet.ResNet(
        *(source.in_features, 8, 4, source.out_features),
        active_features=8,
        activation="abs",
        parametrization=(0.75, 0.25),
        base_width=8,
        base_depth=2,
        block_multiplier=2**0.5,
        block_depth=2,
        norm="layer",
        generator=torch.Generator().manual_seed(1),
    )
    groups = model.param_groups("adamw")
    for group in groups:
        group["lr"] = 2.0 ** (variant.log2_lr[3] if group["name"] == "hidden" else -7)
    optimizer = depthnet.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = schedule(optimizer, "linear", 10, 3)
    alone = []
    for step in range(10):
        x, y = source.batch(1, step, 4)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        alone.append(loss.item())
    # Products of other shapes round otherwise, and Adam divides by small gradients' sizes.
    np.testing.assert_allclose(found[:, 1, 1, 3], alone, rtol=1e-4)


def test_memory_divides_populations_without_changing_them():
    whole, parts = (
        Fig10(**TINY, memory=memory)._train(Fig10().variants()[0], 4, no_tick)["losses"]
        for memory in ("2GiB", "1MB")
    )
    np.testing.assert_allclose(whole, parts, rtol=1e-4)


@dataclass(frozen=True)
class Two(Curves):
    name: ClassVar[str] = "two"
    title: ClassVar[str] = "Two variants"
    claim: ClassVar[str] = "?"

    log2_a: tuple[float, ...] = (-1.0, 0.0, 1.0)
    depths: tuple[int, ...] = (8, 16, 32)

    def variants(self):
        return [Variant(name, name, self.rates(), self.log2_a) for name in ("a", "b")]

    def judge(self, found):
        return []


def bowls(study, variant, optima, least, noise=0.05, seed=0, bend=0.14):
    """Made-up losses of a variant: at each depth a bowl with its minimum at `optima` and the multiplier
    2^0; the logs of steps of a seed share noise."""
    rng = np.random.default_rng(seed)
    shared = noise * rng.normal(size=(study.steps, study.seeds, 1, 1))
    lr, a = np.array(variant.log2_lr), np.array(variant.log2_a)[:, None]
    return {
        f"{variant.name}-L{depth}": {
            "losses": (low * np.exp(bend * rise(lr - at) + 0.1 * a**2 + shared)).astype(np.float32)
        }
        for depth, at, low in zip(study.depths, optima, least, strict=True)
    }


def measured(study, name, *made, **options):
    variant = next(each for each in study.variants() if each.name == name)
    return study.measure(variant, bowls(study, variant, *made, **options), study.parts()[-1])


def test_optima_are_those_of_the_losses():
    study = Two()
    found = measured(study, "a", (-7.2, -8.0, -8.8), (3.0, 2.9, 2.8))
    np.testing.assert_allclose(
        [c.optimum.log2_lr for c in found.curves], [-7.2, -8, -8.8], atol=1e-4
    )
    assert [found.settings.log2_block_multiplier[found.lowest(i)[1]] for i in range(3)] == [0, 0, 0]
    assert found.transfer.drift.value == pytest.approx(-0.8, abs=1e-4)
    assert not any(found.at_edge(index) for index in range(3))
    assert found.best.shape == (3, 1001)
    np.testing.assert_allclose(
        found.best[:, 0] / found.best[0, 0], [1, 2.9 / 3, 2.8 / 3], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("optima", "stay", "move"),
    [
        ((-8.0, -8.1, -8.0), True, False),
        ((-7.0, -8.0, -9.0), False, True),
        ((-5.0, -5.0, -5.0), None, None),  # at the edge: it may have moved beyond
        ((-7.0, -6.0, -5.0), False, True),  # at the edge in the end, having moved already
    ],
)
def test_drift(optima, stay, move):
    found = measured(Two(), "a", optima, (3.0, 3.0, 3.0))
    assert stays("claim", found).holds is stay
    assert moves("claim", found).holds is move
    assert ("at the edge" in stays("claim", found).words) is (-5.0 in optima)


@pytest.mark.parametrize("optima", [(-8.0, -8.0, -8.0), (-7.0, -8.0, -9.0)])
def test_where_every_learning_rate_is_a_good_one_nothing_is_said_of_it(optima):
    """Of losses at the best one something still is: they do not depend on which it is."""
    study = Two()
    steep, flat = (
        measured(study, "a", optima, (3.0, 2.9, 2.8), bend=bend) for bend in (0.14, 0.02)
    )
    assert steep.transfer.contrast > CONTRAST_LIMIT > flat.transfer.contrast
    for judge in (stays, moves):
        assert judge("claim", steep).holds is not None
        verdict = judge("claim", flat)
        assert verdict.holds is None
        assert verdict.words.startswith("no verdict, as the contrast is ")
    assert less("claim", (flat, 2), (flat, 0)).holds is True


def test_a_depth_where_all_diverge_does_not_transfer():
    study = Two()
    variant = study.variants()[0]
    results = bowls(study, variant, (-8.0,) * 3, (3.0,) * 3)
    results["a-L32"]["losses"][study.steps // 4 :] = np.nan
    found = study.measure(variant, results, study.parts()[-1])
    assert found.best[2, 0] == math.inf
    verdict = stays("claim", found)
    assert verdict.holds is False
    assert "all diverge at depth 32" in verdict.words
    assert less("claim", (found, 0), (found, 2)).holds is True
    assert less("claim", (found, 2), (found, 0)).holds is False
    early = study.measure(variant, results, study.parts()[0])
    assert np.isfinite(early.best).all()  # the part ends before that
    study.figure({"a": [early, found], "b": [early, found]})


def test_losses_are_compared_draw_by_draw():
    """Noise that both have is much more than their difference of 1 %, and does not count."""
    study = Two()
    a = measured(study, "a", (-8.0,) * 3, (2.97,) * 3, 1.0)
    b = measured(study, "b", (-8.0,) * 3, (3.0,) * 3, 1.0)
    assert less("claim", (a, 0), (b, 0)).holds is True
    assert less("claim", (b, 0), (a, 0)).holds is False
    assert less("claim", (b, 0), (a, 0), limit=0.1).holds is True
    other = measured(study, "b", (-8.0,) * 3, (3.0,) * 3, 1.0, 1)
    assert less("claim", (a, 0), (other, 0)).holds is None


def test_a_loser_at_the_edge_is_not_judged():
    study = Two()
    inside = measured(study, "a", (-8.0,) * 3, (2.9,) * 3)
    edge = measured(study, "b", (-5.0,) * 3, (3.0,) * 3)
    verdict = less("claim", (inside, 0), (edge, 0))
    assert verdict.holds is None
    assert "at the edge" in verdict.words
    best = measured(study, "b", (-5.0,) * 3, (2.0,) * 3)
    assert less("claim", (inside, 0), (best, 0)).holds is False  # a winner would only win more


def test_rising_is_not_falling():
    study = Fig11(depths=(8, 16, 32))
    own = measured(study, "depth_mup", (-8.0,) * 3, (2.0,) * 3)
    for optima, holds in (((-9.0, -8.0, -7.0), True), ((-7.0, -8.0, -9.0), False)):
        ode = measured(study, "ode", optima, (3.0,) * 3)
        verdicts = study.judge({"ode": [ode], "depth_mup": [own]})
        assert [verdict.holds for verdict in verdicts] == [holds, True]


@pytest.mark.parametrize(("last", "holds"), [(-2.9, True), (-4.0, False), (-6.0, None)])
def test_multipliers_converge(last, holds):
    """Along the multiplier: large steps at first, then a small one, or not."""
    study = Fig13(depths=(8, 16, 32))
    a, lr = np.array(study.log2_a)[:, None], np.zeros(1)
    results = {
        f"depth_mup-L{depth}": {
            "losses": np.ones((study.steps, study.seeds, 1, 1), np.float32)
            * (3 * np.exp(np.minimum(rise(a - at), 9) + lr))
        }
        for depth, at in zip(study.depths, (-1.0, -3.0, last), strict=True)
    }
    found = study.measure(study.variants()[0], results, study.parts()[-1])
    np.testing.assert_allclose([c.optimum.log2_lr for c in found.curves], [-1, -3, last], atol=1e-3)
    (verdict,) = study.judge({"depth_mup": [found]})
    assert verdict.holds is holds


@pytest.mark.parametrize("slope", [-2.0, -1.0])
def test_tilt_is_that_of_the_valley(slope):
    """A valley log2 a = slope log2 lr that ends at the top and bottom of the map."""
    x, y = np.arange(-8.0, 9), np.arange(-3.0, 4)
    planes = (x[:, None] - y / slope) ** 2
    np.testing.assert_allclose(tilt(planes, x, y), 1 / slope, atol=0.02)
    # Adding to all losses, or multiplying them, changes nothing; what diverged is not looked at.
    planes = np.where(planes > 20, np.inf, 5 + 3 * planes)
    np.testing.assert_allclose(tilt(np.stack([planes] * 2), x, y), [1 / slope] * 2, atol=0.02)


@pytest.mark.parametrize(("deep", "holds"), [(-1.0, True), (-4.0, False)])
def test_slopes_across_depth(deep, holds):
    study = Fig7(depths=(4, 64))
    lr, a = np.array(study.rates()) + 8, np.array(study.log2_a)[:, None] + 3
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.normal(size=(study.steps, study.seeds, a.size, lr.size))
    results = {
        f"two-L{depth}": {"losses": (3 + (lr - a / slope) ** 2 + noise).astype(np.float32)}
        for depth, slope in ((4, -2.0), (64, deep))
    }
    found = study.measure(study.variants()[0], results, study.parts()[-1])
    (verdict,) = study.judge({"two": [found]})
    assert verdict.holds is holds
    (slope,) = re.findall(r"^slopes (-\S+) at depth 4,", verdict.words)
    assert float(slope) == pytest.approx(-2, abs=0.05)


def test_parts_of_training():
    parts = Fig10(steps=200).parts()
    assert [(part.start, part.end) for part in parts] == [(0, 40), (160, 200)]
    paper = Fig10(**{**Fig10.full(), "data": "text"}).parts()
    assert [(part.start, part.end) for part in paper] == [(0, 1000), (37_000, 38_000)]
    assert [part.end for part in Fig21(steps=200).parts()] == [50, 100, 150, 200]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_end_to_end(name, tmp_path):
    kind = STUDIES[name].load()
    study = kind(**TINY)
    findings = run(study, tmp_path / name)
    assert len(findings.lines) == len(study.variants()) * len(study.parts()) * 2
    assert findings.verdicts
    assert (tmp_path / name / f"{name}.png").stat().st_size > 10_000
    with open(tmp_path / name / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = sum(len(v.log2_lr) * len(v.log2_a) for v in study.variants())
    assert len(rows) == points * len(study.parts()) * 2 * 2  # depths, seeds
    assert state(kind, tmp_path / name).startswith("done ")


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_settings(name):
    """All but where the data is; they make the grids that they should."""
    kind = STUDIES[name].load()
    full = kind.full()
    assert full.pop("data") == "cifar10"
    study = kind(**full)
    assert (study.width, study.seeds, study.steps, study.batch) == (256, 5, 39_100, 64)
    assert study.lr_step == (0.5 if name == "fig7" else 1.0)
    assert len(study.jobs()) == len(study.variants()) * len(study.depths)
    assert set(full) <= set(asdict(study))


def test_full_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "fig10", "--full"]) == 2
    assert "data_dir: cifar10 is read from a folder" in capsys.readouterr().err
    assert cli.main(["reproduce", "family", "--full"]) == 2
    assert "full: family has no larger run" in capsys.readouterr().err
    changes = {**TINY, "data": "text", "depths": (8,)}
    words = []
    for key, value in changes.items():
        words += ["--set", key, *map(str, value if isinstance(value, tuple) else (value,))]
    words += ["--set", "early", "0", "0.5", "--set", "late", "0.5", "1"]
    assert cli.main(["reproduce", "fig13", "--full", *words]) == 0
    settings = json.loads((tmp_path / "runs" / "fig13-full" / "summary.json").read_text())[
        "settings"
    ]
    assert settings["log2_a"] == list(range(-6, 4))
    assert settings["steps"] == 10


def test_studies_that_share_their_jobs(tmp_path):
    run(Fig6(**TINY), tmp_path / "fig6")
    jobs = tmp_path / Fig6.shared / "jobs"
    before = {path.name: path.stat().st_mtime_ns for path in jobs.iterdir()}
    assert sorted(before) == ["abs-L2.npz", "abs-L4.npz", "relu-L2.npz", "relu-L4.npz"]
    assert state(Fig21, tmp_path / "fig21") == "2 of 2 jobs done"
    run(Fig21(**TINY), tmp_path / "fig21")
    assert {path.name: path.stat().st_mtime_ns for path in jobs.iterdir()} == before
    assert not (tmp_path / "fig21" / "jobs").exists()
    assert (tmp_path / "fig21" / "fig21.png").exists()
    other = Fig21(**{**TINY, "seeds": 1})
    with pytest.raises(ValueError, match="holds a study with other settings"):
        run(other, tmp_path / "fig21")
    run(other, tmp_path / "fig21-full")
    assert (tmp_path / f"{Fig6.shared}-full" / "jobs").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Fig10, {"log2_lr": (-8.0,)}, "log2_lr must be the least and the greatest"),
        (Fig10, {"log2_lr": (-8.0, -9.0)}, "log2_lr must have at least one value"),
        (Fig10, {"lr_step": 0.0}, "lr_step must be positive"),
        (Fig10, {"depths": (8, 4)}, "depths must be ascending"),
        (Fig10, {"depths": ()}, "depths must be ascending"),
        (Fig10, {"early": (0.5, 0.5)}, "early must be two ascending numbers"),
        (Fig10, {"early": (0.0, 0.001)}, "steps must be more: early has none, got 200"),
        (Fig10, {"device": "tpu9"}, "device: 'tpu9' cannot be used"),
        (Fig4, {"depths": (3, 4)}, r"whole numbers of blocks of 2 layers, got \[3\]"),
        (Fig6, {"log2_a": (0.0,)}, "log2_a must be that of relu and that of"),
    ],
)
def test_bad_settings(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)
