"""The commands `depthnet sweep` and `depthnet transfer`: files, words, exit statuses."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from depthnet import cli
from depthnet.cli import sweep as verbs
from depthnet.cli.watch import View
from depthnet.sweep.ledger import Ledger
from depthnet.sweep.study import SweepSettings

SMALL = ["--width", "16", "--steps", "10", "--batch", "8", "--seeds", "2"]
SMALL += ["--log2-lr", "-9", "-6", "--per-octave", "1"]
ONE_JOB = ["transfer", *SMALL, "--depths", "4", "--parametrizations", "ode"]

STUDY = """
data: digits
parametrization: [depth_mup, ode]
depth: [2, 4]
width: 16
log2_lr: {low: -9, high: -6, step: 1}
log2_block_multiplier: [-1, 0, 1]
steps: 10
batch: 8
"""
FEW = ["--depth", "2", "--parametrization", "ode"]  # 24 of the file's 96 trials


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(STUDY)
    return "mine.yaml"


def flat(text):
    return " ".join(text.split())


def test_run_report_and_watch(study, tmp_path, capsys):
    assert cli.main(["sweep", "run", study]) == 0
    out = tmp_path / "runs" / "mine"
    printed = capsys.readouterr().out
    assert "96 trials of 4 networks on digits, kept in sqlite:///runs/mine/study.db" in flat(
        printed
    )
    assert "ode-abs-n16-L2-all-r0-p0: 24 trials" in printed
    assert "depth_mup (0.5, 0.5)" in flat(printed)
    assert "96 of 96 trials took" in printed
    assert {path.name for path in out.iterdir()} >= {
        *("results.csv", "results.parquet", "summary.json", "report.html"),
        *("transfer.png", "transfer.svg", "heatmap.png", "heatmap.svg"),
    }
    assert not list((out / "checkpoints").iterdir())
    assert not list((out / "workers").iterdir())
    before = (out / "results.csv").read_bytes()
    for way in ([study], ["runs/mine"], [study, "--storage", "sqlite:///runs/mine/study.db"]):
        (out / "report.html").unlink()
        assert cli.main(["sweep", "report", *way]) == 0
        assert (out / "report.html").exists()
        assert (out / "results.csv").read_bytes() == before
    capsys.readouterr()
    assert cli.main(["sweep", "watch", "runs/mine"]) == 0
    assert "96 of 96 trials, 0 diverged" in capsys.readouterr().out


def test_a_finished_study_is_not_trained_again(study, tmp_path, capsys, monkeypatch):
    assert cli.main(["sweep", "run", study, *FEW]) == 0
    before = (tmp_path / "runs/mine/results.csv").read_bytes()
    monkeypatch.setattr("depthnet.sweep.worker.trainer", None)  # a second training would fail
    assert cli.main(["sweep", "run", study, *FEW]) == 0
    assert (tmp_path / "runs/mine/results.csv").read_bytes() == before


def test_options_change_what_the_file_says(study):
    options = cli._parser().parse_args(
        ["sweep", "run", study, "--depth", "3", "--log2-lr", "-8:-7:0.5", "--weight-decay", "0", "0.1",
         "--parametrization", "-0.5,1.5", "--seeds", "1", "--sweep", "hidden", "frozen",
         "--outer-log2-lr", "-7", "--output-std", "0.5", "--schedule", "linear", "--warmup", "3"]
    )  # fmt: skip
    settings = verbs.settings_of(options)
    assert settings == SweepSettings(
        name="mine", data="digits", depth=3, width=16, parametrization="-0.5,1.5", steps=10, batch=8,
        log2_lr=(-8, -7.5, -7), weight_decay=(0, 0.1), log2_block_multiplier=(-1, 0, 1), seeds=1,
        sweep=("hidden", "frozen"), outer_log2_lr=-7.0, output_std=0.5, schedule="linear", warmup=3,
    )  # fmt: skip


def test_a_study_without_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = ["--name", "bare", "--data", "digits", "--depth", "2", "--width", "8", "--steps", "5"]
    chosen += [
        "--sampler",
        "tpe",
        "--log2-lr=-9:-5",
        "--trials",
        "4",
        "--round",
        "2",
        "--batch",
        "8",
    ]
    assert cli.main(["sweep", "run", *chosen]) == 0
    assert "8 of 8 trials" in capsys.readouterr().out
    found = Ledger("sqlite:///runs/bare/study.db", "bare", None).trials()
    assert len({trial.member.log2_lr for trial in found}) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "none.yaml"], "none.yaml cannot be read"),
        (["run", "--depth", "4", "4"], "depth must be different"),
        (["run", "--log2-lr=-9:-4"], "log2_lr needs a step"),
        (["run", "--schedule", "linaer"], "did you mean 'linear'"),
        (["run", "--steps", "50", "--warmup", "50"], "warmup must be less than steps"),
        (["run", "--sweep", "all", "frozen"], "output_std must be positive with sweep frozen"),
        (["run", "--output-std", "inf"], "output_std must be a finite number"),
        (["run", "--outer-log2-lr", "-99"], "outer_log2_lr must be from -60 to 60"),
        (["run", "--log2-lr", "-9:-4:1", "0"], "log2_lr: a range stands alone"),
        (
            ["run", "--storage", "nosuch://me:secret@host/x", "--data", "digits"],
            "nosuch://me@host/x",
        ),
        (["report", "none.yaml"], "none.yaml cannot be read"),
        (["report", "mine.yaml"], "there is no runs/mine/study.db; has the study been run?"),
        (["report", "."], "has the study been run?"),
        (["watch", "mine.yaml", "--storage", "sqlite:///none.db"], "there is no none.db"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(study, capsys, arguments, words):
    assert cli.main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "secret" not in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["sweep"], ["sweep", "run", "--log2-lr", "x"], ["sweep", "run", "--log2-lr=1:2:3:4"],
     ["sweep", "run", "--depth", "four"], ["sweep", "report"], ["sweep", "fly"]],
)  # fmt: skip
def test_argparse_errors_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_a_changed_study_under_an_old_name_is_refused(study, tmp_path, capsys):
    assert cli.main(["sweep", "run", study, *FEW]) == 0
    (tmp_path / study).write_text(STUDY.replace("steps: 10", "steps: 12"))
    capsys.readouterr()
    assert cli.main(["sweep", "run", study, *FEW]) == 2
    error = capsys.readouterr().err
    assert "'mine' is there with other settings" in error
    assert "steps: 10 there, 12 now" in error


def test_two_studies_in_one_storage(study, capsys):
    storage = ["--storage", "sqlite:///all.db"]
    for name in ("a", "b"):
        chosen = ["--name", name, "--depth", "2", "--log2-lr", "-8", "--seeds", "1"]
        assert cli.main(["sweep", "run", study, *chosen, *storage]) == 0
    assert cli.main(["sweep", "report", "runs/a", *storage]) == 2
    assert "has 2 studies (a, b); name a study file" in capsys.readouterr().err


def test_tensorboard(study, tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    chosen = [
        "sweep",
        "run",
        study,
        "--depth",
        "2",
        "--parametrization",
        "ode",
        "--log2-lr",
        "-8",
        "60",
    ]
    chosen += ["--log2-block-multiplier", "0", "--sweep", "all", "--tensorboard", str(logs)]
    assert cli.main(chosen) == 0
    runs = sorted((logs / "ode-abs-n16-L2-all").iterdir())
    assert [run.name for run in runs] == [
        *("lr-8-a0-wd0-seed0", "lr-8-a0-wd0-seed1", "lr60-a0-wd0-seed0", "lr60-a0-wd0-seed1")
    ]
    events = EventAccumulator(str(runs[0]))
    events.Reload()
    curve = [event.value for event in events.Scalars("loss")]
    (trial,) = (
        trial
        for trial in Ledger("sqlite:///runs/mine/study.db", "mine", None).trials()
        if (trial.member.log2_lr, trial.member.seed) == (-8, 0)
    )
    assert np.array_equal(np.float32(curve), trial.losses)
    before = sorted(path.name for path in logs.rglob("events*"))
    assert cli.main(chosen) == 0  # nothing is logged twice
    assert sorted(path.name for path in logs.rglob("events*")) == before


def test_the_live_view_shows_who_trains_what(study, monkeypatch):
    from rich.console import Console

    def shown(view):
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(view.render())
        return flat(console.export_text())

    assert cli.main(["sweep", "run", study, "--depth", "2"]) == 0
    ledger = Ledger("sqlite:///runs/mine/study.db", "mine", None)
    status = {"doing": "training", "job": "ode-abs-n16-L9-all-r0-p0", "step": 7, "members": 24}
    ledger.report("host-1-abc", {**status, "alive": 20, "best": 1.25, "beat": 1})
    ledger.report("host-2-def", {"doing": "stopped"})
    view = View(ledger)
    text = shown(view)
    assert "mine 48 of 48 trials, 0 diverged" in text
    assert view.finished
    assert "host-1-abc" not in text  # who trains what is over
    assert re.search(r"depth_mup-abs-n16-L2-all +24/24 +0", text)
    every = ledger.trials()
    monkeypatch.setattr(ledger, "trials", lambda: every[:-1])
    text = shown(view)
    assert "mine 47 of 48 trials" in text
    assert not view.finished
    assert re.search(r"host-1-abc +ode-abs-n16-L9-all-r0-p0 +7/10 +20/24 +1.25 +0 s ago", text)
    assert "host-2-def" not in text
    assert re.search(r"ode-abs-n16-L2-all +23/24 +0", text)


def test_watching_in_a_terminal_ends_with_the_study(study, tmp_path):
    """Through a pseudo-terminal, as a person would; the study runs beside it."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    import os

    assert cli.main(["sweep", "run", study, "--depth", "2"]) == 0
    parent, child = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-m", "depthnet.cli", "sweep", "watch", "runs/mine"],
        stdout=child,
        stderr=child,
        timeout=60,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(child)
    shown = os.read(parent, 100_000).decode()
    assert process.returncode == 0, shown
    assert "48 of 48 trials" in shown


# ---- transfer ----


def test_the_files_of_a_transfer_study(tmp_path, capsys):
    arguments = ["transfer", *SMALL, "--depths", "4", "8", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    out = tmp_path / "out"
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 2 * 4 * 2 * 3
    summary = json.loads((out / "summary.json").read_text())
    assert [panel["parametrization"] for panel in summary["panels"]] == [
        *("depth_mup", "half_zero", "ode", "standard")
    ]
    assert (out / "transfer.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "Report:" in capsys.readouterr().out


def test_a_transfer_study_of_several_sweeps_and_a_schedule(tmp_path, capsys):
    arguments = ["transfer", *SMALL, "--depths", "2", "4", "--parametrizations", "depth_mup"]
    arguments += [
        "--sweep",
        "all",
        "hidden",
        "frozen",
        "--output-std",
        "1",
        "--outer-log2-lr",
        "-8",
    ]
    arguments += ["--schedule", "cosine", "--warmup", "3", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [panel["sweep"] for panel in summary["panels"]] == ["all", "hidden", "frozen"]
    assert [panel["name"] for panel in summary["panels"]] == [
        *("depth_mup, all layers", "depth_mup, blocks only"),
        "depth_mup, blocks only, others frozen",
    ]
    kept = ("schedule", "warmup", "outer_log2_lr", "output_std")
    assert [summary["settings"][key] for key in kept] == ["cosine", 3, -8, 1]
    assert summary["headline"] in flat(capsys.readouterr().out)


def test_everything_diverging_is_drawn_and_told(tmp_path, capsys):
    arguments = ["transfer", "--width", "16", "--steps", "10", "--batch", "8", "--seeds", "1"]
    arguments += ["--log2-lr", "50", "52", "--sweep", "all", "--depths", "4", "8"]
    assert cli.main([*arguments, "--parametrizations", "standard", "--out", str(tmp_path)]) == 0
    assert "every learning rate diverges at depth" in flat(capsys.readouterr().out)
    rows = (tmp_path / "results.csv").read_text().splitlines()[1:]
    assert all(row.endswith("inf,1") for row in rows)
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_changed_data_are_noticed(tmp_path, capsys):
    path = tmp_path / "d.npz"
    chosen = [*ONE_JOB, "--data", str(path), "--out", str(tmp_path / "out")]
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.normal(size=(20, 3)), y=np.arange(20) % 2)
    assert cli.main(chosen) == 0
    np.savez(path, x=rng.normal(size=(20, 3)), y=np.arange(20) % 2)
    assert cli.main(chosen) == 2
    assert "source:" in capsys.readouterr().err


def test_odd_names_and_negative_exponents(tmp_path, capsys):
    text = tmp_path / "a[bold]$x^y^z$<b>.txt"
    text.write_text("to be or not to be " * 100)
    out = tmp_path / "o[/b]"
    chosen = ["transfer", *SMALL, "--depths", "4", "--parametrizations", "-0.5,1.5", "0.5,0.5"]
    assert cli.main([*chosen, "--data", str(text), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "-0.5,1.5" in printed
    assert "a[bold]" in printed
    assert (out / "transfer.png").exists()
    assert "<b>.txt" not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depths", "0"], "depth must be at least 1, got 0"),
        (["--depths", "4", "4"], "depth must be different"),
        (["--width", "0"], "width must be at least 1"),
        (["--steps", "3"], "steps must be at least 5"),
        (["--base-depth", "5"], "base_depth must be one of depths"),
        (["--per-octave", "0"], "per_octave must be at least 1"),
        (["--parametrizations", "depthmup"], "did you mean 'depth_mup'"),
        (["--activation", "rellu"], "did you mean 'relu'"),
        (["--log2-lr", "-4", "-13"], "log2_lr must have low at most high"),
        (["--data", "cifar10"], "data_dir: cifar10 is read from a folder"),
        (["--data", "mnist", "--data-dir", "/nowhere"], "data_dir: there is no folder /nowhere"),
        (["--log2-lr", "-9", "-8.7"], "log2_lr: low and high must be whole steps apart"),
        (
            ["--schedule", "cosin"],
            "schedule='cosin' is not one of constant, linear, cosine; did you",
        ),
        (["--warmup", "-1"], "warmup must be at least 0, got -1"),
        (["--steps", "50", "--warmup", "50"], "warmup must be less than steps, 50, got 50"),
        (["--sweep", "al"], "sweep='al' is not one of all, hidden, frozen; did you mean 'all'"),
        (["--sweep", "all", "all"], "sweep must be different"),
        (["--sweep", "hidden", "frozen"], "output_std must be positive with sweep frozen"),
        (["--output-std", "-0.5"], "output_std must not be negative, got -0.5"),
        (["--output-std", "nan"], "output_std must be a finite number"),
        (["--outer-log2-lr", "99"], "outer_log2_lr must be from -60 to 60"),
        (["--device", "meta"], "device: 'meta' cannot be used"),
        (["--parametrizations", "2000,0", "--width", "8"], "depthnet transfer:"),
        (["--device", "quantum"], "device: 'quantum' cannot be used"),
    ],
)
def test_bad_transfer_arguments_exit_with_2_and_one_line(tmp_path, capsys, arguments, words):
    assert cli.main(["transfer", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_an_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "deeper", "/proc/nowhere"):
        assert cli.main(["transfer", "--out", str(out)]) == 2
        assert f"out: {out} cannot be written" in capsys.readouterr().err
