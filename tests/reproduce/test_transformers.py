"""Figures 14 to 16: what is trained, by whom, what is said of it, and how it is stopped."""

import math
import operator
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from depthnet.cli.studies import run_study
from depthnet.reproduce import transformers
from depthnet.reproduce.study import run
from depthnet.reproduce.transformers import (
    Fig14,
    Fig15,
    Fig16,
    in_processes,
    largest_viable,
    train_one,
)

STUDIES = (Fig14, Fig15, Fig16)
TINY = {
    "width": 8,
    "head_size": 4,
    "context": 8,
    "depths": (1, 2),
    "base_depth": 2,
    "log2_lr": (-9.0, -7.0),
    "multipliers": (-2.0, -1.0),
    "steps": 10,
    "batch": 4,
    "microbatch": 4,
    "early": (0.0, 0.3),
}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> dict:
    """The settings that name a text."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "a.txt"
    path.write_text("".join(f"def f{i % 7}(x):\n    return x + {i}\n\n" for i in range(300)))
    return {"data": str(path), "data_dir": str(folder / "tokens")}


def train(study, variant: int, depth: int, member=(0, -1.0, -8.0)) -> np.ndarray:
    path = study.dataset.path
    return train_one(study, study.variants()[variant], depth, path, member, lambda: None)


def test_parametrizations_are_the_same_at_the_base_depth_only(text, set_threads):
    set_threads(1)
    study = Fig16(**TINY, **text)
    at_base = [train(study, variant, 2) for variant in range(3)]
    np.testing.assert_array_equal(at_base[1], at_base[0])
    np.testing.assert_array_equal(at_base[2], at_base[0])
    elsewhere = [train(study, variant, 4) for variant in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(elsewhere[a], elsewhere[b])


def test_it_learns(text):
    losses = train(Fig16(**{**TINY, "steps": 60}, **text), 0, 2, (0, -1.0, -6.0))
    assert losses[0] == pytest.approx(math.log(128), rel=1e-5)  # output weights start at 0
    assert losses[-6:].mean() < 0.8 * losses[0]


def test_microbatches_sum_to_the_batch(text):
    whole = Fig16(**TINY, **text)
    parts = replace(whole, microbatch=3)  # 3 texts, then 1
    # Sums in another order: Adam turns rounding errors of tiny gradients into updates of size lr.
    np.testing.assert_allclose(train(parts, 0, 2), train(whole, 0, 2), rtol=1e-3)


def test_a_diverging_network_is_left(text, monkeypatch):
    study, calls = Fig16(**TINY, **text), []
    losses = train_one(
        study,
        study.variants()[2],
        2,
        study.dataset.path,
        (0, 60.0, 60.0),
        lambda: calls.append(None),
    )
    lost = np.flatnonzero(~np.isfinite(losses))
    assert len(lost)
    assert np.isnan(losses[lost[0] :]).all()
    assert len(calls) == lost[0]


def test_studies_share_what_they_train(tmp_path, text, monkeypatch):
    trained = []

    def recording(train, members, step_done, waiting):
        trained.append(members)
        losses = [train(member, step_done) for member in members]
        waiting()
        return losses

    monkeypatch.setattr(transformers, "in_processes", recording)
    for kind in STUDIES:
        found = run(kind(**TINY, **text), tmp_path / kind.name)
        assert len(found.lines) == 2 * 2 * len(kind(**TINY, **text).variants())
        assert (tmp_path / kind.name / f"{kind.name}.png").stat().st_size
    # Two depths of one variant, then one depth of three and the base depth of one; nothing for figure 16.
    assert [len(members) for members in trained] == [2, 2, 3, 3, 3, 3]
    assert len(list((tmp_path / "transformers" / "jobs").iterdir())) == 6


# ---- verdicts ----


def results(study, optimum, least, bend=0.3) -> dict:
    """Bowls of loss over log2 lr: the minimum is at optimum(variant, depth, part) and is
    least(variant, depth, part), where part is how much of the training is over; some noise on top."""
    from trials import rise  # not where this file is a script of its own

    rng = np.random.default_rng(0)
    part = (np.arange(study.steps) + 0.5) / study.steps
    found = {}
    for variant in study.variants():
        lr = np.array(variant.log2_lr)
        for depth in study.depths:
            name = variant.parametrization
            best, loss = (np.array([f(name, depth, p) for p in part]) for f in (optimum, least))
            curve = loss[:, None] * np.exp(bend * rise(lr - best[:, None]))
            noise = np.exp(5e-4 * rng.normal(size=curve.shape))
            found[f"{variant.name}-L{depth}"] = {
                "losses": (curve * noise)[:, None, None].astype(np.float32)
            }
    return found


SHAPE = {"depths": (2, 4, 8, 16), "base_depth": 4, "steps": 100, "log2_lr": (-13.0, -5.0)}


def test_verdicts_of_figure_16(text):
    def optimum(name, depth, part):
        slope = {"depth_mup": 0.5 * (part < 0.8), "completep": 0.0, "mup": -0.8}[name]
        return -9 + slope * math.log2(depth / 4)

    study = Fig16(**SHAPE, **text)
    found = study.findings(results(study, optimum, lambda *_: 2.0))
    holds = [verdict.holds for verdict in found.verdicts]
    # In the middle the whole curve moves, and what is viable with it.
    assert holds == [True, True, False, True, True, True, True, True, False]
    assert "+0.50" in found.verdicts[0].words
    assert "-0.80" in found.verdicts[5].words


def test_figure_16_says_nothing_where_every_learning_rate_is_a_good_one(text):
    study = Fig16(**SHAPE, **text)
    moving = results(study, lambda _, depth, __: -10 + math.log2(depth), lambda *_: 2.0, 0.001)
    verdicts = study.findings(moving).verdicts
    assert [verdict.holds for verdict in verdicts] == [None] * 9
    judged = [verdict for verdict in verdicts if "viable" not in verdict.claim]
    assert all(verdict.words.startswith("no verdict, as the contrast") for verdict in judged)


def test_verdicts_of_figure_15(text):
    def least(name, depth, part):
        own = {"depth_mup": 2.0, "completep": 1.9, "mup": 2.1}[name]
        return own + (0.05 if part < 0.5 else -0.05) * math.log2(depth)

    study = Fig15(**SHAPE, **text)
    found = study.findings(results(study, lambda *_: -9.0, least))
    assert all(verdict.holds for verdict in found.verdicts)
    assert len(found.verdicts) == 8
    assert [verdict.claim[:31] for verdict in found.verdicts[-2:]] == [
        "at depth 16 CompleteP is better",
        "at depth 16 CompleteP is better",
    ]
    turned = study.findings(results(study, lambda *_: -9.0, lambda n, d, p: 4 - least(n, d, p)))
    assert not any(verdict.holds for verdict in turned.verdicts[:6])


@pytest.mark.parametrize(("spread", "holds"), [(0.02, True), (0.2, False)])
def test_verdicts_of_figure_14(text, spread, holds):
    study = Fig14(**SHAPE, **text)
    tilt = 1 + spread * np.linspace(0, 1, len(study.multipliers))
    noise = 1e-3 * np.random.default_rng(0).normal(size=(100, 1, 1, 1))
    losses = ((2 + noise) * tilt[:, None]).astype(np.float32)
    found = study.findings({f"multiplier-L{depth}": {"losses": losses} for depth in study.depths})
    assert [verdict.holds for verdict in found.verdicts] == [holds, holds]
    assert f"{100 * spread:.1f} %" in found.verdicts[0].words


def test_the_largest_viable_learning_rate():
    lr = np.arange(5.0)
    level = 1 + transformers.VIABLE
    curves = np.array(
        [
            [3, 2, 1, 1.05, 1.55],  # crosses the level in the last interval
            [3, 2, 1, 1.05, np.inf],  # diverges there
            [1.05, 1.2, 1, 3, 3],  # crosses it twice
            [3, 2, 1.5, 1.2, 1],  # viable to the end
            [np.inf] * 5,
        ]
    )
    found = largest_viable(lr, curves)
    expected = [3 + (level - 1.05) / 0.5, 3, 2 + (level - 1) / 2, 4, np.nan]
    np.testing.assert_allclose(found, expected)


# ---- settings ----


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("width", 30, "width must be a multiple"),
        ("context", 0, "context must be at least 1"),
        ("microbatch", 0, "microbatch must be at least 1"),
        ("middle", (0.6, 0.5), "middle must be two ascending"),
        ("log2_a", (-1.0, 0.0), "log2_a must be one value"),
        ("tuned", math.nan, "tuned"),
        ("depths", (8, 4), "depths must be ascending"),
        ("steps", 5, "early has none"),
    ],
)
def test_bad_settings(key, value, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Fig15(**{key: value})


@pytest.mark.parametrize("kind", STUDIES)
def test_the_papers_settings(kind):
    study = kind(**{**kind.full(), "device": "cpu"})
    parts = [(part.start * 256, part.end * 256) for part in study.parts()]
    assert all(end - start == 32_768 for start, end in parts)
    grid = np.array(study.rates())
    np.testing.assert_allclose(grid - math.log2(1e-4), np.arange(3, 11))


# ---- processes ----


MEMBERS = [(seed, -1.0, -8.0) for seed in range(3)]


def training(study: Fig16):
    """What a process does for each of MEMBERS."""
    return partial(train_one, study, study.variants()[0], 1, study.dataset.path)


@pytest.mark.parametrize("count", [1, 2])
def test_results_do_not_depend_on_the_number_of_processes(text, set_threads, count):
    set_threads(1)
    train = training(Fig16(**TINY, **text))
    alone = [train(member, lambda: None) for member in MEMBERS]
    set_threads(count)
    steps = []
    found = in_processes(train, MEMBERS, lambda: steps.append(None), lambda: None)
    np.testing.assert_array_equal(found, alone)
    assert len(steps) == TINY["steps"] * len(MEMBERS)


def test_a_process_that_dies_is_an_error(set_threads, capfd):
    set_threads(1)
    with pytest.raises(RuntimeError, match="status 1"):
        in_processes(operator.add, MEMBERS, lambda: None, lambda: None)
    assert "can only concatenate" in capfd.readouterr().err
    assert not children(os.getpid())


def test_an_exception_ends_the_processes(text, set_threads):
    set_threads(1)

    def step_done():
        assert children(os.getpid())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_processes(
            training(Fig16(**{**TINY, "steps": 10**6}, **text)), MEMBERS, step_done, lambda: None
        )
    assert not children(os.getpid())


def children(process: int) -> set[int]:
    """Processes that `process` has started and that run, but for multiprocessing's tracker."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        if int(parent) == process and state != "Z" and b"spawn_main" in command:
            found.add(int(path.parent.name))
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)]
)
def test_stopped_by_a_signal(tmp_path, text, number, seconds):
    """Ctrl-C reaches every process of the terminal; no process is left, and finished jobs are kept."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path / "fig16"), text["data"], text["data_dir"]],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        jobs = tmp_path / "transformers" / "jobs"
        wait(lambda: len(list(jobs.glob("*.npz"))) == 1 and children(process.pid), 120)
        workers = children(process.pid)
        time.sleep(seconds)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert errors.strip() == f"stopped; the same command goes on from {tmp_path / 'fig16'}"
    wait(lambda: not any(map(alive, workers)), 60)
    assert [path.name for path in jobs.iterdir()] == ["depth_mup-L1.npz"]


def wait(until, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


if __name__ == "__main__":
    folder, source, tokens = sys.argv[1:]
    slow = {**TINY, "depths": (1, 256), "data": source, "data_dir": tokens}
    sys.exit(run_study(Fig16(**slow), folder))
